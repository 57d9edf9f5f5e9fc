"""The script for a GPU is rehearsed on every machine, so that it runs on the first one that has a card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_check.py"


def test_the_rehearsal_checks_every_backend_and_times_what_it_should() -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--output", "-"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(answer.stdout)
    assert {row["status"] for row in results["backends"]} <= {"ok", "skipped"}
    assert {"plain", "joint", "hidden", "most_used", "compressive"} <= set(results["gradients"])
    assert {row["status"] for row in results["gradients"].values()} == {"ok"}
    assert results["search"][0]["milliseconds"]["exact"] > 0
    assert set(results["training_step"]["ratio_to_no_memory"]) == {"0", "512"}
    assert [row["family"] for row in results["attached_memory"]] == ["llama", "gpt2"]
    assert all(row["evaluation_ratio"] > 0 and row["decoding_speed"] > 0 for row in results["attached_memory"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_card_it_says_what_to_do() -> None:
    answer = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert answer.returncode == 2
    assert "--device cpu --small" in answer.stdout
