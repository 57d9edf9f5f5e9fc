"""LayerMemory: attention over retrieved pairs against a dense reference; rows, wraparound, missing neighbours."""

from __future__ import annotations

import pytest
import torch

from recollect.memory_backends.registry import make_backend
from recollect.model.memory_layer import LayerMemory

B, H, D, K = 2, 3, 8, 4
SCALE = torch.tensor([1.0, 2.0, 5.0])


def make_memory(capacity: int = 16, k: int = K, spec: str = "exact") -> LayerMemory:
    backend = make_backend(spec, num_memories=B * H, capacity=capacity, dim=D)
    return LayerMemory(backend, heads=H, k=k)


def dense(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, k: int) -> torch.Tensor:
    """Attention over all keys (B, H, N, D) with all but the k best logits of each query masked."""
    logits = queries @ keys.transpose(2, 3) * scale[:, None, None]
    best = logits.topk(min(k, keys.shape[2]), dim=-1).values[..., -1:]
    return torch.softmax(logits.masked_fill(logits < best, -torch.inf), dim=-1) @ values


@pytest.mark.parametrize("tokens", [2, 10, 16])
def test_values_and_gradients_equal_dense_attention(tokens: int) -> None:
    memory = make_memory()
    keys, values = torch.randn(B, H, tokens, D), torch.randn(B, H, tokens, D)
    memory.append(keys, values)
    queries = torch.randn(B, H, 5, D).requires_grad_()
    scale = SCALE.clone().requires_grad_()
    retrieved = memory.attend(queries, scale)
    remembered, found = retrieved.remembered, retrieved.found
    memory.append(torch.randn(B, H, 6, D), torch.randn(B, H, 6, D))  # overwrites slots before the gradient is taken
    weights = torch.randn_like(remembered)
    (remembered * weights).sum().backward()
    other, other_scale = queries.detach().clone().requires_grad_(), SCALE.clone().requires_grad_()
    expected = dense(other, keys, values, other_scale, K)
    (expected * weights).sum().backward()
    assert bool(found.all())
    torch.testing.assert_close(remembered, expected)
    torch.testing.assert_close(queries.grad, other.grad)
    torch.testing.assert_close(scale.grad, other_scale.grad)
    with torch.no_grad():
        torch.testing.assert_close(make_filled(keys, values).attend(queries, scale).remembered, expected)


def make_filled(keys: torch.Tensor, values: torch.Tensor, spec: str = "exact") -> LayerMemory:
    memory = make_memory(spec=spec)
    memory.append(keys, values)
    return memory


def test_no_gradient_flows_into_the_memory() -> None:
    keys, values = torch.randn(B, H, 6, D).requires_grad_(), torch.randn(B, H, 6, D).requires_grad_()
    memory = make_filled(keys, values)
    queries = torch.randn(B, H, 3, D).requires_grad_()
    memory.attend(queries, SCALE).remembered.sum().backward()
    assert keys.grad is None
    assert values.grad is None
    assert queries.grad is not None


def test_an_empty_memory_finds_nothing() -> None:
    queries = torch.randn(B, H, 3, D).requires_grad_()
    retrieved = make_memory().attend(queries, SCALE)
    remembered, found = retrieved.remembered, retrieved.found
    assert not bool(found.any())
    assert not bool(remembered.any())
    remembered.sum().backward()
    assert not bool(queries.grad.any())


def test_missing_neighbours_never_read_slot_zero() -> None:
    keys, values = torch.randn(B, H, 2, D), torch.randn(B, H, 2, D)
    memory = make_filled(keys, values)
    queries = torch.randn(B, H, 3, D)
    retrieved = memory.attend(queries, SCALE)
    remembered, found = retrieved.remembered, retrieved.found
    torch.testing.assert_close(remembered, dense(queries, keys, values, SCALE, K))
    assert bool(found.all())
    memory.reset_rows(torch.tensor([True, False]))
    memory.values.fill_(1e6)  # what an emptied slot still holds must not be read
    retrieved = memory.attend(queries, SCALE)
    remembered, found = retrieved.remembered, retrieved.found
    assert not bool(remembered[0].any())
    assert not bool(found[0].any())
    assert bool(found[1].all())


def test_values_follow_their_keys_around_the_ring_and_through_long_appends() -> None:
    memory = make_memory(capacity=5)
    keys = torch.nn.functional.normalize(torch.randn(B, H, 19, D), dim=-1)
    values = torch.randn(B, H, 19, D)
    for begin, end in ((0, 3), (3, 7), (7, 8), (8, 19)):  # the last append alone exceeds the capacity
        memory.append(keys[:, :, begin:end], values[:, :, begin:end])
        newest = slice(max(0, end - 5), end)
        queries = keys[:, :, newest]
        remembered = memory.attend(queries, torch.full((H,), 3.0)).remembered
        expected = dense(queries, keys[:, :, newest], values[:, :, newest], torch.full((H,), 3.0), K)
        torch.testing.assert_close(remembered, expected)


def test_resetting_a_row_leaves_the_others_alone() -> None:
    keys, values = torch.randn(B, H, 6, D), torch.randn(B, H, 6, D)
    memory, queries = make_filled(keys, values), torch.randn(B, H, 3, D)
    before = memory.attend(queries, SCALE).remembered
    memory.reset_rows(torch.tensor([False, True]))
    after = memory.attend(queries, SCALE).remembered
    assert torch.equal(after[0], before[0])
    assert not bool(after[1].any())
    memory.append(keys[:, :, :2] + 1.0, values[:, :, :2] - 1.0)
    fresh = memory.attend(queries, SCALE).remembered
    torch.testing.assert_close(fresh[1], dense(queries, keys[:, :, :2] + 1.0, values[:, :, :2] - 1.0, SCALE, K)[1])


@pytest.mark.parametrize("spec", ["degraded:drop=0.5", "faiss-flat", "hnswlib"])
def test_any_backend_serves(spec: str) -> None:
    keys, values = torch.randn(B, H, 16, D), torch.randn(B, H, 16, D)
    try:
        memory = make_filled(keys, values, spec)
    except ImportError as error:
        pytest.skip(str(error))
    retrieved = memory.attend(torch.randn(B, H, 5, D), SCALE)
    remembered, found = retrieved.remembered, retrieved.found
    assert remembered.shape == (B, H, 5, D)
    assert bool(torch.isfinite(remembered).all())
    assert bool(found.any())


def test_a_backend_of_the_wrong_shape_is_refused() -> None:
    backend = make_backend("exact", num_memories=5, capacity=4, dim=D)
    with pytest.raises(ValueError, match="5 memories cannot serve 3 heads"):
        LayerMemory(backend, heads=3, k=2)
    with pytest.raises(ValueError, match="k=0"):
        LayerMemory(backend, heads=5, k=0)
