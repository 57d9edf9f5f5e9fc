"""What of an append goes to which rank of a job, and what a step moves between the ranks.

Letters as in `base`; W ranks. Slots lie on ranks as they lie in shards (`sharding.Share`): slot s of every memory on
rank s mod W, as its slot s // W there. Each rank has M memories of its own, and a part of those of all ranks; or all
ranks share M memories.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCORE_AND_SLOT_BYTES = 8
"""Of a neighbour on its way: a float32 and an int32."""
REQUEST_BYTES = 8
"""Of a key that is asked for."""


@dataclass(frozen=True)
class Appended:
    """The keys of one rank that stay after an append, memory by memory, oldest first: N of them.

    Attributes:
        memories: (N,) of the rank's M memories.
        numbers: (N,) counted since the last reset of each.
        first: (M,) the number of the first that stays.
    """

    memories: Tensor
    numbers: Tensor
    first: Tensor

    @classmethod
    def between(cls, before: Tensor, after: Tensor, capacity: int) -> Appended:
        """Of memories that were given `before` (M,) keys so far and `after` (M,) when the append is done."""
        first = torch.maximum(before, after - capacity)
        counts = after - first
        memories = torch.repeat_interleave(torch.arange(len(counts)), counts)
        begins = counts.cumsum(0) - counts
        return cls(memories, torch.arange(len(memories)) - begins[memories] + first[memories], first)

    def ranks_of(self, capacity: int, ranks: int) -> Tensor:
        """(N,) the rank that each of them lies on."""
        return self.numbers % capacity % ranks


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one rank sends in a step; it receives as many. Of headers, which are small, see `header_bytes`.

    Attributes:
        queries: to every other rank.
        answers: neighbours of its part for the queries of every other rank.
        appended: new keys to the ranks where they belong.
        requests: of keys to attend to while training, at most (each key is asked for once).
        gathered: those keys, at most.
    """

    queries: int
    answers: int
    appended: int
    requests: int
    gathered: int

    @property
    def reading(self) -> int:
        """Of a step without gradients: a search and an append."""
        return self.queries + self.answers + self.appended

    @property
    def training(self) -> int:
        """Of a step with gradients, at most."""
        return self.reading + self.requests + self.gathered


def step_bytes(
    *, memories: int, dim: int, queries: int, appended: int, k: int, ranks: int, part_length: int, shared: bool = False
) -> StepBytes:
    """What one rank sends in a step, on average over the ranks.

    Args:
        memories: M of each rank.
        dim: D.
        queries, appended: Q and T of each memory.
        k: neighbours asked for.
        ranks: W.
        part_length: keys of the longest part of a memory; no more neighbours than that come from a rank.
        shared: whether all ranks share the memories, and are given the same keys.
    """
    others = ranks - 1
    asked = memories * queries
    found = asked * min(k, part_length * ranks)
    return StepBytes(
        queries=others * asked * dim * 4,
        answers=others * asked * min(k, part_length) * SCORE_AND_SLOT_BYTES,
        appended=0 if shared else memories * appended * dim * 4 * others // ranks,
        requests=found * REQUEST_BYTES * others // ranks,
        gathered=found * dim * 4 * others // ranks,
    )
