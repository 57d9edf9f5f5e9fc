"""The ranks of a torch.distributed job that search in lockstep: how they agree on a call, and what they exchange.

Before anything else, every call sends a small header to every other rank: which call it is, with which shapes, of which
memory, and the counts of its keys. Where two headers differ, or a rank could not make its call, all ranks raise an
error and nothing has changed. Headers go from each rank to each over gloo, whatever device the keys are on, so that a
rank that stopped is known by its number within the deadline; the tensors that follow go by the device's own backend
(gloo for the CPU, NCCL for CUDA), whose operations have the same deadline.

Once a rank is lost, or this one failed between a header and what follows it, nobody knows what the others hold: every
later call is refused, and the job must be started anew, as torchrun does.

Letters as in `base`; W ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recollect.memory_backends.errors import MemoryBackendError

MAKE, ADD, SEARCH, GATHER, SAVE, RESTORE = range(6)
CALLS = ("made a memory", "add", "search", "gather_keys", "save", "load")
WORDS = 8
"""Of a header before its tables: call, memory, number of the call, memories, keys or queries, k, failed, spare."""
PATIENCE_SECONDS = 0.05
"""For each further rank, once the deadline has passed for one."""
LONGEST_TEXT = 4000
DEADLINE_SECONDS = 300.0
"""Where the job's process group does not tell its own."""


class RanksDiffer(MemoryBackendError, ValueError):
    """The ranks of a job made different calls of a memory that they share, or one of them failed; nothing changed."""


class RankLost(MemoryBackendError, RuntimeError):
    """A rank of the job was killed, or did not answer within the deadline: all ranks must be started anew."""


@dataclass
class Traffic:
    """What this rank has sent to and received from other ranks so far.

    Attributes:
        calls: agreed calls.
        headers: bytes of headers and of what memories say when they are made, each way.
        sent, received: bytes of tensors.
    """

    calls: int = 0
    headers: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Call:
    """What one rank calls.

    Attributes:
        kind: one of the constants above.
        memory: number of the memory, in the order in which they were made.
        memories: M' that take part.
        count: keys or queries of each of them.
        k: neighbours.
    """

    kind: int
    memory: int
    memories: int = 0
    count: int = 0
    k: int = 0

    def __str__(self) -> str:
        if self.kind == MAKE:
            return CALLS[MAKE]
        what = CALLS[self.kind] if 0 <= self.kind < len(CALLS) else f"call {self.kind}"
        shape = {
            ADD: f" of {self.count} keys to each of {self.memories} memories",
            SEARCH: f" of {self.count} queries in each of {self.memories} memories with k={self.k}",
            GATHER: f" of {self.k} keys for {self.count} queries in each of {self.memories} memories",
        }.get(self.kind, "")
        return f"{what}{shape} (memory number {self.memory})"


def job() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 and 1 outside a job."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def timeout_of_job() -> float:
    """Seconds after which the job's own process group gives up, which whoever started it has set."""
    for device in ("cpu", "cuda"):
        with contextlib.suppress(
            RuntimeError, AttributeError
        ):  # the group has no backend for it, or one without options
            group: Any = dist.group.WORLD
            return float(group._get_backend(torch.device(device)).options._timeout.total_seconds())
    return DEADLINE_SECONDS


_made: dict[tuple[float, str], RankGroup] = {}
_making = threading.Lock()


def group_of(deadline_seconds: float, device: torch.device) -> RankGroup:
    """The ranks of this job, all of them; one group for each deadline and kind of device.

    Raises:
        RankLost: not all ranks asked for it within the deadline.
    """
    with _making:
        key = (deadline_seconds, device.type)
        found = _made.get(key)
        if found is None or found.world is not dist.group.WORLD or found.broken is not None:
            found = _made[key] = RankGroup(deadline_seconds, device)
        return found


def _forget(group: RankGroup) -> None:
    """Makes the next memory ask for a new group."""
    with _making:
        for key in [key for key, made in _made.items() if made is group]:
            del _made[key]


