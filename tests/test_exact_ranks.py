"""Memories over the ranks of a job: what lies where, and answers equal to those of `exact`, whatever the ranks do."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from rank_jobs import run
from torch import Tensor

from recollect.memory_backends import (
    InvalidSpec,
    MemoryBackend,
    SearchResult,
    canonical_spec,
    load_backend,
    make_backend,
)
from recollect.memory_backends.implementations.exact_ranks import ExactRanks
from recollect.memory_backends.rank_shards import Appended, step_bytes
from recollect.memory_backends.sharding import Share
from recollect.memory_backends.testing import vectors

M, D = 3, 8
HISTORIES = (
    # Options, shared or not, metric, capacity: what ranks do not divide, what is less than they are many, each storage.
    ("", False, "inner_product", 41),
    ("", False, "l2", 24),
    ("", False, "cosine", 30),
    ("", False, "inner_product", 2),
    (":storage=int8", False, "cosine", 29),
    (":storage=bfloat16", False, "inner_product", 32),
    (":keys_in=temporary,storage=int8", False, "inner_product", 31),
    ("", True, "cosine", 41),
    (":storage=int8", True, "inner_product", 2),
)


class TestWhereKeysLie:
    @given(capacity=st.integers(1, 40), ranks=st.integers(1, 7), number=st.integers(0, 130))
    def test_every_slot_lies_on_one_rank_and_every_part_is_a_ring(self, capacity: int, ranks: int, number: int) -> None:
        parts = [Share(capacity, ranks, rank) for rank in range(ranks)]
        assert sum(part.size for part in parts) == capacity
        for rank, part in enumerate(parts):
            mine = [n for n in range(number) if n % capacity % ranks == rank]
            assert part.count(number) == part.count(torch.tensor(number)) == len(mine)
            assert part.count(min(number, capacity)) == min(len(mine), part.size)
            # Where the part itself puts its i-th key is where the slot of the whole memory says.
            assert [i % part.size for i in range(len(mine))] == [n % capacity // ranks for n in mine]

    @given(
        counts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4),
        capacity=st.integers(1, 20),
        ranks=st.integers(1, 5),
    )
    def test_what_stays_of_an_append(self, counts: list[tuple[int, int]], capacity: int, ranks: int) -> None:
        before, new = torch.tensor(counts).T
        appended = Appended.between(before, before + new, capacity)
        expected = [
            (memory, number)
            for memory, (start, more) in enumerate(counts)
            for number in range(start, start + more)
            if number >= start + more - capacity
        ]
        assert list(zip(appended.memories.tolist(), appended.numbers.tolist(), strict=True)) == expected
        assert appended.ranks_of(capacity, ranks).tolist() == [n % capacity % ranks for _, n in expected]

    def test_bytes_of_a_step(self) -> None:
        one = step_bytes(memories=8, dim=64, queries=512, appended=512, k=32, ranks=1, part_length=65536)
        assert one.training == 0
        four = step_bytes(memories=8, dim=64, queries=512, appended=512, k=32, ranks=4, part_length=16384)
        assert four.queries == 3 * 8 * 512 * 64 * 4
        assert four.answers == 3 * 8 * 512 * 32 * 8
        assert four.appended == 3 * 8 * 512 * 64 * 4 // 4
        assert four.gathered == 3 * 8 * 512 * 32 * 64 * 4 // 4
        sizes = [
            step_bytes(memories=8, dim=64, queries=512, appended=512, k=32, ranks=w, part_length=9).training
            for w in range(1, 9)
        ]
        assert all(less < more for less, more in pairwise(sizes))


@pytest.mark.parametrize("value", ["-1", "soon", "inf"])
def test_a_deadline_is_a_number_of_seconds(value: str) -> None:
    with pytest.raises(InvalidSpec, match=value):
        canonical_spec(f"exact-ranks:deadline_seconds={value}")


def test_in_one_process_it_is_exact() -> None:
    alone = make_backend("exact-ranks", num_memories=M, capacity=50, dim=D)
    exact = make_backend("exact", num_memories=M, capacity=50, dim=D)
    assert isinstance(alone, ExactRanks)
    assert alone.ranks is None
    keys, queries = vectors(M, 70, D), vectors(M, 9, D, seed=1)
    assert torch.equal(alone.add(keys), exact.add(keys))
    mine, other = alone.search(queries, 7), exact.search(queries, 7)
    assert torch.equal(mine.slots, other.slots)
    assert torch.equal(mine.scores, other.scores)
    assert alone.stats() == exact.stats()
    assert alone.traffic.calls == alone.traffic.sent == 0


# On several ranks -----------------------------------------------------------------------------------------------------


def grid(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Keys of few values, so that sums are exact in float32 and ties are the rule."""
    return (2 * torch.randn(*shape, generator=generator)).round() / 2


