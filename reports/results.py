"""Reading a result folder: what `recollect compare` wrote, checked and typed.

    run.json            what was run, on what, where            -> Run
    cells/<id>.json     one spec at one memory size             -> Cell
    losses/<id>.npz     per-token losses of that cell           -> Cell.losses
    curves.json         every search option over each index     -> CurvePoint
    crossover.json      search times at larger memories, if any -> CrossoverRow

Only JSON and plain arrays are read; nothing is ever unpickled. A folder that is missing, truncated, foreign or that
mixes two runs raises `ReportError`: a difference between cells of different runs would look like a finding.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.reports.beside import CrossoverRow, CurvePoint, read_crossover, read_curves
from recollect.reports.errors import ReportError
from recollect.reports.machines import NO_MACHINES, Machines, judge_machines, machine_of, without_times
from recollect.reports.reading import check_schema, read_json, refuse_mixing, rerun

STATUSES = ("ok", "skipped", "failed")
NO_MEMORY = "none"
# The perplexity of a cell and its stored losses are one measurement: they may differ by rounding only.
PERPLEXITY_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Streaming:
    """How a backend ages: arrays of equal length, one entry per checkpoint in the stream.

    turnover: keys appended so far, in multiples of the memory size. Any other array may be missing.
    """

    turnover: tuple[float, ...]
    recall: tuple[float, ...] | None
    append_us: tuple[float, ...] | None
    search_ms: tuple[float, ...] | None


@dataclass(frozen=True)
class Cell:
    """One spec at one memory size. Figures are None where they were not measured."""

    spec: str
    backend: str
    memory_size: int
    k: int | None
    status: str
    reason: str
    recall_at_k: float | None = None
    softmax_mass: float | None = None
    softmax_mass_exact: float | None = None  # of the true k best keys: what lies beyond them no index can find
    perplexity: float | None = None
    accuracy: float | None = None
    tokens: int | None = None
    search_ms: float | None = None
    search_ms_low: float | None = None
    search_ms_high: float | None = None
    search_ms_p50: float | None = None
    search_ms_p95: float | None = None
    search_ms_p99: float | None = None
    search_ms_cold: float | None = None
    search_first_ms: float | None = None
    searches: int | None = None
    append_us_per_key: float | None = None
    append_ms_p50: float | None = None
    append_ms_p95: float | None = None
    append_ms_p99: float | None = None
    reference_ms: float | None = None
    noisy: bool | None = None
    build_seconds: float | None = None
    stalled_seconds: float | None = None
    index_bytes: float | None = None
    key_bytes: float | None = None
    bytes_per_key: float | None = None
    seed: int | None = None
    losses: NDArray[np.float32] | None = None  # (N,) in the order of Tokens
    streaming: Streaming | None = None
    machine: str | None = None  # that measured it

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def is_none(self) -> bool:
        """Whether this is the 'no memory' baseline."""
        return self.memory_size == 0 or self.backend == NO_MEMORY


@dataclass(frozen=True)
class Tokens:
    """Where each loss stands in the text: document (N,) index into the run's names, position (N,) in the document."""

    document: NDArray[np.int64]
    position: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)


