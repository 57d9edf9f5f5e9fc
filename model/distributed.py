"""Processes that work side by side, one for each device or core: which of them this one is, and what they agree on.

    torchrun --nproc-per-node 4 script.py

    with joined("cpu") as ranks:                  # in script.py; without torchrun: a job of one, which talks to nobody
        start, stop = ranks.rows(batch_size)      # the rows that are this rank's

Starting, watching, killing and restarting processes is torchrun's; moving tensors is torch.distributed's (gloo for
tensors on the CPU, NCCL for those on CUDA devices). Every wait has a deadline: whoever waits for a rank that was killed
or stopped ends with a `RankError` that names it, and torchrun starts all ranks again if it was told to.

Letters: W ranks, B batch rows.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from recollect.memory_backends.threads import share_of_cores, use_share
from recollect.model.configuration import ConfigurationError

Result = TypeVar("Result")

PARALLEL = ("ddp", "fsdp")
"""How a model is trained by several processes (`recollect.model.parallel`)."""
DEADLINE_SECONDS = 300.0
"""How long a rank waits for the others within a step before it gives them up."""
PATIENCE_SECONDS = 3600.0
"""The same where one rank does something for all, such as tokenizing a corpus or writing a checkpoint."""
GRACE_SECONDS = 3.0
"""How long a rank that lost another waits for a word about why."""
_LOST = ("gloo/", "Connection ", "Timed out waiting", "Broken pipe", "NCCL error")
"""What the errors of torch.distributed say where another process is gone or silent; gloo raises plain RuntimeErrors."""


_JOINS = itertools.count()


class RankError(RuntimeError):
    """Another process of the job failed, was killed, or was silent for longer than the deadline."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a job as one of them sees it; the defaults are a job of one.

    Attributes:
        rank: this one's number, 0 to W - 1.
        count: W.
        device: where this rank's model lives.
        deadline: seconds within which the others must answer.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    deadline: float = DEADLINE_SECONDS
    _patient: Any = None
    _store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is anybody else."""
        return self.count > 1

    def rows(self, batch_size: int) -> tuple[int, int]:
        """First row and one past the last row, of B, that are this rank's.

        Raises:
            ConfigurationError: the rows cannot be dealt evenly.
        """
        if batch_size % self.count:
            below = batch_size // self.count * self.count
            near = f"{below} or {below + self.count}" if below else f"{self.count}"
            raise ConfigurationError(
                f"batch_size={batch_size} rows cannot be dealt evenly to {self.count} processes: give a multiple of "
                f"{self.count}, such as {near}, or start another number of processes"
            )
        share = batch_size // self.count
        return self.rank * share, (self.rank + 1) * share

    def some_rows(self, rows: int) -> tuple[int, int]:
        """As `rows`, for any number of rows: shares differ by one row at most, and may be empty."""
        return self.rank * rows // self.count, (self.rank + 1) * rows // self.count

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in double precision."""
        if not self.several:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on its device and without gradient."""
        total = tensor.detach().clone()
        if self.several:
            dist.all_reduce(total)
        return total

    def all(self, value: Any) -> list[Any]:
        """What every rank gave, in order of ranks; waits as long as one rank may work for all."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._patient)
        return values

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What `make` gives on the first rank, which alone calls it."""
        values: list[Any] = [make() if self.first else None]
        if self.several:
            dist.broadcast_object_list(values, src=0, group=self._patient)
        return values[0]

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.several:
            dist.barrier(group=self._patient)

    def agree(self, values: dict[str, Any]) -> None:
        """Raises ConfigurationError on every rank if some of `values` (plain and comparable) differ between ranks."""
        everyone = self.all(values)
        for rank, others in enumerate(everyone):
            for name, value in everyone[0].items():
                if others.get(name) != value:
                    raise ConfigurationError(
                        f"rank {rank} of {self.count} has {name}={others.get(name)!r} and rank 0 {value!r}: start "
                        "every process with the same command, files and program"
                    )


# Joining a job --------------------------------------------------------------------------------------------------------


def launched() -> int:
    """How many processes the launcher started, by its environment or by a process group that there is; 1 without."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def speaks() -> bool:
    """Whether this process is the one of its job that prints and writes for all; true without a launcher."""
    return launched() == 1 or (dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])) == 0


@contextlib.contextmanager
def joined(device: str = "cpu", *, deadline: float = DEADLINE_SECONDS) -> Iterator[Ranks]:
    """The processes that torchrun (or another launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) started.

    A process group that exists already is used as it is, with its own timeout. Without a launcher it is a job of one.
    What the block raises on one rank ends the others: they raise a `RankError` with its text. Each rank gets its share
    of the machine's cores for threads, unless OMP_NUM_THREADS says how many.

    Args:
        device: "cpu", or "cuda" for the device that the rank's number on its machine names.
        deadline: seconds within which the others must answer in a step.

    Raises:
        ConfigurationError: there are more ranks than devices, or one device was named for all.
        RankError: the others did not come, or one of them is lost.
    """
    if deadline <= 0:
        raise ConfigurationError(f"deadline={deadline} seconds must be above 0")
    if launched() == 1:
        yield Ranks(device=torch.device(device), deadline=deadline)
        return
    with _signals() as ending:
        ranks, ours = _join(device, deadline)
        try:
            yield ranks
        except BaseException as error:
            ending()
            explained = _explain(ranks, error)
            if explained is not error:
                raise explained from error
            raise
        finally:
            if ours and dist.is_initialized():
                with contextlib.suppress(RuntimeError):
                    dist.destroy_process_group()


def is_repeated(error: BaseException) -> bool:
    """Whether the first rank tells the same, so that this one can end in silence."""
    return bool(getattr(error, "_told_by_first_rank", False))


