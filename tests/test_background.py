"""Jobs in the background: order, giving way, errors, abandoning, interrupts, forks, and leaving the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from recollect.memory_backends import background
from recollect.memory_backends.background import Job, checkpoint, submit
from recollect.memory_backends.threads import library_threads

PATIENCE = 60.0
"""Seconds after which a wait has gone wrong; nothing here takes one of them."""


@pytest.fixture(autouse=True)
def _one_builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(background, "builder_threads", lambda: 1)
    yield
    assert not background._builder.queue or all(job.state != "waiting" for _, _, job in background._builder.queue)


def held() -> tuple[Job[str], threading.Event, threading.Event]:
    """A job that is running now, and goes on when the second event is set, checking in between."""
    running, go_on = threading.Event(), threading.Event()

    def task() -> str:
        running.set()
        while not go_on.wait(0.005):
            checkpoint()
        return "held"

    job = submit(task, size=100)
    assert running.wait(PATIENCE)
    return job, running, go_on


def test_runs_in_a_thread_of_its_own_with_one_library_thread() -> None:
    job = submit(lambda: (threading.get_ident(), library_threads(), threading.current_thread().daemon), size=1)
    waiting = threading.Event()
    while job.pending:
        waiting.wait(0.005)
    ident, threads, daemon = job.result()
    assert ident != threading.get_ident()
    assert threads == 1
    assert not daemon
    assert job.seconds > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
def test_builders_have_a_lower_priority() -> None:
    job = submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), size=1)
    while job.pending:
        threading.Event().wait(0.005)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert job.result() == min(19, mine + background.NICER)


def test_a_result_that_nobody_has_begun_is_made_by_who_wants_it() -> None:
    blocking, _, go_on = held()
    # Larger than the one that runs, so that it does not give way.
    job = submit(threading.get_ident, size=1000)
    assert job.result() == threading.get_ident()
    assert blocking.pending
    go_on.set()
    assert blocking.result() == "held"


def test_a_larger_build_gives_way_to_smaller_ones() -> None:
    blocking, _, go_on = held()
    order: list[int] = []
    jobs = [submit(lambda size=size: order.append(size), size=size) for size in (200, 50, 10)]
    while jobs[1].pending or jobs[2].pending:
        threading.Event().wait(0.005)
    assert blocking.pending
    assert jobs[0].state == "waiting"
    go_on.set()
    while jobs[0].pending:
        threading.Event().wait(0.005)
    assert sorted(order[:2]) == [10, 50]
    assert order[2] == 200
    assert blocking.result() == "held"


def test_errors_come_with_the_result_however_often_it_is_asked_for() -> None:
    def fail() -> None:
        raise ValueError("a build that fails")

    job = submit(fail, size=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="a build that fails"):
            job.result()
    assert job.state == "failed"
    assert submit(lambda: 3, size=1).result() == 3  # the builder lives on


def test_abandoned_jobs_end_at_the_next_checkpoint_and_others_never_begin() -> None:
    running, _, _ = held()
    queued = submit(lambda: 1, size=1000)
    for job in (queued, running):
        job.abandon()
        job.join()
        assert job.state == "abandoned"
        with pytest.raises(RuntimeError, match="abandoned"):
            job.result()


def test_an_interrupt_while_waiting_leaves_the_job_as_it_is() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    try:
        interrupted_while_waiting()
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted_while_waiting() -> None:
    job, _, go_on = held()
    main = threading.main_thread().ident
    assert main is not None
    assert threading.get_ident() == main
    timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        job.result()
    timer.join()
    assert job.pending
    go_on.set()
    assert job.result() == "held"


def test_an_interrupted_build_can_be_asked_for_again() -> None:
    blocking, _, go_on = held()
    interrupted: list[bool] = []

    def task() -> int:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return 7

    job = submit(task, size=1000)
    with pytest.raises(KeyboardInterrupt):
        job.result()
    assert job.result() == 7
    go_on.set()
    blocking.result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_of_a_fork_builds_by_itself() -> None:
    blocking, _, go_on = held()
    queued = submit(lambda: "queued", size=1000)
    go_on.set()  # in the child nobody would
    child = os.fork()
    if not child:
        try:
            fine = blocking.result() == "held" and queued.result() == "queued" and submit(lambda: 5, 1).result() == 5
            os._exit(0 if fine else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert blocking.result() == "held"
    assert queued.result() == "queued"


LEAVING = """
import threading, time
from recollect.memory_backends.background import checkpoint, submit

assert threading.active_count() == 1, "importing starts threads"
running = threading.Event()

def build():
    running.set()
    for _ in range(100_000):
        time.sleep(0.01)
        checkpoint()

jobs = [submit(build, size=1) for _ in range(50)]
running.wait()
print("leaving", flush=True)
"""


def test_leaving_the_interpreter_waits_for_no_queue() -> None:
    # 50 builds of a quarter of an hour each: they must not be waited for, nor killed inside a library.
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "leaving\n"
    assert not done.stderr
