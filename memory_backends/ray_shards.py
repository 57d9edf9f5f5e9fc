"""All shards of one memory: what is asked of them at once, with a deadline, and what happens where one does not answer.

Letters as in `base`; S shards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends.errors import Unreachable
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.ray_host import Failed, Refused
from recollect.memory_backends.ray_link import RETRY_SECONDS, Recovery, ShardLink, as_ours
from recollect.memory_backends.ray_session import SESSION
from recollect.memory_backends.ray_start import within
from recollect.memory_backends.sharding import alike

SECONDS_OF_HEAD = 3.0
"""For the head of a cluster to say what there is, when an error is told."""


class PartialAnswer(UserWarning):
    """A search was answered without some of the shards, as `partial=true` allows."""


class Shards:
    """The links to all shards of a memory. Asked by several threads at once; changed by one.

    Args:
        links: S of them, in order.

    Attributes:
        missing: the shards that the last search was answered without.
        partial_answers: searches that were answered without some shard.
    """

    def __init__(self, links: list[ShardLink]) -> None:
        self.links = links
        self.missing: tuple[int, ...] = ()
        self.partial_answers = 0
        self._lock = threading.RLock()
        self._received_bytes = 0

    @property
    def moved_bytes(self) -> int:
        """Bytes of keys, queries and answers that have gone to the shards or come from them."""
        return self._received_bytes + sum(link.moved_bytes for link in self.links)

    @property
    def recoveries(self) -> list[Recovery]:
        """Shards that were lost and are back, in the order in which they came back to each link."""
        return [recovery for link in self.links for recovery in link.recoveries]

    def use(self, ring: KeyRing) -> None:
        """Has the links read the keys where they are now: a backend around this one may keep them itself."""
        for link in self.links:
            link.ring = ring

    def append(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        """Sends every shard its part of keys that the ring has got, without waiting.

        Raises:
            MemoryBackendError: what an earlier append failed with in a shard; the shard is filled anew.
        """
        groups = alike(slots[:, 0])
        with self._lock:
            check_connected()
            for link in self.links:
                link.settle()
                link.begin()
                link.raise_failure()
            for link in self.links:
                link.append(groups, keys, slots, memories)

    def reset(self, memories: Tensor) -> None:
        """Empties memories, which the ring has emptied already."""
        with self._lock:
            check_connected()
            for link in self.links:
                link.reset(memories)

    def refill(self, why: str, *, all_of_them: bool = False) -> None:
        """Has shards filled anew that hold other keys than the ring counts, or all of them."""
        with self._lock:
            for link in self.links:
                if all_of_them or bool((link.sent > link.ring.totals).any()):
                    link.lost(why, time.monotonic())

    def needed_from(self, totals: Tensor) -> Tensor:
        """(M,) the number from which on some shard that is there has not been sent a memory's keys."""
        needed = totals.clone()
        for link in self.links:
            if link.epoch is not None:
                torch.minimum(needed, link.sent, out=needed)
        return needed

    def begin_again(self) -> None:
        """Has all shards made and filled anew, by what they are made from now."""
        with self._lock:
            for link in self.links:
                link.forget()

    def ask(
        self,
        method: str,
        arguments: Callable[[ShardLink], tuple[Any, ...]],
        memories: Tensor,
        *,
        deadline: float,
        partial: bool = False,
        changes: bool = False,
    ) -> dict[int, Any]:
        """Calls a method of every shard that has all keys of `memories`, once it has.

        A shard that is away is made and filled meanwhile.

        Args:
            method: of `ShardHost`.
            arguments: what it is called with, after name and expectation.
            memories: whose keys the shards have to hold.
            deadline: seconds within which each shard has to answer something, since the call or its last answer.
            partial: leave out shards that are away, if any answers.
            changes: the method changes the shard.

        Returns:
            The answers by number of shard; some are missing only where `partial`.

        Raises:
            Unreachable: a shard was away, or did not answer, for that long.
            MemoryBackendError: what the call, or an earlier append, failed with in a shard.
        """
        started = time.monotonic()
        answers: dict[int, Any] = {}
        asked: dict[Any, tuple[ShardLink, str | None, float]] = {}
        away = list(self.links)
        while True:
            with self._lock:
                check_connected()
                for link in list(away):
                    if _brought_up(link, memories):
                        call = link.change if changes else link.ask
                        asked[call(method, *arguments(link))] = (link, link.epoch, time.monotonic())
                        away.remove(link)
            if not asked and (not away or (partial and answers)):
                return answers
            waiting = [*asked, *(future for link in away for future in link.futures())]
            everyone = len(asked) if not away else 1
            left = min(
                self._left(link, started, deadline) for link in (*away, *(link for link, _, _ in asked.values()))
            )
            if away and not (partial and asked):
                left = min(left, RETRY_SECONDS)
            if not waiting:
                time.sleep(max(min(left, RETRY_SECONDS), 0.0))
            for reference, answer in _answers(waiting, everyone, max(left, 0.0)):
                if reference in asked:
                    link, epoch, since = asked.pop(reference)
                    if not self._take(answer, link, epoch, since, answers):
                        away.append(link)
            self._give_up(away, asked, answers, started, deadline, partial)

    def _take(self, answer: Any, link: ShardLink, epoch: str | None, since: float, answers: dict[int, Any]) -> bool:
        """Takes in the answer to a call; whether there is one, rather than a shard that turns out to be lost."""
        import ray

        if isinstance(answer, ray.exceptions.ObjectStoreFullError):
            raise as_ours(answer, link.where) from answer
        if isinstance(answer, Failed):
            raise as_ours(answer.error, link.where) from answer.error
        with self._lock:
            lost = isinstance(answer, Exception | Refused)
            if link.epoch == epoch:  # another thread may have found out already
                if lost:
                    link.lost(answer, since)
                else:
                    link.progress = time.monotonic()
                    link.settle(all_done=True)
        if not lost:
            answers[link.share.shard] = answer
        return not lost

    def _left(self, link: ShardLink, started: float, deadline: float) -> float:
        return max(started, link.progress) + deadline - time.monotonic()

    def _give_up(
        self,
        away: list[ShardLink],
        asked: dict[Any, tuple[ShardLink, str | None, float]],
        answers: dict[int, Any],
        started: float,
        deadline: float,
        partial: bool,
    ) -> None:
        """Raises for shards whose time is over, or leaves them out where the others will do."""
        for reference, (link, epoch, since) in list(asked.items()):
            if self._left(link, started, deadline) > 0:
                continue
            if not (partial and len(self.links) > 1):
                raise Unreachable(
                    f"{link.where} has not answered for {deadline:g} s. Its machine or process may be stopped or cut "
                    "off, or busy for longer than that: raise deadline_seconds, or let the others answer with "
                    "partial=true"
                )
            del asked[reference]
            away.append(link)
            with self._lock:
                if link.epoch == epoch:
                    link.lost("it did not answer in time", since)
        if partial and (asked or answers):
            return
        for link in away:
            if self._left(link, started, deadline) <= 0:
                raise Unreachable(f"{link.where} has been away for {deadline:g} s: {_why_away(link)}")

    def count_missing(self, answers: dict[int, Any]) -> tuple[int, ...]:
        """Notes which shards a search was answered without, and returns them."""
        missing = tuple(link.share.shard for link in self.links if link.share.shard not in answers)
        with self._lock:
            self.missing = missing
            self.partial_answers += bool(missing)
        return missing

    def count_moved(self, size: int) -> None:
        """Notes bytes of queries and answers."""
        with self._lock:
            self._received_bytes += size