def check_same(
    found: SearchResult, memory: MemoryBackend, exact: MemoryBackend, queries: Tensor, k: int, which: Any
) -> None:
    """Holds an answer to be one that `exact` could give: equal scores, and slots whose keys have them."""
    true = exact.search(queries, k, memories=which)
    torch.testing.assert_close(found.scores, true.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.slots < 0, true.slots < 0)
    for row, true_row in zip(found.slots.flatten(0, 1).tolist(), true.slots.flatten(0, 1).tolist(), strict=True):
        real = [slot for slot in row if slot >= 0]
        assert len(set(real)) == len(real) == len([slot for slot in true_row if slot >= 0])
    keys = memory.gather_keys(found.slots, memories=which)
    torch.testing.assert_close(keys, exact.gather_keys(found.slots, memories=which))
    # As `exact` scores those very keys.
    if exact.metric == "l2":
        scores = -(keys - queries[:, :, None]).square().sum(-1)
    else:
        scores = torch.einsum("mqkd,mqd->mqk", keys, queries)
        if exact.metric == "cosine":
            lengths = keys.norm(dim=-1) * queries.norm(dim=-1)[..., None]
            scores = scores / lengths.clamp(min=1e-30)
    if exact.key_options.storage == "float32":
        there = found.slots >= 0
        torch.testing.assert_close(found.scores[there], scores[there], rtol=1e-4, atol=1e-4)


def random_histories(rank: int, size: int, seed: int, steps: int, every: int) -> int:
    """Every rank does the same calls with contents of its own; which memories, and which are reset, are its own too."""
    common, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 * seed + rank)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=common))

    searches = 0
    for options, shared, metric, capacity in HISTORIES[::every]:
        sizes: dict[str, Any] = {"num_memories": M, "capacity": capacity, "dim": D, "metric": metric}
        exact = make_backend(f"exact{options}", **sizes)
        if shared:
            options = f"{options},shared=true" if options else ":shared=true"
        memory = make_backend(f"exact-ranks{options}", **sizes)
        assert isinstance(memory, ExactRanks)
        assert memory.ranks is not None
        assert memory.ranks.size == size
        # Shared memories are given the same keys by every rank, and asked by each what it likes.
        giving = common if shared else own
        for _ in range(steps):
            number = pick(1, M + 1)
            which = torch.randperm(M, generator=giving)[:number].tolist()
            if pick(0, 4) == 0:
                which = None
                number = M
            if pick(0, 2):
                keys = grid((number, pick(0, capacity + 9), D), giving)
                assert torch.equal(memory.add(keys, memories=which), exact.add(keys, memories=which))
            if float(torch.rand(1, generator=giving)) < 0.2:
                gone = torch.randperm(M, generator=giving)[: 1 + searches % M].tolist()
                memory.reset(gone)
                exact.reset(gone)
            queries, k = grid((number, pick(0, 6), D), own), pick(1, capacity + 5)
            check_same(memory.search(queries, k, memories=which), memory, exact, queries, k, which)
            searches += 1
            assert torch.equal(memory.lengths, exact.lengths)
            assert memory.stats().keys == exact.stats().keys
        memory.close()
    return searches


@pytest.mark.parametrize(("size", "every"), [(2, 1), (3, 2)])
def test_random_histories_answer_as_exact(size: int, every: int) -> None:
    assert run(size, random_histories, size, 5, every) == [5 * len(HISTORIES[::every])] * size


