"""One end of a shard: what its memory's owner knows of it, sends to it, and does when its process is gone.

The owner holds the truth: the key ring, with the number of every key. A link knows up to which number the shard has
got them (`sent`) and in which process (`epoch`). Appends are sent and not waited for. When anything goes wrong (the
process ended, it refuses, an append failed there), nothing is repeated: the link counts the shard as lost, has an empty
one made, and sends it the keys alive from the ring. A shard that was behind is brought up to date in the same way.

Nothing here waits for longer than it is told to, and no thread works behind the caller's back: what has to be done for
a shard that is away is done a piece at a time, by the calls that come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.memory_backends.errors import CorruptMemory, MemoryBackendError, OutOfMemory, Unreachable
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.out_of_memory import as_out_of_memory, ran_out
from recollect.memory_backends.ray_host import Expected, Failed, Filled, Group, Refused, ShardAbout, group_of
from recollect.memory_backends.ray_session import Host
from recollect.memory_backends.ray_store import StoreRing
from recollect.memory_backends.sharding import Share

MOST_PENDING = 32
"""Appends on their way to a shard at most."""
BUSY = 4
"""Appends on their way, from which on further small ones wait in the ring and go together."""
TOGETHER_BYTES = 1 << 20
"""Of keys that wait so, at most."""
PENDING_BYTES = 64 << 20
"""Of keys on their way to a shard at most."""
CHUNK_BYTES = 8 << 20
"""Of keys in one message."""
RETRY_SECONDS = 0.1
"""Between two attempts to make a shard in a process that is not there yet."""
GIVEN_UP = 5
"""Attempts in a row that find the process dead, after which another one is asked for."""


@dataclass(frozen=True)
class Recovery:
    """A shard that was lost and is back.

    Attributes:
        shard: its number.
        reason: what was noticed.
        detection_seconds: from the call that failed to its failure being known.
        away_seconds: from then until a process had an empty shard.
        refill_seconds: from then until it held every key.
        keys_refilled: keys sent to it.
        keys_lost: keys alive in the memory that it does not hold.
    """

    shard: int
    reason: str
    detection_seconds: float
    away_seconds: float
    refill_seconds: float
    keys_refilled: int
    keys_lost: int


@dataclass
class _Mending:
    reason: str
    detection_seconds: float
    lost_at: float
    made_at: float = 0.0
    keys: int = 0


class _Sent(NamedTuple):
    """A change on its way: the call's future, bytes, when it was called, and the memory that it fills from a log."""

    reference: Any
    size: int
    since: float
    filled: int = -1


