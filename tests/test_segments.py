"""Sealed parts and exact tail, with an exact part in place of a library's so that every answer can be checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recollect.memory_backends import InvalidSpec, make_backend
from recollect.memory_backends.merging import Run
from recollect.memory_backends.segments import Part, PartOptions, SegmentedBackend


class Counting(SegmentedBackend):
    """Parts that search exactly and remember what they were built from."""

    name = "counting"

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.built: list[int] = []
        self.searched = 0

    def _build_part(self, keys: np.ndarray, seed: int) -> Any:
        self.built.append(len(keys))
        return keys.copy(), seed

    def _search_part(self, part: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.searched += 1
        scores = queries @ part[0].T
        order = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), order

    def _part_bytes(self, part: Any) -> int:
        return int(part[0].nbytes)


class Quantised(Counting):
    """Parts whose scores are rough, and must not be answered."""

    exact_scores = False

    def _search_part(self, part: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, positions = super()._search_part(part, queries, k)
        return np.round(scores), positions

    def _fetch(self, k: int) -> int:
        return 5 * k


class Forgetful(Counting):
    """Parts that find only their best key: position -1 stands for the others, with a score that looks like one."""

    def _search_part(self, part: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, positions = super()._search_part(part, queries, k)
        positions[:, 1:] = -1
        scores[:, 1:] = 1e9
        return scores, positions


def make(capacity: int, part_size: int = 0, cls: type[Counting] = Counting, num_memories: int = 1) -> Counting:
    return cls(PartOptions(part_size), num_memories=num_memories, capacity=capacity, dim=6)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", [Counting, Quantised])
@pytest.mark.parametrize(("capacity", "part_size"), [(40, 10), (37, 8), (20, 20), (50, 1)])
def test_answers_are_those_of_exact_search(cls: type[Counting], capacity: int, part_size: int) -> None:
    backend = make(capacity, part_size, cls, num_memories=3)
    exact = make_backend("exact", num_memories=3, capacity=capacity, dim=6)
    choose = np.random.default_rng(0)
    for step in range(60):
        which = choose.permutation(3)[: choose.integers(1, 4)].tolist()
        if step % 13 == 12:
            backend.reset(which)
            exact.reset(which)
        keys = vectors(len(which), int(choose.integers(1, capacity + 9 if step % 7 == 6 else 9)), 6, seed=step)
        assert torch.equal(backend.add(keys, memories=which), exact.add(keys, memories=which))
        which = choose.permutation(3)[: choose.integers(1, 4)].tolist()
        queries = vectors(len(which), 5, 6, seed=1000 + step)
        one, other = backend.search(queries, 7, memories=which), exact.search(queries, 7, memories=which)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(one.slots, other.slots)
    assert backend.searched > (0 if part_size == capacity else 100)


def test_each_key_is_indexed_once_for_each_level_whatever_the_capacity() -> None:
    for capacity in (64, 256, 1024):
        backend = make(capacity, 32)
        for step in range(4 * capacity // 16):
            backend.add(vectors(1, 16, 6, seed=step))
        assert sum(backend.built) == 4 * capacity
        merging = Counting(PartOptions(part_size=32, run_size=16, fan_out=2), num_memories=1, capacity=capacity, dim=6)
        for step in range(4 * capacity // 16):
            merging.add(vectors(1, 16, 6, seed=step))
        assert sum(merging.built) == 1.5 * 4 * capacity  # every second run of 16 completes one of 32


def test_less_than_two_runs_are_searched_exactly() -> None:
    backend = make(40, 10)
    backend.add(vectors(1, 40, 6))
    assert [(part.run.start, part.run.stop) for part in backend.parts[0]] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    for position in range(41, 125):
        backend.add(vectors(1, 1, 6, seed=position))
        assert len(backend.parts[0]) == (4 if position % 10 == 0 else 3)
        assert sum(length for _, length in backend._unsealed(position, backend.parts[0])) == (
            0 if position % 10 == 0 else 10
        )


def test_an_add_longer_than_the_capacity_builds_each_run_once() -> None:
    backend = make(40, 10)
    backend.add(vectors(1, 1007, 6))
    assert backend.built == [10, 10, 10]
    assert [part.run.start for part in backend.parts[0]] == [970, 980, 990]
    assert backend._unsealed(1007, backend.parts[0]) == [(0, 10)]  # slots 0 to 6 the newest, 7 to 9 the oldest keys


def test_stretches_without_a_part_go_round_the_ring() -> None:
    backend = make(40, 10)
    assert backend._unsealed(0, ()) == []
    assert backend._unsealed(25, ()) == [(0, 25)]
    assert backend._unsealed(57, ()) == [(0, 40)]
    parts = (Part(Run(20, 30), None), Part(Run(30, 40), None))
    assert backend._unsealed(57, parts) == [(0, 20)]
    assert backend._unsealed(57, (Part(Run(20, 30), None), Part(Run(40, 50), None))) == [(10, 10), (30, 10)]


def test_missing_neighbours_stay_missing() -> None:
    backend = make(40, 10, Forgetful)
    backend.add(vectors(1, 40, 6))
    result = backend.search(vectors(1, 5, 6, seed=1), 8)
    assert ((result.slots >= 0).sum(-1) == 4).all()
    assert (result.slots[..., 4:] == -1).all()
    assert (result.scores[..., 4:] == -torch.inf).all()
    assert (result.scores[..., :4] < 100).all()


def test_scores_of_rough_parts_are_those_of_the_raw_keys() -> None:
    backend = make(40, 10, Quantised)
    backend.add(vectors(1, 45, 6))
    queries = vectors(1, 5, 6, seed=1)
    result = backend.search(queries, 4)
    keys = backend.gather_keys(result.slots)
    torch.testing.assert_close(result.scores, torch.einsum("mqkd,mqd->mqk", keys, queries))


def test_parts_have_seeds_of_their_own() -> None:
    backend = make(40, 10, num_memories=2)
    backend.add(vectors(2, 40, 6))
    seeds = [part.index[1] for parts in backend.parts for part in parts]
    assert len(set(seeds)) == len(seeds) == 8


def test_index_bytes_and_build_seconds() -> None:
    backend = make(40, 10)
    backend.add(vectors(1, 45, 6))
    assert backend.stats().index_bytes == 30 * 6 * 4
    assert backend.stats().build_seconds > 0
    backend.reset()
    assert backend.stats().index_bytes == 0


def test_options_are_checked() -> None:
    with pytest.raises(InvalidSpec, match="part_size=-1"):
        make_backend("hnswlib:part_size=-1", num_memories=1, capacity=8, dim=2)
    for wrong in ("part_size=9", "run_size=9", "fan_out=0", "run_size=4,part_size=2"):
        with pytest.raises(InvalidSpec, match=wrong.partition(",")[0]):
            make_backend(f"hnswlib:{wrong}", num_memories=1, capacity=8, dim=2)
