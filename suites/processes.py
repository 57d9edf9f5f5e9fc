"""Running measurements in processes of their own, and telling a crash from an answer."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .environment import THREAD_VARIABLES

Event = dict[str, Any]

POLL_SECONDS = 0.2
LAST = ("end", "died", "timeout", "lost")
LOG_LINES = 6
"""Lines of a dead process's log that its reason quotes."""


class WorkerProcess:
    """One process of `worker`, and what it says.

    Args:
        task: what it is to do, as JSON.
        threads: for torch and every library.
        log: file that gets what it prints.
        environment: variables of the process; None is those of this one.
    """

    def __init__(
        self, task: dict[str, Any], *, threads: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        inherited = os.environ if environment is None else environment
        variables = {**inherited, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "PYTHONUNBUFFERED": "1"}
        # Threads that wait by spinning take the cores from each other as soon as anything else runs on the machine:
        # beside one busy process on two cores, a pass of 18 s took 370 s, and 22 s with threads that sleep.
        variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "recollect.suites.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=variables,
                start_new_session=True,  # so that Ctrl-C reaches this process alone, which then ends its workers
            )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({**task, "threads": threads}).encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once: its exit code tells
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.decode("utf-8", "replace"))
        self._lines.put(None)

    def events(self, *, timeout: float) -> Iterator[Event]:
        """What the process tells, until it ends.

        A process that has been silent about a finished measurement for `timeout` seconds is killed; its last event is
        then 'timeout'. One that ends without saying so gives 'died' with the reason.
        """
        since = time.monotonic()
        while True:
            try:
                line = self._lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                line = ""
            if line is None:
                self.process.wait()
                yield {"event": "died", "reason": self._reason()}
                return
            if line:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # half a line of a process that was killed
                if event["event"] in ("start", "step", "done", "failed"):
                    since = time.monotonic()
                yield event
                if event["event"] in ("end", "cannot-write"):
                    self.process.wait()
                    return
            if time.monotonic() - since > timeout:
                self.kill()
                yield {"event": "timeout", "reason": f"not finished after {timeout:.0f} s"}
                return

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _reason(self) -> str:
        code = self.process.returncode
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            how = f"the measuring process was ended by {name}"
        else:
            how = f"the measuring process ended with exit code {code}"
        last = self._last_lines()
        return f"{how}; its last words: {last}" if last else how

    def _last_lines(self) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return " | ".join(line.strip() for line in lines[-LOG_LINES:] if line.strip())[-600:]


def run_task(
    task: dict[str, Any], *, threads: int, log: Path, timeout: float, on_event: Callable[[Event], None]
) -> Event:
    """Runs one task to its end.

    Args:
        task: as for `WorkerProcess`.
        on_event: is told every event but the last.

    Returns:
        The last event: 'end', 'died' or 'timeout'.

    Raises:
        OSError: the process could not write; nothing is written half.
    """
    worker = WorkerProcess(task, threads=threads, log=log)
    try:
        return follow(worker, timeout=timeout, on_event=on_event)
    finally:
        worker.kill()


def follow(worker: WorkerProcess, *, timeout: float, on_event: Callable[[Event], None]) -> Event:
    """Listens to a process until it ends; arguments, result and errors as of `run_task`."""
    last: Event = {"event": "end"}
    for event in worker.events(timeout=timeout):
        if event["event"] == "cannot-write":
            raise cannot_write(event)
        if event["event"] in LAST:
            last = event
        else:
            on_event(event)
    return last


def cannot_write(event: Event) -> OSError:
    """The error for a process that could not write its results."""
    return OSError(
        f"cannot write {event['path']}: {event['reason']}; make room or give another output folder. "
        "What was measured before is kept"
    )
