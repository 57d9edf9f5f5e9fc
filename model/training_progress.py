"""What surrounds the training loop: its log, its progress bar, and stopping it at the end of a step."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recollect.memory_backends.atomic import write_text


class Interruption:
    """While active, Ctrl-C and SIGTERM set `asked` instead of stopping the program in the middle of a step.

    A step moves streams, memory and weights one after the other; a state saved between them would belong to no step. A
    second signal stops at once, unless `patient`: torchrun may repeat what a terminal sent, and ends by itself whatever
    takes too long. Outside of the main thread, where Python delivers no signals, nothing is changed.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.asked = False
        self._patient = patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._patient:
            raise KeyboardInterrupt
        self.asked = True


class Log:
    """JSON lines, one object for each step and each validation; lines of steps that will be run again are dropped."""

    def __init__(self, path: Path, *, keep_until: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.is_file() and keep_until:
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= keep_until:
                        kept.append(line + "\n")
        write_text(path, "".join(kept))
        self._path = path

    def write(self, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


@contextlib.contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[Callable[[int, str], None]]:
    """Yields a function that shows a step and a note."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("training", total=total, note="")

        def advance(step: int, note: str) -> None:
            bar.update(task, completed=step, note=note)

        yield advance
