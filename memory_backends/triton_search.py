"""The fused search of a backend that lives on a GPU: images of its keys, kept as its ring is, and when to use them.

Letters as in `base`.
"""

from __future__ import annotations

import importlib.util

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
    triton_topk,
)

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

    def serves(self, lengths: list[int], k: int) -> bool:
        """Whether this search is worth its launches: every memory that holds keys holds many."""
        return k <= LARGEST_K and min((length for length in lengths if length), default=0) >= FEWEST_KEYS

    def search(
        self,
        queries: Tensor,
        k: int,
        memories: Tensor,
        lengths: list[int],
        *,
        shape: Shape | None = None,
        open_blocks: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """As a backend's `_search`; `shape` and `open_blocks` as for `triton_topk`."""
        return triton_topk(
            self.keys,
            self.ring,
            queries,
            k,
            memories.tolist(),
            lengths,
            guard=self.guard,
            shape=shape,
            open_blocks=open_blocks,
        )


__all__ = ["FusedSearch", "usable"]