def _join(device: str, deadline: float) -> tuple[Ranks, bool]:
    ours = not dist.is_initialized()
    rank, count = (int(os.environ["RANK"]), launched()) if ours else (dist.get_rank(), dist.get_world_size())
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    own = _own_device(device, local_rank)
    store = None
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        if ours:
            timeout = datetime.timedelta(seconds=deadline)
            joining = datetime.timedelta(seconds=max(deadline, 60.0))
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=joining)))
            # A store outlives the group that met in it: what an earlier one left must not be found.
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"recollect/{start}/{next(_JOINS)}", store)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=count,
                timeout=timeout,
                device_id=own if own.type == "cuda" else None,
            )
        patience = datetime.timedelta(seconds=max(deadline, PATIENCE_SECONDS))
        patient = dist.new_group(backend="gloo", timeout=patience)
        ranks = Ranks(rank, count, own, deadline, patient, store)
        mine = (socket.gethostname(), sorted(_cores()))
        machines = ranks.all(mine)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} of {count} could not join the others at {where}: {error}; start all of them, by torchrun, "
            "and look at what they say"
        ) from error
    others = [cores for host, cores in machines if host == mine[0]]
    use_share(share_of_cores(mine[1], others))
    return ranks, ours


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _own_device(device: str, local_rank: int) -> torch.device:
    asked = torch.device(device)
    if asked.type == "cpu":
        return asked
    if asked.type != "cuda":
        raise ConfigurationError(f"device {device!r} cannot be used by several processes: give cpu or cuda")
    if asked.index is not None:
        raise ConfigurationError(
            f"device {device!r} is one device, and several processes were started: give 'cuda', and each takes its own"
        )
    there = torch.cuda.device_count()
    if local_rank >= there:
        raise ConfigurationError(
            f"process {local_rank} of this machine has no device: there are {there} CUDA devices; start at most as "
            "many processes (--nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


# Ending together ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Ends this rank by an exception when the launcher asks it to, so that it tells why; yields how to be left alone.

    The launcher asks by SIGTERM as soon as one rank has failed, when the others are about to say what they saw.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def leave_alone() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    try:
        yield leave_alone
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone or silent."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _LOST)


def _explain(ranks: Ranks, error: BaseException) -> BaseException:
    """The error that this rank should raise, after telling the others; marked where the first rank tells the same."""
    if not is_lost(error):
        text = _text(error)
        _tell(ranks, "failed", text)
        # Ranks that all raise the same need nothing more, and closing a connection could cut short what one of them
        # is about to read. The others wait for this rank in vain, for as long as its process lives.
        _endings(ranks, wanted=ranks.count - 1, seconds=GRACE_SECONDS / 3)
        _close_connections()
        return _marked(ranks, error, text)
    _close_connections()
    _tell(ranks, "noticed", "")  # by which the others see that this rank is alive
    ended = _endings(ranks, wanted=ranks.count - 1, until_failed=True)
    culprit = _failed(ended)
    if culprit is not None:
        text = f"rank {culprit} of {ranks.count} failed: {ended[culprit]['text']}"
    else:
        silent = [rank for rank in range(ranks.count) if rank != ranks.rank and rank not in ended]
        who = f"rank {silent[0]}" if len(silent) == 1 else f"one of ranks {', '.join(map(str, silent))}"
        text = (
            f"{who if silent else 'another rank'} of {ranks.count} is lost: killed, stopped, or silent for the "
            f"{ranks.deadline:g} seconds of the deadline ({_short(error)}). The run goes on from its last saved state "
            "when the same command is given again; `torchrun --max-restarts 3` does that by itself"
        )
    explained = RankError(text)
    _tell(ranks, "lost", text)
    return _marked(ranks, explained, text)


def _close_connections() -> None:
    """Closes this rank's connections, at which the others' pending waits fail."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError, AssertionError):
            dist.distributed_c10d._abort_process_group()


def _text(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) or type(error).__name__


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]


def _tell(ranks: Ranks, kind: str, text: str) -> None:
    if ranks._store is not None:
        with contextlib.suppress(RuntimeError):
            ranks._store.set(f"end/{ranks.rank}", json.dumps({"kind": kind, "text": text}))


def _failed(ended: dict[int, dict[str, str]]) -> int | None:
    """The first rank that failed by itself."""
    return next((rank for rank in sorted(ended) if ended[rank]["kind"] == "failed"), None)


def _endings(
    ranks: Ranks, *, wanted: int, seconds: float = GRACE_SECONDS, until_failed: bool = False, until: int | None = None
) -> dict[int, dict[str, str]]:
    """What other ranks said as they ended, by rank; waits until `wanted` did, one failed, or rank `until` told why."""
    latest = time.monotonic() + seconds
    while True:
        found: dict[int, dict[str, str]] = {}
        with contextlib.suppress(RuntimeError, ValueError):
            for rank in range(ranks.count) if ranks._store is not None else ():
                if rank != ranks.rank and ranks._store.check([f"end/{rank}"]):
                    found[rank] = json.loads(ranks._store.get(f"end/{rank}"))
        told = until is not None and found.get(until, {"kind": "noticed"})["kind"] != "noticed"
        enough = until is None and len(found) >= wanted
        if told or enough or (until_failed and _failed(found) is not None) or time.monotonic() > latest:
            return found
        time.sleep(0.02)


def _marked(ranks: Ranks, error: BaseException, text: str) -> BaseException:
    if not ranks.first and text in _endings(ranks, wanted=0, until=0).get(0, {}).get("text", ""):
        error._told_by_first_rank = True  # type: ignore[attr-defined]
    return error
