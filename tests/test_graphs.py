"""What graph indexes are known to get wrong: hnswlib's exception, inner products, keys with a common mean."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from recollect.memory_backends import make_backend
from recollect.memory_backends.inner_products import as_distances, centred, queries_for_distances


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recall(spec: str, keys: torch.Tensor, queries: torch.Tensor, k: int = 10) -> float:
    settings = {"num_memories": len(keys), "capacity": keys.shape[1], "dim": keys.shape[2]}
    backend, exact = make_backend(spec, **settings), make_backend("exact", **settings)
    backend.add(keys)
    exact.add(keys)
    found, true = backend.search(queries, k), exact.search(queries, k)
    return float((found.scores >= true.scores[..., -1:] - 1e-3).float().mean())


def test_the_transformations_keep_the_order_of_inner_products() -> None:
    keys = (vectors(200, 7) * (1 + vectors(200, 1, seed=1).abs()) + 3).numpy()
    queries = vectors(20, 7, seed=2).numpy()
    order = np.argsort(-queries @ keys.T, axis=1)
    around, mean = centred(keys)
    np.testing.assert_allclose(queries @ around.T + (queries @ mean)[:, None], queries @ keys.T, rtol=1e-4, atol=1e-4)
    prepared, length = as_distances(keys)
    asked = queries_for_distances(queries, length, prepared.shape[1])
    assert prepared.dtype == asked.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), length, rtol=1e-5)
    norms = np.linalg.norm(prepared, axis=1)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)
    distances = ((asked[:, None] - prepared[None]) ** 2).sum(-1)
    assert (np.argsort(distances, axis=1)[:, :20] == order[:, :20]).mean() > 0.99  # float32 may swap near ties
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    prepared, length = as_distances(unit)
    assert np.array_equal(prepared, unit)
    assert length == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("spec", ["hnswlib", "faiss-hnsw"])
def test_unnormalised_keys_with_a_common_mean(spec: str) -> None:
    pytest.importorskip("hnswlib" if spec == "hnswlib" else "faiss")
    keys = vectors(1, 2048, 32) * (1 + 0.3 * vectors(1, 2048, 1, seed=1)) + 3 * vectors(1, 1, 32, seed=2)
    queries = vectors(1, 100, 32, seed=3)
    assert recall(spec, keys, queries) > 0.9


@pytest.mark.parametrize("spec", ["hnswlib", "faiss-hnsw"])
def test_ef_construction_takes_effect(spec: str) -> None:
    pytest.importorskip("hnswlib" if spec == "hnswlib" else "faiss")
    keys, queries = vectors(1, 8192, 32), vectors(1, 200, 32, seed=1)
    low, high = (
        recall(f"{spec}:part_size=8192,M=8,ef_search=16,ef_construction={ef}", keys, queries) for ef in (8, 200)
    )
    assert high > low + 0.05


def test_hnswlib_finds_fewer_than_k_without_raising() -> None:
    hnswlib = pytest.importorskip("hnswlib")
    backend = make_backend("hnswlib:M=2,ef_construction=2,ef_search=1", num_memories=1, capacity=400, dim=4)
    # Far clusters and hardly any links leave keys that no walk reaches.
    keys = vectors(1, 400, 4) + 100 * vectors(1, 8, 4, seed=1).repeat_interleave(50, 1)[:, torch.randperm(400)]
    backend.add(keys)
    index = backend.parts[0][0].index[0]
    with pytest.raises(RuntimeError):
        index.knn_query(keys[0, :40].numpy(), 100, num_threads=1)
    result = backend.search(keys[:, :40], 400)
    assert result.slots.shape == (1, 40, 400)
    assert ((result.slots >= 0).sum(-1) < 400).any()
    assert ((result.slots == -1) == (result.scores == -torch.inf)).all()
    assert hnswlib is not None


def test_ef_below_k_is_raised_to_k() -> None:
    pytest.importorskip("hnswlib")
    for spec in ("hnswlib:ef_search=1", "faiss-hnsw:ef_search=1"):
        backend = make_backend(spec, num_memories=1, capacity=256, dim=8)
        backend.add(vectors(1, 256, 8))
        assert (backend.search(vectors(1, 9, 8, seed=1), 64).slots >= 0).all()


def test_faiss_hnsw_is_searched_beside_torch_tensors_in_faiss() -> None:
    pytest.importorskip("faiss")
    # The import changes faiss's classes for good: in a process of its own.
    program = (
        "import torch, faiss, faiss.contrib.torch_utils; from recollect import make_backend; "
        "m = make_backend('faiss-hnsw:ef_search=9', num_memories=1, capacity=512, dim=8); "
        "m.add(torch.randn(1, 512, 8)); print(bool((m.search(torch.randn(1, 9, 8), 5).slots >= 0).all()))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "True", answer.stderr[-2000:]
