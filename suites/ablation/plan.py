"""From grids to jobs: every variant, seed and section checked, each training and evaluation planned once."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.training_options import TrainingOptions

from .grid import Grid, Variant
from .jobs import CHECKPOINTS, EvaluationJob, Plan, PlannedRow, TrainingJob, digest_of
from .options import AblateError, AblateOptions
from .sections import Section, check_lengths
from .settings import (
    EvaluationSettings,
    evaluation_settings,
    missing_library,
    model_config,
    training_identity,
    training_options,
)
from .systems import check_system, training_free_config
from .timing import timing_digest, timing_task

EVALUATION_SHARE = 0.1
"""An evaluation's time as a share of a training's, until one was measured; for the order and the estimate only."""

FILLING = 2
"""Raised when the way in which memories are filled before scoring changes the losses."""

Matched = Callable[[Grid, Variant, "Resolved"], dict[str, Any]]
"""Gives the values of the model that `match_cost` sets."""


@dataclass(frozen=True)
class Resolved:
    """A variant with everything made: what it trains and what it evaluates.

    Attributes:
        trained: the model that is trained.
        training: its options, but for output, corpus, tokenizer and start.
        evaluated: the model as evaluated.
        settings: of the evaluation.
        start: the variant whose checkpoint is fine-tuned.
    """

    variant: Variant
    trained: ModelConfig
    training: TrainingOptions
    evaluated: ModelConfig
    settings: EvaluationSettings
    start: str | None

    @property
    def kind(self) -> str:
        """For the tables: how the variant came about."""
        if self.variant.system != "model":
            return self.variant.system
        return "train" if self.start is None else "fine-tune"

    def described(self) -> dict[str, Any]:
        """Everything that is trained and evaluated, nothing left to defaults, for run.json."""
        training = self.training.to_dict()
        for name in ("model", "seed", "corpus", "validate_every", "validation_tokens"):
            training.pop(name)
        training["memory_size"] = self.trained.memory_size if self.trained.memory_layers else 0
        return {
            "model": self.trained.to_dict(),
            "training": training,
            "evaluation": dataclasses.asdict(self.settings),
            "evaluated_model": self.evaluated.to_dict(),
        }


def resolve(grid: Grid, variant: Variant, options: AblateOptions, *, seed: int, changes: dict[str, Any]) -> Resolved:
    """Makes and checks everything that a variant names.

    Args:
        changes: values of the model that `match_cost` has set.

    Raises:
        AblateError: a value that cannot be used.
    """
    where = variant.where(grid)
    trained = model_config({**variant.tables["model"], **changes}, where)
    training = training_options(
        variant.tables["training"], trained, where, seed=seed, threads=options.threads, device=options.device
    )
    base = training_free_config(trained, variant.options, where) if variant.system == "training-free" else trained
    settings, evaluated = evaluation_settings(variant.tables["evaluation"], base, training, where)
    check_system(variant, trained, settings, where)
    for name, values in variant.probes.items():
        _probe_module(name, values, where)
    return Resolved(variant, trained, training, evaluated, settings, variant.start_from)


def probe_options(name: str, values: dict[str, Any], where: str) -> tuple[dict[str, Any], int]:
    """All options of a probe, and its version."""
    module = _probe_module(name, values, where)
    return {**module.OPTIONS, **values}, int(module.VERSION)


def _probe_module(name: str, values: dict[str, Any], where: str) -> Any:
    path = f"{__package__}.probes_{name.replace('-', '_')}"
    if not name.replace("-", "_").isidentifier() or importlib.util.find_spec(path) is None:
        there = sorted(found.stem[7:] for found in Path(__file__).parent.glob("probes_*.py"))
        raise AblateError(f"{where}: there is no probe {name!r}; there are {', '.join(there) or 'none'}")
    module = importlib.import_module(path)
    for key in values:
        if key not in module.OPTIONS:
            raise AblateError(f"{where}: probes.{name}.{key} is unknown; known are {', '.join(module.OPTIONS)}")
    return module


def chosen_variants(grid: Grid, wanted: Sequence[str]) -> tuple[Variant, ...]:
    """The variants to run: all, or those named with their references."""
    if not wanted:
        return grid.variants
    names = {variant.name for variant in grid.variants}
    chosen = {name for name in wanted if name in names}
    chosen |= {grid.variant(name).reference for name in chosen}
    return tuple(variant for variant in grid.variants if variant.name in chosen)


class Planner:
    """Plans grids into one output folder.

    Args:
        options: of the run.
        sections: its corpora.
        matched: gives what `match_cost` sets.
        measured: seconds of a training by its digest, where it is known.
    """

    def __init__(
        self,
        options: AblateOptions,
        sections: Sequence[Section],
        *,
        matched: Matched,
        measured: Callable[[str], float | None] = lambda digest: None,
    ) -> None:
        self.options = options
        self.output = Path(options.output).resolve()
        self.sections = sections
        self.matched = matched
        self.measured = measured
        self.plan = Plan()

    def check(self, grids: Sequence[Grid]) -> None:
        """Resolves every variant, asked for or not: a grid is right or it is not."""
        for grid in grids:
            for variant in grid.variants:
                resolved = self._resolve(grid, variant, 0)
                if resolved.start is not None:
                    self._check_start(self._resolve(grid, grid.variant(resolved.start), 0).trained, resolved)

    def add(self, grid: Grid) -> None:
        """Plans a grid: all its seeds, sections and variants."""
        seeds = grid.seeds if self.options.seeds is None else self.options.seeds
        for seed in range(seeds):
            for section in self.sections:
                for variant in chosen_variants(grid, self.options.variants):
                    self._row(grid, section, variant, seed)

    def _resolve(self, grid: Grid, variant: Variant, seed: int) -> Resolved:
        resolved = resolve(grid, variant, self.options, seed=seed, changes={})
        if variant.match_cost is None:
            return resolved
        changes = self.matched(grid, variant, resolved)
        return resolve(grid, variant, self.options, seed=seed, changes=changes)

    def _row(self, grid: Grid, section: Section, variant: Variant, seed: int) -> None:
        where = variant.where(grid)
        resolved = self._resolve(grid, variant, seed)
        check_lengths(section, resolved.settings, resolved.evaluated.segment_length, where)
        if variant.system in ("knn-lm", "spalm") and "validation" not in section.split_digests:
            raise AblateError(
                f"{where}: {variant.system} is tuned on validation documents, and corpus {section.name!r} has none"
            )
        self.plan.settings.setdefault((grid.name, variant.name), resolved.described())
        training = self._training(grid, section, resolved)
        evaluation = self._evaluation(section, resolved, training, resolved.variant.system, variant.options, where)
        probes = {}
        for name, values in variant.probes.items():
            chosen, version = probe_options(name, values, where)
            probes[name] = self._evaluation(
                section,
                resolved,
                training,
                f"probe:{name}",
                {**chosen, "version": version, "snapshots": list(resolved.training.snapshots)},
                where,
            )
        self.plan.asked += 2 + len(probes)
        self.plan.rows.append(
            PlannedRow(
                grid=grid.name,
                section=section.name,
                variant=variant.name,
                seed=seed,
                kind=resolved.kind,
                reference=variant.reference,
                training=training,
                evaluation=evaluation,
                probes=probes,
                timing=self._timing(grid, resolved),
                skip=missing_library(resolved.training.backend, resolved.settings.backend),
            )
        )

    def _training(self, grid: Grid, section: Section, resolved: Resolved) -> str:
        options, start = resolved.training, None
        if resolved.start is not None:
            before = self._resolve(grid, grid.variant(resolved.start), options.seed)
            start = self._training(grid, section, before)
            self._check_start(before.trained, resolved)
        identity = {
            **training_identity(options),
            "corpus": section.split_digests["train"],
            "tokenizer": section.tokenizer_key(resolved.trained.vocabulary_size),
            "start": start,
        }
        digest = digest_of(identity)
        if digest not in self.plan.trainings:
            folder = self.output / CHECKPOINTS
            tokenizer = section.tokenizer_path(self.output, resolved.trained.vocabulary_size)
            options = dataclasses.replace(
                options,
                output=folder / digest,
                corpus=section.source,
                tokenizer=tokenizer if start is None else None,
                checkpoint=None if start is None else folder / start,
                cache_directory=None if self.options.cache_directory is None else Path(self.options.cache_directory),
            )
            known = self.measured(digest)
            seconds = known if known is not None else self._expected(grid, options)
            self.plan.trainings[digest] = TrainingJob(
                digest, options, start, section.name, f"{grid.name}/{resolved.variant.name}", seconds
            )
        job = self.plan.trainings[digest]
        # Snapshots decide no weights: one training serves the variants that want them and those that do not.
        snapshots = tuple(sorted({*job.options.snapshots, *options.snapshots}))
        self.plan.trainings[digest] = dataclasses.replace(
            job, options=dataclasses.replace(job.options, snapshots=snapshots)
        )
        return digest

    def _timing(self, grid: Grid, resolved: Resolved) -> str:
        """The comparison of the variant's training step with its reference's."""
        reference = self._resolve(grid, grid.variant(resolved.variant.reference), 0).training
        digest = timing_digest(resolved.training, reference)
        label = f"{grid.name}/{resolved.variant.name}"
        self.plan.timings.setdefault(
            digest,
            {
                "digest": digest,
                "label": label,
                "this": timing_task(resolved.training),
                "reference": timing_task(reference),
            },
        )
        return digest

    def _check_start(self, before: ModelConfig, resolved: Resolved) -> None:
        """A fine-tuned model has the weights of its start: only what no weight depends on may differ, or a memory."""
        where = f"variant {resolved.variant.name!r}: start_from"
        for name in ("vocabulary_size", "layers", "width", "heads", "head_dim", "feed_forward"):
            if getattr(before, name) != getattr(resolved.trained, name):
                raise AblateError(
                    f"{where}: {name} is {getattr(resolved.trained, name)}, and the checkpoint has "
                    f"{getattr(before, name)}"
                )

    def _expected(self, grid: Grid, options: TrainingOptions) -> float:
        """Seconds of a training, from the scale's own figure and how many tokens are read through how many layers."""
        seconds = grid.seconds or 60.0
        base = model_config(grid.variant(grid.reference).tables["model"], grid.name)
        steps = grid.variant(grid.reference).tables["training"].get("steps", options.steps)
        rows = grid.variant(grid.reference).tables["training"].get("batch_size", options.batch_size)
        share = options.tokens / max(1, steps * rows * base.segment_length)
        model = options.model
        searches = len(model.memory_layers) * model.memory_size / 65_536
        return seconds * share * (0.75 + searches + 0.15 * len(model.memory_layers))

    def _evaluation(
        self,
        section: Section,
        resolved: Resolved,
        training: str,
        system: str,
        options: dict[str, Any],
        where: str,
    ) -> str:
        settings, config = resolved.settings, resolved.evaluated
        if training_only(system):
            settings = dataclasses.replace(settings, backend=None, memory_size=0, k=0)
        identity = {
            "training": training,
            "text": section.split_digests[settings.split],
            # Defaults are left out, so that a setting added by a later release changes no identity.
            "settings": {name: value for name, value in dataclasses.asdict(settings).items() if value != _PLAIN[name]},
            "system": system,
            "options": options,
            "seed": resolved.training.seed,
        }
        if settings.fill_tokens:
            identity["filling"] = FILLING
        digest = digest_of(identity)
        if digest not in self.plan.evaluations:
            expected = (self.plan.trainings[training].seconds) * EVALUATION_SHARE
            self.plan.evaluations[digest] = EvaluationJob(
                digest=digest,
                training=training,
                config=config,
                settings=settings,
                system=system,
                options=options,
                seed=resolved.training.seed,
                seconds=expected * (1.0 + (settings.memory_size or 0) / 16_384),
                label=where.replace("grid ", "").replace(", variant ", "/").replace("'", ""),
            )
        return digest


_PLAIN = dataclasses.asdict(EvaluationSettings())


def training_only(system: str) -> bool:
    """Whether the evaluation's memory has no part in a system, so that its settings are no part of its identity."""
    return system.startswith("probe:")


__all__ = ["ConfigurationError", "Planner", "Resolved", "chosen_variants", "probe_options", "resolve"]
