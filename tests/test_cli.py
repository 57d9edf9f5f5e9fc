"""The command line as a user runs it: in a process of its own, for its words and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recollect._user_errors import check_roots, explain


def recollect(*arguments: str, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    answer = subprocess.run(
        [sys.executable, "-m", "recollect", *arguments], capture_output=True, text=True, env=environment, cwd=cwd
    )
    assert answer.returncode == code, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    return answer


VERBS = [
    "backends",
    "train",
    "evaluate",
    "memorize",
    "generate",
    "inspect",
    "compare",
    "crossover",
    "tune",
    "ablate",
    "report",
    "plan",
    "trace",
    "ann-benchmarks",
    "runbook",
]


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_by_example(verb: str) -> None:
    text = recollect(verb, "--help").stdout
    assert "Examples" in text
    assert f"recollect {verb}" in text


def test_backends_as_json() -> None:
    rows = json.loads(recollect("backends", "--json").stdout)
    by_name = {row["name"]: row for row in rows}
    assert by_name["exact"]["available"] is True
    assert by_name["exact"]["capabilities"]["exact"] is True
    assert {"name", "options", "capabilities", "available", "pip_command", "sweep"} <= set(by_name["faiss-ivf"])


def test_backends_as_a_table() -> None:
    text = recollect("backends").stdout
    assert "exact search on this CPU: " in text
    assert "hnswlib" in text
    assert "ef_search" in text


def test_user_errors_are_messages(tmp_path: Path) -> None:
    assert recollect("evaluate", "--backend", "exat", code=2).stderr.startswith("error: there is no backend 'exat'")
    assert "no option 'nlits'" in recollect("evaluate", "--backend", "faiss-ivf:nlits=3", code=2).stderr
    assert "nowhere" in recollect("evaluate", "--checkpoint", str(tmp_path / "nowhere"), code=2).stderr
    assert "nowhere.txt" in recollect("evaluate", "--corpus", str(tmp_path / "nowhere.txt"), code=2).stderr
    assert "run.json" in recollect("report", "--output", str(tmp_path), code=2).stderr
    assert "--memory-size" in recollect("evaluate", "--memory-size", "-1", code=2).stderr
    assert "k" in recollect("evaluate", "--k", "0", code=2).stderr
    recollect("no-such-verb", code=2)


def test_every_known_error_still_exists() -> None:
    assert check_roots() == []


def test_a_full_disk_is_told_with_its_remedy() -> None:
    message = explain(OSError(28, "No space left on device", "out/compare/run.json"))
    assert message is not None
    assert "disk is full" in message
    assert "out/compare/run.json" in message
    assert explain(ZeroDivisionError("a fault of ours")) is None
