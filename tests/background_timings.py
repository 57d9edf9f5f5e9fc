"""The same calls to three memories that build early, late, and whenever a thread comes to it: equal answers."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from recollect.memory_backends import background
from recollect.memory_backends.background import Job
from recollect.memory_backends.errors import BuildFailed
from recollect.memory_backends.testing_oracle import OracleMemory, check_answer

M, C, D = 2, 60, 6


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timed_submit(task: functools.partial[Any], size: int) -> Job[Any]:
    """Begins a job as the memory's `timing` says: at once, never before it is wanted, or whenever a thread comes.

    The memory's `fails(*arguments of the task)` says whether the job fails.
    """
    memory = task.func.__self__

    def work() -> Any:
        if memory.fails(*task.args):
            raise RuntimeError(f"no index by {task.args[1:2]}")
        return task()

    if memory.timing == "whenever":
        return background.submit(work, size)
    job = Job(work, size)
    if memory.timing == "early":
        job.outcome()
    return job


def check_timings(make: Callable[[str], Any], *, exact: bool = False) -> None:
    """Tries random histories; `make(timing)` gives a memory of M x C x D with attributes `timing` and `fails`."""

    class Machine(Timings):
        pass

    Machine.make = staticmethod(make)
    Machine.exact = exact
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


class Timings(RuleBasedStateMachine):
    """Early, late, whenever."""

    make: Callable[[str], Any]
    exact = False

    @initialize()
    def begin(self) -> None:
        self.backends = [self.make(timing) for timing in ("early", "late", "whenever")]
        self.oracle = OracleMemory(M, C, "inner_product")

    def each(self, call: Callable[[Any], Any]) -> list[Any]:
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
        check_answer(first, queries, k, self.oracle, range(M), exact=self.exact)
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
        restored = self.make("late")
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
