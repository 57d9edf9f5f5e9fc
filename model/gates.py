"""How a memory layer joins what it remembers with what it sees: one class per kind, found by name.

A new kind is a subclass of `Gate` under `@register_gate("name")`; `ModelConfig(gate="name")` then uses it.

Every kind here, the joint softmax among them, gives each query a share g of memory, or weighs the two attentions in
another way, after each had a softmax of its own. That is no loss: one softmax over all logits is exactly the mixture
whose log-odds are the difference of the two log-sum-exps (see `JointGate`).

Letters: B batch rows, H heads, T tokens, D head dimension, W model width, K retrieved pairs, N keys seen near by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from recollect.model.configuration import GATE_NAMES, ConfigurationError, ModelConfig


@dataclass(frozen=True)
class Scores:
    """What the logits say of each attention, all (B, H, T) float32; zero where nothing was retrieved.

    Attributes:
        odds: log-sum-exp of the retrieved logits less that of the local ones: the log-odds of memory under one softmax.
        memory_peak: logarithm of the highest weight among the retrieved pairs: 0 is sure of one pair.
        local_peak: the same of the local attention.
    """

    odds: Tensor
    memory_peak: Tensor
    local_peak: Tensor

    @classmethod
    def of(cls, local: Tensor, retrieved: Tensor, found: Tensor) -> Scores:
        """From local logits (B, H, T, N), retrieved logits (B, H, T, K), and found (B, H, T) bool."""
        # The logits of missing neighbours are the least finite number: kept out, they could overflow a learned gate.
        retrieved = retrieved.masked_fill(~found[..., None], 0.0)
        local_sum, memory_sum = torch.logsumexp(local, dim=-1), torch.logsumexp(retrieved, dim=-1)
        return cls(
            odds=(memory_sum - local_sum).masked_fill(~found, 0.0),
            memory_peak=(retrieved.amax(-1) - memory_sum).masked_fill(~found, 0.0),
            local_peak=(local.amax(-1) - local_sum).masked_fill(~found, 0.0),
        )


class Gate(nn.Module):
    """Joins the two attentions of a memory layer. Subclasses take the configuration and fill in `join`."""

    uses_scores: ClassVar[bool] = False
    """Whether `join` needs `Scores`; they are computed for such gates alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(
        self, local: Tensor, remembered: Tensor, found: Tensor, hidden: Tensor, scores: Scores | None = None
    ) -> Tensor:
        """The joined attention output.

        Args:
            local: (B, H, T, D) attention over the segment and the Transformer-XL cache.
            remembered: (B, H, T, D) attention over the retrieved pairs.
            found: (B, H, T) bool, whether anything was retrieved. Where nothing was, the result is `local` alone: an
                empty memory must not dim what the layer sees.
            hidden: (B, T, W) the layer's normalised input, for gates that depend on the token.
            scores: what the logits say, for gates that use it.
        Returns:
            (B, H, T, D).
        """
        return torch.where(found[..., None], self.join(local, remembered, hidden, scores), local)

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
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
    """The gate that `config.gate` names; the configuration has refused a name that does not exist."""
    return GATES[config.gate](config)


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))


@register_gate("head")
class HeadGate(Gate):
    """One learned share per head (Wu et al. 2022, section 3.2): g = sigmoid(b_g); V = V_m * g + V_c * (1 - g)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.full((config.heads,), _logit(config.gate_share)))

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        return torch.lerp(local, remembered, torch.sigmoid(self.bias).to(local.dtype)[:, None, None])


@register_gate("token")
class TokenGate(Gate):
    """A share per head and token, a learned linear function of the layer's input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.width, config.heads)
        nn.init.zeros_(self.projection.weight)
        nn.init.constant_(self.projection.bias, _logit(config.gate_share))

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        share = torch.sigmoid(self.projection(hidden)).transpose(1, 2)[..., None]  # (B, H, T, 1)
        return torch.lerp(local, remembered, share.to(local.dtype))


@register_gate("layer")
class LayerGate(Gate):
    """One learned share for all heads of the layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.full((1,), _logit(config.gate_share)))

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        return torch.lerp(local, remembered, torch.sigmoid(self.bias).to(local.dtype))


@register_gate("confidence")
class ConfidenceGate(Gate):
    """A share per head and token from how sure the attention scores are, not from the layer's input.

    The share's log-odds are a learned linear function, one per head, of the three `Scores`. The weights start at zero,
    so the start is a constant share; weights (1, 0, 0) without bias would be the joint softmax.
    """

    uses_scores = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(3, config.heads))
        self.bias = nn.Parameter(torch.full((config.heads,), _logit(config.gate_share)))

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        scores = _needed(scores)
        odds, memory_peak, local_peak = self.weight.float()[..., None]  # each (H, 1)
        log_odds = scores.odds * odds + scores.memory_peak * memory_peak + scores.local_peak * local_peak
        share = torch.sigmoid(log_odds + self.bias.float()[:, None])[..., None]
        return torch.lerp(local, remembered, share.to(local.dtype))


@register_gate("fixed")
class FixedGate(Gate):
    """The constant share `config.gate_share`, not learned."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.share = config.gate_share

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        return torch.lerp(local, remembered, self.share)


@register_gate("sum")
class SumGate(Gate):
    """Both added; the output projection learns what to make of it."""

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        return local + remembered


@register_gate("mean")
class MeanGate(Gate):
    """Both averaged."""

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        return (local + remembered) * 0.5


@register_gate("weighted_sum")
class WeightedSumGate(Gate):
    """Both added with two free learned weights per head, which need not add up to one nor stay positive."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        share = config.gate_share
        self.weight = nn.Parameter(torch.tensor([1.0 - share, share])[:, None].repeat(1, config.heads))

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        of_local, of_remembered = self.weight.to(local.dtype)[..., None, None]  # each (H, 1, 1)
        return torch.addcmul(local * of_local, remembered, of_remembered)


@register_gate("concatenation")
class ConcatenationGate(Gate):
    """Both side by side, all heads at once, through a learned projection back to the size of one.

    It starts as the constant share `config.gate_share`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        inner = config.heads * config.head_dim
        # Named as the attention's output projection is, so that the optimiser for matrices takes it.
        self.output = nn.Linear(2 * inner, inner, bias=False)
        one, share = torch.eye(inner), config.gate_share
        with torch.no_grad():
            self.output.weight.copy_(torch.cat([(1.0 - share) * one, share * one], dim=1))

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        batch, heads, tokens, dim = local.shape
        both = torch.stack([local, remembered], dim=1).permute(0, 3, 1, 2, 4)  # (B, T, 2, H, D)
        projected = self.output(both.reshape(batch, tokens, 2 * heads * dim))
        return projected.view(batch, tokens, heads, dim).transpose(1, 2)


@register_gate("joint")
class JointGate(Gate):
    """One softmax over local and retrieved logits together; nothing to learn (as in LongLLaMA, Tworkowski et al. 2023).

    With a = sum of exp(local logits) and m = sum of exp(retrieved logits), the joint attention is
    (a V_c + m V_m) / (a + m): a share of m / (a + m) = sigmoid(log m - log a) for memory.
    """

    uses_scores = True

    def join(self, local: Tensor, remembered: Tensor, hidden: Tensor, scores: Scores | None) -> Tensor:
        share = torch.sigmoid(_needed(scores).odds)[..., None]
        return torch.lerp(local, remembered, share.to(local.dtype))


def _needed(scores: Scores | None) -> Scores:
    if scores is None:
        raise TypeError("this gate reads attention scores: give it Scores.of(local logits, retrieved logits, found)")
    return scores
