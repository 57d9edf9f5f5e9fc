"""Memories of sealed parts while their indexes are built: answers do not depend on when a build is ready."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from background_timings import C, D, M, check_timings, timed_submit, vectors

from recollect.memory_backends import background, segments
from recollect.memory_backends.errors import BuildFailed, ClosedMemory
from recollect.memory_backends.merging import Run
from recollect.memory_backends.segments import PartOptions, SegmentedBackend
from recollect.memory_backends.testing_oracle import OracleMemory, check_answer

OPTIONS = PartOptions(part_size=16, run_size=4, fan_out=2)


class Half(SegmentedBackend):
    """Parts that find every second key only, so that answers tell which parts serve; and builds that can be held."""

    name = "half"
    background_from = 1
    timing = "whenever"
    fails: Callable[..., bool] = staticmethod(lambda *which: False)

    def _build_part(self, keys: np.ndarray, seed: int) -> np.ndarray:
        return keys.copy()

    def _search_part(self, part: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ part.T
        scores[:, 1::2] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        return best, np.where(np.isfinite(best), order, -1)

    def _part_bytes(self, part: np.ndarray) -> int:
        return int(part.nbytes)


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "submit", timed_submit)


def make(timing: str = "whenever", options: PartOptions = OPTIONS, **more: Any) -> Half:
    backend = Half(options, **{"num_memories": M, "capacity": C, "dim": D, **more})
    backend.timing = timing
    return backend


@pytest.mark.parametrize("failing", [False, True])
def test_answers_do_not_depend_on_when_a_build_is_ready(failing: bool) -> None:
    def made(timing: str) -> Half:
        backend = make(timing)
        backend.fails = lambda memory, run, seed: failing and run.start // len(run) % 5 == 3
        return backend

    check_timings(made)


def test_an_index_serves_from_the_key_on_that_was_foretold() -> None:
    backend = make("late", num_memories=1)
    for _ in range(4):
        backend.add(vectors(1, 1, D))
    assert backend.stats().pending_builds == 1  # keys 0 to 3; taken in three keys later
    backend.add(vectors(1, 2, D))
    assert backend.parts == [()]
    assert backend.stats().stalled_seconds == 0
    backend.add(vectors(1, 1, D))
    assert [part.run for part in backend.parts[0]] == [Run(0, 4)]
    assert backend.stats().stalled_seconds > 0  # nobody had begun
    assert backend.stats().build_seconds > 0


def test_without_background_a_run_is_sealed_by_the_append_that_fills_it() -> None:
    backend = make("late", PartOptions(part_size=16, run_size=4, fan_out=2, background=False), num_memories=1)
    for _ in range(8):
        backend.add(vectors(1, 1, D))
    assert [part.run for part in backend.parts[0]] == [Run(0, 8)]
    assert backend.stats().pending_builds == 0
    assert backend.stats().stalled_seconds == 0


def test_a_load_is_built_before_it_returns() -> None:
    backend = make("late", num_memories=1)
    backend.add(vectors(1, 30, D))
    assert [part.run for part in backend.parts[0]] == [Run(0, 16), Run(16, 24), Run(24, 28)]
    assert backend.stats().pending_builds == 0


def test_waiting_takes_in_what_was_begun() -> None:
    backend = make(num_memories=1)
    for step in range(17):
        backend.add(vectors(1, 1, D, seed=step))
    assert sum(len(part.run) for part in backend.parts[0]) < 16
    backend.wait()
    assert [part.run for part in backend.parts[0]] == [Run(0, 16)]
    assert backend.stats().pending_builds == 0


def test_a_failed_build_is_told_once_and_its_keys_stay() -> None:
    backend = make("late", num_memories=1)
    backend.fails = lambda memory, run, seed: run == Run(0, 4)
    keys = vectors(1, 10, D)
    backend.add(keys[:, :4])
    with pytest.raises(BuildFailed, match=r"keys 0 to 3 of memory 0.*no index by"):
        backend.add(keys[:, 4:7])
    assert backend.lengths.tolist() == [4]  # an append takes place or it does not
    backend.add(keys[:, 4:7])
    oracle = OracleMemory(1, C, "inner_product")
    oracle.add(keys[:, :7], [0])
    check_answer(backend.search(keys, 5), keys, 5, oracle, [0], exact=True)
    backend.add(keys[:, 7:])
    backend.wait()
    assert Run(0, 4) not in [part.run for part in backend.parts[0]]


def test_out_of_memory_in_a_build_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Half, keys: np.ndarray, seed: int) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(Half, "_build_part", no_memory)
    backend = make("late", num_memories=1)
    backend.add(vectors(1, 4, D))
    with pytest.raises(MemoryError, match="index over 4 keys"):
        backend.add(vectors(1, 3, D))
    backend.add(vectors(1, 3, D))
    assert backend.lengths.tolist() == [7]


def held_build(monkeypatch: pytest.MonkeyPatch) -> tuple[Half, threading.Event, threading.Event]:
    running, ended = threading.Event(), threading.Event()

    def build(self: Half, keys: np.ndarray, seed: int) -> np.ndarray:
        running.set()
        try:
            while True:  # no end but being abandoned
                background.checkpoint()
                threading.Event().wait(0.002)
        finally:
            ended.set()

    monkeypatch.setattr(Half, "_build_part", build)
    backend = make(num_memories=1)
    backend.add(vectors(1, 4, D))
    assert running.wait(60)
    return backend, running, ended


def test_closing_ends_what_is_being_built(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _, ended = held_build(monkeypatch)
    backend.close()
    assert ended.is_set()
    with pytest.raises(ClosedMemory):
        backend.add(vectors(1, 1, D))


def test_a_reset_ends_what_is_being_built(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _, ended = held_build(monkeypatch)
    backend.reset()
    assert backend.stats().pending_builds == 0
    assert ended.wait(60)
    assert (backend.search(vectors(1, 2, D), 3).slots == -1).all()
    backend.add(vectors(1, 3, D))
    assert backend.search(vectors(1, 2, D), 3).slots.sort().values.tolist() == [[[0, 1, 2]] * 2]


def test_searching_goes_on_while_an_index_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _, ended = held_build(monkeypatch)
    assert backend.search(vectors(1, 5, D), 4).slots.sort().values.tolist() == [[[0, 1, 2, 3]] * 5]
    backend.add(vectors(1, 2, D))
    assert not ended.is_set()
    backend.close()
