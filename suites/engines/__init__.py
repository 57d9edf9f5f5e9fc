"""Where measurements run: in processes of this machine, or as tasks on the machines of a Ray cluster.

    with make_engine("ray", output=folder, threads=2, note=print) as engine:
        engine.each(todo, lambda item: engine.run(order_of(item), hear))

An engine runs an `Order`: one task of `suites.worker`, in a process of its own, wherever the engine has room. What the
process tells arrives as events, the same with every engine; its results lie in the order's output folder when it tells
of them. Nothing that is measured depends on the engine, so a run that was begun with one goes on with another.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..processes import Event

ENGINES = ("local", "ray")
"""The names that `--engine` takes."""

RUNS_AT_MOST = 3
"""How often something is run whose process or machine is lost each time."""

CONNECT_SECONDS = 30.0
"""How long a cluster that is to be joined has to answer."""

Item = TypeVar("Item")
Note = Callable[[str], None]


class EngineError(RuntimeError):
    """Measurements can't be run where they were to run; the message names the machine or address, and the remedy."""


class Stopped(EngineError):
    """The engine was stopped while something ran: nothing is wrong with what ran."""


@dataclass(frozen=True)
class Order:
    """One task, what it needs, and where its results belong.

    Attributes:
        task: for `suites.worker`, as JSON. Paths in it are those of this machine; an engine that runs it elsewhere puts
            those of the other machine in their places.
        output: folder below which everything lies that the task writes.
        threads: of torch and every library.
        log: file below `output` that gets what the process prints.
        timeout: seconds without a finished measurement after which it is given up.
        alone: nothing else runs on the machine meanwhile: its times are to be compared.
        needs: files and folders that the task reads and leaves as they are.
        resumes: files and folders below `output` that it finds there, goes on with and may change.
        rewritten: those JSON files among them, by name, that hold paths of this machine.
        device: where it computes, such as 'cpu' or 'cuda'.
        label: what it is called where people read of it.
    """

    task: dict[str, Any]
    output: Path
    threads: int
    log: Path
    timeout: float
    alone: bool = False
    needs: tuple[Path, ...] = ()
    resumes: tuple[Path, ...] = ()
    rewritten: tuple[str, ...] = ()
    device: str = "cpu"
    label: str = ""


@dataclass
class Losses:
    """Counts how often each thing was lost, and says whether it is run again."""

    most: int = RUNS_AT_MOST
    counts: dict[Any, int] = field(default_factory=dict)

    def again(self, key: Any) -> bool:
        """Notes one more loss of `key`; False when it has been run often enough."""
        self.counts[key] = self.counts.get(key, 0) + 1
        return self.counts[key] < self.most

    def told(self, key: Any, reason: str) -> str:
        """The reason, with how often it happened where that was more than once."""
        count = self.counts.get(key, 1)
        return reason if count == 1 else f"{reason} ({count} times)"


class Engine(ABC):
    """Runs orders. Use as a context manager: what it started is ended on the way out, however that comes about.

    Attributes:
        threads: of each process, where nobody says otherwise; known once `settle` has answered.
        turn: held while an order's events are told, so that no two are told at once; also for what must not happen
            between them.
    """

    name: str
    threads: int | None = None

    def __init__(self) -> None:
        self.turn = threading.RLock()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Makes it ready to run orders."""

    def close(self) -> None:
        """Ends what is left of it."""

    @abstractmethod
    def settle(self, former: Mapping[str, Any] | None, *, any_machine: bool = False) -> Mapping[str, Any]:
        """Chooses the machines whose figures may stand side by side; to be called once, before the first order.

        Args:
            former: the machine (`environment.describe_machine`) that earlier results in the folder come from.
            any_machine: take unlike machines too.

        Returns:
            The machine that results are described by, as `describe_machine` has it.

        Raises:
            EngineError: there is none that fits.
        """

    @property
    def unlike(self) -> list[str]:
        """What differs between the machines that are used, in words; empty where they are alike."""
        return []

    @abstractmethod
    def places(self, *, alone: bool, threads: int, device: str = "cpu") -> int:
        """How many orders of this kind can run at a time."""

    @abstractmethod
    def run(self, order: Order, on_event: Callable[[Event], None]) -> Event:
        """Runs an order to its end; may be called by several threads at once.

        Args:
            order: what to run.
            on_event: is told every event but the last, one at a time; each says under 'machine' where it happened.

        Returns:
            The last event: 'end', 'died', 'timeout', or 'lost' where the process or its machine went away without
            fault of the task, which may be run again. All but 'end' have a 'reason'.

        Raises:
            OSError: results cannot be written.
            EngineError: no machine can run it, or the engine was stopped (`Stopped`).
        """

    @abstractmethod
    def each(self, items: Iterable[Item], work: Callable[[Item], None]) -> None:
        """Calls `work`, which runs orders alone on a machine, with every item, as many at a time as there is room for.

        Raises what `work` raises first, after everything else was stopped.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ends everything that is running; may be called by another thread."""


@dataclass(frozen=True)
class Bench:
    """An engine with what all orders of a run have in common.

    Attributes:
        engine: runs them.
        output, threads, timeout, device: as of `Order`.
    """

    engine: Engine
    output: Path
    threads: int
    timeout: float
    device: str = "cpu"

    def run(self, task: dict[str, Any], on_event: Callable[[Event], None], *, log: Path, **others: Any) -> Event:
        """Runs a task; `others` are attributes of its `Order`, result and errors as of `Engine.run`."""
        order = Order(task, self.output, self.threads, log, self.timeout, device=self.device, **others)
        return self.engine.run(order, on_event)


def make_engine(
    name: str,
    *,
    output: Path,
    threads: int | None,
    note: Note,
    address: str | None = None,
    device: str = "cpu",
) -> Engine:
    """An engine by name.

    Args:
        name: one of `ENGINES`.
        output: folder of the run.
        threads: of each process; None is what the machine has.
        note: is told what people should read.
        address: of a Ray cluster to join; None starts Ray on this machine.
        device: where orders compute.

    Raises:
        EngineError: the name is unknown, or an address is given to an engine that has none.
    """
    if name not in ENGINES:
        raise EngineError(f"engine {name!r} is unknown; choose one of {', '.join(ENGINES)}")
    if name == "local":
        if address is not None:
            raise EngineError(f"address {address!r} is of a Ray cluster: give --engine ray with it, or leave it out")
        from .local import LocalEngine

        return LocalEngine(device)
    from .ray_engine import RayEngine

    return RayEngine(output=output, threads=threads, note=note, address=address, device=device)
