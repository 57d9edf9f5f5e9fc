"""Indexes that live on a GPU: refused with the remedy where there is none, and what is ours of their logic.

faiss-gpu and cuVS cannot run on a machine without a card. Where a test says "stand-in", a thin fake has taken the
library's place: what it proves is which slots, scores and keys this project's code makes of the library's answers, and
nothing about the library itself. `benchmarks/gpu_check.py` runs the real ones.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from recollect.memory_backends import BackendUnavailable, InvalidInput, InvalidSpec, UnsupportedOperation, make_backend
from recollect.memory_backends.cuvs_support import answer

SIZE = {"num_memories": 2, "capacity": 2048, "dim": 16}


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recall(backend: Any, plain: Any, queries: torch.Tensor, k: int) -> float:
    found, true = backend.search(queries, k), plain.search(queries, k)
    own = torch.einsum("mqd,mqkd->mqk", queries, plain.gather_keys(found.slots))
    torch.testing.assert_close(found.scores, own, rtol=1e-4, atol=1e-4)
    return float((found.scores >= true.scores[..., -1:] - 1e-4).float().mean())


@pytest.mark.skipif(importlib.util.find_spec("cuvs") is not None, reason="cuvs is installed")
@pytest.mark.parametrize("name", ["cuvs-cagra", "cuvs-brute-force"])
def test_cuvs_is_refused_with_the_pip_command_where_it_is_not_installed(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"needs cuvs.*pip install 'cuvs-cu12"):
        make_backend(name, **SIZE)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cuvs-cagra:graph_degree=0", "graph_degree=0"),
        ("cuvs-cagra:graph_degree=64,intermediate_graph_degree=32", "intermediate_graph_degree=32"),
        ("cuvs-cagra:itopk_size=513", "itopk_size=513"),
    ],
)
def test_options_of_cagra_that_cannot_be_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        make_backend(spec, **SIZE)


def test_answers_of_cuvs_become_scores_and_slots() -> None:
    distances = np.array([[0.5, 1.5, 9.0]], dtype=np.float32)
    neighbours = np.array([[7, 2**20, 2**32 - 1]], dtype=np.uint32)
    scores, positions = answer(distances, neighbours, "l2", torch.device("cpu"))
    assert scores.tolist() == [[-0.5, -1.5, -9.0]]
    assert positions.tolist() == [[7, 2**20, -1]]
    scores, positions = answer(distances, neighbours.astype(np.int64)[:, :2], "inner_product", torch.device("cpu"))
    assert scores.tolist() == [[0.5, 1.5, 9.0]]
    assert positions.tolist() == [[7, 2**20]]


class StandInForCuvs:
    """`build` keeps the array, `search` is torch: the arguments, and the kinds of number, are those of cuVS."""

    def __init__(self, position_type: Any) -> None:
        self.position_type = position_type
        self.built: list[tuple[int, str]] = []
        self.IndexParams = self.SearchParams = dict

    def build(self, first: Any, dataset: Any = None, *, metric: str = "") -> Any:
        keys, metric = (first, metric) if dataset is None else (dataset, first["metric"])
        assert keys.dtype == torch.float32
        assert keys.is_contiguous()
        self.built.append((len(keys), metric))
        return keys, metric

    def search(self, *arguments: Any) -> tuple[Any, Any]:
        (keys, metric), queries, k = arguments[-3:]
        if len(arguments) == 4:
            assert arguments[0]["itopk_size"] >= k
            assert arguments[0]["itopk_size"] % 32 == 0
        distances = torch.cdist(queries, keys).square() if metric == "sqeuclidean" else queries @ keys.mT
        best = distances.topk(k, largest=metric != "sqeuclidean")
        return best.values.numpy(), best.indices.numpy().astype(self.position_type)


@pytest.fixture
def cuvs(monkeypatch: pytest.MonkeyPatch) -> dict[str, StandInForCuvs]:
    """A stand-in that is imported as cuVS, with the CPU for a card."""
    standing = {"brute_force": StandInForCuvs(np.int64), "cagra": StandInForCuvs(np.uint32)}
    for name in ("cuvs", "cuvs.neighbors"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for name, one in standing.items():
        monkeypatch.setitem(sys.modules, f"cuvs.neighbors.{name}", one)
    for name in ("cuvs_brute_force", "cuvs_cagra"):
        module_name = f"recollect.memory_backends.implementations.{name}"
        importlib.import_module(module_name)
        monkeypatch.setattr(f"{module_name}.card_for", lambda device, name: torch.device("cpu"))
        monkeypatch.setattr(f"{module_name}.settled", lambda tensor, card: tensor.contiguous())
    return standing


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
@pytest.mark.parametrize("name", ["cuvs-brute-force", "cuvs-cagra:run_size=1024"])
def test_slots_and_scores_over_a_stand_in_for_cuvs(name: str, metric: str, cuvs: dict[str, StandInForCuvs]) -> None:
    backend = make_backend(name, **SIZE, metric=metric)
    plain = make_backend("exact", **SIZE, metric=metric)
    queries = vectors(2, 20, 16, seed=1)
    for step in vectors(2, 5000, 16).split(700, dim=1):
        for memory in (backend, plain):
            memory.add(step + 1)
        backend.wait()
        one, other = backend.search(queries, 40), plain.search(queries, 40)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-4)
        assert (one.slots == other.slots).float().mean() > 0.98
    for memory in (backend, plain):
        memory.reset([0])
        memory.add(vectors(1, 30, 16, seed=2), memories=[0])
    torch.testing.assert_close(
        backend.search(queries, 40).scores, plain.search(queries, 40).scores, rtol=1e-4, atol=1e-4
    )
    expected = "sqeuclidean" if metric == "l2" else "inner_product"
    used = cuvs["cagra" if "cagra" in name else "brute_force"].built
    assert used
    assert {metric for _, metric in used} == {expected}


faiss = pytest.importorskip("faiss")


@pytest.fixture
def faiss_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for faiss-gpu: what would be copied to a card is copied beside it. Returns the sizes of the copies."""
    copies: list[int] = []

    def copy(resources: Any, device: int, index: Any) -> Any:
        assert index.direct_map.type == faiss.DirectMap.NoMap  # a card takes no other
        copies.append(index.ntotal)
        return faiss.clone_index(index)

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", copy, raising=False)
    return copies


