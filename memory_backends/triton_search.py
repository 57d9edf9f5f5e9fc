"""The fused search of a backend that lives on a GPU: images of its keys, kept as its ring is, and when to use them.

Letters as in `base`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.triton_keys import FirstPass, TritonKeys, padded_depth
from recollect.memory_backends.triton_topk import (
    FEWEST_KEYS,
    LARGEST_INDEX,
    LARGEST_K,
    MOST_KEYS,
    Shape,
    shape_for,
    triton_topk,
)

PlainSearch = Callable[[Tensor, list[int], list[int]], tuple[Tensor, Tensor]]
"""From queries (G, Q, D), memories and lengths to scores and slots (G, Q, k)."""

OLDEST_CARD = (8, 0)
"""Compute capability from which Triton's matrix products of these types run on matrix units."""


def usable(device: torch.device) -> bool:
    """Whether kernels can run on `device`: a card that is new enough, and triton installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_CARD


class FusedSearch:
    """What a backend whose index is its ring calls beside it; see `triton_topk`.

    Args:
        ring: the backend's keys.
        metric: as the backend's hooks see it.
        first_pass: the type of the first pass.
        guard: False for candidates without the proven margin.
    """

    def __init__(self, ring: KeyRing, metric: str, *, first_pass: FirstPass = "float16", guard: bool = True) -> None:
        memories, capacity, dim = ring.stored.shape
        self.ring = ring
        self.guard = guard
        self.keys = TritonKeys(memories, capacity, dim, metric=metric, device=ring.device, first_pass=first_pass)

    @classmethod
    def where_usable(
        cls, ring: KeyRing, metric: str, *, first_pass: FirstPass = "float16", guard: bool = True
    ) -> FusedSearch | None:
        """One for this ring; None where it could never serve it (see `usable`, and the sizes in `triton_topk`)."""
        _, capacity, dim = ring.stored.shape
        fits = FEWEST_KEYS <= capacity <= MOST_KEYS and capacity * padded_depth(dim) <= LARGEST_INDEX
        if not fits or ring.storage not in ("float32", "bfloat16") or not usable(ring.device):
            return None
        return cls(ring, metric, first_pass=first_pass, guard=guard)

    @property
    def nbytes(self) -> int:
        """Bytes beside the ring."""
        return self.keys.nbytes

    def add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        """As a backend's `_add`."""
        self.keys.update(self.ring.rounded(keys), slots, memories)

    def reset(self, memories: Tensor) -> None:
        """As a backend's `_reset`."""
        self.keys.reset(memories)

    @property
    def fewest(self) -> int:
        """Keys that a memory must hold to be searched so: below a quarter of the capacity its blocks are too few."""
        return max(FEWEST_KEYS, self.ring.capacity // 4)

    def search(
        self,
        queries: Tensor,
        k: int,
        memories: list[int],
        lengths: list[int],
        plain: PlainSearch,
        *,
        shape: Callable[[list[int]], Shape | None] | None = None,
        open_blocks: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """As a backend's `_search`: memories with enough keys by the kernels, the others by `plain`.

        Args:
            queries: (M', Q, D) float32 on the ring's device.
            k: at least 1.
            memories, lengths: M' numbers.
            plain: takes queries, memories and lengths of some rows, and answers as a backend's `_search`.
            shape: from the lengths searched, how keys are cut up, None to leave it to `plain`; by `shape_for` the
                capacity when None, so that kernels are compiled once.
            open_blocks: as for `triton_topk`.
        """
        long = [row for row, length in enumerate(lengths) if length >= self.fewest]
        if not long or k > LARGEST_K or not queries.shape[1]:
            return plain(queries, memories, lengths)
        chosen: Shape | None
        if shape is None:
            chosen = shape_for(self.ring.capacity, k, self.keys.first_pass, guard=self.guard, fewest=self.fewest)
        else:
            chosen = shape([lengths[row] for row in long])
        if chosen is None:
            return plain(queries, memories, lengths)

        def fused(asked: Tensor, which: list[int], alive: list[int]) -> tuple[Tensor, Tensor]:
            return triton_topk(
                self.keys, self.ring, asked, k, which, alive, guard=self.guard, shape=chosen, open_blocks=open_blocks
            )

        if len(long) == len(lengths):
            return fused(queries, memories, lengths)
        short = [row for row in range(len(lengths)) if lengths[row] < self.fewest]
        scores = torch.empty(*queries.shape[:2], k, device=queries.device)
        slots = torch.empty(scores.shape, dtype=torch.int64, device=queries.device)
        for rows, search in ((long, fused), (short, plain)):
            at = torch.tensor(rows).to(queries.device, non_blocking=True)
            some = search(queries[at], [memories[row] for row in rows], [lengths[row] for row in rows])
            scores[at], slots[at] = some
        return scores, slots


__all__ = ["FusedSearch", "usable"]
