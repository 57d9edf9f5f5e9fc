"""What an append overwrites, kept until it has succeeded. Letters as in `base`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recollect.memory_backends.errors import UnusableMemory
from recollect.memory_backends.key_ring import KeyRing

if TYPE_CHECKING:
    from recollect.memory_backends.base import MemoryBackend


class Undo:
    """The state of `memories` before `count` keys are appended to each.

    Args:
        ring: where the keys lie.
        norms: (M, C) beside them, or None.
        memories: (M',) int64 on the CPU, those appended to.
        count: keys that each of them gets.
        keep_rows: keep the keys that will be overwritten as well; without them only the counts can be brought back.
    """

    def __init__(self, ring: KeyRing, norms: Tensor | None, memories: Tensor, count: int, *, keep_rows: bool) -> None:
        self.ring = ring
        self.memories = memories
        self.totals = ring.totals[memories]
        self.kept: list[tuple[Tensor, Tensor]] = []
        # Nothing is overwritten while a memory fills.
        if not keep_rows or int(self.totals.max()) + count <= ring.capacity:
            return
        stay = min(count, ring.capacity)
        numbers = self.totals[:, None] + torch.arange(count - stay, count)
        arrays = ring.arrays() if norms is None else (*ring.arrays(), norms)
        device = arrays[0].device
        self.slots = (numbers % ring.capacity).to(device)
        self.rows = memories.to(device)[:, None]
        self.kept = [(array, array[self.rows, self.slots]) for array in arrays]

    def restore(self) -> None:
        """Brings the ring back to that state."""
        for array, rows in self.kept:
            array[self.rows, self.slots] = rows
        self.ring.totals[self.memories] = self.totals

    def roll_back(self, backend: MemoryBackend, *, indexed: bool) -> None:
        """Brings ring and index of `backend` back after a failed append; refuses its use where that fails too.

        Args:
            backend: whose append it was.
            indexed: whether `_add` had returned, so that the index holds what the ring no longer does.
        """
        self.restore()
        try:
            with torch.autocast(backend.device.type, enabled=False):
                (backend._index_again if indexed else backend._recover)(self.memories)
        except BaseException as error:
            backend._refusal = UnusableMemory(
                f"an append to this {backend.name!r} memory failed, and so did bringing its index back ({error}): call "
                "reset() for all memories, or load_backend() what was saved"
            )
            raise
