"""What the report of one grid shows, computed once: figures of each variant and its differences to its reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.reports.ablation_results import Ablation, Losses, SeedRow, Variant
from recollect.reports.ablation_statistics import Sample, SeedInterval, SeedSpread, TextDraws, contrast, over_seeds

LEAST_SHARED = 0.5
"""Two variants are compared on the tokens that both predicted, if these are at least this share of either's."""


@dataclass(frozen=True)
class Measure:
    """A figure of each run that is no loss. path: where it stands in a row, the first that is there.

    title, unit, digits: for readers.
    """

    name: str
    path: tuple[tuple[str, str], ...]
    title: str
    unit: str
    digits: int


MEASURES = (
    Measure("spikes", (("training", "spikes"),), "Loss spikes", "per training", 2),
    Measure("gradient_norm_median", (("training", "gradient_norm_median"),), "Gradient norm", "median", 2),
    Measure("gradient_norm_max", (("training", "gradient_norm_max"),), "Gradient norm", "largest", 1),
    Measure("step_ratio", (("costs", "step_ratio"),), "Training step", "reference = 1", 2),
    Measure("step_ms", (("costs", "step_ms"), ("training", "step_ms")), "Training step", "ms", 1),
    Measure("evaluation_us_per_token", (("evaluation", "us_per_token"),), "Evaluation", "µs per token", 1),
    Measure("memory_bytes", (("costs", "memory_bytes"),), "Memory", "bytes per sequence", 0),
    Measure("cache_bytes", (("costs", "cache_bytes"),), "Caches", "bytes per sequence", 0),
    Measure("parameters", (("training", "parameters"), ("costs", "parameters")), "Parameters", "", 0),
    Measure("training_tokens", (("training", "tokens"),), "Trained on", "tokens", 0),
)


TIMED_ON = {
    "step_ms": (("costs", "timed_on"), ("training", "machine")),
    "evaluation_us_per_token": (("evaluation", "machine"),),
}
"""Where a row names the machine that a time was taken on."""


@dataclass(frozen=True)
class Row:
    """One variant in one section.

    reference: what it is compared with; None where it is the reference.
    seeds: that were asked for; ok: that have figures; diverged: that did not survive training.
    status: 'ok' where any seed has figures, else that of the first seed. reason: of the first seed without figures.
    difference, percent, accuracy_difference: against the reference over the seeds that both have.
    figures, differences: by `Measure.name`. probes: by '<probe>_<number>'.
    """

    section: str
    variant: Variant
    reference: str | None
    seeds: int
    ok: int
    diverged: int
    status: str
    reason: str
    perplexity: SeedInterval | None = None
    difference: SeedInterval | None = None
    percent: SeedInterval | None = None
    accuracy: SeedInterval | None = None
    accuracy_difference: SeedInterval | None = None
    figures: Mapping[str, SeedInterval] = field(default_factory=dict)
    differences: Mapping[str, SeedInterval] = field(default_factory=dict)
    probes: Mapping[str, SeedInterval] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def compared(self) -> SeedInterval | None:
        """The difference in per cent, None for the reference itself."""
        return None if self.reference is None else self.percent