def large_and_moved(rank: int, size: int) -> dict[str, Any]:
    """Sizes at which the fused search of a CPU runs; and the bytes that moved beside those on paper."""
    keys_each, queries_each, capacity, dim, k = 512, 128, 6144, 32, 16
    sizes: dict[str, Any] = {"num_memories": 2, "capacity": capacity, "dim": dim}
    memory, exact = make_backend("exact-ranks", **sizes), make_backend("exact", **sizes)
    assert isinstance(memory, ExactRanks)
    for step in range(4):
        keys = vectors(2, 4 * keys_each, dim, seed=100 * rank + step)
        assert torch.equal(memory.add(keys), exact.add(keys))
    queries = vectors(2, queries_each, dim, seed=rank + 7)
    true, before = exact.search(queries, k), memory.traffic
    found = memory.search(queries, k)
    after = memory.traffic
    torch.testing.assert_close(found.scores, true.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.slots, true.slots)
    memory.add(vectors(2, keys_each, dim, seed=rank + 50))
    appended = memory.traffic.sent - after.sent
    gathered = memory.gather_keys(found.slots)
    on_paper = step_bytes(
        memories=2, dim=dim, queries=queries_each, appended=keys_each, k=k, ranks=size, part_length=capacity // size
    )
    assert after.sent - before.sent == after.received - before.received == on_paper.queries + on_paper.answers
    assert abs(appended - on_paper.appended) <= 2 * size * dim * 4, (appended, on_paper)
    assert gathered.shape == (*found.slots.shape, dim)
    assert memory.traffic.sent - after.sent - appended <= 1.5 * (on_paper.requests + on_paper.gathered)
    common = make_backend("exact-ranks:shared=true", **sizes)
    common.add(vectors(2, capacity, dim))
    whole = 2 * capacity * dim * 4
    return {"bytes": memory.stats().key_bytes, "shared": common.stats().key_bytes, "whole": whole}


def test_large_memories_and_the_bytes_they_move() -> None:
    size = 2
    found = run(size, large_and_moved)
    for one in found:
        assert one["bytes"] == one["whole"], "of the memories of all ranks each holds as many keys as its own have"
        assert one["shared"] == one["whole"] / size


def saved(rank: int, size: int, folder: Path, metric: str) -> tuple[SearchResult, SearchResult]:
    memory = make_backend("exact-ranks", num_memories=M, capacity=20, dim=D, metric=metric)
    for step, count in enumerate((7, 18, 4)):
        memory.add(vectors(M, count, D, seed=10 * rank + step))
    if rank == 0:
        memory.reset([1])
    memory.save(folder / f"{metric}{rank}")
    found = memory.search(vectors(M, 5, D, seed=3), 6)
    memory.add(vectors(M, 9, D, seed=40))
    later = memory.search(vectors(M, 5, D, seed=3), 6)
    return found, later


def loaded(rank: int, size: int, folder: Path, metric: str) -> tuple[SearchResult, SearchResult]:
    memory = load_backend(folder / f"{metric}{rank}")
    assert memory.spec == "exact-ranks"
    found = memory.search(vectors(M, 5, D, seed=3), 6)
    memory.add(vectors(M, 9, D, seed=40))
    return found, memory.search(vectors(M, 5, D, seed=3), 6)


@pytest.mark.parametrize("metric", ["inner_product", "cosine"])
def test_what_ranks_save_is_loaded_by_as_many_fewer_or_one(metric: str, tmp_path: Path) -> None:
    written = run(3, saved, tmp_path, metric)
    again = [*run(2, loaded, tmp_path, metric), loaded(2, 1, tmp_path, metric)]
    for one, other in zip(written, again, strict=True):
        for before, after in zip(one, other, strict=True):
            assert torch.equal(before.slots, after.slots)
            torch.testing.assert_close(before.scores, after.scores, rtol=1e-5, atol=1e-5)


def training_steps(rank: int, size: int) -> dict[str, list[float]]:
    """Losses and gradients of a model whose memory is spread, and of one with its own: documents begin as they like."""
    from tiny import tiny_model

    losses: dict[str, list[float]] = {}
    for backend in ("exact", "exact-ranks"):
        model = tiny_model().train()
        state = model.initial_state(2, backend=backend, memory_size=40)
        tokens = torch.randint(0, 64, (2, 16 * 5 + 1), generator=torch.Generator().manual_seed(rank))
        losses[backend] = []
        for step in range(5):
            segment = tokens[:, 16 * step : 16 * step + 17]
            starts = torch.tensor([step == 0, step == 2 + rank])
            output = model(segment[:, :-1], state, starts)
            state = output.state
            loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), segment[:, 1:].flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            losses[backend] += [float(loss.detach()), float(norm)]
            model.zero_grad()
    return losses


def test_a_model_trains_as_with_exact() -> None:
    for losses in run(2, training_steps):
        assert losses["exact-ranks"] == pytest.approx(losses["exact"], rel=1e-5)