class RankGroup:
    """All ranks of a job, with a process group of their own.

    Attributes:
        rank, size: this one, and W.
        deadline_seconds: how long an answer of another rank is waited for.
        lock: held by whoever makes a call, from its header to its end.
        memories: how many memories the ranks have made together.
        broken: why every call is refused; None as long as none is.
        traffic: bytes moved so far.
    """

    def __init__(self, deadline_seconds: float, device: torch.device) -> None:
        self.world: Any = dist.group.WORLD
        self.rank, self.size = job()
        self.deadline_seconds = deadline_seconds
        self.lock = threading.RLock()
        self.memories = 0
        self.broken: MemoryBackendError | None = None
        self.traffic = Traffic()
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._calls = 0
        self._table = 0
        """Numbers of a header's tables: enough for the memory with the most."""
        timeout = datetime.timedelta(seconds=deadline_seconds)
        with self._may_lose():
            self._headers: Any = dist.new_group(backend="gloo", timeout=timeout)
            self._data: Any = self._headers
            if device.type == "cuda":
                self._data = dist.new_group(backend="nccl", timeout=timeout)

    # Agreeing ---------------------------------------------------------------------------------------------------------

    def agree(self, call: Call, table: Tensor, failure: BaseException | None = None) -> Tensor:
        """Tells every other rank what this one calls, and learns that they call the same.

        Args:
            call: what this rank calls.
            table: (n,) int64 on the CPU, what the others must know besides, the same n on every rank.
            failure: why this rank cannot go on, to be told to the others.

        Returns:
            (W, n) int64: the tables of all ranks.

        Raises:
            RanksDiffer: other ranks call something else, or one of them could not; on every rank, and no rank goes on.
            RankLost: a rank does not answer.
            BaseException: `failure` itself, once it is told.
        """
        self.check_usable()
        self._calls += 1
        header = torch.zeros(WORDS + self._table, dtype=torch.int64)
        words = (call.kind, call.memory, self._calls, call.memories, call.count, call.k, failure is not None)
        header[: len(words)] = torch.tensor(words)
        header[WORDS : WORDS + len(table)] = table
        every = self._swap(header)
        said = every[:, :6]
        if bool(every[:, 6].any()):
            texts = self.tell("" if failure is None else f"{type(failure).__name__}: {failure}")
            if failure is not None:
                raise failure
            failed = ", ".join(f"rank {rank} ({texts[rank]})" for rank in every[:, 6].nonzero().flatten().tolist())
            raise RanksDiffer(f"{call}: could not be made by {failed}; no rank made it, and nothing has changed")
        if bool((said != said[0]).any()):
            raise RanksDiffer(self._difference(said))
        self.traffic.calls += 1
        return every[:, WORDS : WORDS + len(table)]

    def _difference(self, said: Tensor) -> str:
        by_call: dict[str, list[int]] = {}
        for rank, (kind, memory, number, memories, count, k) in enumerate(said.tolist()):
            words = str(Call(kind, memory, memories, count, k))
            if bool((said[:, 2] != said[0, 2]).any()):
                words += f" as call number {number}"
            by_call.setdefault(words, []).append(rank)
        differing = "; ".join(f"{_ranks(ranks)}: {words}" for words, ranks in by_call.items())
        return (
            f"the ranks of this job made different calls ({differing}): every rank must make the same calls of the "
            "memories that they share, with equal shapes and in one order. Nothing was done and nothing has changed"
        )

    def make(self, description: str, table: int) -> int:
        """Agrees on a new memory and returns its number.

        Args:
            description: of everything that must be equal on all ranks.
            table: numbers of its headers' tables.

        Raises:
            RanksDiffer: it is not equal.
        """
        try:
            self.agree(Call(MAKE, self.memories), torch.zeros(0, dtype=torch.int64))
            texts = self.tell(description)
            if len(set(texts)) > 1:
                differing = "; ".join(
                    f"{_ranks([rank for rank, other in enumerate(texts) if other == text])}: {text}"
                    for text in dict.fromkeys(texts)
                )
                raise RanksDiffer(
                    f"the ranks of this job make different memories ({differing}): each must make the same one"
                )
        except RanksDiffer:
            if not self.memories:  # the ranks may have made this group with different deadlines
                _forget(self)
            raise
        self._table = max(self._table, table)
        self.memories += 1
        return self.memories - 1

    def tell(self, text: str) -> list[str]:
        """What every rank says, in order."""
        encoded = text.encode("utf-8")[:LONGEST_TEXT]
        lengths = self._swap(torch.tensor([len(encoded)]))[:, 0].tolist()
        room = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        room[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else 0
        said = self._swap(room)
        return [
            bytes(row[:length].tolist()).decode("utf-8", "ignore") for row, length in zip(said, lengths, strict=True)
        ]

    def _swap(self, mine: Tensor) -> Tensor:
        """(W, n): what each rank hands in, (n,) on the CPU; straight from rank to rank, so that a lost one is known."""
        with self.together():
            return self._swap_with_all(mine)

    def _swap_with_all(self, mine: Tensor) -> Tensor:
        every = mine.new_empty(self.size, len(mine))
        every[self.rank] = mine
        until = time.monotonic() + self.deadline_seconds
        lost: dict[int, BaseException] = {}
        pending: list[tuple[int, Any]] = []
        for start in (self._receiving(every), self._sending(mine)):
            for rank, begin in start:
                try:
                    pending.append((rank, begin()))
                except RuntimeError as error:
                    lost[rank] = error
        for rank, work in pending:
            left = max(PATIENCE_SECONDS, until - time.monotonic())
            try:
                work.wait(datetime.timedelta(seconds=left))
            except RuntimeError as error:
                lost.setdefault(rank, error)
        if lost:
            raise self._lost(lost)
        self.traffic.headers += len(self._others) * mine.numel() * mine.element_size()
        return every

    def _receiving(self, every: Tensor) -> Iterator[tuple[int, Callable[[], Any]]]:
        for rank in self._others:
            yield rank, lambda rank=rank: dist.irecv(every[rank], src=rank, group=self._headers)  # type: ignore[misc]

    def _sending(self, mine: Tensor) -> Iterator[tuple[int, Callable[[], Any]]]:
        for rank in self._others:
            yield rank, lambda rank=rank: dist.isend(mine, dst=rank, group=self._headers)  # type: ignore[misc]

    # Tensors ----------------------------------------------------------------------------------------------------------

    def gather(self, tensor: Tensor) -> Tensor:
        """(W, ...): the tensor of every rank, all of one shape."""
        every = tensor.new_empty(self.size, *tensor.shape)
        if tensor.numel():
            with self._may_lose():
                dist.all_gather(list(every.unbind(0)), tensor.contiguous(), group=self._data)
        size = len(self._others) * tensor.numel() * tensor.element_size()
        self.traffic.sent += size
        self.traffic.received += size
        return every

    def trade(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows for every rank in order, against those that every rank has for this one.

        Args:
            rows: (sum of `sent`, ...).
            sent: W numbers of rows, to each rank.
            received: W numbers of rows, from each rank.
        """
        taken = rows.new_empty(sum(received), *rows.shape[1:])
        with self._may_lose():
            dist.all_to_all_single(taken, rows.contiguous(), list(received), list(sent), group=self._data)
        size = rows[:1].numel() * rows.element_size() if len(rows) else taken[:1].numel() * taken.element_size()
        self.traffic.sent += (sum(sent) - sent[self.rank]) * size
        self.traffic.received += (sum(received) - received[self.rank]) * size
        return taken

    # What goes wrong --------------------------------------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raises what broke the group, if anything did."""
        if self.broken is not None:
            raise type(self.broken)(*self.broken.args)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What follows a header: where it fails on this rank the others hold something else, and nothing may go on."""
        try:
            yield
        except BaseException as error:
            if self.broken is None:
                self.broken = RankLost(
                    f"rank {self.rank} of {self.size} failed in the middle of a call ({type(error).__name__}: {error})"
                    ", and holds something else than the others now: start all ranks anew, as torchrun does"
                )
            raise

    @contextmanager
    def _may_lose(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost({}, error) from error

    def _lost(self, lost: dict[int, BaseException], error: BaseException | None = None) -> RankLost:
        gone = [rank for rank, why in lost.items() if "closed" in str(why).lower() or "reset" in str(why).lower()]
        silent = [rank for rank in lost if rank not in gone]
        parts = []
        if gone:
            parts.append(f"{_ranks(gone)} of {self.size} ended")
        if silent:
            parts.append(f"{_ranks(silent)} of {self.size} did not answer within {self.deadline_seconds:g} s")
        if not parts:
            parts.append(f"a rank of {self.size} ended or did not answer within {self.deadline_seconds:g} s ({error})")
        self.broken = RankLost(
            f"{' and '.join(parts)}: it was killed, stopped, or makes other calls than rank {self.rank}. What the "
            "memory holds is no longer whole: start all ranks anew, as torchrun does (deadline_seconds sets how long a "
            "slow rank is waited for)"
        )
        return self.broken


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
