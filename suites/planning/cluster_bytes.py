"""Bytes that a step of a memory in shards moves, and that its machines hold. Exact, as `ray` counts them.

Letters as in `answer`; M memories, S shards, N machines.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BYTES = 4
COUNTS_BYTES = 24
"""Beside the new keys of a memory in a shard: its number, and the numbers of keys that it should have and goes on with.
"""
SMALL_SLOTS = 2**31
"""Below so many keys a shard answers with slots of 4 bytes, otherwise of 8."""


@dataclass(frozen=True)
class Moved:
    """Bytes of one step of one copy.

    Attributes:
        queries: the queries once; every shard reads them.
        answers: a score and a slot of each neighbour, from all shards together.
        keys: the new keys, each to its shard.
        counts: that tell every shard which keys they are.
        shards, machines: S, N.
    """

    queries: int
    answers: int
    keys: int
    counts: int
    shards: int
    machines: int

    @property
    def between_processes(self) -> int:
        """To and from all shards, wherever they run."""
        return self.queries * self.shards + self.answers + self.keys + self.counts

    @property
    def sent(self) -> int:
        """Out of the machine that asks: queries go to a machine once, where all its shards read them."""
        return self.queries * self.machines + self.keys + self.counts

    @property
    def received(self) -> int:
        """Into that machine."""
        return self.answers


def moved_by_step(
    *, memories: int, keys: int, dim: int, queries: int, appended: int, k: int, shards: int, machines: int
) -> Moved:
    """What a step of Q queries and T new keys of each memory moves.

    Args:
        memories, keys, dim, queries, k: M, n of each memory, D, Q, neighbours.
        appended: T.
        shards, machines: S, and how many machines they are on.
    """
    longest = -(-keys // shards)
    full = keys % shards or shards
    found = full * min(k, longest) + (shards - full) * min(k, longest - 1)
    slot = 4 if longest < SMALL_SLOTS else 8
    return Moved(
        queries=memories * queries * dim * FLOAT_BYTES,
        answers=memories * queries * found * (FLOAT_BYTES + slot),
        keys=memories * appended * dim * FLOAT_BYTES,
        counts=memories * shards * COUNTS_BYTES if appended else 0,
        shards=shards,
        machines=machines,
    )
