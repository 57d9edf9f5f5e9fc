"""Reading the folder of one ablation grid: what `recollect ablate` wrote, checked and typed.

    run.json     what was planned, on what, where    -> Ablation.run, .variants, .sections
    rows.jsonl   a row a section, variant and seed   -> SeedRow
    the .npz files that rows name                    -> SeedRow.losses()

Only JSON and plain arrays are read. A grid that is not finished is read as far as it goes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.reports.errors import ReportError

SCHEMA = 1
STATUSES = ("ok", "diverged", "failed", "skipped", "missing")
ROWS, RUN = "rows.jsonl", "run.json"
RERUN = "run the same `recollect ablate` command again: it goes on where it stopped"


@dataclass(frozen=True)
class Variant:
    """One variant of a grid.

    reference: the variant that it is compared with, None where it is the reference itself.
    changes: what it says itself, dotted names. settings: all its values, by table (model, training, evaluation).
    """

    name: str
    summary: str
    kind: str
    reference: str | None
    changes: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def value(self, table: str, name: str) -> Any:
        """A value of a table, such as ('model', 'k'); None where the folder does not tell."""
        values = self.settings.get(table)
        own = values.get(name) if isinstance(values, Mapping) else None
        return self.changes.get(f"{table}.{name}") if own is None else own

    @property
    def trained_memory(self) -> int | None:
        """Keys that each memory held in training, 0 for none; None where the folder does not tell."""
        if self.value("model", "memory_layers") == []:
            return 0
        own = self.value("training", "memory_size")
        size = self.value("model", "memory_size") if own is None else own
        return size if isinstance(size, int) else None


@dataclass(frozen=True)
class Losses:
    """What one variant and seed gave on the text, ordered by document and position.

    loss: (N,) nats. correct: (N,) bool. document: (N,) index into names. position: (N,) of the token in its document.
    """

    loss: NDArray[np.float32]
    correct: NDArray[np.bool_]
    document: NDArray[np.int64]
    position: NDArray[np.int64]
    names: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """Names the predicted tokens: equal texts are compared entry by entry."""
        digest = hashlib.sha256("\n".join(self.names).encode())
        digest.update(self.document.tobytes())
        digest.update(self.position.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class SeedRow:
    """One section, variant and seed. The mappings are as they stand in the file; empty where there is nothing."""

    section: str
    variant: str
    seed: int
    status: str
    reason: str
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Any] = field(default_factory=dict)
    system: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def losses(self) -> Losses | None:
        """Per-token losses, None where none were kept. Raises ReportError for a file that is damaged."""
        return None if self.path is None else _read_losses(self.path)


@dataclass(frozen=True)
class Ablation:
    """One grid's folder. run: run.json as it stands. rows: by section, variant and seed."""

    folder: Path
    run: Mapping[str, Any]
    variants: tuple[Variant, ...]
    sections: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: Mapping[tuple[str, str, int], SeedRow]

    @property
    def grid(self) -> str:
        return str(self.run.get("grid") or self.folder.name)

    @property
    def question(self) -> str:
        return str(self.run.get("question") or self.grid)

    def variant(self, name: str) -> Variant | None:
        return next((v for v in self.variants if v.name == name), None)

    def of(self, section: str, variant: str) -> tuple[SeedRow, ...]:
        """The rows of one variant in the order of the seeds, those that are not there yet left out."""
        found = (self.rows.get((section, variant, seed)) for seed in self.seeds)
        return tuple(row for row in found if row is not None)


def is_ablation(folder: Path | str) -> bool:
    """Whether a folder is that of one grid, or holds such folders."""
    return bool(grid_folders(folder))


def grid_folders(folder: Path | str) -> tuple[Path, ...]:
    """The folder itself where it is that of a grid, else the grids in it, by name."""
    folder = Path(folder)
    if _is_grid(folder):
        return (folder,)
    return tuple(sorted(path for path in folder.iterdir() if _is_grid(path))) if folder.is_dir() else ()


def _is_grid(folder: Path) -> bool:
    if not (folder / RUN).is_file():
        return False
    try:
        return "grid" in json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return (folder / ROWS).is_file()


