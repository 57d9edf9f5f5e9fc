"""What backends share whose index is their key ring and that a card searches by the fused kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.triton_search import FusedSearch


class FusedBackend(MemoryBackend):
    """A backend with nothing beside its ring but, on a card, images of the keys."""

    fused: FusedSearch | None
    """Images of the keys for the search on a card; None where there is none. Set by the constructor."""

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

    def _reset(self, memories: Tensor) -> None:
        if self.fused is not None:
            self.fused.reset(memories)

    @classmethod
    def _planned_index_bytes(cls, options: Any, *, capacity: int, dim: int, metric: str) -> int:
        return 0  # Images of keys lie on a card, not in main memory.

    def _index_bytes(self) -> int:
        return 0 if self.fused is None else self.fused.nbytes
