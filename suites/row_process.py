"""Rows measured in a process of their own: what it tells becomes rows, and what ends it becomes their reason."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recollect.memory_backends import BackendUnavailable
from recollect.memory_backends.registry import backend_class

from .processes import Event, run_task

OnProgress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it, and how much there is."""

Row = TypeVar("Row")
"""A frozen dataclass with `status`, `reason` and `from_json`."""

TELL_SECONDS = 0.2


def measure_rows(
    task: Mapping[str, Any],
    backend: str,
    blanks: Sequence[Row],
    *,
    threads: int,
    log: Path,
    timeout: float,
    keep: Callable[[Row], None],
    tell: OnProgress,
) -> None:
    """Runs a task whose 'done' events are rows, in the order of `blanks`.

    Args:
        task: for `recollect.suites.worker`.
        backend: its name; where its library is missing, every row is skipped with the pip command.
        blanks: the rows before anything is measured.
        threads, log, timeout: as for `run_task`.
        keep: is told each row, and of one that cannot be measured the reason.
        tell: is told the progress.
    """
    left = list(blanks)

    def drop(status: str, reason: str) -> None:
        while left:
            keep(dataclasses.replace(left.pop(0), status=status, reason=reason))  # type: ignore[type-var]

    def hear(event: Event) -> None:
        if event["event"] == "progress":
            tell(str(event["what"]), int(event["done"]), int(event["of"]))
        elif event["event"] == "done":
            blank: Any = left.pop(0)
            keep(type(blank).from_json(event["row"]))
        elif event["event"] == "failed":
            drop("failed", str(event["reason"]))

    try:
        backend_class(backend).check_available()
    except BackendUnavailable as error:
        drop("skipped", str(error))
        return
    last = run_task(dict(task), threads=threads, log=log, timeout=timeout, on_event=hear)
    drop("failed", str(last.get("reason", "the measuring process told nothing")))


def progress_events(tell: Callable[..., None]) -> OnProgress:
    """The progress that a measuring process tells, a few times a second at most."""
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > TELL_SECONDS:
            last = now
            tell("progress", what=what, done=done, of=total)

    return progress
