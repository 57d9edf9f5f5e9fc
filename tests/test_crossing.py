"""The arithmetic of crossings: interpolation, brackets, early stopping, appends counted in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.reports.crossing import SizedRatio, bracket, can_still_win, find_crossing, with_appends

SIZES = [512, 1024, 2048, 4096, 8192, 16384]


def ratios(values: list[float], spread: float = 1.0) -> list[SizedRatio]:
    return [SizedRatio(n, v, v / spread, v * spread, f"at-{n}") for n, v in zip(SIZES, values, strict=False)]


@given(st.floats(600, 16000), st.floats(0.1, 1.0), st.floats(1.0, 1.2))
def test_a_power_law_is_found_again(where: float, slope: float, spread: float) -> None:
    found = find_crossing(ratios([(where / n) ** slope for n in SIZES], spread))
    assert found.outcome == "at"
    assert found.size == pytest.approx(where, rel=1e-6)
    # The ends of the interval cross where the power law times the spread does.
    assert found.low is None or found.low == pytest.approx(where * spread ** (-1 / slope), rel=1e-6)
    assert found.high is None or found.high == pytest.approx(where * spread ** (1 / slope), rel=1e-6)
    assert (found.low or 0) <= found.size <= (found.high or float("inf")) * (1 + 1e-12)


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=6), st.floats(1.0, 2.0))
def test_what_is_said_fits_what_was_measured(values: list[float], spread: float) -> None:
    given_ratios = ratios(values, spread)
    found = find_crossing(given_ratios[::-1])
    assert found.ratio == given_ratios[-1]
    assert found.spec == f"at-{SIZES[len(values) - 1]}"
    assert found.overtakes == (values[-1] < 1)
    if found.outcome == "never":
        assert min(values) >= 1
    if found.outcome == "from the start":
        assert max(values) < 1
    if found.outcome == "not lasting":
        assert min(values) < 1 <= values[-1]
    if found.outcome == "at":
        # It is slower at the last size before the crossing and quicker at every one after it.
        assert found.size is not None
        assert all(value < 1 for size, value in zip(SIZES, values, strict=False) if size > found.size * (1 + 1e-9))
        left, right = bracket(given_ratios) or (0, 0)
        assert left <= found.size * (1 + 1e-9)
        assert found.size <= right * (1 + 1e-9)
    else:
        assert bracket(given_ratios) is None


def test_an_interval_that_never_falls_below_1_leaves_the_crossing_open() -> None:
    found = find_crossing(ratios([2.0, 1.2, 0.9], spread=1.5))
    assert found.outcome == "at"
    assert found.high is None
    assert not found.clear
    assert find_crossing(ratios([2.0, 1.2, 0.3], spread=1.5)).clear


def test_nothing_measured_is_said_so() -> None:
    assert find_crossing([]).outcome == "not measured"
    assert bracket([]) is None


@pytest.mark.parametrize(
    ("ratio", "size", "wins"), [(3.9, 8192, True), (4.1, 8192, False), (0.5, 32768, True), (1.1, 32768, False)]
)
def test_an_index_that_cannot_win_even_if_it_never_slows_down(ratio: float, size: int, wins: bool) -> None:
    assert can_still_win(ratio, size, 32768) is wins


def test_appends_count_on_both_sides() -> None:
    quick = SizedRatio(1024, 0.5, 0.4, 0.6, "x")
    found = with_appends(quick, exact_ms=10.0, exact_append_ms=0.0, append_ms=10.0)
    assert (found.value, found.low, found.high) == (1.5, 1.4, 1.6)
    assert with_appends(quick, 10.0, 5.0, 5.0).value == pytest.approx(10 / 15)
    assert with_appends(quick, 10.0, 0.0, 0.0) == quick
