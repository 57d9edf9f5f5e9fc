"""Work in the background: builds that an append starts and a later append takes in.

A build is a `Job`. Builder threads run jobs one after another, the smallest first, at a lower priority than the rest
of the process (on Linux), each library inside on one thread. They start when there is work and end when there is none,
so importing the package starts nothing, and a process that has nothing to build has no threads to wait for.

* Whoever needs a result takes it by `Job.result()`: a job that nobody has begun is then run by the caller, at the
  caller's priority; one that is being run is waited for.
* A build calls `checkpoint()` now and then. There a larger build gives way to smaller ones that have come in
  meanwhile, and a build that nobody wants any more ends. So does every build once the main thread has ended: leaving
  the interpreter waits for one stretch between checkpoints, not for the queue.
* A child of a fork has none of its parent's threads: it runs a job itself when it needs the result.

Nothing here knows of memories. When a result is taken in is for the caller to decide, and must not depend on when it
was ready: see `segments` and `trained`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

from recollect.memory_backends.threads import builder_threads, enter_worker

Result = TypeVar("Result")
NICER = 10
"""By how much a builder is nicer than the process: where both want a core it gets a tenth. No more, or on a machine
that others keep busy no build would come about, and an append that needs it would wait behind everybody."""

_current = threading.local()
_counter = itertools.count()


class _Abandoned(BaseException):
    """Ends a build that nobody wants; no library may catch it as an ordinary error."""


class _Builder:
    """The queue and its threads. One to a process; made anew in the child of a fork."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.queue: list[tuple[int, int, Job[Any]]] = []
        self.threads = 0

    def take(self, below: int | None = None) -> Job[Any] | None:
        """Claims the smallest job that waits (smaller than `below`, if given); None where there is none."""
        with self.changed:
            while self.queue:
                if self.queue[0][2].state != "waiting":
                    heapq.heappop(self.queue)
                elif below is not None and self.queue[0][0] >= below:
                    return None
                else:
                    job = heapq.heappop(self.queue)[2]
                    job.state = "running"
                    return job
            return None

    def work(self) -> None:
        """What a builder thread does."""
        enter_worker()
        _lower_priority()
        while True:
            job = self.take() if threading.main_thread().is_alive() else None
            if job is None:
                with self.changed:
                    # Between `take` and here a job may have come in that counts on this thread.
                    if threading.main_thread().is_alive() and any(one[2].state == "waiting" for one in self.queue):
                        continue
                    self.threads -= 1
                    return
            _run(job)


_builder = _Builder()


def _after_fork() -> None:
    global _builder
    _builder = _Builder()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Job(Generic[Result]):
    """A build that runs in the background. Make one with `submit`.

    Attributes:
        size: what it is ordered by, such as the number of keys.
        state: "waiting", "running", "done", "failed" or "abandoned".
        seconds: how long it ran, once it has.
    """

    def __init__(self, task: Callable[[], Result], size: int) -> None:
        self.task: Callable[[], Result] | None = task
        self.size = size
        self.state: Literal["waiting", "running", "done", "failed", "abandoned"] = "waiting"
        self.seconds = 0.0
        self.unwanted = False
        self.error: BaseException | None = None
        self._value: Result | None = None
        self._builder = _builder

    @property
    def pending(self) -> bool:
        """Whether it still waits or runs."""
        return self.state in ("waiting", "running")

    def result(self) -> Result:
        """What the build gave; runs it here if nobody has begun, else waits.

        Raises:
            Exception: what the build raised.
            RuntimeError: it was abandoned.
        """
        while self.pending:
            with _builder.changed:
                lost = self._builder is not _builder  # queued or begun before a fork: no thread here works on it
                if lost or self.state == "waiting":
                    self._builder, self.state, mine = _builder, "running", True
                else:
                    mine = False
                    if self.state == "running":
                        _builder.changed.wait()
            if mine:
                _run_here(self)
        if self.error is not None:
            raise self.error
        if self.state == "abandoned":
            raise RuntimeError("the build was abandoned")
        return self._value  # type: ignore[return-value]

    def outcome(self) -> Result | None:
        """What the build gave, None where it failed: then `error` tells; runs or waits like `result`."""
        with contextlib.suppress(Exception):
            return self.result()
        return None

    def abandon(self) -> None:
        """Says that nobody wants the result: it is not begun any more, or ends at its next checkpoint."""
        with _builder.changed:
            self.unwanted = True
            if self.state == "waiting":
                self._end("abandoned")

    def join(self) -> None:
        """Returns when no thread works on it."""
        with _builder.changed:
            while self.state == "running" and self._builder is _builder:
                _builder.changed.wait()

    def _end(self, state: Literal["done", "failed", "abandoned"]) -> None:
        self.state = state
        self.task = None  # and with it the keys that it was built from
        _builder.changed.notify_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> Job[Result]:
        # What is built is never changed, so that the copy of a memory may share it.
        return self