def _answers(futures: list[Any], enough: int, seconds: float) -> list[tuple[Any, Any]]:
    """Futures that have an answer, once `enough` of them have or the time is over, each with it, or with its error."""
    import ray

    if not futures:
        return []
    if enough == len(futures):
        try:
            return list(zip(futures, ray.get(futures, timeout=seconds), strict=True))
        except Exception:
            seconds = 0.0  # one by one: which of them failed, or did not come
    found = []
    for future in ray.wait(futures, num_returns=enough, timeout=seconds)[0]:
        try:
            found.append((future, ray.get(future)))
        except Exception as error:
            found.append((future, error))
    return found


def _brought_up(link: ShardLink, memories: Tensor) -> bool:
    """Does what can be done for a shard now; whether it has got every key of `memories`."""
    link.settle()
    link.begin()
    link.raise_failure()
    if not link.current(memories):
        link.push()
    return link.current(memories)


def _why_away(link: ShardLink) -> str:
    import ray

    keys = "its keys are safe with the caller, and it is filled again as soon as it has a process"
    if link.progress:
        return (
            f"{link.away_because or 'it is being filled'}. No key is lost: {keys}. Wait longer with deadline_seconds, "
            "or let the others answer with partial=true"
        )
    try:
        has = within(ray.cluster_resources, SECONDS_OF_HEAD)
    except Exception:
        return f"{link.away_because or 'Ray has found no place for it'}, and the head of the cluster does not answer"
    there = {name: amount for name, amount in has.items() if not name.startswith(("node:", "object"))}
    return (
        f"{link.away_because or 'Ray has found no place for it'}. Each shard asks for {link.host.placement}, and the "
        f"cluster has {there} in all: ask for less, take fewer shards, add machines, or free main memory (Ray ends "
        "processes where 95 % of it is taken)"
    )


def check_connected() -> None:
    """Raises Unreachable where the program has ended its connection to Ray."""
    if not SESSION.stands():
        raise Unreachable("the connection to Ray was ended by ray.shutdown(): make the memory again, or load it")


__all__ = ["PartialAnswer", "Shards", "check_connected"]
