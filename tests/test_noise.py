"""Timings as distributions: percentiles, intervals, turns, and when a machine is called noisy."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.suites import noise

TIMES = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60)


def test_percentiles_are_those_of_the_samples() -> None:
    samples = list(range(1, 101))
    found = noise.summarise(samples, references_ms=[2.0, 2.0, 2.0], first_ms=9.0, cold_ms=[3.0, 5.0, 4.0])
    assert (found.count, found.p50_ms, found.p95_ms) == (100, 50.5, pytest.approx(95.05))
    assert found.p99_ms == pytest.approx(99.01)
    assert (found.first_ms, found.cold_ms) == (9.0, 4.0)
    assert found.ratio == 50.5 / 2
    assert found.low_ms < 50.5 < found.high_ms
    assert not found.noisy
    assert noise.Latency.from_json({**found.as_json(), "of another version": 1}) == found


@given(TIMES)
@settings(deadline=None, max_examples=30)
def test_figures_are_in_order(samples: list[float]) -> None:
    found = noise.summarise(samples, references_ms=[1.0])
    assert min(samples) <= found.p50_ms <= found.p95_ms <= found.p99_ms <= max(samples)
    assert min(samples) <= found.low_ms <= found.high_ms <= max(samples)


@pytest.mark.parametrize(
    ("references", "noisy"),
    [
        ([2.0] * 9, False),
        ([2.0, 2.02, 2.04, 2.0, 1.99], False),
        ([2.0, 3.0, 2.0, 4.0, 2.5], True),
        ([1, 2, 2, 2], True),
    ],
)
def test_a_noisy_machine_is_told_by_its_reference(references: list[float], noisy: bool) -> None:
    assert noise.describe_reference(references).noisy is noisy
    assert noise.summarise([1.0], references_ms=references).noisy is noisy


@pytest.mark.parametrize("bad", [[], [math.nan], [math.inf], [-1.0]])
def test_times_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="times"):
        noise.summarise(bad, references_ms=[1.0])
    with pytest.raises(ValueError, match="reference operation"):
        noise.summarise([1.0], references_ms=bad)


def test_the_interval_of_the_median_covers_it_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        low, high = noise.median_interval(generator.exponential(size=25), seed=trial)
        inside += low <= math.log(2) <= high
    assert 0.88 <= inside / 200 <= 1.0


def test_a_ratio_within_rounds_survives_a_slow_stretch() -> None:
    # The machine is four times slower in half of the rounds: medians of each alone would say nothing.
    slow = np.where(np.arange(20) % 2, 4.0, 1.0)
    found = noise.ratio_interval(0.8 * slow, slow)
    assert (found.value, found.low, found.high) == (pytest.approx(0.8),) * 3
    assert found.clearly_below
    assert not found.clearly_above
    turned = noise.ratio_interval(slow, 0.8 * slow)
    assert turned.clearly_above
    assert turned.value == pytest.approx(1 / found.value)


def test_ratios_need_the_same_rounds_and_a_clock_that_ticks() -> None:
    with pytest.raises(ValueError, match="3 times against 2"):
        noise.ratio_interval([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="coarse"):
        noise.ratio_interval([0.0], [1.0])


def test_turns_are_taken_in_changing_order_with_the_reference_in_each_round() -> None:
    said: list[str] = []
    calls = {name: (lambda name=name: said.append(name)) for name in ("a", "b", "c")}
    found = noise.interleave(calls, rounds=8, before=lambda: said.append("-"))
    assert set(found) == {"a", "b", "c", noise.REFERENCE}
    assert all(len(times) == 8 for times in found.values())
    assert said.count("-") == 8 * 4
    rounds = "".join(said).replace("-", "")
    assert len({rounds[start : start + 3] for start in range(0, 24, 3)}) > 1
    assert all(sorted(rounds[start : start + 3]) == ["a", "b", "c"] for start in range(0, 24, 3))


def test_turns_end_when_the_time_is_spent() -> None:
    found = noise.interleave({"a": lambda: None}, rounds=1000, seconds=0.0)
    assert len(found["a"]) == 1
    assert len(noise.interleave({"a": lambda: None}, rounds=1000, least=4, seconds=0.0)["a"]) == 4
    with pytest.raises(ValueError, match="at least one"):
        noise.interleave({"a": lambda: None}, rounds=0)


def test_the_reference_operation_takes_time_by_either_clock() -> None:
    assert noise.reference_operation_ms(repeats=3) > 0
    assert noise.reference_operation_ms("cpu", repeats=3) > 0
    with pytest.raises(ValueError, match="'wall' or 'cpu'"):
        noise.reference_operation_ms("sundial")  # type: ignore[arg-type]


def test_flushing_touches_more_than_a_common_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "FLUSH_BYTES", 64 * 2**20)
    noise._flush_buffer.cache_clear()
    assert noise.flush_caches() == 64 * 2**20
    noise._flush_buffer.cache_clear()


def test_preparations_are_not_timed() -> None:
    def wait() -> None:
        time.sleep(0.02)

    found = noise.interleave({"a": lambda: None, "b": lambda: None}, rounds=2, prepare={"a": wait})
    assert max(found["a"]) < 20
