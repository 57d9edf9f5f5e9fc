"""A cost as a sum of terms in the number of keys, fitted to measured points.

Words: n keys, D dimension, beyond: how many times further out than the largest measured n something is predicted.

The terms come from how an index works (`growth`). Their weights, none below zero, have the least sum of squared
relative errors, since a millisecond at 4096 keys counts as much as a second at a million. The terms that an index must
have stay; another is left out if the points do not ask for it: noise in the third digit, taken for a term in n, would
be everything at a thousand times n. How a cost grows with D is one power, fitted where there are points of several D.

The range of a prediction is that of all the laws that the points allow: with the terms that were left out and without,
fitted to all points and to all but one, widened by the scatter of the points. So it opens beyond the points wherever
they do not tell two terms apart. What no term has (memory that runs out, a cache that does) is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from .amounts import PlanError


@dataclass(frozen=True)
class Term:
    """One way to grow: its name, and how large it is at n keys; `needed` is never left out of a law."""

    name: str
    of: Callable[[float], float]
    needed: bool = False


FEWEST_SIZES = 3
"""Different n that a law is fitted to at least."""

WORTH = 0.1
"""A term stays if without it the scatter is larger by this share, and by `NOISE`."""
NOISE = 0.01

VANISHING = 0.02
"""Share of a cost, at most, below which a term that must be there is taken to be lost in the noise."""

LEAST_SPREAD = 0.03
"""No time is told more closely: a few points may lie on a law by chance."""

POWER_OF_DIM = 1.0
"""The power of D where all points have one D: what reading a key costs."""


@dataclass(frozen=True)
class Estimate:
    """A predicted figure: its value, the range it is likely within, and how far beyond the largest measured n it is."""

    value: float
    low: float
    high: float
    beyond: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.value + other.value, self.low + other.low, self.high + other.high, max(self.beyond, other.beyond)
        )

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.beyond)


@dataclass(frozen=True)
class Law:
    """A fitted cost.

    Attributes:
        terms, weights: cost = sum of weight * term(n), at dimension `dim`; weights of terms that were left out are 0.
        others: weights of the other laws that the points allow.
        dim: the dimension that most points have.
        power: for another dimension, times (D / dim) ** power.
        dims: how many dimensions there were points of.
        spread: scatter of the points about the law, as the standard deviation of the natural logarithm.
        smallest, largest: n of the points.
    """

    terms: tuple[Term, ...]
    weights: tuple[float, ...]
    others: tuple[tuple[float, ...], ...]
    dim: int
    power: float
    dims: int
    spread: float
    smallest: int
    largest: int

    def value(self, keys: float, dim: int, weights: Sequence[float] | None = None) -> float:
        """The law itself, or with other weights."""
        sizes = [term.of(keys) for term in self.terms]
        cost = sum(weight * size for weight, size in zip(weights or self.weights, sizes, strict=True))
        return cost * (dim / self.dim) ** self.power

    def at(self, keys: float, dim: int) -> Estimate:
        """The law's value with its range."""
        value = self.value(keys, dim)
        allowed = [value, *(self.value(keys, dim, weights) for weights in self.others)]
        scatter = math.exp(2 * max(self.spread, LEAST_SPREAD))
        return Estimate(value, min(allowed) / scatter, max(allowed) * scatter, max(1.0, keys / self.largest))

    def __str__(self) -> str:
        return " + ".join(term.name for term, weight in zip(self.terms, self.weights, strict=True) if weight > 0)


def fit_law(points: Sequence[tuple[int, int, float]], terms: Sequence[Term]) -> Law:
    """The law of points (n, D, cost > 0) in some of the given terms.

    Raises:
        PlanError: fewer than three sizes of one dimension, or a cost that is not above zero.
    """
    if any(not (math.isfinite(cost) and cost > 0) for _, _, cost in points):
        raise PlanError("a measured cost is not above zero: measure again with `recollect plan --measure`")
    by_dim: dict[int, dict[int, float]] = {}
    for keys, dim, cost in points:
        by_dim.setdefault(dim, {})[keys] = cost
    most = max(by_dim, key=lambda dim: (len(by_dim[dim]), -dim), default=0)
    if len(by_dim.get(most, ())) < FEWEST_SIZES:
        raise PlanError(f"a law needs points at {FEWEST_SIZES} sizes, there are {len(by_dim.get(most, ()))}")
    power = _power_of_dim(by_dim, most)
    sizes = np.array([float(keys) for keys, _, _ in points])
    costs = np.array([cost * (most / dim) ** power for _, dim, cost in points])
    # Every row is a point, of which the law should give 1: relative errors.
    rows = np.array([[term.of(size) for term in terms] for size in sizes]) / costs[:, None]
    kept = list(range(len(terms)))
    weights, spread = _fit(rows, kept)
    while True:
        without = {place: _fit(rows, [k for k in kept if k != place]) for place in kept if not terms[place].needed}
        if not without or len(kept) == 1:
            break
        place = min(without, key=lambda place: without[place][1])
        if without[place][1] > spread * (1 + WORTH) and without[place][1] > spread + NOISE:
            break
        kept.remove(place)
        weights, spread = without[place]
    every = list(range(len(terms)))
    others = {_fit(rows, every)[0]}
    if len(np.unique(sizes)) > FEWEST_SIZES:
        for left_out in range(len(rows)):
            some = np.delete(rows, left_out, axis=0)
            others |= {_fit(some, kept)[0], _fit(some, every)[0]}
    for place in (place for place, term in enumerate(terms) if term.needed):
        if weights[place] * rows[:, place].max() < VANISHING:
            # What must be there is lost in the noise: of the laws that the points allow, the one with most of it.
            weights = max(others, key=lambda other: other[place])
            spread = _scatter(rows, weights)
    return Law(
        terms=tuple(terms),
        weights=weights,
        others=tuple(sorted(others)),
        dim=most,
        power=power,
        dims=len(by_dim),
        spread=spread,
        smallest=int(sizes.min()),
        largest=int(sizes.max()),
    )


def _fit(rows: np.ndarray, kept: Sequence[int]) -> tuple[tuple[float, ...], float]:
    """Weights of all terms, zero but for the kept ones, and the scatter of the points about their sum."""
    weights = np.zeros(rows.shape[1])
    if kept:
        some = rows[:, kept]
        scale = some.max(axis=0)
        scale[scale == 0] = 1.0
        weights[kept] = nnls(some / scale, np.ones(len(rows)))[0] / scale
    found = tuple(weights.tolist())
    return found, _scatter(rows, found)


def _scatter(rows: np.ndarray, weights: Sequence[float]) -> float:
    predicted = rows @ np.array(weights)
    if not (predicted > 0).all():
        return math.inf
    free = max(1, len(rows) - sum(weight > 0 for weight in weights))
    return math.sqrt(float((np.log(predicted) ** 2).sum()) / free)


def _power_of_dim(by_dim: Mapping[int, Mapping[int, float]], most: int) -> float:
    """From points of the same n and different D; within 0 and 2."""
    found = [
        math.log(cost / by_dim[most][keys]) / math.log(dim / most)
        for dim, costs in by_dim.items()
        if dim != most
        for keys, cost in costs.items()
        if keys in by_dim[most]
    ]
    return min(2.0, max(0.0, sum(found) / len(found))) if found else POWER_OF_DIM
