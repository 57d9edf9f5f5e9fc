"""The written-out gradients against autograd of the composed operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from recollect.model.closed_form import RootMeanSquareNorm, normalise, squared_relu
from recollect.model.configuration import ModelConfig
from recollect.model.streams import Segment
from recollect.model.training import training_loss
from recollect.model.transformer import MemorizingTransformer

PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "squared_relu": (squared_relu, lambda x: functional.relu(x) * functional.relu(x)),
    "normalise": (normalise, lambda x: functional.normalize(x.double(), dim=-1)),
}


def _numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def _norms(width: int) -> tuple[RootMeanSquareNorm, nn.RMSNorm]:
    ours, theirs = RootMeanSquareNorm(width, eps=1e-6).double(), nn.RMSNorm(width, eps=1e-6).double()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(0.5, -2.0, width))
    return ours, theirs


@pytest.mark.parametrize("name", PAIRS)
def test_one_tensor_operations(name: str) -> None:
    ours, plain = PAIRS[name]
    inputs = _numbers(3, 4, 5)
    direction = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(inputs), plain(inputs))
    (expected,) = torch.autograd.grad(plain(inputs), inputs, direction)
    (found,) = torch.autograd.grad(ours(inputs), inputs, direction)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("name", PAIRS)
def test_rows_of_zeros(name: str) -> None:
    ours, plain = PAIRS[name]
    inputs = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(inputs).sum(), inputs)
    (found,) = torch.autograd.grad(ours(inputs).sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_norm_and_its_weight() -> None:
    ours, plain = _norms(5)
    inputs, direction = _numbers(3, 4, 5), torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(inputs), plain(inputs))
    expected = torch.autograd.grad(plain(inputs), (inputs, plain.weight), direction)
    found = torch.autograd.grad(ours(inputs), (inputs, ours.weight), direction)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda x, _: ours(x), (inputs, ours.weight))


def test_norm_with_frozen_weights_or_inputs() -> None:
    ours, plain = _norms(5)
    inputs = _numbers(2, 5)
    torch.testing.assert_close(
        torch.autograd.grad(ours(inputs.detach()).sum(), ours.weight),
        torch.autograd.grad(plain(inputs.detach()).sum(), plain.weight),
    )
    for norm in (ours, plain):
        norm.requires_grad_(False)
    torch.testing.assert_close(
        torch.autograd.grad(ours(inputs).sum(), inputs), torch.autograd.grad(plain(inputs).sum(), inputs)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_are_those_of_the_composed_operations(dtype: torch.dtype) -> None:
    inputs = _numbers(4, 6, dtype=dtype)
    assert squared_relu(inputs).dtype == dtype
    assert normalise(inputs).dtype == torch.float32
    for output in (squared_relu(inputs).float(), normalise(inputs)):
        (gradient,) = torch.autograd.grad(output.sum(), inputs)
        assert gradient.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = inputs.detach().float().requires_grad_()
        assert RootMeanSquareNorm(6)(wide).dtype == nn.RMSNorm(6)(wide).dtype


def test_layout_is_kept() -> None:
    permuted = _numbers(4, 3, 2, 5).permute(2, 0, 1, 3)
    for operation in (squared_relu, normalise):
        assert operation(permuted).stride() == permuted.stride()
        expected = torch.autograd.grad(operation(permuted.contiguous()).sum(), permuted, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(operation(permuted).sum(), permuted), expected)


@pytest.mark.parametrize("operation", [squared_relu, normalise])
def test_two_uses_and_two_passes(operation: Callable[[Tensor], Tensor]) -> None:
    inputs = _numbers(3, 4)
    output = operation(inputs)
    (once,) = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    (both,) = torch.autograd.grad(output.sum() + 2 * output.sum() + operation(inputs).sum(), inputs, retain_graph=True)
    torch.testing.assert_close(both, 4 * once)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), inputs), (once,))


def test_without_gradient_nothing_changes() -> None:
    inputs = _numbers(5, 8, dtype=torch.float32)
    norm = RootMeanSquareNorm(8, eps=1e-6)
    with torch.no_grad():
        assert torch.equal(normalise(inputs), functional.normalize(inputs, dim=-1))
        assert torch.equal(norm(inputs), functional.rms_norm(inputs, (8,), norm.weight, 1e-6))
        positive = functional.relu(inputs)
        assert torch.equal(squared_relu(inputs), positive * positive)


def test_a_whole_step_has_the_gradients_of_the_composed_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.preset("tiny", vocabulary_size=64)
    torch.manual_seed(0)
    model = MemorizingTransformer(config)
    tokens = torch.randint(0, 64, (2, 2, config.segment_length + 1))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        state = model.initial_state(2)
        zeros = torch.zeros(2, dtype=torch.int64)
        for part in tokens:
            segment = Segment(part[:, :-1], part[:, 1:], zeros.bool(), zeros, zeros + 1, zeros + config.segment_length)
            loss, state = training_loss(model, state, segment)
            loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    found = gradients()
    monkeypatch.setattr("recollect.model.closed_form._writes_out", lambda *_: False)
    for one, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
