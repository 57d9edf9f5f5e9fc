"""What users of faiss are known to get wrong: the metric of IVF-PQ, position -1, options that are ignored."""

from __future__ import annotations

import pytest
import torch

from recollect.memory_backends import BackendUnavailable, InvalidSpec, UnsupportedOperation, make_backend

faiss = pytest.importorskip("faiss")


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["faiss-ivf", "faiss-ivfpq", "faiss-hnsw", "faiss-flat"])
def test_searches_by_inner_product_and_not_by_distance(name: str) -> None:
    backend = make_backend(name, num_memories=1, capacity=1024, dim=16)
    keys = vectors(1, 1024, 16)
    keys[:, ::2] *= 4  # by distance the short keys are nearest, by inner product the long ones
    backend.add(keys)
    slots = backend.search(vectors(1, 50, 16, seed=1), 5).slots
    assert (slots % 2 == 0).float().mean() > 0.95
    for index in [*getattr(backend, "indexes", []), *[part.index[0] for part in getattr(backend, "parts", [()])[0]]]:
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT


@pytest.mark.parametrize("name", ["faiss-ivf", "faiss-ivfpq"])
def test_a_missing_neighbour_is_not_row_0(name: str) -> None:
    backend = make_backend(f"{name}:nlist=128,nprobe=1", num_memories=2, capacity=512, dim=16)
    backend.add(vectors(2, 512, 16))
    result = backend.search(vectors(2, 50, 16, seed=1), 40)
    missing = result.slots == -1
    assert missing.any()
    assert (result.scores[missing] == -torch.inf).all()
    assert (backend.gather_keys(result.slots)[missing] == 0).all()
    scores = torch.einsum("mqkd,mqd->mqk", backend.gather_keys(result.slots), vectors(2, 50, 16, seed=1))
    torch.testing.assert_close(result.scores[~missing], scores[~missing])


@pytest.mark.parametrize("name", ["faiss-ivf", "faiss-ivfpq"])
def test_nprobe_takes_effect_without_a_rebuild(name: str) -> None:
    backend = make_backend(f"{name}:nprobe=1", num_memories=1, capacity=1024, dim=16)
    backend.add(vectors(1, 1024, 16))
    built = backend.stats().build_seconds
    queries = vectors(1, 100, 16, seed=1)
    true = make_backend("exact", num_memories=1, capacity=1024, dim=16)
    true.add(vectors(1, 1024, 16))
    least = true.search(queries, 10).scores[..., -1:] - 1e-4
    recalls = []
    for nprobe in (1, 4, 32):
        backend.set_search_options(nprobe=nprobe)
        recalls.append(float((backend.search(queries, 10).scores >= least).float().mean()))
    assert recalls == sorted(recalls)
    assert recalls[-1] > recalls[0] + 0.2
    assert backend.stats().build_seconds == built


def test_more_candidates_for_rescoring_find_more() -> None:
    backend = make_backend("faiss-ivfpq:m=2,nprobe=64", num_memories=1, capacity=1024, dim=16)
    backend.add(vectors(1, 1024, 16))
    exact = make_backend("exact", num_memories=1, capacity=1024, dim=16)
    exact.add(vectors(1, 1024, 16))
    queries = vectors(1, 100, 16, seed=1)
    least = exact.search(queries, 10).scores[..., -1:] - 1e-4
    recalls = []
    for factor in (1, 4, 16):
        backend.set_search_options(k_factor=factor)
        recalls.append(float((backend.search(queries, 10).scores >= least).float().mean()))
    assert recalls[0] + 0.1 < recalls[1] < recalls[2]


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss has GPU support")
@pytest.mark.parametrize("name", ["faiss-flat", "faiss-ivf", "faiss-ivfpq"])
def test_cuda_without_faiss_gpu_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"pip install 'faiss-gpu"):
        make_backend(f"{name}:device=cuda", num_memories=1, capacity=8, dim=4)


def test_there_is_no_graph_on_a_gpu() -> None:
    with pytest.raises(UnsupportedOperation, match="device=cuda"):
        make_backend("faiss-hnsw:device=cuda", num_memories=1, capacity=8, dim=4)


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("faiss-ivf:nlist=9", "nlist=9"),
        ("faiss-ivf:nprobe=0", "nprobe=0"),
        ("faiss-ivfpq:m=3", "m=3"),
        ("faiss-ivfpq:nbits=13", "nbits=13"),
        ("faiss-ivfpq:nbits=4", "nbits=4"),
        ("faiss-hnsw:M=1", "M=1"),
    ],
)
def test_options_that_cannot_be_are_refused(spec: str, value: str) -> None:
    with pytest.raises(InvalidSpec, match=value):
        make_backend(spec, num_memories=1, capacity=8, dim=4)
