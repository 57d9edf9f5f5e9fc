"""Choosing among measured points: which of them reach a target for certain, and which of those is cheapest.

A point counts as reaching a target when the end of its 95 % interval that is the worse one does: of many points whose
estimates lie around a target, the luckiest would be chosen otherwise, and miss on other text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.reports.pareto import pareto_front

from .tuning_options import Kind, Outcome

RESAMPLES = 2000

Numbers = Sequence[float] | NDArray[Any]
"""One for each entry."""


@dataclass(frozen=True)
class Figure:
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 4) -> str:
        """For a person."""
        value, low, high = (round(end, digits) + 0.0 for end in (self.value, self.low, self.high))  # no minus zero
        return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@dataclass(frozen=True)
class Point:
    """One setting of one built index on one text.

    Attributes:
        spec: canonical registry string.
        cost: time over exact search's in the same rounds, of a step or of its searches (see `TuneOptions.cost`).
        search_ratio: of the searches alone, with its interval.
        search_ms, append_ms: of one segment over all memories.
        recall: share of the true k nearest keys that were found.
        mass: softmax mass of the found keys, as a share of what the true k nearest hold: the most that can be found.
        loss: relative increase of perplexity over exact search's; None where it was not measured.
        perplexity: likewise.
        noisy: the machine varied so much meanwhile that small differences of time mean nothing.
    """

    spec: str
    cost: float
    search_ratio: Figure
    search_ms: float
    append_ms: float
    recall: Figure
    mass: Figure
    loss: Figure | None = None
    perplexity: float | None = None
    noisy: bool = False

    def figure(self, kind: Kind) -> Figure | None:
        """The figure that a target of this kind is about."""
        return {"recall": self.recall, "mass": self.mass, "loss": self.loss}[kind]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Point:
        """What `as_json` described."""
        values = dict(content)
        for name in ("search_ratio", "recall", "mass", "loss"):
            if values.get(name) is not None:
                values[name] = Figure(**values[name])
        return cls(**values)


def bound(figure: Figure, kind: Kind) -> float:
    """The worse end of an interval."""
    return figure.high if kind == "loss" else figure.low


def distance(figure: Figure, kind: Kind, target: float) -> float:
    """How far the worse end is from a target: not above 0 where it reaches it."""
    return bound(figure, kind) - target if kind == "loss" else target - bound(figure, kind)


def choose(points: Sequence[Point], kind: Kind, target: float) -> Point | None:
    """The cheapest point that reaches the target for certain; None where none does."""
    reaching = [
        point for point in points if (figure := point.figure(kind)) is not None and distance(figure, kind, target) <= 0
    ]
    return min(reaching, key=lambda point: point.cost, default=None)


def nearest(points: Sequence[Point], kind: Kind, target: float) -> Point:
    """The point that comes nearest to a target that none reaches.

    Raises:
        ValueError: the figure was measured for none.
    """
    known = [(distance(figure, kind, target), point.cost, point) for point in points if (figure := point.figure(kind))]
    return min(known, key=lambda item: item[:2])[2]


def outcome_of(figure: Figure, kind: Kind, target: float) -> Outcome:
    """Whether a target held on the documents that had no part in the choice."""
    if distance(figure, kind, target) <= 0:
        return "held"
    reached = figure.value <= target if kind == "loss" else figure.value >= target
    return "held within noise" if reached else "missed"


def promising(points: Sequence[Point], most: int) -> list[Point]:
    """What perplexity is worth measuring for: what nothing else matches in both cost and softmax mass, `most` at most.

    Where there are more, they are thinned out evenly by the logarithm of the mass that they miss.
    """
    front = pareto_front(points, lambda point: point.cost, lambda point: 1.0 - point.mass.value)
    if len(front) <= most:
        return front
    missed = [math.log(max(1.0 - point.mass.value, 1e-6)) for point in front]
    wanted = np.linspace(missed[0], missed[-1], most)
    return [front[place] for place in sorted({int(np.abs(np.asarray(missed) - value).argmin()) for value in wanted})]


def weighted_interval(values: Numbers, weights: Numbers, labels: Numbers, *, seed: int = 0) -> Figure:
    """The weighted mean with its 95 % interval, by drawing whole blocks of entries with replacement.

    Args:
        values: of each entry.
        weights: of each, above 0.
        labels: which block each belongs to: neighbours in a text depend on each other, so a block is a run of them.

    Raises:
        ValueError: there is no entry.
    """
    from scipy.stats import norm, t  # here, since importing it takes longer than most of what is done

    if not len(values):
        raise ValueError("there is nothing to take the mean of")
    _, block = np.unique(np.asarray(labels), return_inverse=True)
    weight = np.asarray(weights, dtype=np.float64)
    sums = np.bincount(block, weights=weight * np.asarray(values, dtype=np.float64))
    sizes = np.bincount(block, weights=weight)
    estimate = float(sums.sum() / sizes.sum())
    count = len(sizes)
    if count == 1:
        return Figure(estimate, -math.inf, math.inf)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    replicates = (draws @ sums) / (draws @ sizes)
    # Few blocks give percentiles that lie too close together (Hesterberg 2015).
    level = float(norm.cdf(t.ppf(0.025, count - 1) * math.sqrt(count / (count - 1))))
    low, high = np.quantile(replicates, (level, 1 - level))
    return Figure(estimate, float(low), float(high))
