"""Cases of the fused search, run by `test_triton.py` in a process of their own, where Triton interprets its kernels.

Blocks are made short and rooms small, so that few keys meet every branch: runs, the masked round, opened blocks, wide
lists of candidates, and the queries that are left to plain torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.memory_backends import NotFinite, make_backend, triton_search, triton_topk
from recollect.memory_backends.implementations.approx_topk import _fused_shape, buckets_for, expected_recall
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.options import KeyStorage
from recollect.memory_backends.triton_keys import FIRST_PASSES, FirstPass, encode, margin_coefficient
from recollect.memory_backends.triton_search import FusedSearch
from recollect.memory_backends.triton_topk import Shape, interpreted, shape_for

CPU = torch.device("cpu")


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Held:
    """A ring with a fused search over it, as a backend holds them."""

    def __init__(
        self,
        keys: Tensor,
        capacity: int,
        metric: str = "inner_product",
        *,
        storage: KeyStorage = "float32",
        **more: Any,
    ) -> None:
        self.metric = metric
        self.ring = KeyRing(len(keys), capacity, keys.shape[2], device=CPU, storage=storage)
        self.fused = FusedSearch(self.ring, metric, **more)
        self.add(keys)

    def add(self, keys: Tensor, memories: list[int] | None = None) -> None:
        which = torch.arange(len(keys)) if memories is None else torch.tensor(memories)
        slots = self.ring.append(keys, which)
        kept = slots[:, -min(slots.shape[1], self.ring.capacity) :]
        self.fused.add(keys[:, -kept.shape[1] :], kept, which)

    def search(
        self, queries: Tensor, k: int, lengths: list[int], shape: Shape | None, *, open_blocks: bool = True
    ) -> tuple[Tensor, Tensor]:
        fused, which = self.fused, list(range(len(queries)))
        return triton_topk.triton_topk(
            fused.keys, self.ring, queries, k, which, lengths, guard=fused.guard, shape=shape, open_blocks=open_blocks
        )

    def check(self, queries: Tensor, k: int, shape: Shape | None, lengths: list[int] | None = None) -> list[int]:
        """The answer is the oracle's: the same scores, of the slots that are named. Counts queries left to torch."""
        lengths = self.ring.lengths.tolist() if lengths is None else lengths
        left = [0] * len(lengths)
        search = triton_topk.search_ring

        def counted(ring: KeyRing, asked: Tensor, k: int, memories: list[int], *rest: Any) -> tuple[Tensor, Tensor]:
            left[memories[0]] += asked.shape[1]
            return search(ring, asked, k, memories, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_topk, "search_ring", counted)
            scores, slots = self.search(queries, k, lengths, shape)
        for memory, length in enumerate(lengths):
            keys = self.ring.chunk(memory, 0, length).double()
            asked = queries[memory].double()
            if self.metric == "l2":
                true = -(asked[:, None] - keys[None]).square().sum(-1)
            else:
                true = asked @ keys.T
            found = min(k, length)
            assert (slots[memory, :, found:] == -1).all()
            assert (scores[memory, :, found:] == -torch.inf).all()
            here = slots[memory, :, :found]
            assert (here >= 0).all()
            assert (here < length).all()
            assert all(len(set(row)) == found for row in here.tolist())
            size = float(true.abs().max()) if length else 1.0
            own = true.gather(1, here)
            torch.testing.assert_close(scores[memory, :, :found].double(), own, rtol=1e-5, atol=1e-6 * size)
            torch.testing.assert_close(own, true.topk(found).values, rtol=1e-5, atol=1e-6 * size)
        return left


def test_kernels_are_interpreted() -> None:
    assert interpreted()


@pytest.mark.parametrize(
    ("dim", "k", "metric", "first_pass"),
    [
        (24, 1, "l2", "float16"),
        (64, 5, "inner_product", "bfloat16"),
        (128, 32, "inner_product", "float16"),
        (128, 32, "l2", "int8"),
        (24, 256, "inner_product", "float16"),
        (300, 7, "l2", "float8"),
    ],
)
def test_random_keys_of_memories_of_different_lengths(dim: int, k: int, metric: str, first_pass: FirstPass) -> None:
    held = Held(vectors(3, 1500, dim), 1500, metric, first_pass=first_pass)
    shape = Shape(2, 512, 128) if k == 256 else Shape(4, 256, 16)
    left = held.check(vectors(3, 3, dim, seed=1), k, shape, [1500, 1111, 3 if k < 256 else 1025])
    assert not any(left) or first_pass == "float8"


