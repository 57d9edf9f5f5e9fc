"""The backend `milvus` against a server, where the environment variable RECOLLECT_MILVUS_URI names one.

RECOLLECT_MILVUS_URI=http://localhost:19530 pytest tests/test_milvus_server.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from milvus_appending import CAPACITY, DIM, key_numbers

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.memory_backends.errors import InvalidInput
from recollect.memory_backends.implementations.milvus import Milvus
from recollect.memory_backends.records import METRICS
from recollect.memory_backends.testing import skip_unless_available, vectors
from recollect.memory_backends.testing_oracle import OracleMemory, check_answer

VARIABLE = "RECOLLECT_MILVUS_URI"
URI = os.environ.get(VARIABLE, "")
pytestmark = pytest.mark.skipif(not URI, reason=f"{VARIABLE} names no Milvus server")
APPENDING = Path(__file__).with_name("milvus_appending.py")


class Made:
    """Makes memories on the server, and drops them at the end."""

    def __init__(self) -> None:
        self.name = f"test_{uuid.uuid4().hex[:12]}"
        self.memories: list[Milvus] = []

    def __call__(self, *options: str, **sizes: Any) -> Milvus:
        spec = ",".join((f"milvus:uri={URI}", f"collection={self.name}", *options))
        memory = make_backend(spec, **{"num_memories": 2, "capacity": 96, "dim": 8, **sizes})
        assert isinstance(memory, Milvus)
        self.memories.append(memory)
        return memory


@pytest.fixture
def made() -> Iterator[Made]:
    skip_unless_available("milvus")
    made = Made()
    yield made
    for memory in made.memories:
        memory.drop()


def checked(memory: MemoryBackend, oracle: OracleMemory, k: int = 5, seed: int = 9) -> float:
    queries = vectors(memory.num_memories, 16, memory.dim, seed=seed)
    result = memory.search(queries, k)
    exact = memory.capabilities.exact
    return check_answer(result, queries, k, oracle, range(memory.num_memories), exact=exact).value


@pytest.mark.parametrize("metric", METRICS)
def test_slots_scores_and_eviction(made: Made, metric: str) -> None:
    memory = made(metric=metric)
    oracle = OracleMemory(2, 96, metric)
    for step, count in enumerate((1, 50, 30, 96, 17, 200)):
        keys = vectors(2, count, 8, seed=step) * vectors(2, count, 1, seed=50 + step).abs()
        assert (memory.add(keys).numpy() == oracle.add(keys, range(2))).all()
        assert checked(memory, oracle, seed=step) == 1.0
    checked(memory, oracle, k=120)
    memory.reset([1])
    oracle.reset([1])
    keys = vectors(1, 20, 8, seed=7)
    memory.add(keys, memories=[1])
    oracle.add(keys, [1])
    assert checked(memory, oracle) == 1.0
    memory.wait()
    assert checked(memory, oracle) == 1.0
    totals, gathered = memory.ring.totals.tolist(), memory.gather_keys(torch.arange(20).expand(2, 1, 20))
    memory.close()
    made.memories.clear()
    with pytest.raises(InvalidInput, match="existing=reuse"):
        made(metric=metric)
    again = made("existing=reuse", metric=metric)
    assert again.ring.totals.tolist() == totals
    torch.testing.assert_close(again.gather_keys(torch.arange(20).expand(2, 1, 20)), gathered)
    assert checked(again, oracle) == 1.0


# How thorough AUTOINDEX is, the server decides.
@pytest.mark.parametrize(("index", "least"), [("HNSW", 0.95), ("IVF_FLAT,nprobe=64", 0.95), ("AUTOINDEX", 0.6)])
def test_recall_beside_other_memories(made: Made, index: str, least: float) -> None:
    memory = made(f"index={index}", capacity=5000, dim=16)
    oracle = OracleMemory(2, 5000, "inner_product")
    keys = vectors(2, 5000, 16)
    keys[1] *= 5
    memory.add(keys)
    oracle.add(keys, range(2))
    memory.wait()
    assert checked(memory, oracle, k=10) > least


def test_acknowledged_keys_are_found_after_a_kill(made: Made) -> None:
    command = [sys.executable, str(APPENDING), URI, made.name, "existing=reuse"]
    acknowledged = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _, line in zip(range(30), process.stdout, strict=False):
            acknowledged = int(line)
        process.kill()
        for line in process.stdout:
            acknowledged = int(line) if line.endswith("\n") else acknowledged
    memory = made("existing=reuse", num_memories=1, capacity=CAPACITY, dim=DIM)
    total = int(memory.ring.totals[0])
    assert 0 < acknowledged <= total
    torch.testing.assert_close(memory.gather_keys(torch.arange(total)[None, None])[0, 0], key_numbers(0, total)[0])
