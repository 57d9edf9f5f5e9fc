"""How a memory layer joins what it remembers with what it sees: one class per kind, found by name.

A new kind is a subclass of `Gate` under `@register_gate("name")`; `ModelConfig(gate="name")` then uses it.

Letters: B batch rows, H heads, T tokens, D head dimension, W model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from recollect.model.configuration import GATE_NAMES, ConfigurationError, ModelConfig


class Gate(nn.Module):
    """Joins the two attentions of a memory layer. Subclasses take the configuration and fill in `join`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, local: Tensor, remembered: Tensor, found: Tensor, hidden: Tensor) -> Tensor:
        """The joined attention output.

        Args:
            local: (B, H, T, D) attention over the segment and the Transformer-XL cache.
            remembered: (B, H, T, D) attention over the retrieved pairs.
            found: (B, H, T) bool, whether anything was retrieved. Where nothing was, the result is `local` alone: an
                empty memory must not dim what the layer sees.
            hidden: (B, T, W) the layer's normalised input, for gates that depend on the token.
        Returns:
            (B, H, T, D).
        """
        return torch.where(found[..., None], self.join(local, remembered, hidden), local)

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor) -> Tensor:
        """The joined output where something was retrieved; shapes as in `forward`."""
        raise TypeError(f"{type(self).__name__} must define join()")


GATES: dict[str, type[Gate]] = {}


def register_gate(name: str) -> Callable[[type[Gate]], type[Gate]]:
    """Class decorator: makes a gate available as `ModelConfig(gate=name)`; a name can be taken once."""

    def register(kind: type[Gate]) -> type[Gate]:
        if name in GATES:
            raise ConfigurationError(f"a gate named {name!r} exists already: {GATES[name].__qualname__}")
        GATES[name] = kind
        if name not in GATE_NAMES:
            GATE_NAMES.append(name)
        return kind

    return register


def make_gate(config: ModelConfig) -> Gate:
    """The gate that `config.gate` names; an unknown name raises `ConfigurationError` and offers the nearest."""
    if config.gate not in GATES:
        near = get_close_matches(config.gate, GATES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"gate {config.gate!r} is unknown; choose one of {', '.join(GATES)}{hint}")
    return GATES[config.gate](config)


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))


@register_gate("head")
class HeadGate(Gate):
    """One learned share per head (Wu et al. 2022, section 3.2): g = sigmoid(b_g); V = V_m * g + V_c * (1 - g)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.full((config.heads,), _logit(config.gate_share)))

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor) -> Tensor:
        return torch.lerp(local, remembered, torch.sigmoid(self.bias).to(local.dtype)[:, None, None])


@register_gate("token")
class TokenGate(Gate):
    """A share per head and token, a learned linear function of the layer's input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.width, config.heads)
        nn.init.zeros_(self.projection.weight)
        nn.init.constant_(self.projection.bias, _logit(config.gate_share))

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor) -> Tensor:
        share = torch.sigmoid(self.projection(hidden)).transpose(1, 2)[..., None]  # (B, H, T, 1)
        return torch.lerp(local, remembered, share.to(local.dtype))


@register_gate("fixed")
class FixedGate(Gate):
    """The constant share `config.gate_share`, not learned."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.share = config.gate_share

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor) -> Tensor:
        return torch.lerp(local, remembered, self.share)


@register_gate("sum")
class SumGate(Gate):
    """Both added; the output projection learns what to make of it."""

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor) -> Tensor:
        return local + remembered


@register_gate("mean")
class MeanGate(Gate):
    """Both averaged."""

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor) -> Tensor:
        return (local + remembered) * 0.5
