"""Reading what `recollect inspect` found: run.json and inspection.npz of one folder.

Letters: N predicted tokens, L memory layers, H heads, R retrieved pairs kept.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.reports.errors import ReportError

SCHEMA = 1
_PER_TOKEN = (
    *("document", "position", "token", "loss", "loss_without", "loss_twin", "kind", "occurrence", "share"),
    *("retrieved", "origin", "weight", "on_target", "before_target", "distance"),
)


@dataclass(frozen=True)
class Text:
    """A document: its name, its text, and where each of its tokens begins and ends in it (n, 2)."""

    name: str
    text: str
    offsets: NDArray[np.integer]

    def piece(self, position: int) -> str:
        """The text of one token."""
        start, end = self.offsets[position]
        return self.text[start:end]


@dataclass(frozen=True)
class InspectionResults:
    """One inspection. arrays: by name, as `recollect.pretrained.inspection_data.TokenArrays` tells them."""

    folder: Path
    run: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    documents: tuple[Text, ...]
    stored: tuple[Text, ...]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.arrays["loss"])

    @property
    def kinds(self) -> list[str]:
        return list(self.run["kinds"])

    @property
    def has_twin(self) -> bool:
        """Whether the losses of a model trained without memory are known for every token."""
        return bool(np.isfinite(self.arrays["loss_twin"]).all())

    @property
    def gain(self) -> NDArray[np.float64]:
        """(N,) loss without memory minus loss with it, of one model."""
        return np.asarray(self["loss_without"].astype(np.float64) - self["loss"])

    @property
    def gain_over_twin(self) -> NDArray[np.float64]:
        """(N,) loss of the twin minus loss with memory."""
        return np.asarray(self["loss_twin"].astype(np.float64) - self["loss"])


def load_inspection(folder: Path | str) -> InspectionResults:
    """Reads an inspection; raises ReportError, naming file and remedy, for anything that `inspect` did not write."""
    folder = Path(folder)
    path, arrays_path = folder / "run.json", folder / "inspection.npz"
    for file in (path, arrays_path):
        if not file.is_file():
            raise ReportError(f"there is no inspection in {folder}: {file.name} is missing; run recollect inspect")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict) or run.get("kind") != "inspection" or run.get("schema") != SCHEMA:
            raise ValueError(f"it is not an inspection of version {SCHEMA}")
        with np.load(arrays_path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
        documents = _texts(run["documents"], arrays["offsets"], arrays["document_tokens"])
        stored: tuple[Text, ...] = ()
        if run.get("stored"):
            stored = _texts(run["stored"], arrays["stored_offsets"], arrays["stored_tokens"])
        counts = {len(arrays[name]) for name in _PER_TOKEN}
        if len(counts) != 1 or counts == {0}:
            raise ValueError("its arrays differ in length")
        kept = {name: arrays[name] for name in _PER_TOKEN}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ReportError(
            f"the inspection in {folder} cannot be read ({error}): run recollect inspect again"
        ) from error
    return InspectionResults(folder, run, kept, documents, stored)


def _texts(entries: Any, offsets: NDArray[Any], counts: NDArray[Any]) -> tuple[Text, ...]:
    ends = np.cumsum(counts)
    if len(entries) != len(counts) or (len(ends) and ends[-1] != len(offsets)):
        raise ValueError("texts and tokens do not belong together")
    parts = np.split(offsets, ends[:-1])
    return tuple(Text(entry["name"], entry["text"], part) for entry, part in zip(entries, parts, strict=True))
