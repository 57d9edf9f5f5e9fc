"""Optimisers of a model that several processes train.

Replicas would all compute the same update. For AdamW that is a few operations on each weight. Muon multiplies matrices
a dozen times for each of its own, which with small batches costs as much as forward and backward together and would
not become less with more ranks. So the matrices are dealt out: each rank updates its own and hands them on.

Letters: W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recollect.model.distributed import Ranks
from recollect.model.optimizers import Optimizers
from recollect.model.parallel import shard_like, whole_tensor


@dataclass
class DealtOptimizers(Optimizers):
    """Muon with its matrices dealt to ranks that hold the same weights; whatever follows it steps on every rank.

    Attributes:
        ranks: who shares the work.
        owners: for each matrix the rank that updates it.
    """

    ranks: Ranks = field(default_factory=Ranks)
    owners: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.owners = deal([_cost(matrix) for matrix in self._matrices()], self.ranks.count)
        sizes = [0] * self.ranks.count
        for matrix, owner in zip(self._matrices(), self.owners, strict=True):
            sizes[owner] += matrix.numel()
        self._room = max(sizes)

    @property
    def replicated(self) -> bool:
        return False

    def _matrices(self) -> list[Tensor]:
        return [matrix for group in self.parts[0].param_groups for matrix in group["params"]]

    def step(self) -> None:
        matrices = self._matrices()
        for matrix, owner in zip(matrices, self.owners, strict=True):
            if owner != self.ranks.rank:
                matrix.grad = None
        super().step()
        self._hand_on(matrices)

    @torch.no_grad()
    def _hand_on(self, matrices: list[Tensor]) -> None:
        """Every rank's matrices to all, in one exchange."""
        like = matrices[0]
        own = [
            matrix.flatten() for matrix, owner in zip(matrices, self.owners, strict=True) if owner == self.ranks.rank
        ]
        sent = torch.cat([*own, like.new_zeros(self._room - sum(len(part) for part in own))])
        everything = like.new_empty(self.ranks.count * self._room)
        dist.all_gather_into_tensor(everything, sent)
        places = [rank * self._room for rank in range(self.ranks.count)]
        for matrix, owner in zip(matrices, self.owners, strict=True):
            start, places[owner] = places[owner], places[owner] + matrix.numel()
            if owner != self.ranks.rank:
                matrix.copy_(everything[start : start + matrix.numel()].view_as(matrix))

    def state_tensors(self) -> dict[str, Tensor]:
        """What this rank alone keeps: moments of its matrices, and on the first rank those of all the rest."""
        kept = {}
        for name, tensor in super().state_tensors().items():
            part, index, _ = name.split(".", 2)
            if self.ranks.first if int(part) else self.owners[int(index)] == self.ranks.rank:
                kept[name] = tensor
        return kept

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes from the moments of everything those that this rank keeps."""
        super().load_state_tensors(
            {
                name: tensor
                for name, tensor in tensors.items()
                if not name.startswith("0.") or self.owners[int(name.split(".")[1])] == self.ranks.rank
            }
        )


@dataclass
class ShardedOptimizers(Optimizers):
    """Optimisers of sharded weights, whose moments are sharded alike and saved whole."""

    def state_tensors(self) -> dict[str, Tensor]:
        return {name: whole_tensor(tensor) for name, tensor in super().state_tensors().items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        laid_out = {}
        for name, tensor in tensors.items():
            part, index, _ = name.split(".", 2)
            weights = [weight for group in self.parts[int(part)].param_groups for weight in group["params"]]
            weight = weights[int(index)]
            laid_out[name] = shard_like(tensor, weight) if tensor.shape == weight.shape else tensor
        super().load_state_tensors(laid_out)


def share_optimizers(optimizers: Optimizers, ranks: Ranks, kind: str) -> Optimizers:
    """The optimisers as several ranks use them, of replicas (`ddp`) or of shards (`fsdp`)."""
    if kind == "fsdp":
        return ShardedOptimizers(optimizers.parts)
    if isinstance(optimizers.parts[0], torch.optim.Muon):
        return DealtOptimizers(optimizers.parts, ranks=ranks)
    return optimizers


def deal(costs: list[float], ranks: int) -> list[int]:
    """For each cost a rank, so that the sums are even: the dearest first, each to whoever has least."""
    sums, owners = [0.0] * ranks, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = sums.index(min(sums))
        sums[owners[place]] += costs[place]
    return owners


def _cost(matrix: Tensor) -> float:
    """Multiplications of one iteration of Newton and Schulz, on which Muon's time goes."""
    short, long = sorted(matrix.shape)
    return 2.0 * short * short * long + float(short) ** 3


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scales the gradients of all ranks to a norm of at most `largest`; returns the norm before."""
    return whole_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), largest))