@pytest.mark.parametrize("name", ["faiss-ivf", "faiss-ivfpq"])
def test_keys_that_change_are_found_beside_a_copy_on_a_stand_in_for_faiss_gpu(name: str, faiss_gpu: list[int]) -> None:
    backend = make_backend(f"{name}:device=cuda,nprobe=45", **SIZE)
    beside = make_backend(f"{name}:nprobe=45", **SIZE)
    plain = make_backend("exact", **SIZE)
    queries = vectors(2, 30, 16, seed=1)
    for memory in (backend, beside, plain):
        memory.add(vectors(2, 2048, 16))
    assert recall(backend, plain, queries, 10) == recall(beside, plain, queries, 10)
    assert len(faiss_gpu) == 2
    for seed in range(2, 6):
        for memory in (backend, beside, plain):
            memory.add(2 * vectors(2, 100, 16, seed=seed))
        # The long new keys are most of what is best, and the ones that they overwrote are found no more.
        assert recall(backend, plain, queries, 10) >= recall(beside, plain, queries, 10)
    # 200 changed keys were searched beside the copies; 300 are more than an eighth.
    assert len(faiss_gpu) == 4


def test_a_first_fill_is_found_beside_a_copy_too(faiss_gpu: list[int]) -> None:
    backend, plain = make_backend("faiss-ivf:device=cuda,nprobe=64", **SIZE), make_backend("exact", **SIZE)
    queries = vectors(2, 30, 16, seed=1)
    for step in vectors(2, 2048, 16).split(64, dim=1):
        for memory in (backend, plain):
            memory.add(step)
        assert recall(backend, plain, queries, 10) == 1
    assert len(faiss_gpu) < 40  # of 64 searches in which keys had changed


def test_more_neighbours_than_faiss_finds_on_a_card_are_refused(faiss_gpu: list[int]) -> None:
    backend = make_backend("faiss-ivf:device=cuda", num_memories=1, capacity=4096, dim=4)
    backend.add(vectors(1, 4096, 4))
    with pytest.raises(InvalidInput, match=r"2048 neighbours, not 2049"):
        backend.search(vectors(1, 1, 4), 2049)


def test_codes_that_faiss_cannot_search_on_a_card_are_refused(faiss_gpu: list[int]) -> None:
    with pytest.raises(InvalidSpec, match=r"nbits=6.*device=cuda"):
        make_backend("faiss-ivfpq:device=cuda,nbits=6", **SIZE)
    with pytest.raises(InvalidSpec, match=r"m=10.*device=cuda"):
        make_backend("faiss-ivfpq:device=cuda,m=10", num_memories=1, capacity=2048, dim=40)


def test_no_card_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(UnsupportedOperation, match="sees no GPU"):
        make_backend("faiss-ivf:device=cuda", **SIZE)
