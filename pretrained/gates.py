"""How a pretrained layer's own attention and its memory are joined: each gate gives the share that memory has.

The layer's output is (1 - share) * local + share * remembered, where `local` is the model's attention over what it
sees and `remembered` is attention over the retrieved pairs.

Letters: B batch rows, H query heads, T tokens.
"""

from __future__ import annotations

import math
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from recollect.model.configuration import ConfigurationError


class MemoryGate(nn.Module):
    """The share of memory in a layer's output.

    Args:
        heads: H.
        gate_share: the share to start from, strictly between 0 and 1, where the kind has one.
    """

    needs_local_mass = True
    """Whether `forward` looks at `local_mass`; if not, the model's own fused attention can compute the local part."""

    def __init__(self, heads: int, gate_share: float) -> None:
        super().__init__()

    def forward(self, local_mass: Tensor | None, memory_mass: Tensor) -> Tensor:
        """(B, H, T) float32 in 0..1.

        Args:
            local_mass: (B, H, T) float32, logarithm of the summed exponentials of the logits of what the model sees.
            memory_mass: the same of the retrieved pairs; -inf where nothing was found, and the share there is 0.
        """
        raise TypeError(f"{type(self).__name__} must define forward()")


class JointGate(MemoryGate):
    """One softmax over local and retrieved logits together, so nothing needs training.

    A token that memory finds gets the weight that it would have had if it were in sight (Bertsch et al. 2023,
    Unlimiformer; Klett and Ahle 2023, Extended Mind; LongLLaMA's memory attention, Tworkowski et al. 2023).
    """

    def forward(self, local_mass: Tensor | None, memory_mass: Tensor) -> Tensor:
        assert local_mass is not None
        return torch.sigmoid(memory_mass - local_mass)


class JointBiasGate(JointGate):
    """The joint softmax with a learned offset per head on the retrieved logits; starts at 0, as `joint`."""

    def __init__(self, heads: int, gate_share: float) -> None:
        super().__init__(heads, gate_share)
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, local_mass: Tensor | None, memory_mass: Tensor) -> Tensor:
        return super().forward(local_mass, memory_mass + self.bias.float()[:, None])


class HeadGate(MemoryGate):
    """One learned share per head (Wu et al. 2022, section 3.2): sigmoid(b_h)."""

    needs_local_mass = False

    def __init__(self, heads: int, gate_share: float) -> None:
        super().__init__(heads, gate_share)
        self.bias = nn.Parameter(torch.full((heads,), math.log(gate_share / (1 - gate_share))))

    def forward(self, local_mass: Tensor | None, memory_mass: Tensor) -> Tensor:
        share = torch.sigmoid(self.bias.float())[:, None]
        return torch.where(torch.isneginf(memory_mass), 0.0, share)


class FixedGate(MemoryGate):
    """The constant share `gate_share`, not learned."""

    needs_local_mass = False

    def __init__(self, heads: int, gate_share: float) -> None:
        super().__init__(heads, gate_share)
        self.share = gate_share

    def forward(self, local_mass: Tensor | None, memory_mass: Tensor) -> Tensor:
        return torch.where(torch.isneginf(memory_mass), 0.0, self.share)


MEMORY_GATES: dict[str, type[MemoryGate]] = {
    "joint": JointGate,
    "joint_bias": JointBiasGate,
    "head": HeadGate,
    "fixed": FixedGate,
}


def check_gate(gate: str, gate_share: float) -> None:
    """Raises ConfigurationError for an unknown gate, offering the nearest, or a share outside 0..1."""
    if gate not in MEMORY_GATES:
        near = get_close_matches(gate, MEMORY_GATES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"gate {gate!r} is unknown; choose one of {', '.join(MEMORY_GATES)}{hint}")
    if not 0 < gate_share < 1:
        raise ConfigurationError(f"gate_share={gate_share} must lie strictly between 0 and 1")


def make_memory_gate(gate: str, heads: int, gate_share: float) -> MemoryGate:
    """The gate of one layer; `check_gate` has passed."""
    return MEMORY_GATES[gate](heads, gate_share)
