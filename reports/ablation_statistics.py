"""Intervals over seeds and text for means of perplexity and for contrasts between variants.

Two things vary when an experiment is repeated: the seed (first weights, order of the documents) and the text that is
read at the end. A hierarchical bootstrap draws both (Davison and Hinkley 1997, section 3.8; Bouthillier et al. 2021 for
why both): for each replicate the text, then the seeds.

Text: moving blocks of consecutive tokens within documents (Künsch 1989), wrapped at a document's end so that every
token is drawn equally often (Politis and Romano 1992). All variants and seeds of a replicate read the same drawn
tokens: differences are paired by token and by seed.

Seeds: three seeds cannot be resampled (the interval that this gives holds the truth about 3 times in 4), so their part
is drawn from what Student's t says of the mean of n values: its spread is that of the seeds' own differences, divided
by the root of n. Where several variants are compared with one reference over few seeds, their spreads are pooled as in
an analysis of variance (`SeedSpread`): two seeds of ten variants know more of the spread than two seeds of one. One
seed has no such part, and its interval speaks of the text alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recollect.reports.statistics import CONFIDENCE, RUN_LENGTHS

RESAMPLES = 4000
MINIMUM_BLOCKS = 60
"""A block is as long as still leaves so many of them."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TextDraws:
    """How blocks of tokens are drawn from documents.

    document: (N,) int64, the document of each token; tokens of one document stand together, in reading order.
    block: tokens of a block; a document that is shorter is a block.
    """

    document: NDArray[np.int64]
    block: int
    seed: int = 0

    @classmethod
    def of(cls, document: NDArray[np.int64], *, block: int | None = None, seed: int = 0) -> TextDraws:
        """block: None takes the longest that leaves enough blocks to draw from."""
        if block is None:
            fitting = [length for length in RUN_LENGTHS if len(document) // length >= MINIMUM_BLOCKS]
            block = fitting[0] if fitting else RUN_LENGTHS[-1]
        return cls(document, block, seed)

    @cached_property
    def _documents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token and length of each document."""
        starts = np.flatnonzero(np.r_[True, self.document[1:] != self.document[:-1]])
        return starts, np.diff(np.r_[starts, len(self.document)])

    @cached_property
    def count(self) -> int:
        """Blocks in one replicate."""
        return max(1, round(len(self.document) / self.block))

    @cached_property
    def _pieces(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Array]:
        """For every drawn block: where it begins and ends, how far it wraps (0 mostly), and its tokens: (R, count)."""
        generator = np.random.default_rng(self.seed)
        starts, lengths = self._documents
        # Each token is drawn equally often: a document's share is its length, a short document's that of a block.
        weight = np.maximum(lengths, self.block).astype(np.float64)
        shape = (RESAMPLES, self.count)
        chosen = np.searchsorted(np.cumsum(weight / weight.sum()), generator.random(shape)).clip(max=len(lengths) - 1)
        length, first = lengths[chosen], starts[chosen]
        begin = first + (generator.random(shape) * length).astype(np.int64).clip(max=length - 1)
        size = np.minimum(self.block, length)
        end = begin + size
        over = np.maximum(end - (first + length), 0)  # what wraps to the document's beginning
        return begin, end - over, np.where(over > 0, first + over, first), size.astype(np.float64)

    def means(self, values: NDArray[np.floating]) -> Array:
        """The mean of `values` (N,) in each replicate, (R,)."""
        if values.shape != self.document.shape:
            raise ValueError(f"values {values.shape} and documents {self.document.shape} differ in shape")
        begin, end, wrapped, size = self._pieces
        first = self._first
        sums = np.r_[0.0, np.cumsum(values, dtype=np.float64)]
        total = (sums[end] - sums[begin] + sums[wrapped] - sums[first]).sum(1)
        return np.asarray(total / size.sum(1))

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """Where the document of each drawn block begins, (R, count)."""
        starts, _ = self._documents
        begin = self._pieces[0]
        return starts[np.searchsorted(starts, begin, side="right") - 1]


@dataclass(frozen=True)
class SeedInterval:
    """An estimate with two intervals: over seeds and text, and over text alone (for these very weights).

    low, high: None where there is no interval at all. text_low, text_high: None where no losses were kept.
    by_seed: the estimate of each seed. seeds: how many.
    """

    estimate: float
    low: float | None
    high: float | None
    text_low: float | None
    text_high: float | None
    by_seed: tuple[float, ...]

    @property
    def seeds(self) -> int:
        return len(self.by_seed)

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of 0, 0 where it contains 0 or is unknown."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class SeedSpread:
    """The standard deviation between seeds, and the degrees of freedom that it was estimated with."""

    deviation: float
    degrees: int

    @classmethod
    def pooled(cls, points: Sequence[Sequence[float]]) -> SeedSpread | None:
        """From figures by seed of several variants, taken to spread alike; None where none has two seeds."""
        known = [values for values in points if len(values) > 1]
        degrees = sum(len(values) - 1 for values in known)
        if not degrees:
            return None
        squares = sum(float(np.var(values, ddof=1)) * (len(values) - 1) for values in known)
        return cls(math.sqrt(squares / degrees), degrees)


@dataclass(frozen=True)
class Sample:
    """A figure of one variant and seed: on the text as it is, and on each drawn text (R,)."""

    point: float
    drawn: Array

    @classmethod
    def perplexity(cls, losses: NDArray[np.floating], draws: TextDraws) -> Sample:
        """exp of the mean loss. losses: (N,) nats per token, in the order of `draws`."""
        return cls(math.exp(float(np.mean(losses, dtype=np.float64))), np.exp(draws.means(losses)))

    @classmethod
    def mean(cls, values: NDArray[np.floating], draws: TextDraws) -> Sample:
        """The mean of values (N,), such as 1 for a token that was predicted right and 0 for another."""
        return cls(float(np.mean(values, dtype=np.float64)), draws.means(values))


def contrast(
    samples: Sequence[Mapping[str, Sample]],
    weights: Mapping[str, float],
    *,
    relative_to: str | None = None,
    spread: SeedSpread | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> SeedInterval:
    """A weighted sum of variants' figures, averaged over seeds, with its intervals.

    samples: for each seed, each variant's sample; all of them of the same draws, so that they are paired.
    weights: of the variants: {'a': 1, 'b': -1} is the difference a - b.
    relative_to: a variant by whose figure the sum is divided, in each replicate, for differences in per cent.
    spread: between seeds, pooled over variants; None takes that of these seeds alone.
    """
    if not samples:
        raise ValueError("no seed to take an estimate from")
    points, replicates = [], []
    for by_variant in samples:
        base = by_variant[relative_to] if relative_to else Sample(1.0, np.ones(1))
        points.append(sum(weight * by_variant[name].point for name, weight in weights.items()) / base.point)
        replicates.append(sum(weight * by_variant[name].drawn for name, weight in weights.items()) / base.drawn)
    text = np.asarray(np.mean(replicates, axis=0))
    return _interval(points, text, text + seed_draws(points, spread, seed=seed), confidence)


def over_seeds(values: Sequence[float], *, confidence: float = CONFIDENCE) -> SeedInterval:
    """The mean of one figure a seed, with Student's interval; no interval for a single seed unless it cannot vary."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return SeedInterval(mean, None, None, None, None, tuple(values))
    from scipy.stats import t  # here, since importing scipy.stats takes longer than reading a folder

    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return SeedInterval(mean, mean - half, mean + half, None, None, tuple(float(v) for v in values))


def seed_draws(points: Sequence[float], spread: SeedSpread | None = None, *, seed: int = 0) -> Array:
    """(R,) draws of how far the mean of these seeds lies from the mean of all seeds; 0 for a single seed."""
    spread = spread or SeedSpread.pooled([points])
    if len(points) < 2 or spread is None:
        return np.zeros(RESAMPLES)
    scale = spread.deviation / math.sqrt(len(points))
    # Student's t from evenly spread quantiles in random order: the heavy tails of few seeds then have no luck in them.
    from scipy.stats import t

    levels = (np.arange(RESAMPLES) + 0.5) / RESAMPLES
    order = np.random.default_rng(seed + 1).permutation(RESAMPLES)
    return np.asarray(scale * t.ppf(levels, spread.degrees)[order])


def _interval(points: Sequence[float], text: Array, both: Array, confidence: float) -> SeedInterval:
    tail = (1 - confidence) / 2
    estimate = float(np.mean(points))
    if np.all(both == both[0]) and np.all(text == text[0]):  # a variant against itself
        return SeedInterval(estimate, estimate, estimate, estimate, estimate, tuple(points))
    low, high = (float(v) for v in np.quantile(both, [tail, 1 - tail]))
    text_low, text_high = (float(v) for v in np.quantile(text, [tail, 1 - tail]))
    return SeedInterval(estimate, low, high, text_low, text_high, tuple(points))
