"""Two stages: candidates of any backend, scored anew from the raw keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recollect.memory_backends import (
    BackendUnavailable,
    Capabilities,
    InvalidInput,
    InvalidSpec,
    MemoryBackend,
    Requirement,
    UnsupportedOperation,
    canonical_spec,
    load_backend,
    make_backend,
)
from recollect.memory_backends.errors import ClosedMemory
from recollect.memory_backends.implementations.degraded import Degraded
from recollect.memory_backends.implementations.rerank import Rerank
from recollect.memory_backends.registry import build_spec, capabilities_of, check_available
from recollect.memory_backends.testing import skip_unless_available, vectors
from recollect.suites.environment import backend_digest
from recollect.suites.sharing import build_key, search_options

M, C, D, Q, K = 2, 512, 16, 30, 8
SOURCES = ("approx-topk:buckets=256", "degraded", "faiss-ivfpq:k_factor=1", "hnswlib:part_size=128", "scann")


def made(source: str, candidates: int = 64, **changes: object) -> MemoryBackend:
    spec = f"rerank:candidates={candidates},source='{source}'"
    sizes: dict[str, object] = {"num_memories": M, "capacity": C, "dim": D, "seed": 3, **changes}
    return make_backend(spec, **sizes)  # type: ignore[arg-type]


def source_of(memory: MemoryBackend) -> MemoryBackend:
    assert isinstance(memory, Rerank)
    return memory.source


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_answer_is_the_best_of_the_candidates_by_their_true_scores(source: str, metric: str) -> None:
    skip_unless_available(source)
    memory = made(source, metric=metric)
    assert source_of(memory).ring is memory.ring, "no second copy of the raw keys"
    keys, queries = vectors(M, C + 200, D), vectors(M, Q, D, seed=1)
    memory.add(keys)
    found = memory.search(queries, K)
    looked_for = queries if metric != "cosine" else torch.nn.functional.normalize(queries, dim=-1)
    _, candidates = source_of(memory)._search(looked_for, 64, torch.arange(M))
    rows = memory.gather_keys(candidates)
    if metric == "l2":
        scores = -(rows - queries[:, :, None]).square().sum(-1)
    elif metric == "cosine":
        scores = torch.cosine_similarity(rows, queries[:, :, None], dim=-1)
    else:
        scores = torch.einsum("mqkd,mqd->mqk", rows, queries)
    scores[candidates < 0] = -torch.inf
    best, order = scores.topk(K)
    torch.testing.assert_close(found.scores, best, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.slots, candidates.gather(-1, order))


class WrongScores(Degraded):
    """Finds all keys and gives them scores that mean nothing."""

    name = "wrong-scores"
    summary = "all keys, with scores that mean nothing"

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*queries.shape[:2], k)
        return torch.zeros(shape), torch.arange(k).expand(shape).clone()


def test_scores_of_the_source_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    from recollect.memory_backends import registry

    known = registry.backend_class
    monkeypatch.setattr(registry, "backend_class", lambda name: WrongScores if name == "wrong-scores" else known(name))
    memory, exact = made("wrong-scores", candidates=C), make_backend("exact", num_memories=M, capacity=C, dim=D)
    keys, queries = vectors(M, C, D), vectors(M, Q, D, seed=1)
    memory.add(keys)
    exact.add(keys)
    assert torch.equal(memory.search(queries, K).slots, exact.search(queries, K).slots)


def test_the_canonical_form_holds_the_source_s() -> None:
    given = "rerank:source='faiss-ivf:nprobe=32 , nlist=0',candidates=256"
    assert canonical_spec(given) == "rerank:source=faiss-ivf:nprobe=32"
    two = "rerank:candidates=64,source='faiss-ivf:nlist=64,nprobe=32'"
    assert canonical_spec("rerank:source='faiss-ivf:nprobe=32,nlist=64',candidates=64") == two
    assert canonical_spec(two) == two


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("fais-ivf", ("'rerank'", "fais-ivf", "did you mean")),
        ("faiss-ivf:nprobes=3", ("'rerank'", "faiss-ivf:nprobes=3", "'nprobe'")),
        ("faiss-ivf:nprobe=0", ("'rerank'", "nprobe=0")),
        ("rerank", ("'rerank'", "twice")),
    ],
)
def test_a_wrong_source_is_named_inside_and_outside(source: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        canonical_spec(f"rerank:source='{source}'")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_only_shows_when_it_is_made_is_named_too() -> None:
    skip_unless_available("faiss-ivf")
    with pytest.raises(InvalidSpec, match=r"'rerank'.*nlist=4096 exceeds the capacity"):
        made("faiss-ivf:nlist=4096")
    with pytest.raises(InvalidSpec, match="candidates=0"):
        made("exact", candidates=0)


def test_capabilities_are_the_source_s() -> None:
    assert capabilities_of("rerank:source=exact") == Capabilities(exact=True, devices=("cpu", "cuda", "mps"))
    assert not capabilities_of("rerank").exact
    assert capabilities_of("rerank:source=scann").needs_training
    assert capabilities_of("rerank:source=hnswlib").eviction == "rebuilt"
    assert made("exact").capabilities.exact
    assert not Rerank.capabilities.exact, "the class's own are as they were"
    skip_unless_available("faiss-ivf")
    with pytest.raises(UnsupportedOperation, match="'rerank' can't live on device 'cuda'"):
        made("faiss-ivf", device="cuda")


def test_a_missing_library_of_the_source_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from recollect.memory_backends.registry import backend_class

    monkeypatch.setattr(backend_class("scann"), "requires", (Requirement("nobody_has_it", "nobody-has-it>=2"),))
    for call in (lambda: made("scann"), lambda: check_available("rerank:source=scann")):
        with pytest.raises(BackendUnavailable, match="pip install 'nobody-has-it>=2'"):
            call()
    check_available("rerank")


def test_search_options_of_both_stages_change_without_a_rebuild() -> None:
    skip_unless_available("faiss-ivf")
    memory = made("faiss-ivf:nlist=16,nprobe=1", candidates=16)
    keys, queries = vectors(M, C, D), vectors(M, Q, D, seed=1)
    memory.add(keys)
    index = source_of(memory).indexes  # type: ignore[attr-defined]
    memory.set_search_options(candidates=128, source="faiss-ivf:nprobe=16,nlist=16")
    assert source_of(memory).indexes is index  # type: ignore[attr-defined]
    assert memory.spec == "rerank:candidates=128,source=faiss-ivf:nlist=16"
    other = made("faiss-ivf:nlist=16,nprobe=16", candidates=128)
    other.add(keys)
    assert torch.equal(memory.search(queries, K).slots, other.search(queries, K).slots)
    for source in ("faiss-ivf:nlist=32", "faiss-flat", "exact"):
        before = memory.spec
        with pytest.raises(UnsupportedOperation, match=r"source='faiss-ivf:nlist=16'"):
            memory.set_search_options(source=source)
        assert memory.spec == before
    with pytest.raises(InvalidSpec, match="nprobes"):
        memory.set_search_options(source="faiss-ivf:nprobes=4")


def test_specs_that_differ_in_search_options_share_a_build() -> None:
    one, other = "rerank:source='faiss-ivf:nlist=16,nprobe=4'", "rerank:candidates=32,source='faiss-ivf:nlist=16'"
    assert build_key(one) == build_key(other) == build_spec(one) == "rerank:source=faiss-ivf:nlist=16"
    assert build_key("rerank:source='approx-topk:recall_target=0.8'") == "rerank:source=approx-topk"
    assert build_key("rerank:candidates=8,source='exact:storage=int8'") == "rerank"
    assert build_key("rerank:source=faiss-ivf") != build_key(one)
    assert search_options(other) == {"source": "faiss-ivf:nlist=16", "candidates": 32}


def test_the_code_of_the_source_counts_as_the_backend_s() -> None:
    assert len({backend_digest(spec) for spec in ("rerank:source=faiss-ivf", "rerank", "exact")}) == 3
    assert backend_digest("rerank:source=exact") == backend_digest("rerank:candidates=8,source=exact")


@pytest.mark.parametrize("source", ["exact:storage=int8", "exact:storage=bfloat16", "approx-topk:storage=int8"])
def test_a_source_with_a_storage_of_its_own(source: str, tmp_path: Path) -> None:
    """Its rounded keys find, the whole ones decide; a ring of its own follows every append, reset and load."""
    memory, exact = made(source), make_backend("exact", num_memories=M, capacity=C, dim=D)
    queries = vectors(M, Q, D, seed=1)
    assert not capabilities_of(memory.spec).exact
    for step in range(4):
        for one in (memory, exact):
            one.add(vectors(M, 300, D, seed=step))
        assert torch.equal(source_of(memory).ring.totals, memory.ring.totals)
        found, wanted = memory.search(queries, K), exact.search(queries, K)
        torch.testing.assert_close(found.scores, wanted.scores)
    for one in (memory, exact):
        one.reset([0])
        one.add(vectors(1, 20, D, seed=9), memories=[0])
    torch.testing.assert_close(memory.search(queries, K).scores, exact.search(queries, K).scores)
    per_key = D + 4 if "int8" in source else 2 * D
    assert memory.stats().index_bytes == (C + 20) * per_key
    memory.save(tmp_path / "memory")
    loaded = load_backend(tmp_path / "memory")
    assert torch.equal(source_of(loaded).ring.totals, memory.ring.totals)
    assert torch.equal(loaded.search(queries, K).slots, memory.search(queries, K).slots)


def test_whole_keys_may_lie_in_a_file_beside_codes_in_memory(tmp_path: Path) -> None:
    memory = make_backend(f"rerank:keys_in='{tmp_path}'", num_memories=M, capacity=C, dim=D)
    exact = make_backend("exact", num_memories=M, capacity=C, dim=D)
    queries = vectors(M, Q, D, seed=1)
    for one in (memory, exact):
        one.add(vectors(M, C + 100, D))
    assert torch.equal(memory.search(queries, K).slots, exact.search(queries, K).slots)
    stats = memory.stats()
    assert (stats.key_bytes, stats.index_bytes) == (0, M * C * (D + 4))
    memory.close()


def test_a_source_that_cannot_find_so_many_says_who_asked() -> None:
    memory = made("approx-topk:buckets=32", candidates=64)
    memory.add(vectors(M, C, D))
    with pytest.raises(InvalidInput, match=r"buckets=32.*'rerank:.*asks its source for 64 candidates"):
        memory.search(vectors(M, 1, D), K)


def test_closing_and_figures_pass_through(tmp_path: Path) -> None:
    skip_unless_available("hnswlib")
    memory = made("hnswlib:part_size=128")
    memory.add(vectors(M, C, D))
    stats = memory.stats()
    assert stats.index_bytes == source_of(memory).stats().index_bytes > 0
    assert stats.build_seconds == source_of(memory).build_seconds > 0
    memory.wait()
    memory.save(tmp_path / "memory")
    loaded = load_backend(tmp_path / "memory")
    queries = vectors(M, Q, D, seed=1)
    assert torch.equal(loaded.search(queries, K).slots, memory.search(queries, K).slots)
    memory.close()
    with pytest.raises(ClosedMemory):
        source_of(memory).search(queries, K)


def test_an_append_that_fails_in_the_source_leaves_both_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_available("hnswlib")
    memory = made("hnswlib:part_size=128")
    memory.add(vectors(M, C, D))
    queries = vectors(M, Q, D, seed=1)
    before = memory.search(queries, K)
    source = source_of(memory)
    build = source._build_part  # type: ignore[attr-defined]
    calls = []

    def fails_once(keys: object, seed: int) -> object:
        calls.append(seed)
        if len(calls) == 2:
            raise MemoryError("no room")
        return build(keys, seed)

    monkeypatch.setattr(source, "_build_part", fails_once)
    with pytest.raises(MemoryError):
        memory.add(vectors(M, 300, D, seed=2))
    assert torch.equal(memory.search(queries, K).slots, before.slots)
