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
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from recollect.memory_backends.threads import share_of_cores, use_share
from recollect.model.configuration import ConfigurationError
from recollect.model.rank_errors import Notices, RankError

Result = TypeVar("Result")

PARALLEL = ("ddp", "fsdp")
"""How a model is trained by several processes (`recollect.model.parallel`)."""
DEADLINE_SECONDS = 300.0
"""How long a rank waits for the others within a step before it gives them up."""
PATIENCE_SECONDS = 3600.0
"""The same where one rank does something for all, such as tokenizing a corpus or writing a checkpoint."""

_JOINS = itertools.count()


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
        ranks, notices, ours = _join(device, deadline)
        try:
            with notices.answering():
                try:
                    yield ranks
                except BaseException as error:
                    ending()
                    explained = notices.explain(error, deadline)
                    if explained is not error:
                        raise explained from error
                    raise
        finally:
            if ours and dist.is_initialized():
                with contextlib.suppress(RuntimeError):
                    dist.destroy_process_group()


def _join(device: str, deadline: float) -> tuple[Ranks, Notices, bool]:
    ours = not dist.is_initialized()
    rank, count = (int(os.environ["RANK"]), launched()) if ours else (dist.get_rank(), dist.get_world_size())
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    own = _own_device(device, local_rank)
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        if ours:
            timeout = datetime.timedelta(seconds=deadline)
            joining = datetime.timedelta(seconds=max(deadline, 60.0))
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=joining)))
            store = _fresh(store)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=count,
                timeout=timeout,
                device_id=own if own.type == "cuda" else None,
            )
        else:
            store = _fresh(dist.distributed_c10d._get_default_store())
        patience = datetime.timedelta(seconds=max(deadline, PATIENCE_SECONDS))
        patient = dist.new_group(backend="gloo", timeout=patience)
        ranks = Ranks(rank, count, own, deadline, patient)
        mine = (socket.gethostname(), sorted(_cores()))
        machines = ranks.all(mine)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} of {count} could not join the others at {where}: {error}; start all of them, by torchrun, "
            "and look at what they say"
        ) from error
    others = [cores for host, cores in machines if host == mine[0]]
    use_share(share_of_cores(mine[1], others))
    return ranks, Notices(store, rank, count), ours


def _fresh(store: Any) -> Any:
    """A part of a store that nobody has used: it outlives the group that met in it, and the start of all ranks."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"recollect/{start}/{next(_JOINS)}", store)


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