def load_ablation(folder: Path | str) -> Ablation:
    """Reads and checks one grid's folder. Raises ReportError, naming the file and the remedy."""
    folder = Path(folder)
    run = _object(folder / RUN, _text(folder / RUN))
    if run.get("schema") != SCHEMA:
        raise ReportError(f"{folder / RUN} has schema {run.get('schema')!r}; this release reads {SCHEMA}: {RERUN}")
    variants = tuple(_variant(folder, entry, run.get("reference")) for entry in _list(folder, run, "variants"))
    sections = tuple(str(s.get("name", "")) if isinstance(s, dict) else str(s) for s in run.get("sections") or [""])
    seeds = tuple(int(seed) for seed in _list(folder, run, "seeds"))
    rows: dict[tuple[str, str, int], SeedRow] = {}
    path = folder / ROWS
    lines = _text(path).splitlines() if path.is_file() else []
    for number, line in enumerate(lines):
        try:
            row = _row(folder, _object(path, line))
        except ReportError:
            if number == len(lines) - 1 and not line.endswith("}"):
                continue  # cut short by a crash: that seed counts as not run
            raise
        rows[row.section, row.variant, row.seed] = row
    unknown = sorted({row.variant for row in rows.values()} - {v.name for v in variants})
    if unknown:
        raise ReportError(f"{path} has variants that {RUN} does not plan ({', '.join(unknown)}): {RERUN}")
    return Ablation(folder, run, variants, sections, seeds, rows)


def _variant(folder: Path, entry: Any, reference: Any) -> Variant:
    try:
        name = str(entry["name"])
        own = entry.get("reference") or reference
        changes = entry.get("changes") or {}
        return Variant(
            name,
            str(entry.get("summary") or ""),
            str(entry.get("kind") or "train"),
            None if own is None or own == name else str(own),
            dict(changes),
            _mapping(entry.get("settings")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{folder / RUN}: a variant is not as it should be ({error!r}): {RERUN}") from error


def _row(folder: Path, entry: Mapping[str, Any]) -> SeedRow:
    path = folder / ROWS
    try:
        evaluation = _mapping(entry.get("evaluation"))
        status = str(entry["status"])
        row = SeedRow(
            section=str(entry.get("section") or ""),
            variant=str(entry["variant"]),
            seed=int(entry["seed"]),
            status=status,
            reason=str(entry.get("reason") or ""),
            training=_mapping(entry.get("training")),
            evaluation=evaluation,
            costs=_mapping(entry.get("costs")),
            probes=_mapping(entry.get("probes")),
            system=_mapping(entry.get("system")),
            path=folder / str(evaluation["losses"]) if status == "ok" and evaluation.get("losses") else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path}: a row is not as it should be ({error!r}): {RERUN}") from error
    if status not in STATUSES:
        raise ReportError(f"{path}: status {status!r} is unknown; known are {', '.join(STATUSES)}")
    perplexity = evaluation.get("perplexity")
    if status == "ok" and not (isinstance(perplexity, (int, float)) and np.isfinite(perplexity) and perplexity > 0):
        raise ReportError(f"{path}: {row.variant} of seed {row.seed} is ok, yet its perplexity is {perplexity!r}")
    return row


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(folder: Path, run: Mapping[str, Any], name: str) -> list[Any]:
    value = run.get(name)
    if not isinstance(value, list) or not value:
        raise ReportError(f"{folder / RUN} names no {name}: {RERUN}")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read ({error}); name the folder that `recollect ablate` wrote") from error


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}): {RERUN}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} holds no JSON object where one is wanted: {RERUN}")
    return value


def _read_losses(path: Path) -> Losses:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            losses = Losses(
                loss=arrays["loss"].astype(np.float32),
                correct=arrays["correct"].astype(bool),
                document=arrays["document"].astype(np.int64),
                position=arrays["position"].astype(np.int64),
                names=tuple(str(name) for name in arrays["document_names"]),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ReportError(f"{path} cannot be read as losses ({error}); remove it, and {RERUN}") from error
    shapes = {len(losses.loss), len(losses.correct), len(losses.document), len(losses.position)}
    if len(shapes) != 1 or not len(losses.loss) or not np.isfinite(losses.loss).all():
        raise ReportError(f"{path} holds losses that do not fit together or are not finite; remove it, and {RERUN}")
    order = np.lexsort((losses.position, losses.document))
    if np.array_equal(order, np.arange(len(order))):
        return losses
    return Losses(
        losses.loss[order], losses.correct[order], losses.document[order], losses.position[order], losses.names
    )