def test_images_follow_a_ring_that_goes_round() -> None:
    held = Held(vectors(2, 700, 16), 1000, "l2")
    queries, shape = vectors(2, 4, 16, seed=1), Shape(4, 128, 8)
    for seed in range(2, 5):
        held.check(queries, 8, shape)  # makes the bounds, which are renewed in part from now on
        held.add(5 * seed * vectors(2, 230, 16, seed=seed))
        held.add(vectors(1, 30, 16, seed=seed), [1])
    held.check(queries, 8, shape)
    held.ring.reset(torch.tensor([0]))
    held.fused.reset(torch.tensor([0]))
    held.add(vectors(1, 400, 16, seed=9), [0])
    held.check(queries, 8, shape)


def test_bounds_that_are_renewed_are_those_made_at_once() -> None:
    one, other = Held(vectors(2, 300, 16), 1000), Held(vectors(2, 300, 16), 1000)
    one.fused.keys.bounds(4)
    for held in (one, other):
        for seed in (1, 2, 3):
            held.add(vectors(2, 330, 16, seed=seed) * 10**seed)
    torch.testing.assert_close(one.fused.keys.bounds(4), other.fused.keys.bounds(4))


def adversaries() -> dict[str, tuple[Tensor, Tensor]]:
    """Keys (1200, 16) and queries (4, 16) by what is wrong with them."""
    plain, queries = vectors(1200, 16), vectors(4, 16, seed=1)
    huge, big, zeros = plain.clone(), plain.clone(), queries.clone()
    huge[77] = 3e30
    big[::100] *= 1e5  # beyond float16
    zeros[1] = 0
    centres = vectors(30, 16, seed=3).repeat_interleave(40, 0)
    return {
        "equal": (plain[:1].expand(1200, 16), queries),
        "tied": (plain[:50].repeat(24, 1), queries),
        "one huge key": (huge, queries),
        "some beyond the type": (big, queries),
        "far from the origin": (vectors(1, 16, seed=2) * 30 + 0.01 * plain, queries),
        "clusters": (centres + 0.1 * plain, queries),
        "zero keys": (torch.zeros_like(plain), queries),
        "a zero query": (plain, zeros),
        "tiny": (plain * 1e-30, queries),
        "huge": (plain * 1e15, queries * 1e10),
        "all negative": (-plain.abs(), queries.abs()),
    }


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_adversarial_keys(metric: str) -> None:
    cases = adversaries()
    held = Held(torch.stack([keys for keys, _ in cases.values()]), 1200, metric)
    left = held.check(torch.stack([queries for _, queries in cases.values()]), 6, Shape(4, 64, 4))
    whole = {name for name, count in zip(cases, left, strict=True) if count == 4}
    assert {"equal", "zero keys", "tiny", "huge"} <= whole
    assert whole.isdisjoint({"tied", "clusters", "a zero query", "all negative"})
    assert ("one huge key" in whole) == (metric == "l2")  # there its square is no number
    assert ("far from the origin" in whole) == (metric == "inner_product")  # there the margin is wider than the keys


def test_keys_as_attention_makes_them() -> None:
    """Unit keys that drift as a text goes on, share a mean and repeat their neighbours; queries from elsewhere."""
    drift = vectors(2, 1400, 32, seed=1).cumsum(1) / 40
    keys = 0.3 * vectors(2, 1400, 32) + drift + vectors(1, 1, 32, seed=2)
    keys[:, 100::7] = keys[:, 99:-1:7]
    held = Held(torch.nn.functional.normalize(keys, dim=-1), 1400)
    assert held.check(torch.nn.functional.normalize(vectors(2, 16, 32, seed=3) + 1, dim=-1), 32, Shape(4, 128, 16)) == [
        0,
        0,
    ]


