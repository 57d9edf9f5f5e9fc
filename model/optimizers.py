"""Optimisers and the learning-rate schedule.

Muon (Jordan et al. 2024, `torch.optim.Muon`) takes the matrices of attention and feed-forward; AdamW takes everything
else: the embedding, whose rows are not a map between two spaces, and vectors such as norms, scales, gates and
convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recollect.model.configuration import ConfigurationError

OPTIMIZERS = ("muon", "adamw")


@dataclass
class Optimizers:
    """One or two torch optimisers that step together under one schedule."""

    parts: list[torch.optim.Optimizer]

    @property
    def replicated(self) -> bool:
        """Whether every process of a job keeps the same state, so that one of them can write it for all."""
        return True

    def set_share(self, share: float) -> None:
        """Scales every learning rate to `share` of its peak."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * share

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the optimisers' state, by a name that `load_state_tensors` understands."""
        tensors = {}
        for number, part in enumerate(self.parts):
            for index, values in part.state_dict()["state"].items():
                for name, value in values.items():
                    tensors[f"{number}.{index}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`; hyperparameters stay those of this object."""
        for number, part in enumerate(self.parts):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                part_number, index, name = key.split(".", 2)
                if int(part_number) == number:
                    state.setdefault(int(index), {})[name] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def make_optimizers(
    model: nn.Module,
    kind: str,
    *,
    matrix_learning_rate: float,
    other_learning_rate: float,
    weight_decay: float,
) -> Optimizers:
    """The optimisers for `model`.

    Args:
        kind: "muon" or "adamw"; with "adamw" all parameters go to AdamW, each still at its own rate.
        matrix_learning_rate: peak rate of attention and feed-forward matrices. For Muon it is scaled so that an update
            has the size that AdamW's would have (`match_rms_adamw`), hence it is of AdamW's order of magnitude.
        other_learning_rate: peak rate of all the rest.
        weight_decay: decoupled decay of the matrices; the rest does not decay.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith((".query.weight", ".key.weight", ".value.weight", ".output.weight"))
        is_matrix = is_matrix or name.endswith((".inner.weight", ".outer.weight"))
        (matrices if is_matrix else others).append(parameter)
    if kind == "muon":
        parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=matrix_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=other_learning_rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
        ]
    elif kind == "adamw":
        groups = [
            {"params": matrices, "lr": matrix_learning_rate, "weight_decay": weight_decay},
            {"params": others, "lr": other_learning_rate, "weight_decay": 0.0},
        ]
        parts = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]
    else:
        raise ConfigurationError(f"optimizer {kind!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    for part in parts:
        for group in part.param_groups:
            group["peak_lr"] = group["lr"]
    return Optimizers(parts)


def learning_rate_share(step: int, *, steps: int, warmup_steps: int, decay_share: float) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, constant, linear decay towards 0.

    The last `decay_share` of all steps decays; 1.0 decays from the end of the warm-up on.
    """
    warmed = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decaying = max(1.0, decay_share * steps)
    return min(warmed, (steps - step) / decaying, 1.0)
