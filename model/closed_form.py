"""Operations of the training step with their gradients written out, where autograd's own pass over memory more often.

Each function gives the values and the gradients of the composed operations, to rounding. The written-out form runs on
a CPU, where such operations are bound by memory, and where a gradient is wanted; everything else, inference above all,
runs the composed operations as they are. A gradient of a gradient is refused.

The cross-entropy is not here: written out, it saved less than a hundredth of a step.

Letter: D last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SHORTEST = 1e-12  # length below which `functional.normalize` no longer divides by the length


def squared_relu(inputs: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, So et al. 2021), any shape."""
    if _writes_out(inputs):
        return _SquaredRelu.apply(inputs)
    positive = functional.relu(inputs)
    return positive * positive


def normalise(inputs: Tensor) -> Tensor:
    """`inputs` (..., D) in float32, or float64, each row divided by its length."""
    if inputs.dtype != torch.float64:
        inputs = inputs.float()
    if _writes_out(inputs):
        return _Normalise.apply(inputs)
    return functional.normalize(inputs, dim=-1)


class RootMeanSquareNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` (Zhang and Sennrich 2019) over the last dimension, with weights: y = w x / rms(x)."""

    def forward(self, x: Tensor) -> Tensor:
        if _writes_out(x, self.weight) and x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            return _RootMeanSquareNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


def _writes_out(*inputs: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and inputs[0].device.type == "cpu"
        and any(tensor.requires_grad for tensor in inputs)
        and not torch.compiler.is_compiling()
    )


class _SquaredRelu(torch.autograd.Function):
    """Keeps one tensor; the gradient 2 max(x, 0) g takes two passes where autograd takes four."""

    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        positive = inputs.clamp_min(0)
        context.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (positive,) = context.saved_tensors
        return (positive * gradient).mul_(2)


class _Normalise(torch.autograd.Function):
    """y = x / |x|, with gradient (g - y (y.g)) / |x|."""

    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True).clamp_min_(_SHORTEST).reciprocal_()
        output = inputs * inverse
        context.save_for_backward(output, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        output, inverse = context.saved_tensors
        along = (output * gradient).sum(-1, keepdim=True)
        return torch.addcmul(gradient, output, along, value=-1).mul_(inverse)


class _RootMeanSquareNorm(torch.autograd.Function):
    """With n = x / rms(x): gradient (w g - n mean(w g n)) / rms(x) for x, and the sum of g n over all rows for w."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor, eps: float | None) -> Tensor:
        eps = torch.finfo(inputs.dtype).eps if eps is None else eps
        square = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True).square_()
        inverse = square.div_(inputs.shape[-1]).add_(eps).rsqrt_()
        normalised = inputs * inverse
        context.save_for_backward(normalised, inverse, weight)
        return normalised * weight

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normalised, inverse, weight = context.saved_tensors
        product = gradient * normalised
        of_weight = product.reshape(-1, product.shape[-1]).sum(0)
        along = (product @ weight).div_(weight.numel()).unsqueeze(-1)
        return (gradient * weight).addcmul_(normalised, along, value=-1).mul_(inverse), of_weight, None
