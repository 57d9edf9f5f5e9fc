"""Which slots of a memory belong to which shard, and how the answers of shards are merged. Knows nothing of processes.

Of a memory of C keys in S shards, slot i belongs to shard i mod S, where it is local slot i // S. A shard then holds
ceil((C - s) / S) keys, every S-th of the memory's, and its own first-in first-out order is that of the memory: nothing
is ever masked, and shards differ by one key at most, at any time.

Letters as in `base`; S shards, s one of them; k' neighbours that shards found together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Numbers = TypeVar("Numbers", int, Tensor)

_LOW = 0xFFFFFFFF
"""Largest slot that fits beside a float32 score in one integer."""


@dataclass(frozen=True)
class Share:
    """The slots of one shard.

    Attributes:
        capacity: C, of the whole memory.
        shards: S, at most C.
        shard: s.
    """

    capacity: int
    shards: int
    shard: int

    @property
    def size(self) -> int:
        """How many keys of a memory the shard keeps at most."""
        return -(-(self.capacity - self.shard) // self.shards)

    def count(self, number: Numbers) -> Numbers:
        """How many of a memory's first `number` keys since its reset came to this shard."""
        turns = number // self.capacity
        return turns * self.size + (number % self.capacity - self.shard + self.shards - 1) // self.shards

    def mine(self, slots: Tensor) -> Tensor:
        """Positions (n,) within slots (T,) of those that are this shard's."""
        return (slots % self.shards == self.shard).nonzero()[:, 0]

    def to_slots(self, local: Tensor) -> Tensor:
        """The memory's slots, int64, of local slots; -1 stays -1."""
        local = local.long()
        return torch.where(local < 0, local, local * self.shards + self.shard)


def shares(capacity: int, shards: int) -> tuple[Share, ...]:
    """The shares of a memory of `capacity` keys; a memory of fewer keys than shards has a shard for each key."""
    count = min(shards, capacity)
    return tuple(Share(capacity, count, shard) for shard in range(count))


def alike(first_slots: Tensor) -> list[Tensor]:
    """Rows 0..M'-1 in groups whose slots begin at the same one (M',): a call's keys lie alike in all of a group."""
    found = []
    for value in first_slots.unique():
        found.append((first_slots == value).nonzero()[:, 0])
    return found


def merge(scores: Sequence[Tensor], slots: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of what shards found.

    Args:
        scores: of every shard (M', Q, K of the shard) float32, -inf where missing.
        slots: of every shard, of the whole memory, int64, -1 where missing.
        k: neighbours wanted.

    Returns:
        Scores (M', Q, k) falling along k, and slots (M', Q, k); of equal scores the lower slot comes first.
    """
    every, where = torch.cat(list(scores), dim=-1), torch.cat(list(slots), dim=-1)
    found = every.shape[-1]
    if found < k:
        every = torch.nn.functional.pad(every, (0, k - found), value=-torch.inf)
        where = torch.nn.functional.pad(where, (0, k - found), value=-1)
    if where.numel() and int(where.max()) >= _LOW:
        best, order = every.topk(k, dim=-1)
        return best, where.gather(-1, order)
    # Score and slot make up one integer, the score above, so that one partition moves both.
    bits = (every + 0.0).view(torch.int32)  # adding zero turns -0.0 into 0.0, which equals it
    packed = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    packed |= _LOW - 1 - where
    numbers = packed.numpy()
    if numbers.shape[-1] > k:
        numbers.partition(numbers.shape[-1] - k, axis=-1)
    best_first = np.sort(numbers[..., -k:], axis=-1)[..., ::-1].copy()
    sorted_numbers = torch.from_numpy(best_first)
    ordered = (sorted_numbers >> 32).int()
    falling = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return falling, _LOW - 1 - (sorted_numbers & _LOW)
