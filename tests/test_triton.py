"""The fused search of a GPU, in Triton's interpreter.

Whether kernels are interpreted is settled when triton is first imported, which another test of this process may have
done: so the cases, in `triton_cases.py`, run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recollect.memory_backends import UnsupportedOperation, make_backend
from recollect.memory_backends.triton_search import usable

TESTS = Path(__file__).resolve().parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (it is for Linux)")
def test_the_cases_hold_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        str(TESTS / "triton_cases.py"),
    ]
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, cwd=TESTS.parent)
    assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (it is for Linux)")
def test_the_kernels_compile_for_a_card_and_use_its_matrix_units(tmp_path: Path) -> None:
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(TESTS / "triton_compiling.py")]
    answer = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert answer.returncode == 0, answer.stderr[-4000:]
    *scans, last = answer.stdout.splitlines()
    assert scans == [f"scan_blocks {kind} matrix units" for kind in ("fp16", "bf16", "i8", "fp8e4nv")]
    assert last == "candidates compiled"


def test_a_cpu_is_served_by_plain_torch() -> None:
    assert not usable(torch.device("cpu"))
    backend = make_backend("exact", num_memories=1, capacity=8192, dim=16)
    assert backend.fused is None
    assert backend.stats().index_bytes == 0


def test_a_first_pass_of_8_bits_is_refused_where_there_is_no_card() -> None:
    with pytest.raises(UnsupportedOperation, match=r"first_pass=int8.*capacity=8192"):
        make_backend("approx-topk:first_pass=int8", num_memories=1, capacity=8192, dim=16)


def test_importing_the_backends_imports_no_triton() -> None:
    program = "import sys, recollect; recollect.make_backend('exact', num_memories=1, capacity=8192, dim=16);"
    program += "print('recollect.memory_backends.triton_kernels' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
