"""The keys of a memory in a durable log, where its owner keeps only the newest: for `ray:keys=store,store=...`.

The log (`key_log`) has every key alive up to some number, the tail here has those from before that number on. A tail is
written after some MiB or some seconds, whichever comes first, and when the memory is told to wait. The owner answers
nothing from the keys themselves: shards are filled from the log by their own processes, and give back keys when asked.

Letters as in `base`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends.errors import StoreMissing, WriteConflict
from recollect.memory_backends.key_log import KeyLog
from recollect.memory_backends.key_ring import KeyRing

COMMIT_BYTES = 16 << 20
"""Of keys that are written at once: a version of the log for each append would be too many."""
COMMIT_SECONDS = 5.0
"""After which keys are written however few they are."""
KEPT_BYTES = 256 << 20
"""Of keys that stay here after they were written, for shards that have not got them yet."""


class StoreRing(KeyRing):
    """What a key ring does, for keys that lie in a log. Reading keys here is possible only for those in the tail.

    Args:
        uri: of the log; made where there is none, and gone on with where there is one.
        num_memories, capacity, dim: M, C, D.
        gather: answers `gather` instead of this ring.

    Attributes:
        uri: of the log.
        committed: (M,) int64, up to which number keys are in the log.

    Raises:
        InvalidInput: the log has other sizes.
        StoreUnreachable: its address does not answer.
    """

    def __init__(
        self, uri: str, num_memories: int, capacity: int, dim: int, gather: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.uri = uri
        self.capacity = capacity
        self.storage = "float32"
        self.scales = self.whole = self._file = None
        self.stored = torch.zeros(num_memories, 0, dim)
        sizes: dict[str, Any] = {"num_memories": num_memories, "capacity": capacity, "dim": dim}
        try:
            self._log = KeyLog.open(uri, **sizes)
        except StoreMissing:
            self._log = KeyLog.create(uri, **sizes)
        self.committed = self._log.totals
        self.totals = self.committed.clone()
        self._tail: list[list[tuple[int, Tensor]]] = [[] for _ in range(num_memories)]
        self._since: float | None = None
        self._gather = gather
        self._in_doubt = False
        self.before = self.totals.clone()
        """(M,) keys before the append that came last, which may yet be taken back."""

    # What a key ring does ---------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, memories: Tensor) -> Tensor:
        """Adds keys (M', T, D) to `memories` (M',) and returns their slots (M', T), -1 for those evicted at once."""
        new = keys.shape[1]
        self.before = self.totals.clone()
        slots = (self.totals[memories, None] + torch.arange(new)) % self.capacity
        kept = min(new, self.capacity)
        for row, memory in enumerate(memories.tolist()):
            self._forget_undone(memory)
            self._tail[memory].append((int(self.totals[memory]) + new - kept, keys[row, new - kept :].clone()))
        self.totals[memories] += new
        slots[:, : new - kept] = -1
        if self._since is None:
            self._since = time.monotonic()
        return slots

    def gather(self, slots: Tensor, memories: Tensor) -> Tensor:
        """Keys (M', Q, K, D) float32 at slots (M', Q, K), which the shards give; zeros where the slot is -1."""
        return self._gather(slots, memories)

    def reset(self, memories: Tensor) -> None:
        """Empties `memories` (M',), durably."""
        self._look()
        self._log.reset(memories)
        self.committed[memories] = 0
        super().reset(memories)
        for memory in memories.tolist():
            self._tail[memory].clear()

    def close(self) -> None:
        """Gives back what is held; the log stays."""
        self._log.close()
        self._tail = [[] for _ in self._tail]

    @property
    def key_bytes(self) -> int:
        """0: keys take main memory here only until they are in the log."""
        return 0

    @property
    def mapped_key_bytes(self) -> int:
        """0: the log's files are read, not mapped."""
        return 0

    # The tail ---------------------------------------------------------------------------------------------------------

    def tail_from(self, memory: int) -> int:
        """The number from which on keys of a memory are here."""
        self._forget_undone(memory)
        return self._tail[memory][0][0] if self._tail[memory] else int(self.totals[memory])

    def in_tail(self, memory: int, start: int, stop: int) -> Tensor:
        """Keys (stop - start, D) number `start` to `stop` - 1, which are all in the tail."""
        parts = []
        for first, keys in self._tail[memory]:
            part = keys[max(0, start - first) : max(0, stop - first)]
            if len(part):
                parts.append(part)
        return torch.cat(parts) if parts else torch.zeros(0, self.stored.shape[2])

    @property
    def uncommitted_bytes(self) -> int:
        """Of keys that are not in the log yet."""
        return int((self.totals - self.committed).clamp(max=self.capacity).sum()) * 4 * self.stored.shape[2]

    def due(self) -> bool:
        """Whether the tail should be written."""
        if self.uncommitted_bytes >= COMMIT_BYTES:
            return True
        return self._since is not None and time.monotonic() - self._since >= COMMIT_SECONDS

    def commit(self, upto: Tensor) -> None:
        """Writes the tail up to numbers `upto` (M,); it is durable when this returns.

        Raises:
            DiskFull, StoreMissing, StoreUnreachable: it stays here, and is written at the next attempt.
            WriteConflict: another program writes to the same log; nothing was written.
        """
        self._look()
        self._in_doubt = True
        # Memories that move together are written together, as they are appended to.
        spans: dict[tuple[int, int], list[int]] = {}
        for memory in (upto > self.committed).nonzero()[:, 0].tolist():
            self._forget_undone(memory)
            spans.setdefault((int(self.committed[memory]), int(upto[memory])), []).append(memory)
        for (done, total), memories in spans.items():
            first = max(done, total - self.capacity, max(self._tail[memory][0][0] for memory in memories))
            keys = torch.stack([self.in_tail(memory, first, total) for memory in memories])
            if first > done:
                # Those between are evicted already; a log has no holes, so they count as zeros that nobody reads.
                keys = torch.cat((keys.new_zeros(len(memories), first - done, keys.shape[2]), keys), dim=1)
            self._log.append(keys, memories, first=done)
            self.committed[memories] = total
        self._in_doubt = False
        self._since = time.monotonic() if bool((self.totals > upto).any()) else None

    def let_go(self, needed_from: Tensor) -> None:
        """Drops keys of the tail that are in the log and that no shard waits for.

        Args:
            needed_from: (M,) the number from which on some shard has not got a memory's keys.
        """
        size = sum(keys.nbytes for tail in self._tail for _, keys in tail)
        for memory, tail in enumerate(self._tail):
            limit = int(self.committed[memory])
            if size <= KEPT_BYTES:
                limit = min(limit, int(needed_from[memory]))
            while tail and tail[0][0] + len(tail[0][1]) <= limit:
                tail.pop(0)

    def _forget_undone(self, memory: int) -> None:
        """Drops keys whose append was taken back: the count of keys is what was brought back."""
        total, tail = int(self.totals[memory]), self._tail[memory]
        while tail and tail[-1][0] + len(tail[-1][1]) > total:
            first, keys = tail.pop()
            if first < total:
                tail.append((first, keys[: total - first]))

    def _look(self) -> None:
        """Sees how the log stands: after an attempt whose outcome is not known, and lest it is gone or another's."""
        self._log.refresh()
        there = self._log.totals
        if bool((there > self.totals).any()) or (not self._in_doubt and not torch.equal(there, self.committed)):
            raise WriteConflict(
                f"{self.uri} holds {there.tolist()} keys where this memory wrote {self.committed.tolist()}: another "
                "program writes to it. Give each memory a store of its own"
            )
        self.committed = there
        self._in_doubt = False
