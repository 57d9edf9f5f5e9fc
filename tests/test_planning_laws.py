"""Costs as laws: those that are known come back from points, and what points cannot tell is told as a range."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recollect.suites.planning.amounts import PlanError, bytes_text, parse_bytes, parse_count, seconds_text
from recollect.suites.planning.growth import CELLS_FIXED, CELLS_GROW, KEYS, ONE, PASS, SQRT, growth_of
from recollect.suites.planning.laws import Term, fit_law

SIZES = [4096 * 2**step for step in range(7)]
LOG = Term("log n", math.log2)


def points(law, noise: float = 0.0, dims: tuple[int, ...] = (64,)) -> list[tuple[int, int, float]]:  # type: ignore[no-untyped-def]
    drawn = np.random.default_rng(0)
    return [(size, dim, law(size) * (dim / 64) * math.exp(noise * drawn.normal())) for dim in dims for size in SIZES]


@pytest.mark.parametrize(
    ("law", "terms"),
    [
        (lambda n: 3.0 + 0.002 * n, (KEYS, ONE)),
        (lambda n: 0.7 * math.sqrt(n), (SQRT, ONE)),
        (lambda n: 5.0 * math.log2(n) + 0.001 * n, (LOG, KEYS, ONE)),
    ],
)
def test_a_known_law_comes_back(law, terms) -> None:  # type: ignore[no-untyped-def]
    found = fit_law(points(law), terms).at(10**9, 64)
    assert found.value == pytest.approx(law(10**9), rel=1e-3)
    assert found.low == pytest.approx(found.value, rel=0.07)
    assert found.high == pytest.approx(found.value, rel=0.07)
    assert found.beyond == pytest.approx(10**9 / SIZES[-1])


def test_the_range_holds_the_truth_and_opens_with_the_distance() -> None:
    fitted = fit_law(points(lambda n: 3.0 + 0.002 * n, noise=0.05), (KEYS, ONE))
    for keys in (SIZES[0], 10**6, 10**9):
        found = fitted.at(keys, 64)
        assert found.low < 3.0 + 0.002 * keys < found.high
    assert fitted.spread == pytest.approx(0.05, abs=0.03)
    fitted = fit_law(points(lambda n: 40.0 + 0.02 * math.sqrt(n), 0.05), (SQRT, ONE))
    near, far = fitted.at(10**5, 64), fitted.at(10**9, 64)
    assert far.low < 40.0 + 0.02 * math.sqrt(10**9) < far.high
    assert far.high / far.low > 1.15 * near.high / near.low


def test_a_term_that_the_points_do_not_ask_for_is_left_out_unless_it_is_needed() -> None:
    noisy = points(lambda n: 2.0 * math.log2(n), noise=0.02)
    assert str(fit_law(noisy, (Term("log n", math.log2, needed=True), KEYS))) == "log n"
    flat = points(lambda n: 8.0, noise=0.02)
    needed = Term("n", lambda n: n, needed=True)
    kept = fit_law(flat, (needed, ONE))
    assert "n" in str(kept).split(" + ")
    assert kept.at(10**9, 64).value >= 8.0


def test_the_power_of_the_dimension_is_fitted_or_assumed() -> None:
    both = fit_law(points(lambda n: 0.1 * n, dims=(64, 128)), (KEYS,))
    assert (both.power, both.dims, both.dim) == (pytest.approx(1.0), 2, 64)
    squared = [(n, d, c * d / 64) for n, d, c in points(lambda n: 0.1 * n, dims=(64, 128))]
    assert fit_law(squared, (KEYS,)).at(1000, 256).value == pytest.approx(100 * 16)
    assert fit_law(points(lambda n: 0.1 * n), (KEYS,)).power == 1.0


def test_too_little_is_refused() -> None:
    with pytest.raises(PlanError, match="3 sizes, there are 2"):
        fit_law(points(lambda n: n)[:2], (KEYS,))
    with pytest.raises(PlanError, match="not above zero"):
        fit_law([(size, 64, 0.0) for size in SIZES], (KEYS,))


def test_each_backend_grows_as_what_it_is_built_on() -> None:
    assert growth_of("exact") is growth_of("approx-topk") is PASS
    assert growth_of("faiss-ivf") is growth_of("scann") is CELLS_GROW
    assert growth_of("faiss-ivf:nlist=64") is CELLS_FIXED
    assert growth_of("rerank:source=faiss-ivfpq") is CELLS_GROW
    at_once = growth_of("faiss-ivf:background=false")
    assert at_once.figures["longest_append_ms"][0].name == "n sqrt n"
    assert "trains the index anew" in at_once.words
    assert growth_of("rerank") is PASS


def test_sealed_parts_grow_by_their_policy_of_merging() -> None:
    parts, rest, _ = growth_of("hnswlib").figures["search_ms"]
    for size in (10**5, 10**7, 10**9):
        assert rest.of(size) < size / 3
    assert rest.of(10**9) < 10**8, "a large memory searches a small share exactly"
    assert parts.of(10**9) < 50_000
    fixed = growth_of("hnswlib:fan_out=1,part_size=16384").figures["search_ms"]
    assert fixed[0].of(2**24) == pytest.approx(2 * fixed[0].of(2**23), rel=0.05), "parts of one size: twice as many"


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e9", 10**9), ("10M", 10**7), ("64k", 64_000), ("64Ki", 65536), ("1.5k", 1500), ("1_000", 1000), (" 7 ", 7)],
)
def test_counts(text: str, number: int) -> None:
    assert parse_count(text, "--keys") == number


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "10X", "1e99", "nan", "ten", "1e-3", "10 M keys"])
def test_what_is_no_count_is_told(text: str) -> None:
    with pytest.raises(PlanError, match="--keys is"):
        parse_count(text, "--keys")


def test_bytes_and_times_for_people() -> None:
    assert parse_bytes("24GiB", "--machine-memory") == 24 * 2**30
    with pytest.raises(PlanError, match=r"--machine-memory.*lots"):
        parse_bytes("lots", "--machine-memory")
    assert [bytes_text(size) for size in (10, 2**30, 1.5 * 2**40)] == ["10 bytes", "1 GiB", "1.5 TiB"]
    shown = [seconds_text(seconds) for seconds in (4e-6, 0.25, 41, 600, 3 * 86400, 10**9)]
    assert shown == ["4 µs", "250 ms", "41 s", "10 min", "3 days", "31.7 years"]
