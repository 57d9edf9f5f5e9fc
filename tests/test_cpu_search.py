"""The fused search on a CPU: the reference's answer for any data, and the reference itself on other machines."""

from __future__ import annotations

import builtins
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recollect.memory_backends import cpu_search, make_backend, ring_search
from recollect.memory_backends.block_topk import search_by_score as reference

fused = pytest.mark.skipif(cpu_search.why_not() is not None, reason=f"no fused search here: {cpu_search.why_not()}")


def assert_same(found: tuple[Tensor, Tensor], queries: Tensor, keys: Tensor, k: int) -> None:
    """Holds scores and slots (Q, k) to the reference's: equal but for rounding, and slots that hold those scores."""
    scores, slots = found
    expected = reference(queries[None], keys[None], [len(keys)], k)[0][0]
    # Rounding is relative to the lengths of what is multiplied, not to their product.
    unit = (queries.norm(dim=1, keepdim=True) * keys.norm(dim=1).max()).clamp(min=torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(scores / unit, expected / unit, rtol=0, atol=1e-6)
    true = torch.einsum("qd,qkd->qk", queries.double(), keys[slots].double()) / unit
    torch.testing.assert_close(true, expected.double() / unit, rtol=0, atol=1e-6)
    assert (slots.sort(dim=1).values.diff(dim=1) > 0).all()
    assert (scores.diff(dim=1) <= 0).all()


def data(kind: str, n: int, dim: int, queries: int = 40) -> tuple[Tensor, Tensor]:
    """Queries (Q, D) and keys (n, D) of one sort."""
    asked, keys = torch.randn(queries, dim), torch.randn(n, dim)
    if kind == "clustered":
        centres = 3 * torch.randn(7, dim)
        keys = centres[torch.randint(7, (n,))] + 0.01 * keys
        asked = centres[torch.randint(7, (queries,))] + 0.3 * asked
    elif kind == "tied":
        asked, keys = asked.round(), keys.round().clamp(-1, 1)
    elif kind == "repeated":
        keys = keys[torch.randint(0, max(1, n // 50), (n,))]
    elif kind == "far from the origin":
        keys = 50 + keys
    elif kind == "rising":
        keys = keys.abs() * torch.arange(1, n + 1)[:, None] / n
        asked = asked.abs()
    elif kind == "one long":
        keys[n // 3] *= 1e6
    elif kind == "lengths":
        keys *= torch.randn(n, 1).mul(2).exp()
    elif kind == "one component":
        keys[:, 0] *= 300
    elif kind == "tiny":
        asked, keys = asked * 1e-18, keys * 1e-18
    elif kind == "sparse":
        keys *= torch.rand(n, dim) < 0.05
    elif kind == "a zero query":
        asked[3] = 0
    elif kind != "random":
        raise ValueError(kind)
    return asked, keys


EASY = ("random", "clustered", "far from the origin", "rising", "one long", "one component", "a zero query")
HARD = ("tied", "repeated", "lengths", "tiny", "sparse")


@fused
@pytest.mark.parametrize("kind", EASY + HARD)
@pytest.mark.parametrize(("n", "dim", "k"), [(5000, 64, 32), (2111, 33, 5)])
def test_any_data(kind: str, n: int, dim: int, k: int) -> None:
    queries, keys = data(kind, n, dim)
    scores, slots, left = (part[0] for part in cpu_search.search(queries[None], [keys], k))
    # Most of what is not made to be hard must be found by the first pass, or nothing was tested.
    assert left.float().mean() < (0.1 if kind in EASY else 1.1)
    done = ~left
    assert_same((scores[done], slots[done]), queries[done], keys, k)


@fused
@given(
    n=st.integers(1, 400),
    dim=st.integers(1, 80),
    count=st.integers(1, 20),
    k=st.integers(1, 40),
    seed=st.integers(0, 1000),
    whole=st.booleans(),
)
def test_any_shape(n: int, dim: int, count: int, k: int, seed: int, whole: bool) -> None:
    k = min(k, n)
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(count, dim, generator=generator), torch.randn(n, dim, generator=generator)
    if whole:
        queries, keys = queries.round(), keys.round()
    scores, slots, left = (part[0] for part in cpu_search.search(queries[None], [keys], k))
    assert whole or not (left & (queries != 0).any(1)).any()
    assert_same((scores[~left], slots[~left]), queries[~left], keys, k)


@fused
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("all equal", lambda queries, keys: keys.fill_(0.5)),
        ("all zero", lambda queries, keys: keys.zero_()),
        ("zero queries", lambda queries, keys: queries.zero_()),
        ("denormal", lambda queries, keys: keys.mul_(1e-42)),
        ("huge keys", lambda queries, keys: keys.mul_(1e30)),
        ("one huge key", lambda queries, keys: keys[0, 700].mul_(1e30)),
        ("huge queries", lambda queries, keys: queries.mul_(1e30)),
        ("overflow", lambda queries, keys: (queries.abs_().mul_(1e25), keys.abs_().mul_(1e25))),
    ],
)
def test_what_the_first_pass_cannot_do_the_reference_does(name: str, change: Callable[[Tensor, Tensor], Any]) -> None:
    backend = make_backend("exact", num_memories=1, capacity=9000, dim=16)
    queries, keys = torch.randn(1, 64, 16), torch.randn(1, 9000, 16)
    change(queries, keys)
    backend.add(keys)
    assert cpu_search.worth(64, 9000, 16, 9)
    found = backend.search(queries, 9)
    expected = reference(queries, keys, [9000], 9)
    assert torch.allclose(found.scores, expected[0], rtol=1e-5, atol=0) or name == "one huge key"
    unit = expected[0].abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(found.scores / unit, expected[0] / unit, equal_nan=True)
    assert ((found.slots >= 0) & (found.slots < 9000)).all()
    assert all(len(set(row)) == 9 for row in found.slots[0].tolist())


@fused
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("memories", [1, 2, 3])
@pytest.mark.parametrize("shared", ["keys", "queries"])
def test_threads_and_memories(monkeypatch: pytest.MonkeyPatch, threads: int, memories: int, shared: str) -> None:
    monkeypatch.setattr(cpu_search, "QUERIES_PER_THREAD", 5 if shared == "queries" else 1000)
    monkeypatch.setattr(cpu_search, "QUERIES_AT_ONCE", 23)
    monkeypatch.setattr(cpu_search, "TILES_PER_PART", 4)
    queries = torch.randn(memories, 50, 20)
    keys = [torch.randn(n, 20).round(decimals=1) for n in (3000, 1500, 999)[:memories]]
    alone = cpu_search.search(queries, keys, 7)
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = cpu_search.search(queries, keys, 7)
    finally:
        torch.set_num_threads(former)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    for row in range(memories):
        assert not together[2][row].any()
        assert_same((together[0][row], together[1][row]), queries[row], keys[row], 7)


@fused
def test_more_parts_than_lists_hold_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_search, "TILES_PER_PART", 4)
    queries, keys = torch.randn(1, 30, 20), torch.randn(12000, 20)
    former = torch.get_num_threads()
    torch.set_num_threads(40)
    try:
        scores, slots, left = cpu_search.search(queries, [keys], 32)
    finally:
        torch.set_num_threads(former)
    assert not left.any()
    assert_same((scores[0], slots[0]), queries[0], keys, 32)


@fused
def test_ragged_memories_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_search, "FEWEST_PRODUCTS", 1 << 15)
    monkeypatch.setattr(cpu_search, "FEWEST_KEYS", 1000)
    ring = make_backend("exact", num_memories=4, capacity=3000, dim=24).ring
    ring.append(torch.randn(4, 3000, 24), torch.arange(4))
    queries, which, lengths = torch.randn(4, 20, 24), [3, 0, 1, 2], [2900, 4, 0, 1800]
    scores, slots = ring_search.search_ring(ring, queries, 9, which, lengths, "inner_product", first=71)
    assert (slots[1, :, 4:] == -1).all()
    assert (scores[1, :, 4:] == -torch.inf).all()
    assert (slots[2] == -1).all()
    for row, found in ((0, 9), (1, 4), (3, 9)):
        keys = ring.keys[which[row], 71 : 71 + lengths[row]]
        assert_same((scores[row, :, :found], slots[row, :, :found] - 71), queries[row], keys, found)


@fused
@pytest.mark.parametrize("kind", ["random", "clustered", "far from the origin", "lengths", "repeated", "a zero query"])
def test_distances(kind: str) -> None:
    queries, keys = data(kind, 5000, 40, queries=60)
    queries[7] = keys[123]
    found = cpu_search.search_by_score(queries[None], keys[None], [5000], 9, memories=[0], metric="l2")
    assert found is not None
    expected = reference(queries[None], keys[None], [5000], 9, metric="l2")[0]
    torch.testing.assert_close(found[0], expected, rtol=1e-3 if kind == "repeated" else 1e-5, atol=1e-4)
    true = -(queries[:, None].double() - keys[found[1][0]].double()).square().sum(-1)
    torch.testing.assert_close(found[0][0].double(), true, rtol=1e-5, atol=1e-4)
    assert found[0][0, 7, 0] == 0
    # The first pass must do most of them, or nothing was tested.
    left = cpu_search._search_distances(queries[None], [keys], 9)[2]
    assert left.float().mean() < (1.1 if kind in HARD else 0.1)


@fused
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
@pytest.mark.parametrize("metric", ["inner_product", "cosine", "l2"])
def test_keys_of_other_types_are_searched_by_it_too(monkeypatch: pytest.MonkeyPatch, storage: str, metric: str) -> None:
    searched = []
    plain = cpu_search.search
    monkeypatch.setattr(cpu_search, "search", lambda *asked: searched.append(asked) or plain(*asked))
    backend = make_backend(f"exact:storage={storage}", num_memories=2, capacity=5000, dim=24, metric=metric)
    backend.add(torch.randn(2, 5000, 24))
    queries = torch.randn(2, 80, 24)
    found = backend.search(queries, 9)
    assert searched
    monkeypatch.setattr(cpu_search, "worth", lambda *_: False)
    expected = backend.search(queries, 9)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-4)
    assert (found.slots == expected.slots).float().mean() > 0.999


