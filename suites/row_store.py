"""Rows of a measurement that can be interrupted: each its own file, those of other settings never mixed in.

OUTPUT/rows/*.json     a row each, with the settings and the machine that it was measured with
OUTPUT/results.json    the rows of this call's settings, and where and with what they were measured
OUTPUT/results.csv     the same rows as a table
"""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json, write_text
from recollect.memory_backends.spec import parse_spec

from .cells import fingerprint
from .environment import backend_digest, commit_of, core_digest, describe_machine, is_changed, library_versions

SCHEMA = 1


class RowStore:
    """Rows in a folder, found again by what they were measured with.

    Args:
        output: the folder.
        kind: what is measured, such as 'ann-benchmarks'.
        settings: JSON values that decide a figure, beside spec, machine and code.
        threads: of torch and the libraries.

    Attributes:
        left_out: rows in the folder that other settings, another machine or other code measured.
    """

    def __init__(self, output: Path, kind: str, settings: Mapping[str, Any], *, threads: int) -> None:
        self.output, self.kind = output, kind
        self.settings, self.threads = dict(settings), threads
        self.machine = describe_machine()
        self._common = {"schema": SCHEMA, "kind": kind, "settings": self.settings, "threads": threads}
        self._common |= {"machine": self.machine, "code": core_digest()}
        self.left_out = 0

    def mark(self, spec: str, about: Mapping[str, Any]) -> str:
        """The identity of a row: its spec, what it is measured on (`about`), settings, machine and code."""
        code = backend_digest(parse_spec(spec)[0])
        return fingerprint({**self._common, "spec": spec, "about": dict(about), "backend": code})

    def path(self, mark: str) -> Path:
        """The file of a row."""
        return self.output / "rows" / f"{mark}.json"

    def load(self, mark: str) -> dict[str, Any] | None:
        """The row, whatever came of it; None where there is none, or its file cannot be read."""
        content = _read(self.path(mark))
        row = None if content is None else content.get("row")
        return row if isinstance(row, dict) else None

    def has(self, mark: str) -> bool:
        """Whether the row was measured: one that was skipped or failed is tried again."""
        row = self.load(mark)
        return row is not None and row.get("status") == "ok"

    def save(self, mark: str, row: Mapping[str, Any]) -> None:
        """Keeps a row, whole or not at all."""
        content = {"mark": mark, "common": fingerprint(self._common), "row": dict(row)}
        write_json(self.path(mark), content)

    def rows(self) -> list[dict[str, Any]]:
        """Every row in the folder that these settings, this machine and this code measured, by any call."""
        found, wanted = [], fingerprint(self._common)
        self.left_out = 0
        for path in sorted((self.output / "rows").glob("*.json")):
            content = _read(path)
            if content is None or content.get("common") != wanted:
                self.left_out += 1
            elif content["mark"] == path.stem:
                found.append(content["row"])
        return found

    def write_results(self, rows: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Writes results.json of `rows` and results.csv of `table`; returns what the JSON file holds."""
        content = {
            "schema": SCHEMA,
            "kind": self.kind,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": self.machine,
            "threads": self.threads,
            "libraries": library_versions(),
            "commit": commit_of(),
            "changed": is_changed(),
            "settings": self.settings,
            "rows": [dict(row) for row in rows],
        }
        write_json(self.output / "results.json", content)
        columns = list(dict.fromkeys(column for row in table for column in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_text(self.output / "results.csv", text.getvalue())
        return content


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
