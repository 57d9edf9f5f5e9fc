"""Exact search: matrix product and top-k, on any device. Every other backend is judged against it.

By torch, or in one pass that writes no scores, which answers the same: on a CPU whose processor can, by `cpu_search`;
on a card with Triton, by `triton_topk`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from recollect.memory_backends import cpu_search
from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.fused_backend import FusedBackend
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.ring_search import search_ring
from recollect.memory_backends.triton_search import FusedSearch


class Exact(FusedBackend):
    """The true nearest neighbours, from the raw keys themselves."""

    name = "exact"
    summary = "exact search, matrix product and top-k by block maxima or in one fused pass"
    Options: ClassVar[type] = KeyStorageOptions
    capabilities: ClassVar[Capabilities] = Capabilities(exact=True, devices=("cpu", "cuda", "mps"))
    recall_floor = 1.0

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.fused = FusedSearch.where_usable(self.ring, self.metric)

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

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        def plain(asked: Tensor, which: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
            return search_ring(self.ring, asked, k, which, lengths, self.metric)

        which, lengths = memories.tolist(), self.ring.lengths[memories].tolist()
        if self.fused is None:
            return plain(queries, which, lengths)
        return self.fused.search(queries, k, which, lengths, plain)
