"""Distances as others measure them, true neighbours by brute force, and the recall that each suite publishes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.model import distances as distances_module
from recollect.model.distances import METRIC_OF_DISTANCE, distances_of, nearest_of, pair_distances, true_neighbors
from recollect.suites.published_recall import ann_benchmarks_recall, big_ann_recall, strict_recall

RANDOM = np.random.default_rng(0)
KEYS = RANDOM.normal(size=(150, 6)).astype(np.float32)
QUERIES = RANDOM.normal(size=(9, 6)).astype(np.float32)


@pytest.mark.parametrize("distance", sorted(METRIC_OF_DISTANCE))
def test_true_neighbours_are_those_of_a_full_sort(distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances_module, "KEYS_AT_ONCE", 32)
    monkeypatch.setattr(distances_module, "QUERIES_AT_ONCE", 4)
    told: list[tuple[int, int]] = []
    places, reached = true_neighbors(
        distance, QUERIES, KEYS, 20, on_queries=lambda done, total: told.append((done, total))
    )
    everything = distances_of(distance, QUERIES, KEYS)
    np.testing.assert_array_equal(places, np.argsort(everything, axis=1, kind="stable")[:, :20])
    np.testing.assert_allclose(reached, np.sort(everything, axis=1)[:, :20])
    assert told == [(4, 9), (8, 9), (9, 9)]
    places[0, 3] = -1
    parts = [(0, KEYS[:70]), (70, KEYS[70:])]
    measured = pair_distances(distance, QUERIES, places, parts)
    assert np.isinf(measured[0, 3])
    measured[0, 3] = reached[0, 3]
    np.testing.assert_allclose(measured, reached, atol=1e-12)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 9))
def test_of_equally_near_keys_the_earlier_one(seed: int, k: int) -> None:
    values = np.random.default_rng(seed).integers(0, 4, size=(3, 8)).astype(np.float64)
    numbers = np.broadcast_to(np.arange(8), values.shape)
    nearest, found = nearest_of(values, numbers, k)
    order = np.argsort(values, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found, order)
    np.testing.assert_array_equal(nearest, np.take_along_axis(values, order, axis=1))


def as_ann_benchmarks_counts(true: np.ndarray, run: np.ndarray, count: int) -> float:
    """Written out from the words of its definition, a query at a time."""
    counted = [
        sum(1 for distance in found[:count] if distance <= known[count - 1] + 1e-3)
        for known, found in zip(true, run, strict=True)
    ]
    return float(np.mean(counted)) / count


def as_big_ann_counts(numbers: np.ndarray, known: np.ndarray, found: np.ndarray, count: int) -> float:
    total = 0
    for ids, dists, keys in zip(numbers, known, found, strict=True):
        end = count
        while end < len(dists) and abs(dists[count - 1] - dists[end]) < 1e-6:
            end += 1
        total += len(set(ids[:end].tolist()) & set(keys.tolist()))
    return total / (count * len(found))


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 5))
def test_published_recall_is_theirs(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    keys = random.integers(0, 3, size=(30, 2)).astype(np.float32)  # many ties
    queries = random.normal(size=(6, 2)).astype(np.float32)
    numbers, known = true_neighbors("euclidean", queries, keys, 8)
    found = np.stack([random.permutation(30)[:k] for _ in queries])
    reached = pair_distances("euclidean", queries, found, [(0, keys)])
    assert ann_benchmarks_recall(known, reached, k) == pytest.approx(as_ann_benchmarks_counts(known, reached, k))
    assert big_ann_recall(numbers, known, found, k) == pytest.approx(as_big_ann_counts(numbers, known, found, k))
    assert strict_recall(known, found, reached, k) <= ann_benchmarks_recall(known, reached, k)
    assert ann_benchmarks_recall(known, known[:, :k], k) == strict_recall(known, numbers[:, :k], known[:, :k], k) == 1.0


def test_what_sets_the_definitions_apart() -> None:
    known = np.array([[0.1, 0.2, 0.2, 0.3]])
    numbers = np.array([[5, 6, 7, 8]])
    twice, margin, tied = np.array([[5, 5]]), np.array([[5, 8]]), np.array([[5, 7]])
    assert ann_benchmarks_recall(known, np.array([[0.1, 0.1]]), 2) == 1.0
    assert strict_recall(known, twice, np.array([[0.1, 0.1]]), 2) == 0.5
    assert big_ann_recall(numbers, known, twice, 2) == 0.5
    assert ann_benchmarks_recall(known, np.array([[0.1, 0.2009]]), 2) == 1.0
    assert strict_recall(known, margin, np.array([[0.1, 0.2009]]), 2) == 0.5
    assert big_ann_recall(numbers, known, margin, 2) == 0.5
    assert big_ann_recall(numbers, known, tied, 2) == 1.0
    missing = np.array([[5, -1]])
    assert big_ann_recall(numbers, known, missing, 2) == 0.5
    assert strict_recall(known, missing, np.array([[0.1, np.inf]]), 2) == 0.5
