"""Exact search by faiss: what IndexFlat does, over the raw keys where they already lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.faiss_support import (
    DEVICE_HELP,
    FAISS,
    GPU_LOCK,
    FaissDevice,
    as_scores,
    gpu_resources,
    metric_of,
)
from recollect.memory_backends.options import IN_MEMORY, KeyStorageOptions
from recollect.memory_backends.ring_search import DECODED_FLOATS
from recollect.memory_backends.threads import library_threads, run_all, set_faiss_threads


@dataclass(frozen=True)
class FaissFlatOptions(KeyStorageOptions):
    """Options of `faiss-flat`."""

    device: FaissDevice = field(default="cpu", metadata={"help": DEVICE_HELP})


class FaissFlat(MemoryBackend):
    """`faiss.knn` over the ring. An IndexFlat would hold the same keys a second time, and answers the same.

    On a GPU the keys have a copy there, overwritten slot by slot, since no faiss index on a GPU can overwrite.
    """

    name = "faiss-flat"
    summary = "exact search by faiss (brute force, BLAS and a heap)"
    Options: ClassVar[type] = FaissFlatOptions
    capabilities: ClassVar[Capabilities] = Capabilities(exact=True)
    requires = (FAISS,)
    recall_floor = 1.0

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.faiss = self.import_library("faiss")
        self._metric = metric_of(self.faiss, self.metric)
        self._resources: Any = None
        self._gpu_keys: Tensor | None = None
        if self.options.device == "cuda":
            self._resources = gpu_resources(self.faiss, self.name)
            self.import_library("faiss.contrib.torch_utils")  # lets knn_gpu take tensors
            self._gpu_keys = torch.zeros(self.num_memories, self.capacity, self.dim, device="cuda")

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        if self._gpu_keys is not None:
            self._gpu_keys[memories[:, None].cuda(), slots.cuda()] = keys.cuda()

    def _reset(self, memories: Tensor) -> None:
        """Nothing: the ring's lengths say which keys count."""

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        which = memories.tolist()
        lengths = self.ring.lengths[memories].tolist()
        scores = torch.full((*queries.shape[:2], k), -torch.inf)
        slots = torch.full(scores.shape, -1, dtype=torch.int64)
        if self._gpu_keys is not None:
            on_gpu = queries.cuda()
            for row, (memory, length) in enumerate(zip(which, lengths, strict=True)):
                found = min(k, length)
                if found:
                    with GPU_LOCK:
                        distances, places = self.faiss.knn_gpu(
                            self._resources, on_gpu[row], self._gpu_keys[memory, :length], found, metric=self._metric
                        )
                    scores[row, :, :found] = as_scores(distances, self.metric).cpu()
                    slots[row, :, :found] = places.cpu()
            return scores, slots
        # One memory at a time on one thread each: faiss spreads a search over threads by blocks of queries, too few
        # to share out when there are several memories.
        threads = library_threads() if len(which) == 1 else 1
        asked = queries.numpy()

        def search(row: int) -> None:
            found = min(k, lengths[row])
            set_faiss_threads(self.faiss, threads)
            scores[row, :, :found], slots[row, :, :found] = self._knn(asked[row], which[row], lengths[row], found)

        run_all([functools.partial(search, row) for row, length in enumerate(lengths) if length])
        return scores, slots

    def _knn(self, queries: np.ndarray, memory: int, length: int, k: int) -> tuple[Tensor, Tensor]:
        """The k <= length best scores and slots (Q, k); keys that are not stored as such are decoded some at a time."""
        whole = self.key_options.storage == "float32" and self.key_options.keys_in == IN_MEMORY
        step = length if whole else DECODED_FLOATS // self.dim
        scores, slots = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, length, step):
            keys = self.ring.chunk(memory, start, min(length, start + step)).numpy()
            distances, places = self.faiss.knn(queries, keys, min(k, len(keys)), metric=self._metric)
            found = torch.from_numpy(as_scores(distances, self.metric))
            where = torch.from_numpy(np.asarray(places, dtype=np.int64))
            if whole:
                return found, where
            scores, order = torch.cat((scores, found), 1).topk(min(k, scores.shape[1] + found.shape[1]), dim=1)
            slots = torch.cat((slots, where + start), 1).gather(1, order)
        return scores, slots

    @classmethod
    def _planned_index_bytes(cls, options: FaissFlatOptions, *, capacity: int, dim: int, metric: str) -> int:
        return 0  # of main memory

    def _index_bytes(self) -> int:
        if self._gpu_keys is None:
            return 0
        return int(self.ring.lengths.sum()) * self.dim * 4
