"""Memories of sealed parts while their indexes are built: answers do not depend on when a build is ready."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from recollect.memory_backends import background, segments
from recollect.memory_backends.background import Job
from recollect.memory_backends.errors import BuildFailed, ClosedMemory
from recollect.memory_backends.merging import Run
from recollect.memory_backends.segments import PartOptions, SegmentedBackend
from recollect.memory_backends.testing_oracle import OracleMemory, check_answer

M, C, D = 2, 60, 6
OPTIONS = PartOptions(part_size=16, run_size=4, fan_out=2)


class Half(SegmentedBackend):
    """Parts that find every second key only, so that answers tell which parts serve; and builds that can be held."""

    name = "half"
    background_from = 1
    timing = "whenever"
    fails: Callable[[Run], bool] = staticmethod(lambda run: False)

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


def timed_submit(task: functools.partial[Any], size: int) -> Job[Any]:
    """Begins a job as the memory's `timing` says: at once, never before it is wanted, or whenever a thread comes."""
    memory: Half = task.func.__self__
    run: Run = task.args[1]

    def work() -> Any:
        if memory.fails(run):
            raise RuntimeError(f"no index over {run}")
        return task()

    if memory.timing == "whenever":
        return background.submit(work, size)
    job = Job(work, size)
    if memory.timing == "early":
        try:
            job.result()
        except RuntimeError:
            assert job.state == "failed"
    return job


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "submit", timed_submit)


def make(timing: str = "whenever", options: PartOptions = OPTIONS, **more: Any) -> Half:
    backend = Half(options, **{"num_memories": M, "capacity": C, "dim": D, **more})
    backend.timing = timing
    return backend


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Timings(RuleBasedStateMachine):
    """The same calls to three memories, which build early, late, and whenever a thread comes to it."""

    failing = False

    @initialize()
    def begin(self) -> None:
        self.backends = [make(timing) for timing in ("early", "late", "whenever")]
        for backend in self.backends:
            backend.fails = lambda run: self.failing and run.start // len(run) % 5 == 3
        self.oracle = OracleMemory(M, C, "inner_product")

    def each(self, call: Callable[[Half], Any]) -> list[Any]:
        """The answers of all three; a failed build is told by all of them or by none, and the call made again."""
        answers = []
        for backend in self.backends:
            failures = []
            while True:
                try:
                    answers.append((call(backend), failures))
                    break
                except BuildFailed as error:
                    failures.append(str(error))
        assert all(failures == answers[0][1] for _, failures in answers)
        return [answer for answer, _ in answers]

    @rule(
        memories=st.sampled_from([[0], [1], [0, 1]]),
        count=st.integers(1, 7) | st.integers(1, 80),
        seed=st.integers(0, 999),
    )
    def add(self, memories: list[int], count: int, seed: int) -> None:
        keys = vectors(len(memories), count, D, seed=seed)
        expected = self.oracle.add(keys, memories)
        for slots in self.each(lambda backend: backend.add(keys, memories=memories)):
            assert (slots.numpy() == expected).all()

    @rule(k=st.integers(1, 12), seed=st.integers(1000, 1999))
    def search(self, k: int, seed: int) -> None:
        queries = vectors(M, 3, D, seed=seed)
        first, *others = [backend.search(queries, k) for backend in self.backends]
        check_answer(first, queries, k, self.oracle, range(M), exact=False)
        for other in others:
            assert torch.equal(first.slots, other.slots)
            assert torch.equal(first.scores, other.scores)

    @rule(memory=st.integers(0, 1))
    def reset(self, memory: int) -> None:
        self.oracle.reset([memory])
        self.each(lambda backend: backend.reset([memory]))

    @rule()
    def wait(self) -> None:
        self.each(lambda backend: backend.wait())
        assert [backend.stats().pending_builds for backend in self.backends] == [0, 0, 0]

    @rule()
    def restore(self) -> None:
        # A memory that was saved in the middle of its builds goes on as if nothing had been.
        restored = make("late")
        restored.fails = self.backends[0].fails
        with tempfile.TemporaryDirectory() as folder:
            self.backends[2]._save(Path(folder))
            restored.ring.stored.copy_(self.backends[2].ring.stored)
            restored.ring.totals.copy_(self.backends[2].ring.totals)
            restored._restore(Path(folder))
        self.backends[1] = restored

    def teardown(self) -> None:
        if hasattr(self, "backends"):
            for backend in self.backends:
                backend.close()


class FailingTimings(Timings):
    failing = True


@pytest.mark.parametrize("machine", [Timings, FailingTimings])
def test_answers_do_not_depend_on_when_a_build_is_ready(machine: type[Timings]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


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
    backend.fails = lambda run: run == Run(0, 4)
    keys = vectors(1, 10, D)
    backend.add(keys[:, :4])
    with pytest.raises(BuildFailed, match=r"keys 0 to 3 of memory 0.*no index over"):
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