class ShardLink:
    """The owner's end of one shard. Not for several threads at once.

    Args:
        share: which slots are the shard's.
        host: the process that holds it.
        name: of the memory's shards in their hosts.
        about: what the shard is made from now; it changes with the search options.
        ring: the memory's keys.

    Attributes:
        epoch: of the process that has the shard; None while none has.
        sent: (M,) int64, up to which number of keys it has got them, counting what is on its way.
        failure: what an append failed with in the shard, until it has been raised.
        progress: when the shard last answered anything, by the clock `time.monotonic`.
        away_because: why it is away; "" when it is not.
    """

    def __init__(self, share: Share, host: Host, name: str, about: Callable[[Share], ShardAbout], ring: KeyRing):
        self.share = share
        self.host = host
        self.name = name
        self.about = about
        self.ring = ring
        self.epoch: str | None = None
        self.sent = torch.zeros_like(ring.totals)
        self.failure: MemoryBackendError | None = None
        self.progress = 0.0
        self.away_because = ""
        self.moved_bytes = 0
        self.recoveries: list[Recovery] = []
        self._changes = 0
        self._pending: deque[_Sent] = deque()
        self._pending_bytes = 0
        self._held = 0
        self._making: Any = None
        self._retry_at = 0.0
        self._found_dead = 0
        self._mending: _Mending | None = None

    # How it stands ----------------------------------------------------------------------------------------------------

    @property
    def expected(self) -> Expected:
        """How the shard stands once everything sent has reached it."""
        return Expected(self.epoch or "", self._changes)

    def current(self, memories: Tensor) -> bool:
        """Whether the shard has got every key of `memories`, or will before what is sent next."""
        return self.epoch is not None and torch.equal(self.sent[memories], self.ring.totals[memories])

    def totals(self, memories: Tensor) -> Tensor:
        """(M',) how many keys of each have come to the shard."""
        return self.share.count(self.sent[memories])

    # Sending ----------------------------------------------------------------------------------------------------------

    def append(self, groups: list[Tensor], keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        """Sends the shard's part of keys that the ring has just got; what cannot go now goes later, from the ring.

        Args:
            groups: rows of the call whose slots begin alike.
            keys: (M', T, D) as the ring gives them back.
            slots: (M', T), no -1.
            memories: (M',); what the ring counts for them includes these keys.
        """
        share, ring = self.share, self.ring
        after = ring.totals[memories]
        start = after - slots.shape[1]
        oldest = (after - ring.capacity).clamp(min=0)
        straight = bool(((self.sent[memories] == start) | (start == oldest)).all())
        waiting = int((after - self.sent[memories]).sum()) * keys.shape[2] * 4 // share.shards
        if len(self._pending) >= BUSY and len(memories) == 1 and waiting < TOGETHER_BYTES:
            return  # it is busy: this goes with what comes next, or with the next search
        if not straight or keys[:, :: share.shards].nbytes > CHUNK_BYTES or not self._has_room():
            self.push()  # from the ring, piece by piece
            return
        made = []
        for rows in groups:
            which = memories[rows]
            mine = share.mine(slots[int(rows[0])])
            some = keys if len(groups) == 1 else keys[rows]
            made.append(group_of(which, self.totals(which), share.count(start[rows]), _taken(some, mine)))
        self._send(made)
        self.sent[memories] = after

    def push(self) -> bool:
        """Sends from the ring what the shard lacks, as far as it may be under way; whether that is all of it."""
        if self.epoch is None:
            return False
        step = max(1, CHUNK_BYTES // (4 * self.ring.stored.shape[2])) * self.share.shards
        for memory in (self.sent != self.ring.totals).nonzero()[:, 0].tolist():
            total = int(self.ring.totals[memory])
            one = torch.tensor([memory])
            while (before := int(self.sent[memory])) < total:
                if not self._has_room():
                    return False
                start = max(before, self.ring.first_number(memory))
                if isinstance(self.ring, StoreRing) and start < self.ring.tail_from(memory):
                    self._fill(self.ring, memory)
                    return False
                stop = min(total, start + step)
                keys = self._keys(memory, start, stop)
                before_start = torch.tensor([before, start])
                counted = self.share.count(before_start)
                self._send([group_of(one, counted[:1], counted[1:], keys.cpu()[None])])
                self.sent[memory] = stop
                if self._mending is not None:
                    self._mending.keys += len(keys)
        return True

    def _keys(self, memory: int, start: int, stop: int) -> Tensor:
        """The shard's own of keys number `start` to `stop` - 1, which are alive."""
        slots = torch.arange(start, stop) % self.ring.capacity
        mine = self.share.mine(slots)
        if isinstance(self.ring, StoreRing):
            return self.ring.in_tail(memory, start, stop)[mine]
        if self.ring.storage == "float32" and not self.ring.mapped_key_bytes:
            return _taken(self.ring.stored[memory][None], slots[mine])[0]
        return self.ring.rows(memory, slots[mine].to(self.ring.device))

    def _fill(self, ring: StoreRing, memory: int) -> None:
        """Has the shard take the next keys of a memory from the log; one step at a time."""
        if not self._filling:
            self._change(self.host.actor.fill.remote(self.name, self.expected, ring.uri, memory, self.share), 0, memory)

    @property
    def _filling(self) -> bool:
        return any(one.filled >= 0 for one in self._pending)

    def reset(self, memories: Tensor) -> None:
        """Empties memories, which the ring has emptied already."""
        self.sent[memories] = 0
        emptied = set(memories.tolist())
        self._pending = deque(one._replace(filled=-1) if one.filled in emptied else one for one in self._pending)
        if self.epoch is not None:
            self._change(self.host.actor.reset.remote(self.name, self.expected, memories.numpy()), 0)

    def change(self, method: str, *arguments: Any) -> Any:
        """Calls a method that changes the shard, to be waited for by the caller; the call's future."""
        reference = getattr(self.host.actor, method).remote(self.name, self.expected, *arguments)
        self._changes += 1
        return reference

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method that leaves the shard as it is; the call's future."""
        return getattr(self.host.actor, method).remote(self.name, self.expected, *arguments)

    def _send(self, groups: list[Group]) -> None:
        size = sum(group.nbytes for group in groups)
        self._change(self.host.actor.add.remote(self.name, self.expected, *groups), size)

    def _change(self, reference: Any, size: int, filled: int = -1) -> None:
        self._changes += 1
        self._pending.append(_Sent(reference, size, time.monotonic(), filled))
        self._pending_bytes += size
        self.moved_bytes += size

    def _has_room(self) -> bool:
        if len(self._pending) >= MOST_PENDING or self._pending_bytes >= PENDING_BYTES:
            self.settle()
        return self.epoch is not None and len(self._pending) < MOST_PENDING and self._pending_bytes < PENDING_BYTES

    # Answers ----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Asks for an empty shard where there is none; `settle` takes in the answer."""
        if self.epoch is None and self._making is None and time.monotonic() >= self._retry_at:
            self._making = self.host.actor.make.remote(self.name, self.about(self.share))

    def futures(self) -> list[Any]:
        """What to wait for before `settle` can do more."""
        if self._making is not None:
            return [self._making]
        return [self._pending[0].reference] if self._pending else []

    def settle(self, *, all_done: bool = False) -> bool:
        """Takes in answers that have come, without waiting; whether there is room for another append.

        Args:
            all_done: everything that was sent is known to have been carried out.
        """
        import ray

        if self._making is not None and ray.wait([self._making], timeout=0)[0]:
            self._made()
        urgent = self._mending is not None or self._filling
        # Answers come in order, so that of many only one is asked for: each question takes a while.
        while self._pending and (all_done or urgent or len(self._pending) >= BUSY):
            done = len(self._pending) if all_done else 1 if urgent else 1 + len(self._pending) // 2
            if not all_done and not ray.wait([self._pending[done - 1].reference], timeout=0)[0]:
                break
            self._take(done)
        self._finish()
        return len(self._pending) < MOST_PENDING and self._pending_bytes < PENDING_BYTES

    def _take(self, count: int) -> None:
        """Takes in the oldest `count` answers, which have come."""
        import ray

        taken = [self._pending.popleft() for _ in range(count)]
        self._pending_bytes -= sum(one.size for one in taken)
        try:
            answers = ray.get([one.reference for one in taken])
        except Exception as error:
            self.lost(error, taken[0].since)
            return
        for answer, one in zip(answers, taken, strict=True):
            if isinstance(answer, Refused | Failed):
                self.lost(answer, one.since)
                return
            if isinstance(answer, Filled):
                self._filled(answer, one)
            self._held = answer.held if isinstance(answer, Filled) else answer
        self.progress = time.monotonic()

    def _filled(self, answer: Filled, sent: _Sent) -> None:
        if self._mending is not None:
            self._mending.keys += answer.keys
        if sent.filled < 0:
            return  # the memory was emptied meanwhile
        before = int(self.sent[sent.filled])
        self.sent[sent.filled] = answer.reached
        if answer.done and answer.reached <= before:
            self.failure = CorruptMemory(
                f"{self.where}: the store holds {answer.reached} keys of memory {sent.filled}, and more were written: "
                "it was changed by another program, or went back to an older version"
            )

    def _made(self) -> None:
        import ray

        making, self._making = self._making, None
        try:
            answer = ray.get(making)
        except Exception as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if getattr(error, "actor_init_failed", False):
                self.failure = as_ours(error, self.where)
                return
            self.away_because = in_words(error)
            self._found_dead += isinstance(error, ray.exceptions.ActorDiedError)
            if self._found_dead >= GIVEN_UP:
                self._found_dead = 0
                self.host.start()
            return
        if isinstance(answer, Failed):
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self.failure = as_ours(answer.error, self.where)
            return
        self.epoch = answer
        self._found_dead = self._changes = self._held = 0
        self.away_because = ""
        self.progress = time.monotonic()
        if self._mending is not None:
            self._mending.made_at = self.progress

    def _finish(self) -> None:
        """Notes that the shard is back, once it has got everything."""
        if self._mending is None or self._pending or not self.current(torch.arange(len(self.sent))):
            return
        mended, self._mending = self._mending, None
        counts = self.share.count(self.sent)
        alive = int(counts.clamp(max=self.share.size).sum())
        self.recoveries.append(
            Recovery(
                shard=self.share.shard,
                reason=mended.reason,
                detection_seconds=mended.detection_seconds,
                away_seconds=mended.made_at - mended.lost_at,
                refill_seconds=time.monotonic() - mended.made_at,
                keys_refilled=mended.keys,
                keys_lost=alive - self._held,
            )
        )

    def lost(self, why: BaseException | Refused | Failed | str, since: float) -> None:
        """Counts the shard as gone: an empty one will be made and filled.

        Args:
            why: what was noticed. What the shard's backend failed with is kept in `failure`.
            since: when the call was made that noticed it.
        """
        now = time.monotonic()
        if isinstance(why, Failed):
            self.failure = as_ours(why.error, self.where)
        self.away_because = in_words(why)
        self.forget()
        if self._mending is None:
            self._mending = _Mending(self.away_because, now - since, now, now)
        self._mending.keys = 0

    def forget(self) -> None:
        """Takes the shard for one that holds nothing and has to be made."""
        self.epoch = self._making = None
        self.sent.zero_()
        self._changes = self._pending_bytes = 0
        self._pending.clear()

    @property
    def where(self) -> str:
        """The shard, in words."""
        return f"shard {self.share.shard} of {self.share.shards} ({self.about(self.share).spec!r})"

    def raise_failure(self) -> None:
        """Raises, once, what an earlier append failed with in the shard."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def _taken(keys: Tensor, places: Tensor) -> Tensor:
    """`keys[:, places]` of keys (M', n, D) on the CPU, by one thread: torch would wake all of its own for it, and the
    shards are at work on the same cores."""
    return torch.from_numpy(keys.numpy().take(places.numpy(), axis=1))


def came_from_ray(error: BaseException) -> bool:
    """Whether an error says that Ray could not carry a call out, rather than that the call itself failed."""
    import ray

    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


def as_ours(error: BaseException, where: str) -> MemoryBackendError:
    """The error of this package for one that a call to a shard raised.

    Args:
        error: as `ray.get` or `ray.put` raises it.
        where: which shard, in words.
    """
    import ray

    cause = getattr(error, "cause", None) if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, MemoryBackendError):
        return type(cause)(f"{where}: {cause}")
    if isinstance(cause, Exception) and ran_out(cause):
        return as_out_of_memory(cause, f"in {where}")
    if isinstance(cause, ray.exceptions.ObjectStoreFullError | ray.exceptions.OutOfDiskError):
        return OutOfMemory(
            f"Ray's object store has no room for what {where} needs: give it more (object_store_memory of ray.init or "
            f"`ray start`), or ask fewer queries and append fewer keys at once ({in_words(cause)})"
        )
    if isinstance(cause, ray.exceptions.OutOfMemoryError):
        return OutOfMemory(
            f"the machine of {where} ran out of main memory and Ray ended its process: take more shards or machines, a "
            f"smaller capacity, or a backend of fewer bytes such as exact:storage=int8 ({in_words(cause)})"
        )
    if came_from_ray(error):
        return Unreachable(f"{where} cannot be reached: {in_words(error)}")
    return MemoryBackendError(f"{where} failed: {type(cause).__name__}: {cause}")


def in_words(why: BaseException | Refused | Failed | str) -> str:
    """What was noticed, in a line."""
    if isinstance(why, Failed):
        why = why.error
    if isinstance(why, Refused):
        return why.why
    if isinstance(why, str):
        return why
    import ray

    if isinstance(why, ray.exceptions.ActorDiedError):
        lines = [line.strip() for line in str(why).splitlines() if line.strip()]
        return (
            f"its process cannot start: {lines[-1][:200]}" if why.actor_init_failed and lines else "its process ended"
        )
    if isinstance(why, ray.exceptions.ActorUnavailableError):
        return "its process ended or cannot be reached"
    lines = [line.strip() for line in str(getattr(why, "cause", why)).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(why).__name__


__all__ = ["Recovery", "ShardLink", "as_ours", "came_from_ray", "in_words"]
