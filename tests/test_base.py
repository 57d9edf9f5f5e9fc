"""What the base class does for every backend: checks and metrics. Saving is in test_storage.py."""

from __future__ import annotations

import pytest
import torch

from recollect.memory_backends import InvalidInput, make_backend


def filled(**changes: object):  # type: ignore[no-untyped-def]
    backend = make_backend("exact", **{"num_memories": 3, "capacity": 8, "dim": 4, **changes})  # type: ignore[arg-type]
    backend.add(torch.randn(3, 11, 4))
    return backend


def test_cosine_gathers_the_keys_as_they_were_added() -> None:
    backend = make_backend("exact", num_memories=1, capacity=8, dim=4, metric="cosine")
    keys = torch.randn(1, 6, 4) * 7
    backend.add(keys)
    result = backend.search(keys[:, 2:3] * 3, 1)
    torch.testing.assert_close(result.scores, torch.ones(1, 1, 1))
    torch.testing.assert_close(backend.gather_keys(result.slots)[0, 0], keys[0, 2:3])


def test_zero_vectors_are_fine_under_cosine() -> None:
    backend = make_backend("exact", num_memories=1, capacity=8, dim=4, metric="cosine")
    backend.add(torch.zeros(1, 3, 4))
    assert torch.isfinite(backend.search(torch.zeros(1, 2, 4), 3).scores).all()


def test_l2_scores_are_minus_squared_distances() -> None:
    backend = make_backend("exact", num_memories=1, capacity=8, dim=4, metric="l2")
    keys, query = torch.randn(1, 6, 4), torch.randn(1, 1, 4)
    backend.add(keys)
    result = backend.search(query, 6)
    torch.testing.assert_close(result.scores[0, 0], -(keys[0] - query[0]).square().sum(-1)[result.slots[0, 0]])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (torch.zeros(2, 1, 4), r"shape \(2, 1, 4\); expected \(memories=3"),
        (torch.zeros(3, 1, 5), "dim=4"),
        (torch.zeros(3, 4), "shape"),
        (torch.zeros(3, 1, 4, dtype=torch.int64), "floating"),
        (torch.full((3, 1, 4), torch.nan), r"nan at index \[0, 0, 0\]"),
        (torch.tensor([0.0, torch.inf, 0.0, 0.0]).expand(3, 1, 4), r"inf at index \[0, 0, 1\]"),
        ("keys", "torch tensor"),
    ],
)
def test_bad_keys_are_refused_and_nothing_is_lost(keys: torch.Tensor, says: str) -> None:
    backend = filled()
    before = backend.ring.keys.clone(), backend.lengths
    with pytest.raises(InvalidInput, match=says):
        backend.add(keys)
    with pytest.raises(InvalidInput, match=says):
        backend.search(keys, 1)
    assert torch.equal(backend.ring.keys, before[0])
    assert torch.equal(backend.lengths, before[1])


def test_large_finite_keys_are_not_mistaken_for_infinity() -> None:
    backend = filled()
    backend.add(torch.full((3, 4, 4), 3e38))


@pytest.mark.parametrize("memories", [[0, 0, 1], [3], [-1], [0.5], [[0, 1]]])
def test_bad_memories_are_refused(memories: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidInput, match="memories"):
        filled().search(torch.zeros(len(memories), 1, 4), 1, memories=memories)


def test_gather_refuses_slots_that_hold_no_key() -> None:
    backend = make_backend("exact", num_memories=1, capacity=8, dim=4)
    backend.add(torch.randn(1, 2, 4))
    with pytest.raises(InvalidInput, match="outside"):
        backend.gather_keys(torch.tensor([[[2]]]))
    assert torch.equal(backend.gather_keys(torch.tensor([[[-1]]])), torch.zeros(1, 1, 1, 4))
