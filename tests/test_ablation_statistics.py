"""Intervals over seeds and text: right on average, paired, and honest about few seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recollect.reports.ablation_statistics import Sample, SeedSpread, TextDraws, contrast, over_seeds, seed_draws
from recollect.reports.synthetic import autocorrelated


def test_coverage_with_three_seeds() -> None:
    """Of 95 % intervals about 95 % hold the true difference of all seeds on all texts; text alone would not do."""
    generator = np.random.default_rng(3)
    document = np.repeat(np.arange(4), 1000)
    shift, spread, repeats, hits, hits_of_text = 0.05, 0.02, 50, 0, 0
    for repeat in range(repeats):
        draws = TextDraws.of(document, seed=repeat)
        hard = 3 + 0.5 * autocorrelated(generator, len(document))
        common = 0.2 * autocorrelated(generator, len(document))
        samples = []
        for _ in range(3):
            other = hard + shift + common + spread * generator.normal()
            samples.append({"a": Sample.perplexity(other, draws), "r": Sample.perplexity(hard, draws)})
        found = contrast(samples, {"a": 1.0, "r": -1.0}, relative_to="r")
        truth = math.exp(shift + spread**2 / 2) - 1
        assert found.low is not None
        assert found.high is not None
        assert found.text_low is not None
        assert found.text_high is not None
        hits += found.low <= truth <= found.high
        hits_of_text += found.text_low <= truth <= found.text_high
    assert hits / repeats >= 0.88
    assert hits_of_text / repeats < 0.85, "the simulation is too easy: the seeds hardly matter"


def test_one_seed_is_judged_on_the_text_alone() -> None:
    document = np.repeat(np.arange(4), 500)
    draws = TextDraws.of(document)
    generator = np.random.default_rng(0)
    losses = 3 + generator.normal(size=2000)
    found = contrast([{"a": Sample.perplexity(losses, draws)}], {"a": 1.0})
    assert (found.low, found.high) == (found.text_low, found.text_high)
    assert found.seeds == 1
    assert np.all(seed_draws([1.0]) == 0)


def test_every_token_is_drawn_equally_often() -> None:
    """Short documents, first tokens and last tokens included."""
    lengths = (5, 40, 300, 33)
    document = np.repeat(np.arange(4), lengths)
    draws = TextDraws.of(document, block=8)
    count = len(document)
    shares = np.asarray([draws.means((np.arange(count) == token).astype(float)).mean() for token in range(count)])
    assert shares.sum() == pytest.approx(1)
    for start, length in zip(np.cumsum((0, *lengths[:-1])), lengths, strict=True):
        # Sizes of the drawn texts differ a little, which moves shares by less than their own noise.
        assert shares[start : start + length].mean() * count == pytest.approx(1, abs=0.06)
    assert np.abs(shares * count - 1).max() < 0.3


def test_blocks_stay_within_documents() -> None:
    document = np.repeat(np.arange(3), (100, 50, 200))
    draws = TextDraws.of(document, block=64)
    for number in range(3):
        inside = draws.means((document == number).astype(float))
        size = {0: 64, 1: 50, 2: 64}[number]
        blocks = inside * 64 * draws.count / size
        assert inside.min() >= 0
        assert blocks.max() <= draws.count * 1.3


def test_a_variant_against_itself_differs_by_nothing() -> None:
    document = np.repeat(np.arange(2), 400)
    draws = TextDraws.of(document)
    sample = Sample.perplexity(np.random.default_rng(0).normal(size=800) + 3, draws)
    found = contrast([{"a": sample, "b": sample}] * 3, {"a": 1.0, "b": -1.0})
    assert (found.low, found.estimate, found.high) == (0.0, 0.0, 0.0)
    assert found.sign == 0


def test_pairing_takes_out_hard_text_and_lucky_seeds() -> None:
    document = np.repeat(np.arange(4), 500)
    draws = TextDraws.of(document)
    generator = np.random.default_rng(1)
    hard = 3 + autocorrelated(generator, 2000)
    samples = []
    for luck in (-0.3, 0.0, 0.3):
        both = hard + luck
        samples.append({"a": Sample.perplexity(both + 0.01, draws), "r": Sample.perplexity(both, draws)})
    apart = contrast(samples, {"a": 1.0, "r": -1.0}, relative_to="r")
    alone = contrast(samples, {"a": 1.0})
    assert apart.sign == 1
    assert apart.estimate == pytest.approx(math.expm1(0.01))
    assert apart.low is not None
    assert apart.high is not None
    assert apart.high - apart.low < 1e-9
    assert alone.low is not None
    assert alone.high is not None
    assert alone.high - alone.low > 5


def test_estimates_are_means_of_perplexities() -> None:
    document = np.zeros(200, dtype=np.int64)
    draws = TextDraws.of(document)
    samples = [{"a": Sample.perplexity(np.full(200, level), draws)} for level in (1.0, 2.0)]
    assert contrast(samples, {"a": 1.0}).estimate == pytest.approx((math.e + math.e**2) / 2)
    share = contrast([{"a": Sample.mean(np.arange(200) < 50, draws)}], {"a": 1.0})
    assert share.estimate == pytest.approx(0.25)


def test_spread_pooled_over_variants_covers_with_two_seeds() -> None:
    """Two seeds of eight variants: the pooled interval holds the truth as often as it says, and is far narrower."""
    generator = np.random.default_rng(5)
    hits, widths, alone = [], [], []
    for _ in range(300):
        truths = generator.normal(size=8)
        points = truths[:, None] + 0.3 * generator.normal(size=(8, 2))
        spread = SeedSpread.pooled(points.tolist())
        assert spread is not None
        assert spread.degrees == 8
        low, high = np.quantile(seed_draws(list(points[0]), spread), [0.025, 0.975])
        hits.append(low <= truths[0] - points[0].mean() <= high)
        widths.append(high - low)
        alone.append(np.subtract(*np.quantile(seed_draws(list(points[0])), [0.975, 0.025])))
    assert 0.91 <= np.mean(hits) <= 0.985
    assert np.median(widths) < 0.6 * np.median(alone)
    assert SeedSpread.pooled([[1.0], [2.0]]) is None


def test_student_over_seeds() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.estimate == 2
    assert found.high is not None
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert over_seeds([5.0]).low is None


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        TextDraws.of(np.zeros(10, dtype=np.int64)).means(np.zeros(9))
