"""Reading the JSON files of a result folder, and refusing what does not belong together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recollect._provenance import differences, in_words
from recollect.reports.errors import ReportError

SCHEMA = 1
RERUN = "run `recollect compare --output {folder}` again; it measures anew what is missing and keeps the rest"


def rerun(folder: Path) -> str:
    """The remedy for what is missing or damaged."""
    return RERUN.format(folder=folder)


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ReportError, naming file and remedy."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is truncated or not JSON ({error}); delete it and {rerun(folder)}") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path} holds no JSON object, so recollect did not write it; remove it from the folder")
    return content


def check_schema(content: Mapping[str, Any], path: Path) -> None:
    """Raises ReportError for what another version wrote."""
    if content.get("schema") != SCHEMA:
        raise ReportError(
            f"{path} has schema {content.get('schema')!r}, this version of recollect reads schema {SCHEMA}; "
            "report with the version that measured it, or compare again into a new folder"
        )


def refuse_mixing(content: Mapping[str, Any], run: Mapping[str, Any], path: Path, folder: Path) -> None:
    """Raises ReportError where a file says that it was measured otherwise than run.json says."""
    found = differences(content.get("provenance"), run)
    if found:
        raise ReportError(
            f"{path} was measured with other settings than run.json says ({in_words(found)}): two runs are mixed in "
            f"{folder}; report on each in a folder of its own, or {rerun(folder)}"
        )
