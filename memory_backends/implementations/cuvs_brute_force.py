"""Brute force by cuVS on a GPU: a peer of the project's own exact search there."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.cuvs_support import CUVS, answer, card_for, metric_name, settled
from recollect.memory_backends.options import KeyStorageOptions


class CuvsBruteForce(MemoryBackend):
    """An index over the keys alive, made anew for each search, which costs no more than reading them once.

    With `device="cuda"` it is over the ring's own keys; from a ring on the CPU the keys are copied for each search.
    """

    name = "cuvs-brute-force"
    summary = "brute force by cuVS on a GPU (cuvs.neighbors.brute_force)"
    Options: ClassVar[type] = KeyStorageOptions
    capabilities: ClassVar[Capabilities] = Capabilities(devices=("cpu", "cuda"))
    requires = (CUVS,)
    needs_card = True
    recall_floor = 0.99

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self._library = self.import_library("cuvs.neighbors.brute_force")
        self._card = card_for(self.device, self.name)

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        """Nothing: the ring is the index."""

    def _reset(self, memories: Tensor) -> None:
        """Nothing: the ring is the index."""

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.full((*queries.shape[:2], k), -torch.inf, device=self.device)
        slots = torch.full(scores.shape, -1, dtype=torch.int64, device=self.device)
        asked = settled(queries, self._card)
        for row, memory in enumerate(memories.tolist()):
            length = int(self.ring.lengths[memory])
            found = min(k, length)
            if not found:
                continue
            keys = settled(self.ring.chunk(memory, 0, length), self._card)
            index = self._library.build(keys, metric=metric_name(self.metric))
            distances, neighbours = self._library.search(index, asked[row], found)
            best, where = answer(distances, neighbours, self.metric, self._card)
            scores[row, :, :found], slots[row, :, :found] = best.to(self.device), where.to(self.device)
        return scores, slots
