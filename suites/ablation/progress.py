"""Progress of an ablation: bars on a terminal, a line for each finished thing elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Reporter:
    """Tells what an ablation does, on standard error. Use as a context manager; its methods may be called by threads.

    Args:
        enabled: tell anything at all.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.enabled = enabled
        self.live = enabled and self.console.is_terminal
        self.started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.live,
        )
        self._lock = threading.Lock()
        self._overall: TaskID | None = None
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> Reporter:
        self._progress.start()
        self._overall = self._progress.add_task("ablation", total=1.0, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def working(self, key: str, label: str, share: float, detail: str = "") -> None:
        """What a process is at."""
        if not self.live:
            return
        with self._lock:
            if key not in self._running:
                self._running[key] = self._progress.add_task(label, total=1.0, left="")
            self._progress.update(self._running[key], description=label, completed=share, left=detail)

    def ended(self, key: str) -> None:
        """A process is done."""
        with self._lock:
            if key in self._running:
                self._progress.remove_task(self._running.pop(key))

    def finished(self, done: int, of: int, text: str, left: float) -> None:
        """One more thing is done."""
        if not self.enabled:
            return
        with self._lock:
            if self._overall is not None:
                spent = time.monotonic() - self.started
                total = max(spent + left, 1e-9)
                self._progress.update(self._overall, completed=spent, total=total, left=f"{minutes(left)} left")
        self.note(f"[{done}/{of}] {text}; about {minutes(left)} left")


def minutes(seconds: float) -> str:
    """A time for people."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
