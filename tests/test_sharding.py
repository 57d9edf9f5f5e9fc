"""Which slots belong to which shard, against the same counted one by one, and the merging of answers."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from recollect.memory_backends.sharding import alike, merge, shares


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 100))
def test_shares_are_even_and_in_order(capacity: int, shards: int, total: int) -> None:
    parts = shares(capacity, shards)
    assert sum(part.size for part in parts) == capacity
    assert max(part.size for part in parts) - min(part.size for part in parts) <= 1
    slots = torch.arange(total) % capacity
    for part in parts:
        mine = part.mine(slots)
        assert part.count(total) == len(mine)
        assert part.count(torch.tensor([total, 0])).tolist() == [len(mine), 0]
        # Each shard's own ring turns over with the memory's.
        local = torch.arange(len(mine)) % part.size
        assert torch.equal(part.to_slots(local), slots[mine])
    counts = [min(part.count(total), part.size) for part in parts]
    assert sum(counts) == min(total, capacity)
    assert max(counts) - min(counts) <= 1


def test_a_missing_neighbour_stays_one() -> None:
    assert shares(10, 3)[2].to_slots(torch.tensor([-1, 0, 2], dtype=torch.int32)).tolist() == [-1, 2, 8]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=24), st.integers(1, 30), st.sampled_from([10, 2**40]))
def test_merging_takes_the_best_and_of_equal_ones_the_lower_slot(values: list[int], k: int, first: int) -> None:
    scores = torch.tensor(values, dtype=torch.float32)[None, None]
    slots = torch.randperm(len(values), generator=torch.Generator().manual_seed(k)) + first
    parts = max(1, len(values) // 2)
    best, where = merge(
        [scores[..., :parts], scores[..., parts:]], [slots[None, None, :parts], slots[None, None, parts:]], k
    )
    order = sorted(zip(values, slots.tolist(), strict=True), key=lambda one: (-one[0], one[1]))[:k]
    missing = k - len(order)
    assert best[0, 0].tolist() == [*(float(value) for value, _ in order), *[-float("inf")] * missing]
    if first < 2**32:
        assert where[0, 0].tolist() == [*(slot for _, slot in order), *[-1] * missing]
    else:  # beyond 2 ** 32 slots ties fall as they may
        assert set(where[0, 0].tolist()) <= {*slots.tolist(), -1}


def test_merging_keeps_what_is_missing_last() -> None:
    nothing = (torch.full((1, 2, 3), -torch.inf), torch.full((1, 2, 3), -1))
    some = (torch.tensor([[[2.0, 1.0], [-0.0, -5.0]]]), torch.tensor([[[4, 0], [2, 6]]]))
    scores, slots = merge([nothing[0], some[0]], [nothing[1], some[1]], 4)
    inf = float("inf")
    assert scores.tolist() == [[[2.0, 1.0, -inf, -inf], [0.0, -5.0, -inf, -inf]]]
    assert slots.tolist() == [[[4, 0, -1, -1], [2, 6, -1, -1]]]


@pytest.mark.parametrize(("first", "wanted"), [([3, 3, 3], [[0, 1, 2]]), ([5, 1, 5], [[1], [0, 2]])])
def test_rows_that_begin_alike(first: list[int], wanted: list[list[int]]) -> None:
    assert [rows.tolist() for rows in alike(torch.tensor(first))] == wanted
