"""Training with an attached memory: gradients reach queries and gates, and nothing that is remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import tiny_model, tokens

from recollect.pretrained.attach import attach_memory


def loss_of(model: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The loss on `second` with `first` in memory."""
    model.recollect_memory.reset()
    with torch.no_grad():
        model(first)
    loss: torch.Tensor = model(second, labels=second).loss
    return loss


@pytest.mark.parametrize("backend", ["exact", "degraded:drop=0"])
def test_gradients_of_gates_and_queries_are_those_of_finite_differences(backend: str) -> None:
    model = tiny_model("llama").double()
    memory = attach_memory(model, layers=[1], gate="joint_bias", k=8, memory_size=8, backend=backend)
    memory.double()
    first, second = tokens(1, 8), tokens(1, 10, seed=1)
    with torch.no_grad():
        memory.gates["1"].bias.normal_()
    loss_of(model, first, second).backward()
    # The queries of the memory layer reach the loss through what is retrieved and through what is seen.
    for parameter in (memory.gates["1"].bias, model.model.layers[1].self_attn.q_proj.weight):
        gradient = parameter.grad.flatten()
        for place in (0, 1, 3):
            step = 1e-3
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[place] += sign * step
                    values.append(float(loss_of(model, first, second)))
                    parameter.view(-1)[place] -= sign * step
            expected = (values[0] - values[1]) / (2 * step)
            assert float(gradient[place]) == pytest.approx(expected, rel=2e-2, abs=2e-5)


def test_checkpointing_gives_the_same_gradients_and_remembers_once() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_model("qwen2")
        memory = attach_memory(model, layers=[0, 1], gate="head", k=4)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for part in tokens(2, 30).split(10, dim=1):
            model(part, labels=part).loss.backward()
        assert memory.lengths.tolist() == [20, 20]
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert found[0]["recollect_memory.gates.1.bias"].abs().max() > 0


def test_a_long_text_trains_in_one_call() -> None:
    model = tiny_model("gpt2")
    attach_memory(model, layers=[1], gate="head", k=4)
    text = tokens(1, 50)
    model(text, labels=text, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_that_is_remembered_keeps_a_graph() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, layers=[1], k=4)
    for part in tokens(1, 30).split(10, dim=1):
        model(part, labels=part).loss.backward()  # a graph kept in memory would be freed twice
    memory.flush()
    for layer in memory._reading.layers:
        assert layer.memory is not None
        assert not layer.memory.values.requires_grad
