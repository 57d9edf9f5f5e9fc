"""Exact search over a ring's slots: any run of slots, and keys that are decoded a chunk at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from recollect.memory_backends import ring_search
from recollect.memory_backends.block_topk import select_top
from recollect.memory_backends.implementations.approx_topk import select_by_buckets
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.options import KeyStorage
from recollect.memory_backends.ring_search import search_ring


def filled(keys: Tensor, storage: KeyStorage = "float32") -> KeyRing:
    ring = KeyRing(keys.shape[0], keys.shape[1], keys.shape[2], device=torch.device("cpu"), storage=storage)
    ring.append(keys, torch.arange(len(keys)))
    return ring


def truth(queries: Tensor, keys: Tensor, metric: str) -> Tensor:
    queries, keys = queries.double(), keys.double()
    return -torch.cdist(queries, keys).square() if metric == "l2" else queries @ keys.transpose(-1, -2)


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("first", [0, 37])
def test_a_run_of_slots(monkeypatch: pytest.MonkeyPatch, metric: str, stored: bool, first: int) -> None:
    monkeypatch.setattr(ring_search, "DECODED_FLOATS", 1024 * 6)
    keys, queries = torch.randn(3, 2500, 6).bfloat16().float(), torch.randn(2, 19, 6)
    ring = filled(keys, "bfloat16" if stored else "float32")
    which, lengths = torch.tensor([2, 0]), [2400, 5]
    scores, slots = search_ring(ring, queries, 9, which, lengths, metric, first=first)
    for row, memory in enumerate(which.tolist()):
        found = min(9, lengths[row])
        exact = truth(queries[row], keys[memory, first : first + lengths[row]], metric)
        torch.testing.assert_close(scores[row, :, :found].double(), exact.topk(found).values, rtol=1e-4, atol=1e-4)
        got = exact.gather(1, slots[row, :, :found] - first)
        torch.testing.assert_close(got, exact.topk(found).values, rtol=1e-4, atol=1e-4)
        assert (slots[row, :, found:] == -1).all()
        assert (scores[row, :, found:] == -torch.inf).all()


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("buckets", [None, 512])
def test_a_choice_among_all_scores_of_stored_keys(
    monkeypatch: pytest.MonkeyPatch, metric: str, buckets: int | None
) -> None:
    monkeypatch.setattr(ring_search, "DECODED_FLOATS", 1024 * 6)
    keys, queries = torch.randn(2, 2500, 6).bfloat16().float(), torch.randn(2, 19, 6)
    select = select_top if buckets is None else partial(select_by_buckets, buckets=buckets)
    asked = (queries, 9, [0, 1], [2500, 0], metric)
    scores, slots = search_ring(filled(keys, "bfloat16"), *asked, select=select)
    expected, places = search_ring(filled(keys), *asked, select=select)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert (slots == places).float().mean() > 0.99


def test_nothing_asked_or_nothing_there() -> None:
    ring = filled(torch.randn(1, 10, 6), "bfloat16")
    scores, slots = search_ring(ring, torch.randn(1, 0, 6), 3, [0], [10], "inner_product")
    assert scores.shape == slots.shape == (1, 0, 3)
    scores, slots = search_ring(ring, torch.randn(1, 2, 6), 3, [0], [0], "inner_product")
    assert (slots == -1).all()