def test_candidates_beyond_a_narrow_list() -> None:
    held = Held(vectors(1, 4000, 16), 4000, first_pass="int8")
    assert held.check(vectors(1, 3, 16, seed=1), 100, Shape(8, 512, 64)) == [0]


def test_keys_stored_as_bfloat16() -> None:
    Held(vectors(2, 1200, 24), 1200, storage="bfloat16").check(vectors(2, 3, 24, seed=1), 9, Shape(4, 128, 8))


def test_groups_of_memories_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_topk, "MAXIMA_BYTES", 1)
    Held(vectors(3, 600, 16), 600).check(vectors(3, 3, 16, seed=1), 5, Shape(2, 64, 8))


@pytest.mark.parametrize("first_pass", FIRST_PASSES)
def test_the_margin_holds_what_the_first_pass_does(first_pass: FirstPass) -> None:
    keys, queries = vectors(400, 64) * torch.logspace(-6, 6, 400)[:, None], vectors(50, 64, seed=1)
    images, scales, norms, errors = encode(keys, first_pass)
    asked, query_scales, query_norms, query_errors = encode(queries, first_pass)
    computed = asked.float() @ images.float().T
    if scales is not None and query_scales is not None:
        computed = computed * query_scales[:, None] * scales
    margin = query_norms[:, None] * (errors + margin_coefficient(64, 1, first_pass) * norms)
    margin = margin + query_errors[:, None] * norms
    off = (computed.double() - queries.double() @ keys.double().T).abs()
    assert (off <= margin).all()
    assert (off > margin / 100).any()  # and is no idle bound


def test_without_the_margin_recall_is_high_but_not_whole() -> None:
    keys, queries = vectors(1, 4096, 32), vectors(1, 16, 32, seed=1)
    true = (queries @ keys.mT).topk(16).indices
    found = {}
    for first_pass in ("float8", "float16"):
        held = Held(keys, 4096, first_pass=first_pass, guard=False)
        slots = held.search(queries, 16, [4096], Shape(8, 128, 16))[1]
        found[first_pass] = (slots[..., None] == true[..., None, :]).any(-1).float().mean()
    assert found["float16"] == 1
    assert 0.9 < found["float8"] <= 1


