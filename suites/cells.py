"""One measurement: one backend at one memory size, with every figure that it gives, and how it lies on disk.

A cell is written once, whole, after its losses; so a process that is killed loses at most the cell it was measuring.

Reading a cell imports neither torch nor numpy: asv starts a process for each figure of each cell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
NO_MEMORY = "none"
"""The spec under which a cell without memory goes."""

_FINITE = (
    "recall_at_k",
    "softmax_mass",
    "perplexity",
    "accuracy",
    "search_ms",
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
    "bytes_per_key",
)


class CellError(RuntimeError):
    """A measurement gave no usable figure; the message says which and why."""


@dataclass(frozen=True)
class Streaming:
    """How a memory behaves while its keys turn over; entry i of each list belongs together.

    Attributes:
        turnover: keys appended since the document began, over the capacity: from 1 on old keys are evicted.
        recall: recall at k in that stretch.
        append_us: microseconds per appended key.
        search_ms: milliseconds to search one segment's queries over all memories (median).
    """

    turnover: tuple[float, ...] = ()
    recall: tuple[float, ...] = ()
    append_us: tuple[float, ...] = ()
    search_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cell:
    """Everything measured for one spec at one memory size. None where a figure does not apply or there is none.

    Attributes:
        spec: canonical registry string; 'none' without memory.
        backend: its name alone.
        memory_size: C, keys that each memory holds at most.
        k: neighbours retrieved per query.
        status: 'ok', 'skipped' (its library is missing) or 'failed'.
        reason: why it was skipped or failed.
        recall_at_k: share of the true k nearest keys that were found, judged by score, so that ties are fair.
        softmax_mass: share of the softmax over all keys in memory (logits with the layer's learned scale) that the
            found keys hold. Exact search has a figure below 1 as well: what lies beyond its k best keys.
        softmax_mass_exact: the same share for the true k best keys: the most that any backend can reach.
        perplexity: over `tokens` predicted tokens.
        accuracy: share of tokens whose likeliest prediction was right.
        tokens: number of predicted tokens.
        search_ms: median milliseconds to search one segment's queries over all memories while they are full;
            `search_ms_low` and `search_ms_high` are the 25th and 75th percentile.
        search_ms_p50, search_ms_p95, search_ms_p99: percentiles of the same searches, of which there are `searches`;
            with fewer than 100 of them p99 is close to the slowest.
        search_ms_cold: median of the same with caches that were filled with other data before; None on a GPU.
        search_first_ms: the first search of full memories, which may pay for what a library does once.
        append_us_per_key: microseconds per appended key over the whole run, rebuilds included.
        append_ms_p50, append_ms_p95, append_ms_p99: milliseconds to append one segment's keys to all memories, over
            the segments that every row reads.
        reference_ms: median of the fixed reference operation beside the searches (see `noise`).
        noisy: it varied so much that small differences of these times mean nothing.
        build_seconds: time spent training and building indexes, over the whole run, in the background too.
        stalled_seconds: of it, what appends and searches had to wait for.
        index_bytes: bytes of the indexes beside the raw keys, while the memories are fullest.
        key_bytes: bytes of the raw keys.
        bytes_per_key: both over the number of keys.
        seed: of the backend.
        seconds: wall time of the measurement.
        streaming: figures as the memory turns over.
        losses: path of the per-token losses, relative to the folder that holds `cells/`.
        settings: digest of what all cells of a run share: checkpoint, text, k, seed, device, threads.
        fingerprint: digest of every setting that the figures depend on; cells of different settings never mix.
        provenance: machine, libraries, threads, seed and code in plain words (see `provenance.describe`), so that a
            refusal to mix can say what differs.
    """

    spec: str
    backend: str
    memory_size: int
    k: int
    status: str
    reason: str = ""
    recall_at_k: float | None = None
    softmax_mass: float | None = None
    softmax_mass_exact: float | None = None
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
    index_bytes: int | None = None
    key_bytes: int | None = None
    bytes_per_key: float | None = None
    seed: int = 0
    seconds: float | None = None
    streaming: Streaming | None = None
    losses: str | None = None
    settings: str = ""
    fingerprint: str = ""
    provenance: Mapping[str, Any] | None = None

    def figure(self, name: str) -> float:
        """One figure of a cell that was measured.

        Raises:
            CellError: the cell has no such figure, or it is not finite.
        """
        value = getattr(self, name)
        if self.status != "ok":
            raise CellError(f"{self.spec} at {self.memory_size} keys was {self.status}: {self.reason}")
        if value is None or not math.isfinite(value):
            raise CellError(f"{self.spec} at {self.memory_size} keys has {name} = {value}")
        return float(value)

    def check(self) -> None:
        """Raises CellError if a measured figure is not finite, or a share lies outside 0 to 1."""
        for name in _FINITE:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise CellError(f"{self.spec} at {self.memory_size} keys has {name} = {value}")
        for name in ("recall_at_k", "softmax_mass", "accuracy"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise CellError(f"{self.spec} at {self.memory_size} keys has {name} = {value}, outside 0 to 1")

    @property
    def identity(self) -> str:
        """Readable and unique: the name of the cell's files."""
        return cell_identity(self.spec, self.memory_size, self.fingerprint)

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary, as written to disk."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Cell:
        """The cell that `as_json` described.

        Raises:
            ValueError: the content is of another schema or lacks something.
        """
        if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
            raise ValueError(f"this is no cell of schema {SCHEMA}")
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        if values.get("streaming") is not None:
            values["streaming"] = Streaming(**{name: tuple(row) for name, row in values["streaming"].items()})
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None


def cell_identity(spec: str, memory_size: int, fingerprint: str) -> str:
    """The name of a cell's files: readable first, then a digest that tells settings apart."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", spec).strip("-")[:80]
    digest = hashlib.sha256(f"{spec}\0{memory_size}\0{fingerprint}".encode()).hexdigest()[:10]
    return f"{readable}-{memory_size}-{digest}"


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A digest of settings: equal settings give equal digests, whatever their order."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_cell(folder: Path, cell: Cell) -> None:
    """Writes a cell into `folder`/cells, whole or not at all."""
    from recollect.memory_backends.atomic import write_json

    write_json(folder / "cells" / f"{cell.identity}.json", cell.as_json())


def load_cell(folder: Path, spec: str, memory_size: int, fingerprint: str) -> Cell | None:
    """The cell of these settings in `folder`, or None where there is none that can be read and used."""
    path = folder / "cells" / f"{cell_identity(spec, memory_size, fingerprint)}.json"
    try:
        cell = Cell.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    if cell.fingerprint != fingerprint or (cell.losses is not None and not (folder / cell.losses).is_file()):
        return None
    return cell


def save_losses(folder: Path, identity: str, loss: np.ndarray, document: np.ndarray, position: np.ndarray) -> str:
    """Writes per-token losses (N,) and returns their path relative to `folder`."""
    import numpy as np

    from recollect.memory_backends.atomic import atomic_file

    relative = f"losses/{identity}.npz"
    with atomic_file(folder / relative) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(
            stream,
            loss=loss.astype(np.float32),
            document=document.astype(np.int32),
            position=position.astype(np.int32),
        )
    return relative
