"""Exact search: matrix product and top-k, on any device. Every other backend is judged against it.

By torch, or in one pass that writes no scores, which answers the same: on a CPU whose processor can, by `cpu_search`;
on a card with Triton, by `triton_topk`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from recollect.memory_backends import cpu_search
from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.ring_search import search_ring
from recollect.memory_backends.triton_search import FusedSearch


class Exact(MemoryBackend):
    """The true nearest neighbours, from the raw keys themselves."""

    name = "exact"
    summary = "exact search, matrix product and top-k by block maxima or in one fused pass"
    Options: ClassVar[type] = KeyStorageOptions
    capabilities: ClassVar[Capabilities] = Capabilities(exact=True, devices=("cpu", "cuda", "mps"))
    recall_floor = 1.0

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.fused = FusedSearch.where_usable(self.ring, self.metric)
        """Images of the keys for the search on a card; None where there is none."""

    @property
    def kernel(self) -> str:
        """What searches large memories, in words; figures should say it."""
        if self.ring.whole is not None:
            return "int8 codes in torch, rescored from whole keys"
        if self.device.type == "cpu":
            return cpu_search.describe()
        if self.fused is not None:
            return "fused first pass (Triton), rescored in float32"
        return f"block maxima in torch, on {self.device.type}"

    @property
    def checks_late(self) -> bool:
        return self.fused is not None

    def _read_from(self, ring: KeyRing) -> None:
        super()._read_from(ring)
        if self.fused is not None:
            self.fused.ring = ring

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        if self.fused is not None:
            self.fused.add(keys, slots, memories)

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        def plain(asked: Tensor, which: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
            return search_ring(self.ring, asked, k, which, lengths, self.metric)

        which, lengths = memories.tolist(), self.ring.lengths[memories].tolist()
        if self.fused is None:
            return plain(queries, which, lengths)
        return self.fused.search(queries, k, which, lengths, plain)

    def _reset(self, memories: Tensor) -> None:
        if self.fused is not None:
            self.fused.reset(memories)

    @classmethod
    def _planned_index_bytes(cls, options: Any, *, capacity: int, dim: int, metric: str) -> int:
        return 0  # Images of keys lie on a card, not in main memory.

    def _index_bytes(self) -> int:
        return 0 if self.fused is None else self.fused.nbytes
