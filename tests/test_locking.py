"""The lock of a memory: readers together, a writer alone, nobody starving."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable

import pytest

from recollect.memory_backends.errors import UnsupportedOperation
from recollect.memory_backends.locking import ReadersWriterLock

SOON = 5.0
"""Seconds after which a thread that has not come forward never will."""


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def test_readers_are_together() -> None:
    lock = ReadersWriterLock()
    inside = threading.Barrier(3)

    def read() -> None:
        with lock.reading:
            inside.wait(SOON)  # passes only when all three are within

    threads = [start(read) for _ in range(3)]
    for thread in threads:
        thread.join(SOON)
    assert not inside.broken


def test_a_writer_is_alone() -> None:
    lock = ReadersWriterLock()
    inside = {"reading": 0, "writing": 0}
    guard, wrong = threading.Lock(), []
    end = time.monotonic() + 0.4

    def work(kind: str) -> None:
        side = lock.reading if kind == "reading" else lock.writing
        while time.monotonic() < end:
            with side:
                with guard:
                    inside[kind] += 1
                    if inside["writing"] > 1 or (inside["writing"] and inside["reading"]):
                        wrong.append(dict(inside))
                time.sleep(0.0002)
                with guard:
                    inside[kind] -= 1

    threads = [start(lambda kind=kind: work(kind)) for kind in ("reading", "reading", "reading", "writing", "writing")]
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert not wrong


@pytest.mark.parametrize("eager", ["reading", "writing"])
def test_nobody_starves(eager: str) -> None:
    # Three threads take one side again and again without a pause; the other side must get its turns all the same.
    lock = ReadersWriterLock()
    sides = {"reading": lock.reading, "writing": lock.writing}
    other = sides["writing" if eager == "reading" else "reading"]
    stop = threading.Event()

    def hog() -> None:
        while not stop.is_set():
            with sides[eager]:
                time.sleep(0.001)

    threads = [start(hog) for _ in range(3)]
    turns = []

    def modest() -> None:
        for _ in range(20):
            with other:
                turns.append(1)

    patient = start(modest)
    patient.join(SOON)
    stop.set()
    for thread in threads:
        thread.join(SOON)
    assert len(turns) == 20


def test_it_may_be_taken_again() -> None:
    lock = ReadersWriterLock()
    with lock.writing, lock.reading, lock.writing:
        pass
    # Also while a writer waits, which lets no *new* reader in.
    with lock.reading:
        writer = start(lambda: lock.acquire_writing())
        wait_until(lambda: lock._waiting_writers == 1)
        with lock.reading:
            pass
    writer.join(SOON)
    assert not writer.is_alive()


def test_reading_then_writing_is_refused() -> None:
    lock = ReadersWriterLock()
    with lock.reading, pytest.raises(UnsupportedOperation, match="unchanged"), lock.writing:
        pass
    with lock.writing:
        pass


def test_an_exception_gives_it_back() -> None:
    lock = ReadersWriterLock()
    for side in (lock.reading, lock.writing):
        with pytest.raises(ZeroDivisionError), side:
            raise ZeroDivisionError
    taken = []

    def work() -> None:
        with lock.writing:
            taken.append(1)

    start(work).join(SOON)
    assert taken


def test_a_copy_is_free() -> None:
    lock = ReadersWriterLock()
    with lock.writing:
        for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            free = start(lambda other=other: other.acquire_writing())
            free.join(SOON)
            assert not free.is_alive()
