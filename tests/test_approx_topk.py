"""Bucket maxima: the recall is the formula's, and the number of buckets the one of the paper's code."""

from __future__ import annotations

import math

import pytest
import torch

from recollect.memory_backends import InvalidInput, InvalidSpec, canonical_spec, cpu_search, make_backend
from recollect.memory_backends.implementations.approx_topk import (
    LANES,
    buckets_for,
    expected_recall,
    first_of_buckets,
    neighbours_for,
    select_by_buckets,
)


@pytest.mark.parametrize(("keys", "buckets", "k"), [(512, 64, 32), (1000, 128, 32), (8192, 1024, 32), (3001, 50, 10)])
def test_measured_recall_is_the_formula(keys: int, buckets: int, k: int) -> None:
    backend = make_backend(f"approx-topk:buckets={buckets}", num_memories=4, capacity=keys, dim=32)
    exact = make_backend("exact", num_memories=4, capacity=keys, dim=32)
    stored, queries = torch.randn(4, keys, 32), torch.randn(4, 200, 32)
    backend.add(stored)
    exact.add(stored)
    found = backend.search(queries, k).slots
    true = exact.search(queries, k).slots
    recall = (found[..., None] == true[..., None, :]).any(-1).double().mean(-1).flatten()
    # Queries are independent, so their mean recall lies within five standard errors of its expectation.
    error = float(recall.std()) / math.sqrt(len(recall))
    assert abs(float(recall.mean()) - expected_recall(buckets, k, keys)) < 5 * error


@pytest.mark.parametrize(("buckets", "k"), [(1, 1), (2, 7), (64, 32), (1024, 32), (640, 128)])
def test_formulas_agree(buckets: int, k: int) -> None:
    # With many keys drawing with and without replacement are the same, and both keep the paper's bound.
    many = expected_recall(buckets, k)
    assert expected_recall(buckets, k, 2_000_000) == pytest.approx(many, abs=1e-3)
    assert many >= (1 - 1 / buckets) ** (k - 1) - 1e-12


def test_formula_by_counting_all_cases() -> None:
    # 5 keys in buckets {0, 2, 4} and {1, 3}; 2 neighbours: of the 10 pairs, 4 share a bucket and lose one.
    assert expected_recall(2, 2, 5) == pytest.approx((6 * 2 + 4 * 1) / 20)


@pytest.mark.parametrize(
    ("recall", "k", "keys", "expected"),
    [
        # By hand from XLA's ApproxTopKReductionOutputSize at rank 2: 31 / 0.0513 = 604; 8192 / 604 leaves 2^3.
        (0.95, 32, 8192, 1024),
        (0.95, 32, 65536, 1024),
        (0.95, 32, 1000, 1000),
        (0.8, 32, 8192, 256),
        (0.95, 1, 8192, 128),
        (0.95, 32, 128, 128),
        (1.0, 32, 8192, 8192),
        (0.95, 32, 20001, 640),
    ],
)
def test_number_of_buckets(recall: float, k: int, keys: int, expected: int) -> None:
    assert buckets_for(recall, k, keys) == expected


@pytest.mark.parametrize("recall", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("k", [1, 8, 32, 200])
@pytest.mark.parametrize("keys", [200, 1000, 4096, 50000])
def test_buckets_reach_the_recall_asked_for(recall: float, k: int, keys: int) -> None:
    buckets = buckets_for(recall, k, keys)
    assert min(k, keys) <= buckets <= keys
    if buckets < keys:
        assert buckets % LANES == 0
        assert expected_recall(buckets, k, keys) >= recall
    # XLA bounds e^((1-k)/L), which is a little above (1-1/L)^(k-1).
    assert (1 - 1 / buckets) ** (k - 1) >= recall - 0.01 or buckets == keys


@pytest.mark.parametrize(("keys", "buckets"), [(100, 10), (103, 10), (19, 10), (11, 11)])
def test_selection_is_the_best_of_each_bucket(keys: int, buckets: int) -> None:
    scores = torch.randn(2, 5, keys)
    best, where = select_by_buckets(scores, min(8, buckets), buckets=buckets)
    assert torch.equal(best, scores.gather(-1, where))
    padded = torch.nn.functional.pad(scores, (0, -keys % buckets), value=-torch.inf)
    maxima = padded.unflatten(-1, (-1, buckets)).amax(-2)
    assert torch.equal(best, maxima.topk(best.shape[-1]).values)
    assert all(len({slot % buckets for slot in row}) == len(row) for row in where.flatten(0, 1).tolist())


def test_ties_within_a_bucket_give_distinct_slots() -> None:
    best, where = select_by_buckets(torch.ones(3, 1000), 32, buckets=128)
    assert (best == 1).all()
    assert all(len(set(row)) == 32 for row in where.tolist())


def test_bad_options() -> None:
    for spec in ("approx-topk:recall_target=0", "approx-topk:recall_target=1.5", "approx-topk:buckets=0"):
        with pytest.raises(InvalidSpec, match=spec.split("=")[1]):
            canonical_spec(spec)
    with pytest.raises(InvalidSpec, match="give one of them"):
        canonical_spec("approx-topk:buckets=64,recall_target=0.9")
    backend = make_backend("approx-topk:buckets=8", num_memories=1, capacity=100, dim=4)
    backend.add(torch.randn(1, 100, 4))
    with pytest.raises(InvalidInput, match=r"k is 9.*buckets=8"):
        backend.search(torch.randn(1, 2, 4), 9)


@pytest.mark.parametrize(("buckets", "k"), [(64, 20), (640, 32), (128, 32), (3000, 100)])
def test_bucket_maxima_out_of_the_best_keys(buckets: int, k: int) -> None:
    scores = torch.randn(50, 3000)
    best = scores.topk(neighbours_for(k, buckets))
    found = first_of_buckets(best.values, best.indices, k, buckets=buckets)
    assert found is not None
    expected = select_by_buckets(scores, k, buckets=buckets)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_best_keys_of_too_few_buckets_are_told() -> None:
    slots = torch.tensor([[0, 1, 2, 3, 4], [0, 4, 8, 1, 5]])
    assert first_of_buckets(torch.zeros(2, 5), slots, 2, buckets=4) is not None
    assert first_of_buckets(torch.zeros(2, 5), slots, 3, buckets=4) is None


@pytest.mark.parametrize("periodic", [False, True])
def test_a_large_memory_answers_as_its_definition(monkeypatch: pytest.MonkeyPatch, periodic: bool) -> None:
    backend = make_backend("approx-topk:buckets=512", num_memories=2, capacity=9000, dim=16)
    stored, queries = torch.randn(2, 9000, 16), torch.randn(2, 64, 16)
    if periodic:
        # All the best keys of a query share a bucket, so that more neighbours are no help.
        stored[:, 3::512] *= 20
    backend.add(stored)
    found = backend.search(queries, 24)
    monkeypatch.setattr(cpu_search, "worth", lambda *_: False)
    plain = backend.search(queries, 24)
    torch.testing.assert_close(found.scores, plain.scores, rtol=1e-5, atol=1e-4)
    assert (found.slots == plain.slots).float().mean() > 0.999