@dataclass(frozen=True)
class AblationAnalysis:
    """A grid's results with everything derived from them. rows: by section, then in the order of the grid's file."""

    ablation: Ablation
    seed: int = 0

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self._row(section, v) for section in self.ablation.sections for v in self.ablation.variants)

    @cached_property
    def measured(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.perplexity is not None)

    def of(self, section: str) -> tuple[Row, ...]:
        """The measured rows of a section."""
        return tuple(row for row in self.measured if row.section == section)

    def row(self, section: str, name: str) -> Row | None:
        """A measured row by name."""
        return next((row for row in self.of(section) if row.name == name), None)

    def compare(self, section: str, one: str, other: str, *, percent: bool = True) -> SeedInterval | None:
        """Perplexity of one variant minus another's, in per cent of the other's; None where they share no text."""
        return self._contrast(section, {one: 1.0, other: -1.0}, relative_to=other if percent else None, factor=percent)

    def interaction(self, section: str, weights: Mapping[str, float], base: str) -> SeedInterval | None:
        """A weighted sum of perplexities in per cent of `base`'s, such as a difference of two differences."""
        return self._contrast(section, weights, relative_to=base, factor=True)

    @cached_property
    def text(self) -> tuple[int, int, int]:
        """Tokens, documents and block length of the first section's text; zeros where no losses were kept."""
        for row in self.measured:
            for seed_row in self.ablation.of(row.section, row.name):
                losses = self._losses(seed_row)
                if losses is not None:
                    draws = self._draws([losses])
                    return len(losses.loss), len(np.unique(losses.document)), draws.block
        return 0, 0, 0

    # One row

    def _row(self, section: str, variant: Variant) -> Row:
        rows = self.ablation.of(section, variant.name)
        good = [row for row in rows if row.ok]
        bad = next((row for row in rows if not row.ok), None)
        status = "ok" if good else bad.status if bad else "missing"
        reason = bad.reason if bad else "" if good else "not run yet"
        # A variant may stand in for sections that it does not have, such as a text of its own.
        reference = variant.reference
        base = Row(
            section,
            variant,
            reference,
            seeds=len(self.ablation.seeds),
            ok=len(good),
            diverged=sum(row.status == "diverged" for row in rows),
            status=status,
            reason=reason,
        )
        if not good:
            return base
        machines = dict.fromkeys(str(row.training.get("machine") or "") for row in good)
        own: dict[str, Any] = {
            "evaluation": {**good[0].evaluation, "machine": ", ".join(filter(None, machines)) or None}
        }
        own["perplexity"] = self._contrast(section, {variant.name: 1.0}) or over_seeds(
            [float(row.evaluation["perplexity"]) for row in good]
        )
        accuracies = [row.evaluation["accuracy"] for row in good if _number(row.evaluation.get("accuracy")) is not None]
        own["accuracy"] = self._contrast(section, {variant.name: 1.0}, of="correct") or (
            over_seeds(accuracies) if accuracies else None
        )
        own["figures"] = self._figures({row.seed: row for row in good})
        own["probes"] = _probes(good)
        if reference is not None:
            weights = {variant.name: 1.0, reference: -1.0}
            own["difference"] = self._contrast(section, weights)
            own["percent"] = self._contrast(section, weights, relative_to=reference, factor=True)
            own["accuracy_difference"] = self._contrast(section, weights, of="correct")
            others = {row.seed: row for row in self.ablation.of(section, reference) if row.ok}
            own["differences"] = self._figures({row.seed: row for row in good}, others)
        return dataclasses.replace(base, **own)

    @cached_property
    def timed_apart(self) -> bool:
        """Whether steps were timed by themselves: then what the logs say of times, taken beside other work, is not."""
        return any("step_ms" in row.costs for row in self.ablation.rows.values())

    def _figure(self, row: SeedRow, measure: Measure) -> float | None:
        path = measure.path
        if measure.name == "step_ms":
            path = (("costs" if self.timed_apart else "training", "step_ms"),)
        for table, name in path:
            value = _number(getattr(row, table).get(name))
            if value is not None:
                return value
        return None

    def _figures(
        self, rows: Mapping[int, SeedRow], others: Mapping[int, SeedRow] | None = None
    ) -> dict[str, SeedInterval]:
        """Each figure's mean over seeds, or the mean of its differences to `others` over the seeds that both have.

        No difference is taken of times of two machines.
        """
        found = {}
        for figure in MEASURES:
            values = []
            for seed, row in rows.items():
                value = self._figure(row, figure)
                if others is not None:
                    comparable = seed in others and _one_machine(figure, row, others[seed])
                    other = self._figure(others[seed], figure) if comparable else None
                    value = None if value is None or other is None else value - other
                if value is not None:
                    values.append(value)
            if values:
                found[figure.name] = over_seeds(values)
        return found

    # Losses

    @cached_property
    def _kept(self) -> dict[tuple[str, str, int], Losses | None]:
        return {}

    def _losses(self, row: SeedRow) -> Losses | None:
        key = (row.section, row.variant, row.seed)
        if key not in self._kept:
            self._kept[key] = row.losses()
        return self._kept[key]

    @cached_property
    def _made(self) -> dict[tuple[str, ...], TextDraws | None]:
        return {}

    @cached_property
    def _samples(self) -> dict[tuple[str, ...], Sample]:
        return {}

    def _contrast(
        self,
        section: str,
        weights: Mapping[str, float],
        *,
        relative_to: str | None = None,
        factor: bool = False,
        of: str = "loss",
    ) -> SeedInterval | None:
        """The weighted sum with its intervals, over the seeds that all variants have; None where there are none."""
        names = sorted({*weights, *([relative_to] if relative_to else [])})
        samples = []
        for seed in self.ablation.seeds:
            rows = [self.ablation.rows.get((section, name, seed)) for name in names]
            losses = [self._losses(row) if row is not None and row.ok else None for row in rows]
            if any(found is None for found in losses):
                continue
            kept = [found for found in losses if found is not None]
            places = self._shared(kept)
            if places is None:
                continue
            draws = self._draws(kept, places)
            shared = "+".join(sorted({found.text for found in kept}))
            samples.append(
                {
                    name: self._sample((section, name, str(seed), of, shared), found, place, draws, of)
                    for name, found, place in zip(names, kept, places, strict=True)
                }
            )
        if not samples:
            return None
        scaled = {name: weight * (100.0 if factor else 1.0) for name, weight in weights.items()}
        spread = self._spread(section, weights, relative_to, factor, of)
        return contrast(samples, scaled, relative_to=relative_to, spread=spread, seed=self.seed)

    def _spread(
        self, section: str, weights: Mapping[str, float], relative_to: str | None, factor: bool, of: str
    ) -> SeedSpread | None:
        """For a difference of two variants: the spread between seeds, pooled over all that are compared like them.

        Variants that share the reference's checkpoint vary far less with the seed than those trained apart: the two
        kinds are pooled each by itself.
        """
        if sorted(weights.values()) != [-1.0, 1.0]:
            return None
        (one,) = (name for name, weight in weights.items() if weight > 0)
        (other,) = (name for name, weight in weights.items() if weight < 0)
        key = (section, other, self._shares_checkpoint(section, one, other), relative_to or "", factor, of)
        if key not in self._spreads:
            alike = [
                variant.name
                for variant in self.ablation.variants
                if variant.reference == other
                and variant.name != other
                and self._shares_checkpoint(section, variant.name, other) == key[2]
            ]
            base = relative_to if relative_to == other else None
            self._spreads[key] = SeedSpread.pooled(
                [self._points(section, name, other, base, 100.0 if factor else 1.0, of) for name in {one, *alike}]
            )
        return self._spreads[key]

    @cached_property
    def _spreads(self) -> dict[tuple[str, str, bool, str, bool, str], SeedSpread | None]:
        return {}

    def _shares_checkpoint(self, section: str, one: str, other: str) -> bool:
        """Whether every seed of both was evaluated from one training."""
        pairs = [
            (self.ablation.rows.get((section, one, seed)), self.ablation.rows.get((section, other, seed)))
            for seed in self.ablation.seeds
        ]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        return bool(both) and all(
            a.training.get("digest") is not None and a.training.get("digest") == b.training.get("digest")
            for a, b in both
        )

    def _points(
        self, section: str, one: str, other: str, relative_to: str | None, factor: float, of: str
    ) -> list[float]:
        """The difference of two variants for each seed that both have, each on all the text that it read."""
        points = []
        for seed in self.ablation.seeds:
            rows = [self.ablation.rows.get((section, name, seed)) for name in (one, other)]
            losses = [self._losses(row) if row is not None and row.ok else None for row in rows]
            if losses[0] is None or losses[1] is None:
                continue
            a, b = (
                math.exp(float(np.mean(found.loss, dtype=np.float64)))
                if of == "loss"
                else float(np.mean(found.correct))
                for found in (losses[0], losses[1])
            )
            points.append(factor * (a - b) / (b if relative_to else 1.0))
        return points

    def _sample(
        self, key: tuple[str, ...], losses: Losses, places: NDArray[np.int64] | None, draws: TextDraws, of: str
    ) -> Sample:
        if key not in self._samples:
            values: NDArray[Any] = losses.loss if of == "loss" else losses.correct.astype(np.float64)
            values = values if places is None else values[places]
            self._samples[key] = Sample.perplexity(values, draws) if of == "loss" else Sample.mean(values, draws)
        return self._samples[key]

    @staticmethod
    def _shared(losses: Sequence[Losses]) -> list[NDArray[np.int64] | None] | None:
        """For each, where the tokens that all of them predicted stand (None: everywhere); None for too few of them."""
        if len({found.text for found in losses}) == 1:
            return [None] * len(losses)
        keys = [_token_keys(found, losses) for found in losses]
        common = keys[0]
        for other in keys[1:]:
            common = np.intersect1d(common, other, assume_unique=True)
        if len(common) < LEAST_SHARED * max(len(key) for key in keys):
            return None
        places: list[NDArray[np.int64] | None] = []
        for key in keys:
            order = np.argsort(key)
            places.append(order[np.searchsorted(key, common, sorter=order)])
        return places

    def _draws(self, losses: Sequence[Losses], places: Sequence[NDArray[np.int64] | None] | None = None) -> TextDraws:
        key = tuple(sorted({found.text for found in losses}))
        if key not in self._made:
            document = losses[0].document
            if places is not None and places[0] is not None:
                document = document[places[0]]
            self._made[key] = TextDraws.of(document, seed=self.seed)
        made = self._made[key]
        assert made is not None
        return made


