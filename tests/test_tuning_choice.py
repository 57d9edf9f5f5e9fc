"""Choosing among points, and the intervals that it goes by."""

from __future__ import annotations

import numpy as np
import pytest

from recollect.suites.curve_settings import open_axes, open_builds
from recollect.suites.tuning_choice import (
    Figure,
    Point,
    choose,
    nearest,
    outcome_of,
    promising,
    weighted_interval,
)
from recollect.suites.tuning_options import TuneError, TuneOptions, checked


def point(spec: str, cost: float, mass: float, *, spread: float = 0.01, loss: float | None = None) -> Point:
    figure = Figure(mass, mass - spread, mass + spread)
    lost = None if loss is None else Figure(loss, loss - 0.002, loss + 0.002)
    return Point(spec, cost, Figure(cost, cost, cost), 1.0, 1.0, figure, figure, lost)


def test_the_cheapest_is_taken_whose_interval_reaches_the_target() -> None:
    points = [point("a", 0.3, 0.94), point("b", 0.5, 0.955), point("c", 0.6, 0.962), point("d", 0.9, 0.99)]
    chosen = choose(points, "mass", 0.95)
    assert chosen is not None
    assert chosen.spec == "c", "the estimate of b reaches it, the lower end does not"
    assert choose(points, "recall", 0.999) is None
    assert nearest(points, "recall", 0.999).spec == "d"


def test_a_loss_counts_by_its_upper_end_and_where_it_was_measured() -> None:
    points = [point("a", 0.3, 0.9), point("b", 0.4, 0.9, loss=0.009), point("c", 0.5, 0.95, loss=0.007)]
    chosen = choose(points, "loss", 0.01)
    assert chosen is not None
    assert chosen.spec == "c"
    assert nearest(points, "loss", 0.001).spec == "c"


@pytest.mark.parametrize(
    ("figure", "kind", "outcome"),
    [
        (Figure(0.96, 0.951, 0.97), "mass", "held"),
        (Figure(0.951, 0.94, 0.96), "recall", "held within noise"),
        (Figure(0.949, 0.94, 0.96), "recall", "missed"),
        (Figure(0.5, 0.4, 0.9), "loss", "held"),
        (Figure(0.9, 0.8, 0.96), "loss", "held within noise"),
        (Figure(0.96, 0.9, 1.0), "loss", "missed"),
    ],
)
def test_whether_a_target_of_95_held(figure: Figure, kind: str, outcome: str) -> None:
    assert outcome_of(figure, kind, 0.95) == outcome  # type: ignore[arg-type]


def test_perplexity_is_measured_for_what_nothing_matches() -> None:
    points = [point(f"p{n}", n, 1 - 0.5**n) for n in range(1, 20)] + [point("worse", 5.5, 0.5)]
    found = promising(points, 6)
    assert len(found) == 6
    assert "worse" not in [one.spec for one in found]
    assert found[0].spec == "p1"
    assert found[-1].spec == "p19"
    assert promising(points[:3], 6) == points[:3]


def test_intervals_draw_whole_blocks() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 8)
    values = 0.9 + np.repeat(generator.normal(0, 0.05, 50), 8)
    found = weighted_interval(values, np.ones(400), labels)
    assert found.value == pytest.approx(values.mean())
    width = (found.high - found.low) / 2
    assert width == pytest.approx(2 * values.std() / 50**0.5, rel=0.2), "as of 50 blocks, not of 400 entries"
    alone = weighted_interval(values, np.ones(400), np.arange(400))
    assert alone.high - alone.low < (found.high - found.low) / 2


def test_intervals_weigh_entries() -> None:
    found = weighted_interval([0.0, 1.0, 1.0], [3.0, 1.0, 0.5], [0, 1, 2])
    assert found.value == pytest.approx(1.5 / 4.5)
    assert weighted_interval([0.5], [1.0], [0]).low == -np.inf, "one block says nothing of the spread"
    with pytest.raises(ValueError, match="nothing"):
        weighted_interval([], [], [])


def test_what_a_spec_names_is_kept() -> None:
    assert list(open_axes("hnswlib:M=8")) == ["ef_search"]
    assert open_axes("hnswlib:ef_search=64") == {}
    assert open_axes("exact") == {}
    builds = open_builds("hnswlib:M=8")
    assert builds[0] == "hnswlib:M=8"
    assert all("M=8" in build for build in builds)
    assert len(builds) == len(set(builds)) > 1
    assert open_builds("exact") == ["exact"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backends": ()}, "no backend"),
        ({"target": 1.2}, "target mass is 1.2"),
        ({"target": 0.0, "kind": "loss"}, "more than 0"),
        ({"kind": "speed"}, "kind is 'speed'"),
        ({"cost": "bytes"}, "cost is 'bytes'"),
        ({"verify_split": "validation"}, "share no document"),
        ({"split": "all"}, "share no document"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_options_out_of_range_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TuneError, match=message):
        checked(TuneOptions(**{"backends": ("hnswlib",), "target": 0.9, **changes}))  # type: ignore[arg-type]
