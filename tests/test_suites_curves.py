"""Curves of recall against time: which settings are tried, and what a point of one index says."""

from __future__ import annotations

import pytest
import torch

from recollect.memory_backends import describe_backend, list_backends, make_backend
from recollect.memory_backends.registry import backend_class
from recollect.memory_backends.spec import make_options
from recollect.suites.curve_settings import between, neighbours, refined, settings_of, without_waste
from recollect.suites.curves import CurveMeter, CurvePoint, exact_truth, measure_curve

M, N, D, Q, K = 2, 600, 16, 12, 8


def vectors(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_settings_are_every_combination() -> None:
    assert settings_of({}) == [{}]
    assert settings_of({"nprobe": (1, 2), "k_factor": (4, 8)}) == [
        {"nprobe": 1, "k_factor": 4},
        {"nprobe": 1, "k_factor": 8},
        {"nprobe": 2, "k_factor": 4},
        {"nprobe": 2, "k_factor": 8},
    ]


@pytest.mark.parametrize(
    ("low", "high", "middle"),
    [
        (4, 64, 16),
        (64, 4, 16),
        (1, 2, None),
        (7, 8, None),
        (0, 4, 2),
        (0.1, 0.3, 0.2),
        (0.5, 0.5, None),
        (True, 3, None),
    ],
)
def test_what_lies_between_two_values(low: float, high: float, middle: float | None) -> None:
    assert between(low, high) == middle


def test_neighbours_differ_in_one_option_and_have_nothing_between_them() -> None:
    settings = [{"a": 1, "b": 1}, {"a": 4, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 3}]
    assert sorted(neighbours(settings)) == [(0, 2), (0, 3), (2, 1)]
    assert neighbours([{}]) == []


def test_a_curve_is_refined_where_it_jumps() -> None:
    settings = [{"n": 1}, {"n": 8}, {"n": 64}]
    assert refined(settings, [0.2, 0.9, 0.92], jump=0.1) == [{"n": 3}]
    assert refined(settings, [0.2, 0.9, 0.92], jump=0.01, most=1) == [{"n": 3}], "the largest jump comes first"
    assert refined(settings, [0.2, 0.9, 0.92], jump=1.0, target=0.91) == [{"n": 23}], "a target is enclosed"
    assert refined(settings, [0.9, 0.2, 0.95], jump=1.0, target=0.5) == [{"n": 23}, {"n": 3}], "recall need not rise"
    assert refined([{"n": 1}, {"n": 2}], [0.1, 0.9]) == [], "nothing lies between 1 and 2"


def test_what_is_more_thorough_than_complete_is_waste() -> None:
    settings = [{"n": n} for n in (1, 2, 4, 8)]
    assert without_waste(settings, [0.5, 0.9996, 1.0, 1.0]) == settings[:2]
    assert without_waste(settings, [0.5, 0.6, 0.7, 0.8]) == settings


def test_every_declared_curve_is_of_search_options_and_every_build_is_not() -> None:
    for info in list_backends():
        cls = backend_class(info.name)
        for setting in settings_of(cls.curve):
            make_options(cls.Options, setting, name=info.name)
        assert set(cls.curve) <= set(cls.search_options)
        assert not set(cls.builds) & set(cls.search_options)
        if cls.search_options and info.name != "degraded" and not info.one_shared:
            assert cls.curve, f"{info.name} has search options and declares no curve"


def test_a_curve_of_one_built_index() -> None:
    if not describe_backend("faiss-ivf").available:
        pytest.skip(describe_backend("faiss-ivf").reason)
    keys = vectors(M, N, D, seed=0)
    queries = torch.stack([vectors(M, Q, D, seed=seed) for seed in (1, 2, 3)])
    backend = make_backend("faiss-ivf:nlist=16,nprobe=5", num_memories=M, capacity=N, dim=D)
    exact = make_backend("exact", num_memories=M, capacity=N, dim=D)
    for made in (backend, exact):
        made.add(keys)
    built = backend.stats().build_seconds
    scale = torch.full((M,), 8.0)
    points = measure_curve(backend, queries, None, K, {"nprobe": (1, 4, 16)}, 2, exact=exact, scale=scale)
    assert backend.options.nprobe == 5, "the options are as they were"
    assert backend.stats().build_seconds == built, "nothing was built again"
    by_nprobe = {point.options["nprobe"]: point for point in points}
    assert {1, 4, 16} <= set(by_nprobe)
    assert by_nprobe.keys() - {1, 4, 16}, "the jumps of recall were refined"
    recall = [by_nprobe[n].recall_at_k for n in sorted(by_nprobe)]
    assert recall == sorted(recall)
    assert by_nprobe[16].recall_at_k == 1.0
    assert by_nprobe[1].recall_at_k < 0.6
    for nprobe, point in by_nprobe.items():
        alone = make_backend(f"faiss-ivf:nlist=16,nprobe={nprobe}", num_memories=M, capacity=N, dim=D)
        alone.add(keys)
        hits = 0
        for batch in queries:
            mine, best = alone.search(batch, K).slots, exact.search(batch, K).slots
            hits += int((mine[..., :, None] == best[..., None, :]).any(-1).sum())
        assert point.recall_at_k == pytest.approx(hits / (3 * M * Q * K), abs=0.004), "as the spec finds alone"
        assert point.spec == alone.spec
        assert point.softmax_mass is not None
        assert 0 < point.softmax_mass <= 1
        assert point.search_ms_low <= point.search_ms <= point.search_ms_p95 <= point.search_ms_p99
        assert point.samples == 6
        assert point.exact_ratio is not None
        assert sum(number for *_, number in point.blocks) == 3 * M * Q
        assert CurvePoint.from_json(point.as_json()) == point


def test_an_empty_memory_does_not_count() -> None:
    backend = make_backend("exact", num_memories=M, capacity=N, dim=D)
    backend.add(vectors(1, 50, D, seed=0), memories=[1])
    meter = CurveMeter(K, rounds=1, rows=M)
    queries = vectors(M, Q, D, seed=1)
    meter.measure(backend, queries, exact_truth(backend, queries, K), [{}])
    (point,) = meter.points()
    assert point.recall_at_k == 1.0
    assert point.softmax_mass is None
    assert point.blocks == ((1.0, None, Q),)
    assert point.exact_ratio is None


def test_a_curve_needs_something_to_judge_by() -> None:
    backend = make_backend("exact", num_memories=M, capacity=N, dim=D)
    with pytest.raises(ValueError, match="exact backend of the same keys"):
        measure_curve(backend, vectors(1, M, Q, D, seed=1), None, K)
    with pytest.raises(ValueError, match="batches"):
        measure_curve(backend, vectors(M, Q, D, seed=1), None, K)
