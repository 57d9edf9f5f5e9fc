"""What a probe gives: figures of a trained model beyond its losses, such as what age does to its keys.

A probe is a module `probes_<name>` beside this file with

    VERSION: int                     raised when its figures change meaning
    OPTIONS: dict[str, Any]          its options with their defaults
    def probe(checkpoints: Sequence[Path], text: EvaluationText, options: Mapping[str, Any]) -> ProbeResult

where `checkpoints` are the folders of the snapshots of one training, oldest first, the finished model last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recollect.model.evaluation_text import EvaluationText


@dataclass(frozen=True)
class ProbeResult:
    """Figures of one probe.

    Attributes:
        numbers: the figures of the variant's row, finite, units in their names.
        rows: a table of flat JSON values behind them, for figures of the report.
    """

    numbers: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)


class Probe(Protocol):
    """A module `probes_<name>`."""

    VERSION: int
    OPTIONS: dict[str, Any]

    def probe(self, checkpoints: Sequence[Path], text: EvaluationText, options: Mapping[str, Any]) -> ProbeResult:
        """The figures of one training on one text."""
        ...
