"""Progress of a comparison: a bar with the time that is left on a terminal, a line for each cell elsewhere."""

from __future__ import annotations

import statistics
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from .cells import Cell
from .plan import PlannedCell


class Estimate:
    """How long the cells that are left will take, from those that were measured."""

    def __init__(self) -> None:
        self._ratios: dict[str, list[float]] = {}

    def expected(self, cell: PlannedCell) -> float:
        """Seconds that a cell will take."""
        known = self._ratios.get(cell.backend)
        if not known:
            every = [ratio for ratios in self._ratios.values() for ratio in ratios]
            known = [statistics.median(every)] if every else [1.0]
        return statistics.mean(known) * self._weight(cell)

    def learn(self, cell: PlannedCell, seconds: float) -> None:
        """Takes in what a cell took."""
        self._ratios.setdefault(cell.backend, []).append(seconds / self._weight(cell))

    @staticmethod
    def _weight(cell: PlannedCell) -> float:
        return 2.0 + cell.memory_size / 2048


class Reporter:
    """Shows a comparison's progress. Use as a context manager.

    Args:
        enabled: show anything at all.
        console: where to; standard error by default, so that `--json` output stays clean.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.enabled = enabled
        self.live = enabled and self.console.is_terminal
        self.started = time.monotonic()
        self._last_line = ""
        self._running: dict[str, float] = {}
        self._expected = 0.0
        self._progress = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.live,
            transient=False,
        )
        self._overall: TaskID | None = None
        self._current: TaskID | None = None

    def __enter__(self) -> Reporter:
        self._progress.start()
        self._overall = self._progress.add_task("comparison", total=1.0, left="")
        self._current = self._progress.add_task("preparing", total=1.0, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def step(self, what: str, share: float) -> None:
        """Work that is no cell: what it is and which share of it is done."""
        assert self._current is not None
        if self.live:
            self._progress.update(self._current, description=what, completed=share, total=1.0, left="")
            self._refresh()
        elif self.enabled and what != self._last_line:
            self._last_line = what
            self.note(what)

    def running(self, what: str, share: float) -> None:
        """One of the things that are being measured, and which share of it is done."""
        first = what not in self._running
        self._running[what] = share
        if self.live:
            self.step("; ".join(self._running), sum(self._running.values()) / len(self._running))
        elif first and self.enabled:
            self.note(what)

    def ended(self, what: str) -> None:
        """It is measured, or given up."""
        self._running.pop(what, None)

    def expect(self, left: float) -> None:
        """Tells how many seconds all that is left will take."""
        self._expected = time.monotonic() - self.started + left
        self._refresh()

    def _refresh(self) -> None:
        """Moves the bar of the whole to where it is by now."""
        if self._overall is None or not self._expected:
            return
        spent = time.monotonic() - self.started
        # What takes longer than expected is nearly done until it is done.
        total = max(self._expected, spent * 1.01)
        left = f"about {_minutes(total - spent)} left"
        self._progress.update(self._overall, completed=spent, total=total, left=left)

    def cell(self, number: int, total: int, cell: Cell, left: float) -> None:
        """Tells of a finished cell."""
        if not self.enabled:
            return
        head = f"[{number}/{total}] {label(cell.spec, cell.memory_size)}"
        if cell.status != "ok":
            first = cell.reason.splitlines()[0] if cell.reason else ""
            self.note(f"{head}: {cell.status}: {first}")
            return
        figures = f"perplexity {cell.perplexity:.3f}"
        if cell.recall_at_k is not None and cell.search_ms is not None:
            figures = f"recall {cell.recall_at_k:.3f}, {figures}, search {cell.search_ms:.1f} ms"
        tail = "" if self.live else f" ({cell.seconds:.1f} s; about {_minutes(left)} left)"
        self.note(f"{head}: {figures}{tail}")


def label(spec: str, memory_size: int) -> str:
    """How a cell is called where people read it."""
    return f"{spec}, {memory_size} keys" if memory_size else "no memory"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
