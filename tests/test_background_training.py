"""Trained indexes that learn anew in the background: answers do not depend on when, and no key is missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from background_timings import C, D, M, check_timings, timed_submit, vectors

from recollect.memory_backends import trained
from recollect.memory_backends.errors import BuildFailed
from recollect.memory_backends.testing_oracle import OracleMemory, check_answer
from recollect.memory_backends.trained import TrainedBackend, TrainedOptions, _stable_places


class Parity(TrainedBackend):
    """An array of keys that finds the even positions only, or the odd ones: that is what it learns."""

    name = "parity"
    Options = TrainedOptions
    background_from = 1
    timing = "whenever"
    whole = False
    fails: Callable[..., bool] = staticmethod(lambda *which: False)

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.trained_in_add = 0

    def _train(self, keys: np.ndarray, seed: int, older: Any, turnover: int) -> dict[str, Any]:
        return {"keys": keys.copy(), "odd": int(1000 * np.abs(keys).sum()) % 2}

    def _append(self, index: dict[str, Any], keys: np.ndarray) -> None:
        index["keys"] = np.concatenate((index["keys"], keys))

    def _overwrite(self, index: dict[str, Any], positions: np.ndarray, keys: np.ndarray) -> None:
        index["keys"][positions] = keys

    def _search_index(self, index: dict[str, Any], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ index["keys"].T
        if not self.whole:
            scores[:, index["odd"] :: 2] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        return best, np.where(np.isfinite(best), order, -1)

    def _bytes_of(self, index: dict[str, Any], keys: int) -> int:
        return int(index["keys"].nbytes)

    def _write_index(self, index: dict[str, Any], path: Path) -> None:
        np.concatenate(([index["odd"]], index["keys"].ravel())).astype(np.float64).tofile(path)

    def _read_index(self, path: Path) -> dict[str, Any]:
        odd, *keys = np.fromfile(path)
        return {"keys": np.array(keys, dtype=np.float32).reshape(-1, self.dim), "odd": int(odd)}


class Sampled(Parity):
    """The same by way of a sample that it learns from, and keys that are then added."""

    def _sample(self, keys: int) -> int:
        return min(keys, 10)

    def _learn_from(self, sample: np.ndarray, keys: int, seed: int, older: Any, turnover: int) -> dict[str, Any]:
        assert len(sample) == min(keys, 10)
        return {"keys": sample[:0].copy(), "odd": int(1000 * np.abs(sample).sum()) % 2}


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "submit", timed_submit)
    monkeypatch.setattr(trained, "LAST_STRETCH", 1)
    monkeypatch.setattr(trained, "STRETCH", 7)


def make(timing: str, cls: type[Parity] = Parity, **more: Any) -> Parity:
    backend = cls(None, **{"num_memories": M, "capacity": C, "dim": D, **more})
    backend.timing = timing
    return backend


@pytest.mark.parametrize("cls", [Parity, Sampled])
@pytest.mark.parametrize("failing", [False, True])
def test_answers_do_not_depend_on_when_training_is_done(cls: type[Parity], failing: bool) -> None:
    def made(timing: str) -> Parity:
        backend = make(timing, cls)
        # What learns is told from what catches up by the number of its arguments.
        backend.fails = lambda *which: failing and len(which) == 6 and which[2] // C % 2 == 1
        return backend

    check_timings(made)


@pytest.mark.parametrize("timing", ["early", "late", "whenever"])
@pytest.mark.parametrize("cls", [Parity, Sampled])
def test_no_key_is_missed(cls: type[Parity], timing: str) -> None:
    backend = make(timing, cls, num_memories=1)
    backend.whole = True
    oracle = OracleMemory(1, C, "inner_product")
    learnt = set()
    for step in range(150):
        keys = vectors(1, 1 + step % 4, D, seed=step)
        backend.add(keys)
        oracle.add(keys, [0])
        queries = vectors(1, 3, D, seed=1000 + step)
        check_answer(backend.search(queries, 7), queries, 7, oracle, [0], exact=True)
        index = backend.indexes[0]
        if index is not None:
            assert np.array_equal(index["keys"], backend.ring.keys[0, : int(backend.lengths[0])].numpy())
            learnt.add(backend.learnt_at[0])
    # Before the memory is full, when it is, and at each turnover; within a step of 4 keys.
    early, *later = sorted(learnt)
    assert early < C
    assert [number // C for number in later] == [1, 2, 3, 4, 5]
    assert all(number % C < 4 for number in later)
    assert backend.stats().build_seconds > 0


def test_a_failed_training_leaves_the_old_index_and_is_tried_a_turnover_later() -> None:
    backend = make("late", num_memories=1)
    backend.add(vectors(1, C, D))
    old = backend.indexes[0]
    assert old is not None
    backend.fails = lambda *which: True
    failures = []
    for step in range(C + C // 2 + 8):
        try:
            backend.add(vectors(1, 1, D, seed=step))
        except BuildFailed as error:
            failures.append(str(error))
            backend.fails = lambda *which: False
    assert len(failures) == 1
    assert "memory 0" in failures[0]
    assert backend.indexes[0] is old
    assert np.array_equal(old["keys"][: C // 4], backend.ring.keys[0, : C // 4].numpy())
    for step in range(2 * C):
        backend.add(vectors(1, 1, D, seed=step))
    assert backend.indexes[0] is not old


def test_waiting_takes_in_what_was_begun() -> None:
    backend = make("whenever", num_memories=1)
    backend.add(vectors(1, C, D))
    for step in range(C + 1):
        backend.add(vectors(1, 1, D, seed=step))
    assert backend.learning[0] is not None
    old = backend.indexes[0]
    backend.wait()
    assert backend.learning == [None]
    assert backend.indexes[0] is not old
    assert np.array_equal(backend.indexes[0]["keys"], backend.ring.keys[0].numpy())


def test_a_load_trains_before_it_returns() -> None:
    backend = make("late", num_memories=1)
    backend.add(vectors(1, C + 5, D))
    assert backend.stats().pending_builds == 0
    assert backend.learnt == [C]


def test_without_background_training_is_done_by_the_append() -> None:
    backend = Parity({"background": False}, num_memories=1, capacity=C, dim=D)
    for step in range(3 * C):
        backend.add(vectors(1, 1, D, seed=step))
        assert backend.learning == [None]
    assert backend.stats().stalled_seconds == 0
    assert backend.learnt_at == [3 * C]


def test_a_reset_and_closing_give_up_what_is_learnt() -> None:
    for end in ("reset", "close"):
        backend = make("whenever", num_memories=1)
        backend.add(vectors(1, C, D))
        for step in range(C + 1):
            backend.add(vectors(1, 1, D, seed=step))
        learning = backend.learning[0]
        assert learning is not None
        getattr(backend, end)()
        learning.job.join()
        assert backend.learning == [None]


@pytest.mark.parametrize(("length", "first", "capacity"), [(20, 0, 40), (40, 0, 40), (40, 13, 40), (7, 30, 7)])
def test_stable_places_name_no_key_that_is_overwritten(length: int, first: int, capacity: int) -> None:
    for unstable in range(length):
        places = _stable_places(length, first, unstable, capacity)
        ages = (places - first) % capacity
        assert ages.min() >= unstable
        itself = (np.arange(length) - first) % capacity >= unstable
        assert (places[itself] == np.arange(length)[itself]).all()
        assert torch.unique(torch.from_numpy(ages)).numel() == length - unstable
