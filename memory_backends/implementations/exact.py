"""Exact search: torch matrix product and top-k, on any device. Every other backend is judged against it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.ring_search import search_ring


class Exact(MemoryBackend):
    """The true nearest neighbours, from the raw keys themselves."""

    name = "exact"
    summary = "exact search, torch matrix product and top-k by block maxima"
    Options: ClassVar[type] = KeyStorageOptions
    capabilities: ClassVar[Capabilities] = Capabilities(exact=True, devices=("cpu", "cuda", "mps"))
    recall_floor = 1.0

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        """Nothing: the ring is the index."""

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        return search_ring(self.ring, queries, k, memories, self.ring.lengths[memories], self.metric)

    def _reset(self, memories: Tensor) -> None:
        """Nothing: the ring is the index."""
