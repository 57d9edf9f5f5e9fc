"""The engine that needs nothing: processes of this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..processes import Event, WorkerProcess, follow
from ..provenance import describe
from . import Engine, Item, Order, Stopped


class LocalEngine(Engine):
    """Runs each order in a process of this machine; `each` runs one after another.

    Args:
        device: where orders compute.
    """

    name = "local"

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self._workers: set[WorkerProcess] = set()
        self._stopped = False

    def settle(self, former: Mapping[str, Any] | None, *, any_machine: bool = False) -> Mapping[str, Any]:
        """This machine."""
        import torch

        # An accelerator that is not there is told where the model is loaded.
        device = self.device if torch.cuda.is_available() else "cpu"
        machine: Mapping[str, Any] = describe(threads=1, device=device)["machine"]
        self.threads = self.threads or int(machine["cores"])
        return machine

    def places(self, *, alone: bool, threads: int, device: str = "cpu") -> int:
        """One: how many processes share this machine is for its user to say."""
        return 1

    def run(self, order: Order, on_event: Callable[[Event], None]) -> Event:
        """See `Engine.run`; nothing is ever 'lost'."""
        if self._stopped:
            raise Stopped("the run was stopped")
        here = platform.node()

        def tell(event: Event) -> None:
            with self.turn:
                on_event({**event, "machine": here})

        worker = WorkerProcess({**order.task, "host": here}, threads=order.threads, log=order.log)
        self._workers.add(worker)
        try:
            last = follow(worker, timeout=order.timeout, on_event=tell)
        finally:
            worker.kill()
            self._workers.discard(worker)
        if self._stopped:
            raise Stopped("the run was stopped")
        return last

    def each(self, items: Iterable[Item], work: Callable[[Item], None]) -> None:
        """Calls `work` with one item after another."""
        for item in items:
            work(item)

    def stop(self) -> None:
        """Kills the processes that are running."""
        self._stopped = True
        for worker in list(self._workers):
            worker.kill()