@dataclass(frozen=True)
class Results:
    """A whole result folder. `run` is run.json as it stands; the cells are ordered by memory size, backend and spec."""

    folder: Path
    run: Mapping[str, Any]
    cells: tuple[Cell, ...]
    tokens: Tokens | None
    crossover: tuple[CrossoverRow, ...]
    curves: tuple[CurvePoint, ...] = ()
    machines: Machines = NO_MACHINES

    @property
    def memory_sizes(self) -> tuple[int, ...]:
        """Memory sizes with at least one measured cell, rising, without 0."""
        return tuple(sorted({c.memory_size for c in self.cells if c.ok and not c.is_none}))

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that have a measured cell: exact first, then by name; 'none' is left out."""
        names = {c.backend for c in self.cells if c.ok and not c.is_none}
        return tuple(sorted(names, key=lambda name: (name != "exact", name)))

    @property
    def baseline(self) -> Cell | None:
        """The measured 'no memory' cell."""
        return next((c for c in self.cells if c.is_none and c.ok), None)

    def reference(self, memory_size: int) -> Cell | None:
        """The cell that differences are taken to: plain `exact` at this size, else its first variant."""
        found = [c for c in self.cells if c.backend == "exact" and c.memory_size == memory_size and c.ok]
        return min(found, key=lambda c: (c.spec != "exact", c.spec), default=None)

    def at(self, memory_size: int) -> tuple[Cell, ...]:
        """The measured cells of one memory size."""
        return tuple(c for c in self.cells if c.ok and c.memory_size == memory_size and not c.is_none)

    @property
    def not_measured(self) -> tuple[Cell, ...]:
        return tuple(c for c in self.cells if not c.ok)

    @property
    def absent(self) -> tuple[tuple[str, int], ...]:
        """(spec, memory size) pairs without any cell: the run was interrupted, or is still going."""
        sizes = sorted({int(n) for n in self.run.get("memory_sizes", []) if int(n) > 0} | set(self.memory_sizes))
        have = {(c.spec, c.memory_size) for c in self.cells}
        named = [s for s in self.run.get("specs") or [] if isinstance(s, str) and s != NO_MEMORY]
        specs = sorted({c.spec for c in self.cells if not c.is_none} | set(named))
        return tuple((spec, size) for spec in specs for size in sizes if (spec, size) not in have)

    @property
    def num_memories(self) -> int | None:
        """Memories searched at each step: rows times heads."""
        if isinstance(self.run.get("num_memories"), int):
            return int(self.run["num_memories"])
        rows, heads = self.run.get("rows"), _entry(self.run, "checkpoint", "config", "heads")
        return int(rows) * int(heads) if isinstance(rows, int) and isinstance(heads, int) else None

    def fill(self, memory_size: int) -> float | None:
        """How full the memories were where times and bytes were taken (0 to 1): documents may be shorter than them."""
        cell = self.reference(memory_size) or next(iter(self.at(memory_size)), None)
        if cell is None or self.num_memories is None or not cell.bytes_per_key or cell.key_bytes is None:
            return None
        keys = (cell.key_bytes + (cell.index_bytes or 0.0)) / cell.bytes_per_key
        return min(1.0, keys / (memory_size * self.num_memories))

    def segment_ms(self, cell: Cell) -> float | None:
        """Search plus append of one segment over all memories, in milliseconds; None when a part is unknown."""
        length = self.run.get("segment_length")
        if cell.search_ms is None or cell.append_us_per_key is None or self.num_memories is None:
            return None
        if not isinstance(length, int):
            return None
        return cell.search_ms + cell.append_us_per_key * length * self.num_memories / 1000


def _entry(mapping: Mapping[str, Any], *path: str) -> Any:
    value: Any = mapping
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def load_results(folder: Path | str) -> Results:
    """Reads and checks a result folder. Raises ReportError, naming the file and the remedy."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; name the folder that `recollect compare --output FOLDER` wrote")
    run_path = folder / "run.json"
    if not run_path.is_file():
        raise ReportError(f"{folder} has no run.json, so it is not a result folder; {rerun(folder)}")
    run = read_json(run_path, folder)
    check_schema(run, run_path)
    paths = sorted((folder / "cells").glob("*.json"))
    if not paths:
        raise ReportError(f"{folder / 'cells'} holds no measurements yet; {rerun(folder)}")
    reader = _Reader(folder, run)
    cells = [reader.cell(path) for path in paths]
    cells.sort(key=lambda c: (c.memory_size, c.backend != "exact", c.backend, c.spec))
    machines = judge_machines(cells)
    return Results(
        folder,
        run,
        tuple(without_times(cell, machines) for cell in cells),
        reader.tokens,
        read_crossover(folder, run, machines.apart),
        read_curves(folder, run, machines.apart),
        machines,
    )


