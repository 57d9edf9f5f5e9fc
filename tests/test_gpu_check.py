"""The script for a GPU is rehearsed on every machine, so that it runs on the first one that has a card."""

from __future__ import annotations

import importlib
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
    assert {row["status"] for row in results["kernels"]} == {"ok"}
    assert {"inner_product", "l2"} == {row["metric"] for row in results["kernels"]}
    assert {row["status"] for row in results["indexes"]} <= {"ok", "skipped"}
    assert results["search"][0]["milliseconds"]["exact"] > 0
    assert results["search"][0]["recall"]["approx-topk"] > 0.9
    assert set(results["training_step"][0]["ratio_to_no_memory"]) == {"0", "512"}
    assert [row["family"] for row in results["attached_memory"]] == ["llama", "gpt2"]
    assert all(row["evaluation_ratio"] > 0 and row["decoding_speed"] > 0 for row in results["attached_memory"])


def test_ratios_are_told_against_targets_where_the_sizes_are_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    check = importlib.import_module("gpu_check")
    memories, keys, queries, dim = check.TARGET_SIZE
    ratios = {"exact over bare bf16 matmul": 1.9, "faiss knn_gpu over exact": 3.0}
    search = {"memories": memories, "keys": keys, "queries": queries, "dim": dim, "ratios": ratios}
    step = {"preset": "paper", "compiled": True, "ratio_to_no_memory": {"0": 1.0, "8192": 1.2}}
    results = {"search": [search], "training_step": [step, {"status": "failed", "reason": "none"}], "gradients": {}}
    assert check.verdicts(results) == [
        "exact over bare bf16 matmul: 1.9, at most 2: met",
        "faiss knn_gpu over exact: 3, at least 4: missed",
        "compiled training step, memory 8192 over none: 1.2, at most 1.15: missed",
    ]
    smaller = {"search": [{**search, "keys": 4096}], "training_step": [{**step, "preset": "laptop"}]}
    assert check.verdicts({**results, **smaller}) == []
    assert [line.split(":")[0] for line in check.failures(results)] == ["training_step"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_card_it_says_what_to_do() -> None:
    answer = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert answer.returncode == 2
    assert "--device cpu --small" in answer.stdout
