"""Intervals for perplexities and their differences, from per-token losses.

Neighbouring losses depend on each other (one copied run makes many tokens easy at once), so tokens are not resampled
one by one. Blocks of them are (Künsch 1989; Davison and Hinkley 1997, section 8.2): whole documents where the text has
enough of them, otherwise runs of consecutive tokens of one document. A difference is paired: both backends' losses of a
block are drawn together, so that hard text cancels out.

The interval is the percentile interval of the bootstrap with Hesterberg's (2015) expansion for few blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# With fewer (effective) documents, drawing documents gives intervals that are too short; runs are drawn instead.
MINIMUM_DOCUMENTS = 20
# A run should be longer than the reach of dependence between losses, yet there must be enough runs to resample.
RUN_LENGTHS = (1024, 512, 256, 128, 64, 32)
MINIMUM_RUNS = 60
# More blocks make no better interval, only a larger matrix of draws.
MAXIMUM_BLOCKS = 2000
CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Blocks:
    """Which block each token belongs to.

    labels: (N,) int64 in [0, count). kind: 'documents' or 'runs'. run_length: tokens in a run, 0 for documents.
    effective: how many blocks of equal size would weigh as much, (sum n)^2 / sum n^2.
    """

    labels: NDArray[np.int64]
    count: int
    kind: str
    run_length: int
    effective: float

    @property
    def description(self) -> str:
        """The method in words, for the page."""
        if self.kind == "documents":
            return f"{self.count} whole documents were drawn with replacement"
        return f"{self.count} runs of about {self.run_length} tokens of one document each were drawn with replacement"


def make_blocks(
    document: NDArray[np.int64],
    position: NDArray[np.int64],
    *,
    minimum_documents: int = MINIMUM_DOCUMENTS,
    run_length: int | None = None,
) -> Blocks:
    """Divides tokens into blocks.

    document, position: (N,) the document of each token and its place in it, in any order.
    run_length: forces runs of that many tokens; by default documents, or the longest run that leaves enough runs.
    """
    if run_length is None:
        names, labels = np.unique(document, return_inverse=True)
        labels = (
            labels.astype(np.int64) % MAXIMUM_BLOCKS
        )  # documents are independent, so a group of them is a block too
        effective = _effective(np.bincount(labels))
        if effective >= minimum_documents:
            return Blocks(labels, min(len(names), MAXIMUM_BLOCKS), "documents", 0, effective)
        fitting = [length for length in RUN_LENGTHS if len(document) // length >= MINIMUM_RUNS]
        run_length = max(fitting[0] if fitting else RUN_LENGTHS[-1], len(document) // MAXIMUM_BLOCKS)
    order = np.lexsort((position, document))
    sorted_document = document[order]
    starts = np.flatnonzero(np.r_[True, sorted_document[1:] != sorted_document[:-1]])
    lengths = np.diff(np.r_[starts, len(order)])
    place = np.arange(len(order)) - np.repeat(starts, lengths)
    # A short end of a document joins the run before it: a run of three tokens would count as much as a full one.
    runs = np.maximum(1, np.round(lengths / run_length).astype(np.int64))
    within = np.minimum(place // run_length, np.repeat(runs, lengths) - 1)
    first = np.cumsum(runs) - runs
    labels = np.empty(len(order), dtype=np.int64)
    labels[order] = np.repeat(first, lengths) + within
    count = int(runs.sum())
    return Blocks(labels, count, "runs", run_length, _effective(np.bincount(labels, minlength=count)))


def _effective(sizes: NDArray[np.int64]) -> float:
    total = float(sizes.sum())
    return total * total / float((sizes.astype(np.float64) ** 2).sum()) if total else 0.0


def perplexity_interval(
    losses: NDArray[np.floating], blocks: Blocks, *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """exp of the mean loss, with its interval. losses: (N,) nats per token."""
    sums = np.bincount(blocks.labels, weights=losses, minlength=blocks.count)
    estimate = math.exp(float(np.mean(losses, dtype=np.float64)))
    draws, sizes = _draws(blocks, seed)
    replicates = np.exp((draws @ sums) / (draws @ sizes))
    return _percentile(estimate, replicates, blocks, confidence)


def difference_interval(
    losses: NDArray[np.floating],
    reference: NDArray[np.floating],
    blocks: Blocks,
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Perplexity of `losses` minus perplexity of `reference`, paired by token. Both (N,) in the same order."""
    if losses.shape != reference.shape or losses.shape != blocks.labels.shape:
        raise ValueError(f"losses {losses.shape}, reference {reference.shape}, blocks {blocks.labels.shape} differ")
    estimate = math.exp(float(np.mean(losses, dtype=np.float64))) - math.exp(
        float(np.mean(reference, dtype=np.float64))
    )
    if np.array_equal(losses, reference):
        return Interval(0.0, 0.0, 0.0)
    sums = np.stack(
        [np.bincount(blocks.labels, weights=x, minlength=blocks.count) for x in (losses, reference)], axis=1
    )
    draws, sizes = _draws(blocks, seed)
    means = (draws @ sums) / (draws @ sizes)[:, None]
    replicates = np.exp(means[:, 0]) - np.exp(means[:, 1])
    return _percentile(estimate, replicates, blocks, confidence)


def mean_interval(
    values: NDArray[np.floating],
    chosen: NDArray[np.bool_],
    blocks: Blocks,
    *,
    against: NDArray[np.bool_] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """The mean of `values` (N,) over the tokens marked in `chosen` (N,), with its interval.

    against: other tokens (N,), whose mean, over the same draws of blocks, is subtracted.

    Raises ValueError where nothing is marked: there is no mean of nothing.
    """
    estimate, replicates = _mean_replicates(values, chosen, blocks, seed)
    if against is not None:
        other, other_replicates = _mean_replicates(values, against, blocks, seed)
        estimate, replicates = estimate - other, replicates - other_replicates
    # A draw may hold no token of a rare kind; it says nothing about their mean.
    return _percentile(estimate, replicates[np.isfinite(replicates)], blocks, confidence)


def _mean_replicates(
    values: NDArray[np.floating], chosen: NDArray[np.bool_], blocks: Blocks, seed: int
) -> tuple[float, NDArray[np.float64]]:
    if not chosen.any():
        raise ValueError("no token is marked: there is no mean of nothing")
    labels = blocks.labels[chosen]
    sums = np.bincount(labels, weights=values[chosen], minlength=blocks.count)
    sizes = np.bincount(labels, minlength=blocks.count).astype(np.float64)
    draws = _multinomial(blocks.count, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        replicates = (draws @ sums) / (draws @ sizes)
    return float(np.mean(values[chosen], dtype=np.float64)), replicates


def _draws(blocks: Blocks, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often each block is drawn in each resample (R, count), and the tokens per block (count,)."""
    sizes = np.bincount(blocks.labels, minlength=blocks.count).astype(np.float64)
    return _multinomial(blocks.count, seed), sizes


@lru_cache(maxsize=2)
def _multinomial(count: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


def _percentile(estimate: float, replicates: NDArray[np.float64], blocks: Blocks, confidence: float) -> Interval:
    from scipy.stats import norm, t  # here, since importing scipy.stats takes longer than reading a folder

    tail = (1 - confidence) / 2
    effective = max(2.0, blocks.effective)
    level = float(norm.cdf(t.ppf(tail, effective - 1) * math.sqrt(effective / (effective - 1))))
    low, high = np.quantile(replicates, [level, 1 - level])
    return Interval(estimate, float(low), float(high))