def test_one_key_of_each_block_has_the_recall_of_the_formula() -> None:
    keys, queries, rounds, k = vectors(2, 4096, 16), vectors(2, 24, 16, seed=1), 8, 32
    held = Held(keys, 4096)
    scores, slots = held.search(queries, k, [4096] * 2, Shape(rounds, 128, 1), open_blocks=False)
    true = (queries @ keys.mT).topk(k).values
    recall = float((scores >= true[..., -1:] - 1e-5).float().mean())
    assert abs(recall - expected_recall(4096 // rounds, k, 4096)) < 0.01
    torch.testing.assert_close(scores, torch.einsum("mqd,mqkd->mqk", queries, held.ring.gather(slots, torch.arange(2))))


@pytest.mark.parametrize("k", [1, 32, 100, 256])
@pytest.mark.parametrize("keys", [4096, 8192, 65536, 1 << 20])
def test_shapes_leave_room(keys: int, k: int) -> None:
    for first_pass in FIRST_PASSES:
        shape = shape_for(keys, k, first_pass)
        assert shape.singles >= k
        assert keys // shape.rounds <= triton_topk.MOST_BLOCKS
        assert keys // shape.rounds >= 2 * triton_topk.OVERSAMPLED * k
        assert shape.width <= 8192
    # Maxima of the largest search that is named in the documentation, over its scores.
    begin, end = triton_topk._groups(64, 512, keys, shape_for(keys, k))[0]
    assert (end - begin) * 2 / shape_for(keys, k).rounds / 64 < 0.02 or keys < 65536


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_a_backend_uses_it_where_it_can(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_memories": 2, "capacity": 900, "dim": 16, "metric": metric}
    plain = make_backend("exact", **settings)
    monkeypatch.setattr(triton_search, "usable", lambda device: True)
    monkeypatch.setattr(triton_search, "FEWEST_KEYS", 500)
    backend = make_backend("exact", **settings)
    assert plain.fused is None
    assert backend.stats().index_bytes == backend.fused.nbytes > 0
    served: list[list[int]] = []
    search = triton_search.triton_topk

    def noted(
        keys: Any, ring: Any, queries: Tensor, k: int, memories: list[int], lengths: list[int], **more: Any
    ) -> Any:
        served.append([*memories, *lengths])
        return search(keys, ring, queries, k, memories, lengths, **more)

    monkeypatch.setattr(triton_search, "triton_topk", noted)
    queries = vectors(2, 3, 16, seed=1)

    def agree() -> None:
        one, other = (memory.search(queries, 12) for memory in (backend, plain))
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        assert (one.slots == other.slots).float().mean() > 0.95

    for step in vectors(2, 1300, 16).split(400, dim=1):
        for memory in (backend, plain):
            memory.add(step)
        agree()
    assert served == [[0, 1, 800, 800], [0, 1, 900, 900], [0, 1, 900, 900]]  # not with fewer than FEWEST_KEYS
    for memory in (backend, plain):
        memory.reset([0])
        memory.add(vectors(1, 300, 16, seed=5), memories=[0])
    agree()
    assert served[3:] == [[1, 900]]  # the other memory is too short


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", ["exact", "approx-topk:first_pass=int8"])
def test_queries_that_are_not_finite_are_refused_after_the_search(
    spec: str, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_search, "usable", lambda device: True)
    monkeypatch.setattr(triton_search, "FEWEST_KEYS", 500)
    memory = make_backend(spec, num_memories=1, capacity=900, dim=16)
    memory.add(vectors(1, 900, 16))
    assert memory.checks_late
    queries = vectors(1, 8, 16, seed=1)
    queries[0, 3, 5] = number
    with pytest.raises(NotFinite, match=r"queries hold (nan|inf) at index \[0, 3, 5\]"):
        memory.search(queries, 8)


@pytest.mark.parametrize("source", ["exact", "approx-topk:recall_target=0.99"])
def test_a_source_reads_the_keys_that_it_shares(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_memories": 1, "capacity": 900, "dim": 16}
    plain = make_backend("exact", **settings)
    monkeypatch.setattr(triton_search, "usable", lambda device: True)
    monkeypatch.setattr(triton_search, "FEWEST_KEYS", 500)
    chain = make_backend(f"rerank:source='{source}',candidates=16", **settings)
    assert chain.source.fused is not None
    for memory in (plain, chain):
        memory.add(vectors(1, 1000, 16))
    queries = vectors(1, 8, 16, seed=1)
    one, other = (memory.search(queries, 8) for memory in (chain, plain))
    assert (one.scores >= other.scores[..., -1:] - 1e-5).float().mean() > 0.95


@pytest.mark.parametrize("first_pass", ["float16", "int8"])
def test_approximate_search_on_a_card_reaches_its_target(first_pass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_search, "usable", lambda device: True)
    settings = {"num_memories": 1, "capacity": 4200, "dim": 16}
    backend = make_backend(f"approx-topk:first_pass={first_pass},recall_target=0.9", **settings)
    keys, queries, k = vectors(1, 5000, 16), vectors(1, 48, 16, seed=1), 32
    backend.add(keys)
    shape = _fused_shape(4200, 4200, k, buckets_for(0.9, k, 4200))
    assert shape == Shape(4, 128, 1)
    result = backend.search(queries, k)
    true = (queries @ keys[:, -4200:].mT).topk(k).values
    recall = float((result.scores >= true[..., -1:] - 1e-5).float().mean())
    assert abs(recall - expected_recall(4200 // shape.rounds, k, 4200)) < 0.015
    assert recall > 0.9
    found = backend.gather_keys(result.slots)
    torch.testing.assert_close(result.scores, torch.einsum("mqd,mqkd->mqk", queries, found))
    assert _fused_shape(4096, 4096, k, 4096) is None
    assert _fused_shape(1 << 20, 1 << 20, k, 8000) == Shape(128, 128, 1)
