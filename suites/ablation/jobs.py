"""What there is to do: trainings, evaluations, probes and rows, as plain records that travel to a process as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recollect.model.checkpoints import CONFIG
from recollect.model.configuration import ModelConfig
from recollect.model.training import SNAPSHOTS
from recollect.model.training_options import TrainingOptions

from ..cells import fingerprint
from .settings import EvaluationSettings

CHECKPOINTS, EVALUATIONS = "checkpoints", "evaluations"
TRAINED, DIVERGED = "training.json", "diverged.json"


@dataclass(frozen=True)
class TrainingJob:
    """One training.

    Attributes:
        digest: of all that decides the weights.
        options: as `train` takes them; with a start, `checkpoint` is its folder.
        start: digest of the training it starts from; None starts from random weights.
        section: name of its corpus.
        label: how it is called while it runs: the first variant that wants it.
        seconds: the time expected.
    """

    digest: str
    options: TrainingOptions
    start: str | None
    section: str
    label: str
    seconds: float

    @property
    def folder(self) -> Path:
        """Where its checkpoint lies."""
        return self.options.output

    def state(self) -> str:
        """'trained', 'diverged' or 'open' (also where snapshots are missing), read from the disk."""
        if (self.folder / TRAINED).is_file():
            return "open" if missing_snapshots(self.options) else "trained"
        return "diverged" if (self.folder / DIVERGED).is_file() else "open"

    def as_json(self) -> dict[str, Any]:
        """For the process that runs it."""
        values = {name.name: getattr(self.options, name.name) for name in dataclasses.fields(self.options)}
        values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        values["model"] = self.options.model.to_dict()
        return {"digest": self.digest, "options": values, "start": self.start, "section": self.section}


def missing_snapshots(options: TrainingOptions) -> list[int]:
    """Steps whose snapshot is wanted and not there."""
    folder = options.output / SNAPSHOTS
    return [step for step in options.snapshots if not (folder / str(step) / CONFIG).is_file()]


@dataclass(frozen=True)
class EvaluationJob:
    """One evaluation of one training, or one probe of it.

    Attributes:
        digest: of the training, the text's corpus, the settings and the system.
        training: digest of the training.
        config: the model as it is evaluated.
        settings: with nothing left open.
        system: 'model', 'knn-lm', 'spalm', 'training-free', or 'probe:<name>'.
        options: of the system or probe.
        seed: for what draws random numbers.
        seconds: the time expected.
    """

    digest: str
    training: str
    config: ModelConfig
    settings: EvaluationSettings
    system: str
    options: dict[str, Any]
    seed: int
    seconds: float
    label: str = ""

    def path(self, output: Path) -> Path:
        """Its record; the losses lie beside it."""
        return output / EVALUATIONS / f"{self.digest}.json"

    def as_json(self) -> dict[str, Any]:
        """For the process that runs it."""
        return {
            "digest": self.digest,
            "training": self.training,
            "config": self.config.to_dict(),
            "settings": dataclasses.asdict(self.settings),
            "system": self.system,
            "options": self.options,
            "seed": self.seed,
            "label": self.label,
        }


@dataclass(frozen=True)
class PlannedRow:
    """One line of a grid's rows.jsonl.

    Attributes:
        skip: why it cannot be run here (a missing library); empty where it can.
        probes: digests by name.
        timing: digest of the comparison of its training step with its reference's.
    """

    grid: str
    section: str
    variant: str
    seed: int
    kind: str
    reference: str
    training: str
    evaluation: str
    timing: str
    probes: dict[str, str] = field(default_factory=dict)
    skip: str = ""


@dataclass
class Plan:
    """Everything that all grids need, each thing once.

    Attributes:
        timings: comparisons of training steps, as the process that measures them takes them.
        asked: trainings and evaluations that the rows would be without sharing.
        settings: all values of each (grid, variant), for run.json.
    """

    rows: list[PlannedRow] = field(default_factory=list)
    trainings: dict[str, TrainingJob] = field(default_factory=dict)
    evaluations: dict[str, EvaluationJob] = field(default_factory=dict)
    timings: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: int = 0
    settings: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def evaluations_of(self, training: str) -> list[EvaluationJob]:
        """The evaluations of one training, those of one text beside each other."""
        found = [job for job in self.evaluations.values() if job.training == training]
        return sorted(found, key=lambda job: (job.settings.fill_tokens, job.config.segment_length, job.seconds))


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object from the disk; None where there is none that can be read, so that it is made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def digest_of(identity: Mapping[str, Any]) -> str:
    """Names what an identity describes."""
    return fingerprint({"schema": 1, **identity})