def submit(task: Callable[[], Result], size: int) -> Job[Result]:
    """Queues a task; the smallest is run first.

    Args:
        task: is called once, in a builder thread or in the one that asks for the result. It calls `checkpoint`.
        size: how much work it is, in any unit that all jobs share; keys, here.
    """
    job = Job(task, size)
    with _builder.changed:
        heapq.heappush(_builder.queue, (size, next(_counter), job))
        start = _builder.threads < builder_threads()
        _builder.threads += start
    if start:
        try:
            # Not a daemon: the interpreter must not be taken down under a library that is at work.
            threading.Thread(target=_builder.work, name="recollect-builder", daemon=False).start()
        except RuntimeError:  # no thread to be had, or the interpreter is about to end: whoever wants it builds it
            with _builder.changed:
                _builder.threads -= 1
    return job


def release(objects: list[Any]) -> None:
    """Lets go of what a list holds in the background: freeing a large index takes a millisecond and more."""
    if objects:
        submit(objects.clear, 0)


def finished(value: Result) -> Job[Result]:
    """A job that is done and gave `value`."""
    job = Job(lambda: value, 0)
    job.result()
    return job


def checkpoint() -> None:
    """To be called between the stretches of a build: lets smaller builds go first, and ends one that nobody wants.

    Outside a builder thread it does nothing.
    """
    job: Job[Any] | None = getattr(_current, "job", None)
    if job is None:
        return
    while True:
        if job.unwanted or not threading.main_thread().is_alive():
            raise _Abandoned
        smaller = _builder.take(below=job.size)
        if smaller is None:
            return
        try:
            _run(smaller)
        finally:
            _current.job = job


def _run(job: Job[Any]) -> None:
    """Runs a job in a builder thread; whatever comes of it is kept with the job."""
    _current.job = job
    begun = time.perf_counter()
    value, error, state = None, None, "done"
    try:
        assert job.task is not None
        value = job.task()
    except _Abandoned:
        state = "abandoned"
    except BaseException as raised:
        error, state = raised, "failed"
    finally:
        _current.job = None
    with _builder.changed:
        job._value, job.error, job.seconds = value, error, time.perf_counter() - begun
        job._end("abandoned" if job.unwanted else state)  # type: ignore[arg-type]


def _run_here(job: Job[Any]) -> None:
    """Runs a job in the thread that wants its result. An interrupt (Ctrl-C) leaves it to be asked for again."""
    begun = time.perf_counter()
    try:
        assert job.task is not None
        value = job.task()
    except Exception as raised:
        with _builder.changed:
            job.error = raised
            job._end("failed")
    except BaseException:
        with _builder.changed:
            job.state = "waiting"
            heapq.heappush(_builder.queue, (job.size, next(_counter), job))
            _builder.changed.notify_all()
        raise
    else:
        with _builder.changed:
            job._value, job.seconds = value, time.perf_counter() - begun
            job._end("done")


def _lower_priority() -> None:
    # Only Linux has a priority for each thread; elsewhere this would slow the whole process down.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICER))
