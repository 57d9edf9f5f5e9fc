"""What `faiss-ivf` and `faiss-ivfpq` share: inverted lists that are trained, overwritten in place and trained anew.

faiss keeps for each list the keys (or their codes) of one cell of a k-means. `update_vectors` moves a key from its
old list to its new one through a direct map from position to list: the cost of a copy, whatever the memory's size.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recollect.memory_backends.errors import InvalidInput, InvalidSpec
from recollect.memory_backends.faiss_support import (
    DEVICE_HELP,
    FAISS,
    GPU_LARGEST_K,
    GPU_LOCK,
    FaissDevice,
    GpuCopy,
    as_scores,
    gpu_resources,
    metric_of,
)
from recollect.memory_backends.threads import library_threads, set_faiss_threads
from recollect.memory_backends.trained import TrainedBackend, TrainedOptions

LIST_ROOM = 1.5
"""Bytes that inverted lists take over those in use: they double when they are full."""
TRAINING_POINTS = 256
"""Keys to a cell at most in training, faiss's own default."""
COARSE_ITERATIONS = 10
"""k-means iterations, faiss's own default for coarse quantizers."""


@dataclass(frozen=True)
class IvfOptions(TrainedOptions):
    """Options of every backend of inverted lists."""

    nlist: int = field(default=0, metadata={"help": "cells; 0: the square root of the keys learnt from"})
    nprobe: int = field(default=16, metadata={"help": "cells searched for a query"})
    device: FaissDevice = field(default="cpu", metadata={"help": DEVICE_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nlist < 0:
            raise ValueError(f"nlist={self.nlist} is below 0")
        if self.nprobe < 1:
            raise ValueError(f"nprobe={self.nprobe} is below 1")


def planned_list_bytes(options: IvfOptions, capacity: int, dim: int, *, code_size: int) -> int:
    """Bytes at most of one memory's inverted lists, the old ones beside the new ones while these are trained."""
    cells = options.nlist or round(capacity**0.5)
    # What `_bytes_of` counts, and the room that lists leave at their end to grow into.
    lists = capacity * (round((code_size + 8) * LIST_ROOM) + 8) + cells * dim * 4
    assigned = capacity * 8  # each key's cell, while they are added
    sample = min(capacity, TRAINING_POINTS * cells) * dim * 4
    return 2 * lists + max(assigned, 2 * sample)


class FaissIvfBackend(TrainedBackend):
    """Inverted lists on the CPU, and where asked for a copy of them on a GPU (see `faiss_support.GpuCopy`)."""

    Options: ClassVar[type] = IvfOptions
    requires = (FAISS,)
    search_options: ClassVar[tuple[str, ...]] = ("nprobe",)

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        if self.options.nlist > self.capacity:
            raise InvalidSpec(f"{self.name!r}: nlist={self.options.nlist} exceeds the capacity of {self.capacity} keys")
        self.faiss = self.import_library("faiss")
        self._metric = metric_of(self.faiss, self.metric)
        self._resources = gpu_resources(self.faiss, self.name) if self.options.device == "cuda" else None
        self._gpu_copies: weakref.WeakKeyDictionary[Any, GpuCopy] = weakref.WeakKeyDictionary()
        """By the index on the CPU."""

    @abstractmethod
    def _empty_index(self, quantizer: Any, nlist: int, seed: int) -> Any:
        """An untrained index with all seeds set."""

    def _fewest_keys(self) -> int:
        return max(1, self.options.nlist)

    def _sample(self, keys: int) -> int:
        return min(keys, TRAINING_POINTS * (self.options.nlist or max(1, round(keys**0.5))))

    def _learn_from(self, sample: np.ndarray, keys: int, seed: int, older: Any, turnover: int) -> Any:
        set_faiss_threads(self.faiss, 1)
        flat = self.faiss.IndexFlatL2 if self.metric == "l2" else self.faiss.IndexFlatIP
        nlist = self.options.nlist or max(1, round(keys**0.5))
        index = self._empty_index(flat(self.dim), nlist, seed)
        index.cp.seed = seed
        index.cp.niter = COARSE_ITERATIONS
        # faiss prints a warning below 39 keys to a cell; cells of sqrt(n) keys are meant here.
        index.cp.min_points_per_centroid = 1
        index.set_direct_map_type(self.faiss.DirectMap.Array)
        self._teach(index, sample, older, turnover)
        return index

    def _train(self, keys: np.ndarray, seed: int, older: Any, turnover: int) -> Any:
        index = self._learn_from(keys, len(keys), seed, older, turnover)
        index.add(keys)
        return index

    def _teach(self, index: Any, keys: np.ndarray, older: Any, turnover: int) -> None:
        """Trains an empty index; `older` and `turnover` as in `_train`."""
        index.train(keys)

    def _append(self, index: Any, keys: np.ndarray) -> None:
        set_faiss_threads(self.faiss, 1)
        self._note_change(index, np.arange(index.ntotal, index.ntotal + len(keys)), keys)
        index.add(keys)

    def _overwrite(self, index: Any, positions: np.ndarray, keys: np.ndarray) -> None:
        set_faiss_threads(self.faiss, 1)
        self._note_change(index, positions, keys)
        index.update_vectors(np.ascontiguousarray(positions), np.ascontiguousarray(keys))

    def _search_index(self, index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        set_faiss_threads(self.faiss, library_threads())
        nprobe = min(self.options.nprobe, index.nlist)
        if self._resources is not None:
            if k > GPU_LARGEST_K:
                raise InvalidInput(f"{self.name}:device=cuda finds at most {GPU_LARGEST_K} neighbours, not {k}")
            with GPU_LOCK:
                copy = self._gpu_copy(index)
                copy.index.nprobe = nprobe
                distances, positions = copy.search(self.faiss, queries, k, self._metric)
            return as_scores(distances, self.metric), positions
        index.nprobe = nprobe
        distances, positions = index.search(queries, k)
        return as_scores(distances, self.metric), positions

    def _gpu_copy(self, index: Any) -> GpuCopy:
        if index not in self._gpu_copies:
            plain = self.faiss.clone_index(index)
            plain.set_direct_map_type(self.faiss.DirectMap.NoMap)
            on_gpu = self.faiss.index_cpu_to_gpu(self._resources, 0, plain)
            self._gpu_copies[index] = GpuCopy(on_gpu, index.ntotal)
        return self._gpu_copies[index]

    def _note_change(self, index: Any, positions: np.ndarray, keys: np.ndarray) -> None:
        copy = self._gpu_copies.get(index)
        if copy is not None:
            copy.change(positions, keys)
            if copy.is_stale:
                del self._gpu_copies[index]

    def _bytes_of(self, index: Any, keys: int) -> int:
        # Codes and ids in the lists, the direct map, the cells' centroids.
        return keys * (index.code_size + 8 + 8) + index.nlist * self.dim * 4

    def _write_index(self, index: Any, path: Path) -> None:
        self.faiss.write_index(index, str(path))

    def _read_index(self, path: Path) -> Any:
        return self.faiss.read_index(str(path))
