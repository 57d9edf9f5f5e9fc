"""Values in bfloat16 or in a file: what attention reads of them, and that a model hardly notices."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from recollect.memory_backends import InvalidSpec, make_backend
from recollect.model.evaluation import replay
from recollect.model.memory_layer import LayerMemory
from recollect.model.trunk import compute_trunk
from recollect.model.value_store import ValueStore

B, H, D = 2, 3, 4
STORES = ["float32:in=temporary", "bfloat16", "bfloat16:in=temporary"]


def memory_of(values: str, **changes: object) -> LayerMemory:
    backend = make_backend("exact", num_memories=B * H, capacity=8, dim=D)
    return LayerMemory(backend, heads=H, k=3, values=values, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", STORES)
@pytest.mark.parametrize("eviction", ["fifo", "most_used"])
def test_attention_reads_what_is_stored(values: str, eviction: str) -> None:
    plain, stored = memory_of("float32", eviction=eviction), memory_of(values, eviction=eviction)
    scale = torch.ones(H)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        keys, vectors, queries = (torch.randn(B, H, 5, D, generator=generator) for _ in range(3))
        # Numbers that bfloat16 holds: both then answer alike, whatever was overwritten and carried along.
        vectors = vectors.bfloat16().float()
        for memory in (plain, stored):
            memory.attend(queries, scale)
            memory.append(keys, vectors)
        asked = torch.randn(B, H, 6, D, generator=generator)
        torch.testing.assert_close(stored.attend(asked, scale).remembered, plain.attend(asked, scale).remembered)
    one, other = asked.clone().requires_grad_(), asked.clone().requires_grad_()
    plain.attend(one, scale).remembered.sum().backward()
    stored.attend(other, scale).remembered.sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("values", STORES)
def test_perplexity_hardly_moves(values: str) -> None:
    model = tiny.tiny_model()
    trunk = compute_trunk(model, tiny.tiny_text())
    sizes = {"memory_size": 64, "k": 8}
    plain = replay(model, trunk, **sizes)  # type: ignore[arg-type]
    stored = replay(model, trunk, values=values, **sizes)  # type: ignore[arg-type]
    nothing = replay(model, trunk, backend="none")
    assert stored.perplexity == pytest.approx(plain.perplexity, rel=1e-3)
    assert abs(stored.perplexity - plain.perplexity) < 0.05 * abs(nothing.perplexity - plain.perplexity)


def test_bytes_are_those_of_main_memory() -> None:
    found = {}
    for values in ("float32", *STORES):
        memory = memory_of(values)
        memory.append(torch.randn(B, H, 8, D), torch.randn(B, H, 8, D))
        found[values] = memory.nbytes
    keys = B * H * 8 * D * 4
    assert found == {"float32": 2 * keys, "bfloat16": keys + keys // 2} | {
        name: keys for name in STORES if "in=" in name
    }


def test_a_file_lies_where_it_was_asked_for_and_has_no_name(tmp_path: Path) -> None:
    store = ValueStore(f"bfloat16:in={tmp_path / 'scratch'}", (2, 10, 4), torch.device("cpu"))
    store.write(torch.tensor([3, 12]), torch.ones(2, 4))
    assert store.read(torch.tensor([[3, 4], [12, 13]]))[..., 0].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("values", ["int8", "bfloat16:where=here", "", "float64"])
def test_a_store_that_does_not_exist_is_refused(values: str) -> None:
    with pytest.raises(InvalidSpec):
        tiny.tiny_model().initial_state(1, memory_size=8, values=values)
