"""The exact answer with neighbours missing at a stated rate: recall set by hand, without any index's habits.

Each key is hidden from each query with probability `drop`, independently, and the answer is the exact top k of the
keys that the query can see. So the expected recall is 1 - drop for every k and every data set, the misses fall on all
ranks alike, and the next best keys take the places of the missed ones, as they do in a real index: what changes in a
model's output is then due to which neighbours it got, and not to how many. With `fill=false` the places stay empty
(slot -1), which shows instead what the true neighbours that are left are worth.

Whether a key is hidden is a hash of the seed, the memory, the slot and the bits of the query, not a random draw: the
same question gets the same answer, in whatever batch it is asked and after a save and load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.errors import InvalidSpec
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.ring_search import search_ring

# Multipliers of SplitMix64 (Steele, Lea and Flood 2014), as signed numbers since torch has no shift on unsigned ones.
_GAMMA, _MIX_1, _MIX_2 = (number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(numbers: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int64; torch's own copies the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _mix(numbers: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (...): every bit of the input moves about half the bits of the output."""
    numbers = (numbers ^ _shift(numbers, 30)) * _MIX_1
    numbers = (numbers ^ _shift(numbers, 27)) * _MIX_2
    return numbers ^ _shift(numbers, 31)


def hidden(queries: Tensor, slots: Tensor, memories: Tensor, *, rate: float, seed: int) -> Tensor:
    """Which keys a query does not see.

    Args:
        queries: (M', Q, D) float32.
        slots: (M', Q, K) int64.
        memories: (M',) int64.
        rate: the share to hide, 0 to below 1.
        seed: another seed hides others.

    Returns:
        (M', Q, K) bool.
    """
    bits = queries.contiguous().view(torch.int32).to(torch.int64)
    places = torch.arange(1, queries.shape[2] + 1, device=queries.device)
    asked = _mix(bits + places * _GAMMA).sum(-1)
    asked = _mix(asked ^ _mix(memories.to(queries.device)[:, None] * _GAMMA + seed))
    mixed = _mix(asked[..., None] + (slots + 1) * _GAMMA)
    # The upper 53 bits fill a double's mantissa evenly over [0, 1).
    return _shift(mixed, 11).double() * 2.0**-53 < rate


@dataclass(frozen=True)
class DegradedOptions(KeyStorageOptions):
    """Options of `degraded`."""

    drop: float = field(default=0.1, metadata={"help": "share of the keys hidden from a query, 0 to below 1"})
    fill: bool = field(default=True, metadata={"help": "let the next best keys take the places of the missed ones"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop < 1:
            raise InvalidSpec(f"'degraded': drop={self.drop!r} is not at least 0 and below 1")


class Degraded(MemoryBackend):
    """Exact search that misses a stated share of the neighbours, to see what recall is worth."""

    name = "degraded"
    summary = "exact search that misses neighbours at a stated rate, to see what recall is worth"
    Options = DegradedOptions
    options: DegradedOptions
    capabilities: ClassVar[Capabilities] = Capabilities(devices=("cpu", "cuda"))
    search_options = ("drop", "fill")
    sweep = ("degraded", "degraded:drop=0.3", "degraded:drop=0.6")
    recall_floor = 0.3

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        """Nothing: the ring is the index."""

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self.ring.lengths[memories]
        longest = int(lengths.max())
        fetch = k if not self.options.fill else self._fetch(k)
        while True:
            fetch = min(fetch, longest)
            scores, slots = search_ring(self.ring, queries, fetch, memories, lengths, self.metric)
            named = memories + self.first_memory
            gone = hidden(queries, slots, named, rate=self.options.drop, seed=self.seed) | (slots < 0)
            enough = torch.minimum((~gone).sum(-1), torch.tensor(k)).eq(k) | (lengths.to(gone.device) <= fetch)[:, None]
            if not self.options.fill or bool(enough.all()):
                break
            fetch *= 2
        # A stable sort by "is it missing" moves the seen ones to the front in their order.
        order = gone.to(torch.uint8).argsort(dim=-1, stable=True)[..., :k]
        gone = gone.gather(-1, order)
        return (
            scores.gather(-1, order).masked_fill(gone, -torch.inf),
            slots.gather(-1, order).masked_fill(gone, -1),
        )

    def _fetch(self, k: int) -> int:
        """Neighbours to fetch so that k are seen, all but never asking a second time."""
        seen = 1 - self.options.drop
        return math.ceil((k + 4 * math.sqrt(k * self.options.drop) + 4) / seen) if self.options.drop else k

    def _reset(self, memories: Tensor) -> None:
        """Nothing: the ring is the index."""
