"""A writer of a log that is killed with -9, many times, and many writers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lance")

KILLS = int(os.environ.get("RECOLLECT_KILLS", "10"))
"""Times that a writing process is killed; a few hundred for a thorough run."""


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")


def run(*arguments: str) -> dict[str, int]:
    script = Path(__file__).with_name("killed_appends.py")
    answer = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    found: dict[str, int] = json.loads(answer.stdout.splitlines()[-1])
    return found


def test_a_killed_writer_loses_nothing_that_it_told(tmp_path: Path) -> None:
    found = run("kill", str(tmp_path / "log"), str(KILLS))
    assert found["kills"] == KILLS
    assert found["changes"] > KILLS
    assert found["rows_acknowledged"] > 0


def test_writers_at_once_lose_nothing_and_number_nothing_twice(tmp_path: Path) -> None:
    found = run("crowd", str(tmp_path / "log"), "10")
    assert found["rows_alive"] == 200
    assert found["refused"] > 0, "the writers never met: nothing was tried"
