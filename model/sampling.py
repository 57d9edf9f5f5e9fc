"""Choosing the next token from logits: greedy, or drawn after temperature, top-k and top-p.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class GenerationError(ValueError):
    """A generation that cannot be: the message names the value and what would be accepted."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, whatever else is set.
        top_k: only the k likeliest tokens may be drawn; None is all.
        top_p: only the fewest likeliest tokens that together have at least this probability may be drawn (nucleus
            sampling, Holtzman et al. 2020); None is all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise GenerationError(f"temperature={self.temperature} must be 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k={self.top_k} must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p={self.top_p} must be above 0 and at most 1, or None for all tokens")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from `logits` (V,); `generator` is on the CPU, so that a seed means the same on every device."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        probabilities = self.probabilities(logits.float().cpu())
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(V,) what a token is drawn with; sums to 1."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            smallest = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probabilities = torch.softmax(logits, dim=-1)
        if self.top_p is not None and self.top_p < 1.0:
            falling, order = probabilities.sort(descending=True, stable=True)
            # A token stays if those before it do not reach top_p by themselves; the likeliest always does.
            surplus = falling.cumsum(0) - falling >= self.top_p
            surplus[0] = False
            probabilities[order[surplus]] = 0.0
            probabilities = probabilities / probabilities.sum()
        return probabilities