class _Reader:
    """Reads the cells of one run and holds what they must agree on."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run = run
        self.tokens: Tokens | None = None
        self.tokens_from: Path | None = None
        self.settings: tuple[str, Path] | None = None
        self.seen: dict[tuple[str, int], Path] = {}

    def cell(self, path: Path) -> Cell:
        content = read_json(path, self.folder)
        check_schema(content, path)
        fields = _Fields(content, path, self.folder)
        status = fields.text("status")
        if status not in STATUSES:
            raise ReportError(f"{path} has status {status!r}, not one of {', '.join(STATUSES)}; delete it and compare")
        spec, size = fields.text("spec"), fields.integer("memory_size")
        if size is None or size < 0:
            raise ReportError(f"{path} has no memory_size; delete it and {rerun(self.folder)}")
        if (spec, size) in self.seen:
            raise ReportError(
                f"{path} and {self.seen[spec, size]} both measure {spec!r} at {size} keys: two runs are mixed; "
                "keep the one that belongs to run.json, or compare into a new folder"
            )
        self.seen[spec, size] = path
        self._same("k", content, path, baseline=size == 0)
        self._same("seed", content, path)
        refuse_mixing(content, self.run, path, self.folder)
        self._settings(content, path)
        figures: dict[str, Any] = {}
        if status == "ok":
            figures = {name: fields.number(name) for name in _FIGURES}
            figures["tokens"], figures["searches"] = fields.integer("tokens"), fields.integer("searches")
            figures["noisy"] = fields.truth("noisy")
            if figures["perplexity"] is None:
                raise ReportError(f"{path} is marked ok but has no perplexity; delete it and {rerun(self.folder)}")
            figures["losses"] = self._losses(content, path, figures["perplexity"])
            figures["streaming"] = fields.streaming()
        return Cell(
            spec=spec,
            backend=fields.text("backend"),
            memory_size=size,
            k=fields.integer("k"),
            status=status,
            reason=str(content.get("reason") or ""),
            seed=fields.integer("seed"),
            machine=machine_of(content),
            **figures,
        )

    def _settings(self, content: Mapping[str, Any], path: Path) -> None:
        """The digest of the settings that all cells of a run share must be one and the same."""
        mine, run = content.get("settings"), self.run.get("settings")
        if not isinstance(mine, str) or not mine:
            return
        if isinstance(run, str) and run and self.settings is None:
            self.settings = (run, self.folder / "run.json")
        if self.settings is None:
            self.settings = (mine, path)
        elif mine != self.settings[0]:
            raise ReportError(
                f"{path} was measured with other settings ({mine}) than {self.settings[1]} ({self.settings[0]}): two "
                f"runs are mixed in {self.folder}; compare again into a new folder, or delete the other run's cells"
            )

    def _same(self, name: str, content: Mapping[str, Any], path: Path, *, baseline: bool = False) -> None:
        mine, run = content.get(name), self.run.get(name)
        if mine is None or run is None or baseline:
            return
        if mine != run:
            raise ReportError(
                f"{path} was measured with {name} {mine!r}, run.json says {run!r}: two runs are mixed in "
                f"{self.folder}; compare again into a new folder, or delete the cells of the other run"
            )

    def _losses(self, content: Mapping[str, Any], path: Path, perplexity: float) -> NDArray[np.float32] | None:
        name = content.get("losses")
        if name is None:
            return None
        target = self.folder / str(name)
        if not target.resolve().is_relative_to(self.folder.resolve()):
            raise ReportError(f"{path} points at losses outside its folder ({name!r}); it is not recollect's own")
        if not target.is_file():
            raise ReportError(f"{target} is missing, though {path} names it; delete {path} and {rerun(self.folder)}")
        losses, tokens = _read_losses(target, path, self.folder)
        if self.tokens is None:
            names = _entry(self.run, "corpus", "document_names")
            if isinstance(names, list) and len(tokens) and int(tokens.document.max()) >= len(names):
                raise ReportError(
                    f"{target} speaks of document {int(tokens.document.max())}, run.json names {len(names)}: "
                    "the losses belong to another corpus; compare again into a new folder"
                )
            self.tokens, self.tokens_from = tokens, target
        elif not (
            np.array_equal(tokens.document, self.tokens.document)
            and np.array_equal(tokens.position, self.tokens.position)
        ):
            raise ReportError(
                f"{target} covers other tokens than {self.tokens_from}: two runs are mixed in {self.folder}; "
                "compare again into a new folder"
            )
        from_losses = math.exp(float(losses.mean(dtype=np.float64)))
        if abs(from_losses / perplexity - 1) > PERPLEXITY_TOLERANCE:
            raise ReportError(
                f"{path} says perplexity {perplexity:.4f}, its losses in {target.name} say {from_losses:.4f}: they are "
                f"not of one measurement; delete {path} and {rerun(self.folder)}"
            )
        return losses


def _read_losses(target: Path, path: Path, folder: Path) -> tuple[NDArray[np.float32], Tokens]:
    remedy = f"delete {target} and {path}, then {rerun(folder)}"
    try:
        with np.load(target, allow_pickle=False) as arrays:
            losses, document, position = (arrays[name] for name in ("loss", "document", "position"))
    except KeyError as error:
        raise ReportError(f"{target} has no array {error.args[0]!r}; {remedy}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ReportError(f"{target} is truncated or not an array file ({error}); {remedy}") from error
    if losses.ndim != 1 or losses.shape != document.shape or losses.shape != position.shape or not len(losses):
        raise ReportError(f"{target} holds arrays of unequal or no length; {remedy}")
    if not np.isfinite(losses).all():
        raise ReportError(f"{target} holds losses that are not finite; {remedy}")
    return losses.astype(np.float32), Tokens(document.astype(np.int64), position.astype(np.int64))


_FIGURES = [
    "recall_at_k",
    "softmax_mass",
    "softmax_mass_exact",
    "perplexity",
    "accuracy",
    "search_ms",
    "search_ms_low",
    "search_ms_high",
    "search_ms_p50",
    "search_ms_p95",
    "search_ms_p99",
    "search_ms_cold",
    "search_first_ms",
    "append_us_per_key",
    "append_ms_p50",
    "append_ms_p95",
    "append_ms_p99",
    "reference_ms",
    "build_seconds",
    "stalled_seconds",
    "index_bytes",
    "key_bytes",
    "bytes_per_key",
]


class _Fields:
    """Typed access to one cell's JSON object."""

    def __init__(self, content: Mapping[str, Any], path: Path, folder: Path) -> None:
        self.content, self.path, self.folder = content, path, folder

    def _wrong(self, name: str, wanted: str) -> ReportError:
        return ReportError(
            f"{self.path}: {name} is {self.content.get(name)!r}, want {wanted}; delete the file and "
            f"{rerun(self.folder)}"
        )

    def text(self, name: str) -> str:
        value = self.content.get(name)
        if not isinstance(value, str) or not value:
            raise self._wrong(name, "a text")
        return value

    def integer(self, name: str) -> int | None:
        value = self.content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number")
        return value

    def number(self, name: str) -> float | None:
        value = self.content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(name, "a finite number")
        return float(value)

    def truth(self, name: str) -> bool | None:
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def streaming(self) -> Streaming | None:
        value = self.content.get("streaming")
        if not isinstance(value, Mapping) or not value.get("turnover"):
            return None
        arrays: dict[str, tuple[float, ...] | None] = {}
        for name in ("turnover", "recall", "append_us", "search_ms"):
            entry = value.get(name)
            arrays[name] = None if not entry else tuple(math.nan if x is None else float(x) for x in entry)
            if entry and len(entry) != len(value["turnover"]):
                raise self._wrong("streaming", f"as many entries in {name} as in turnover")
        turnover = arrays.pop("turnover")
        assert turnover is not None
        return Streaming(turnover=turnover, **arrays)
