"""The benchmark against memorizing-transformers-pytorch measures where that package is installed, else says why not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "training_step_peers.py"


def test_without_the_package_it_skips_with_the_reason_and_leaves_the_results_alone(tmp_path: Path) -> None:
    (tmp_path / "memorizing_transformers_pytorch.py").write_text("raise ImportError('not here')\n")
    result = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--output", str(result)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path)})
    reason = json.loads(answer.stdout)["skipped"]
    assert "not here" in reason
    assert "pip install --no-deps memorizing-transformers-pytorch" in reason
    assert not result.exists()


def test_it_times_both_packages_and_ours_finds_every_neighbour(tmp_path: Path) -> None:
    try:
        importlib.import_module("memorizing_transformers_pytorch")
    except ImportError as error:
        pytest.skip(f"memorizing-transformers-pytorch cannot be imported: {error}")
    result = tmp_path / "result.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--preset",
        "tiny",
        "--memory-size",
        "256",
        "--steps",
        "3",
        "--threads",
        "1",
    ]
    subprocess.run([*command, "--output", str(result)], capture_output=True, check=True)
    measured = json.loads(result.read_text())
    assert measured["memory_size"] == 256
    for side in ("ours_float32", "ours_bfloat16", "theirs_float32"):
        assert measured[side]["step_with_memory_ms"] > 0
        assert 0 < measured[side]["recall"] <= 1
    assert measured["ours_float32"]["recall"] == measured["ours_bfloat16"]["recall"] == 1.0
    assert measured["theirs_float32"]["tokens_per_second_to_theirs"] == 1.0
