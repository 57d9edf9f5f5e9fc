"""Memories of which only the counts are here, since their keys are spread over the ranks of a job.

To be saved, the keys are brought home for a while; a memory that is loaded is read there before it is spread.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from recollect.memory_backends.errors import UnsupportedOperation
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.options import IN_MEMORY, IN_TEMPORARY


class CountedRing(KeyRing):
    """Counts, slots and order of M memories of C slots each whose keys lie in parts elsewhere.

    Args:
        num_memories, capacity, dim: M, C, D.
        like: the ring of the part that lies here: where keys lie, and how they are stored.
    """

    def __init__(self, num_memories: int, capacity: int, dim: int, *, like: KeyRing) -> None:
        self.capacity = capacity
        self.storage = like.storage
        self.stored = like.stored.new_empty(num_memories, 0, dim)
        self.scales = None
        self.whole = None if like.whole is None else like.whole.new_empty(num_memories, 0, dim)
        self.totals = torch.zeros(num_memories, dtype=torch.int64)
        self._file = None
        self._bytes = like.key_bytes, like.mapped_key_bytes
        self._home: KeyRing | None = None

    @property
    def key_bytes(self) -> int:
        """Bytes of main memory that a key takes, on whichever rank it lies."""
        return self._bytes[0]

    @property
    def mapped_key_bytes(self) -> int:
        """Bytes of a file that it takes."""
        return self._bytes[1]

    @property
    def keys(self) -> Tensor:
        """Not here."""
        self._elsewhere()

    def append(self, keys: Tensor, memories: Tensor) -> Tensor:
        """Not here: keys are appended to the parts."""
        self._elsewhere()

    def gather(self, slots: Tensor, memories: Tensor) -> Tensor:
        """Not here."""
        self._elsewhere()

    def rows(self, memory: int, places: Tensor) -> Tensor:
        """Not here."""
        self._elsewhere()

    def chunk(self, memory: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Not here."""
        self._elsewhere()

    def decode(self, memory: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Not here."""
        self._elsewhere()

    @property
    def home(self) -> KeyRing:
        """A ring of this process for all the keys, in main memory; empty and without memory until it is written."""
        if self._home is None:
            memories, _, dim = self.stored.shape
            in_file = IN_TEMPORARY if self.whole is not None else IN_MEMORY
            self._home = KeyRing(
                memories, self.capacity, dim, device=torch.device("cpu"), storage=self.storage, keys_in=in_file
            )
        return self._home

    def leave_home(self) -> None:
        """Gives the memory of `home` back."""
        if self._home is not None:
            self._home.close()
            self._home = None

    def named_arrays(self) -> dict[str, Tensor]:
        """Those of `home`, for what reads and writes files."""
        return self.home.named_arrays()

    def touch(self, size: int) -> None:
        """As a ring's own, of `home`."""
        if self._home is not None:
            self._home.touch(size)

    def close(self) -> None:
        """Nothing lies here."""
        self.leave_home()

    def _elsewhere(self) -> NoReturn:
        raise UnsupportedOperation("the keys of this memory are spread over the ranks of a job: ask gather_keys()")