def _token_keys(losses: Losses, together: Sequence[Losses]) -> NDArray[np.int64]:
    """(N,) one number for each (document's name, position), the same in all of `together`."""
    names = sorted({name for found in together for name in found.names})
    numbers = {name: number for number, name in enumerate(names)}
    document = np.asarray([numbers[name] for name in losses.names], dtype=np.int64)[losses.document]
    return np.asarray(document << 32 | losses.position)


def _one_machine(figure: Measure, one: SeedRow, other: SeedRow) -> bool:
    """Whether a figure of two rows may be set against each other: it is no time, or both come from one machine."""
    for table, name in TIMED_ON.get(figure.name, ()):
        mine, others = getattr(one, table).get(name), getattr(other, table).get(name)
        if mine and others:
            return bool(mine == others)
    return True


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _probes(rows: Sequence[SeedRow]) -> dict[str, SeedInterval]:
    """The mean over seeds of every number that a probe gave, and of what a system told of itself."""
    found: dict[str, list[float]] = {}
    for row in rows:
        tables = {name: value.get("numbers", {}) for name, value in row.probes.items() if isinstance(value, Mapping)}
        for probe, numbers in {**tables, "system": row.system}.items():
            for name, value in numbers.items():
                number = _number(value)
                if number is not None:
                    found.setdefault(f"{probe}_{name}", []).append(number)
    return {name: over_seeds(values) for name, values in found.items()}


def analyse_ablation(ablation: Ablation) -> AblationAnalysis:
    return AblationAnalysis(ablation)