@fused
def test_of_equal_keys_the_lowest_slots() -> None:
    keys = torch.randn(40, 32).repeat(20, 1)
    _, slots, left = cpu_search.search(torch.randn(1, 30, 32), [keys], 50)
    assert not left.any()
    groups = slots[0].view(30, -1)[:, :40].view(30, 2, 20)
    assert torch.equal(groups % 40, (groups[..., :1] % 40).expand(-1, -1, 20))
    assert torch.equal(groups // 40, torch.arange(20).expand(30, 2, 20))
    rest = slots[0, :, 40:] // 40
    assert torch.equal(rest, torch.arange(10).expand(30, 10))


@pytest.fixture
def as_if_new() -> Any:
    """Lets a test change what this machine is thought to have."""
    for known in (cpu_search.why_not, cpu_search._failure):
        known.cache_clear()
    yield
    for known in (cpu_search.why_not, cpu_search._failure):
        known.cache_clear()


def search_large() -> tuple[Tensor, Tensor, Any]:
    backend = make_backend("exact", num_memories=1, capacity=9000, dim=8)
    queries, keys = torch.randn(1, 64, 8), torch.randn(1, 9000, 8)
    backend.add(keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = backend.search(queries, 5)
    expected = reference(queries, keys, [9000], 5)
    torch.testing.assert_close(found.scores, expected[0])
    return queries, keys, backend


@pytest.mark.usefixtures("as_if_new")
def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu_search.importlib.util.find_spec
    monkeypatch.setattr(
        cpu_search.importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else real(name, *rest)
    )
    imported = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] in ("numba", "llvmlite"):
            raise ImportError(name)
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    _, _, backend = search_large()
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert "pip install 'recollect[fast]'" in backend.kernel


@pytest.mark.usefixtures("as_if_new")
def test_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = pytest.importorskip("llvmlite.binding")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx2": True, "avx512f": True})
    monkeypatch.setattr(cpu_search, "search", lambda *_: pytest.fail("the fused search was run"))
    _, _, backend = search_large()
    assert "avx512vnni" in backend.kernel


@pytest.mark.usefixtures("as_if_new")
def test_on_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(cpu_search, "search", lambda *_: pytest.fail("the fused search was run"))
    _, _, backend = search_large()
    assert "aarch64" in backend.kernel


@fused
def test_compiled_code_is_kept_where_it_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from recollect.memory_backends import cpu_cache

    def add_one(number: int) -> int:
        return number + 1

    try:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
        cpu_cache.folder.cache_clear()
        assert cpu_cache.compiled(add_one)(1) == 2
        assert list((tmp_path / "kept").rglob("*.nbi"))
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
        cpu_cache.folder.cache_clear()
        assert cpu_cache.folder() is None
        assert cpu_cache.compiled(add_one)(2) == 3
    finally:
        cpu_cache.folder.cache_clear()


@fused
@pytest.mark.usefixtures("as_if_new")
@pytest.mark.parametrize("how", ["refused", "wrong"])
def test_a_compiler_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def broken(queries: Tensor, keys: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
        if how == "refused":
            raise RuntimeError("LLVM IR parsing error")
        shape = (*queries.shape[:2], k)
        return torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[:2], dtype=torch.bool)

    monkeypatch.setattr(cpu_search, "search", broken)
    with pytest.warns(RuntimeWarning, match="LLVM IR" if how == "refused" else "answered wrongly"):
        assert not cpu_search.worth(512, 65536, 64, 32)
    assert "in torch" in search_large()[2].kernel


def test_numba_is_loaded_when_it_is_needed() -> None:
    code = """
import sys, torch
from recollect import make_backend
backend = make_backend("exact", num_memories=1, capacity=2047, dim=8)
backend.add(torch.randn(1, 2047, 8))
backend.search(torch.randn(1, 32, 8), 4)
print("numba" in sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False"]
