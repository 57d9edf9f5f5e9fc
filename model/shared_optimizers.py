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

TURNS = 2
"""In how many turns a rank updates its matrices: what one turn made travels during the next."""


@dataclass
class DealtOptimizers(Optimizers):
    """Muon with its matrices dealt to ranks that hold the same weights; whatever follows it steps on every rank.

    A rank updates its matrices in a few turns, and hands on those of one turn while it is at the next. The matrices
    that are handed on together lie side by side in memory, so that they are sent from and received into their places.

    Attributes:
        ranks: who shares the work.
        owners: for each matrix the rank that updates it.
    """

    ranks: Ranks = field(default_factory=Ranks)
    owners: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.owners = deal([_cost(matrix) for matrix in self._matrices()], self.ranks.count)
        own = [[place for place, owner in enumerate(self.owners) if owner == rank] for rank in range(self.ranks.count)]
        self._turns = [
            [places[number * len(places) // TURNS : (number + 1) * len(places) // TURNS] for places in own]
            for number in range(TURNS)
        ]
        matrices = self._matrices()
        self._sent = [
            [_side_by_side([matrices[place] for place in places]) for places in of_ranks] for of_ranks in self._turns
        ]

    @property
    def replicated(self) -> bool:
        return False

    def _matrices(self) -> list[Tensor]:
        return [matrix for group in self.parts[0].param_groups for matrix in group["params"]]

    @torch.no_grad()
    def step(self) -> None:
        muon, *others = self.parts
        matrices = self._matrices()
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            matrix.grad = None
        under_way = []
        for of_ranks, sent in zip(self._turns, self._sent, strict=True):
            own = of_ranks[self.ranks.rank]
            for place in own:
                matrices[place].grad = gradients[place]
            muon.step()
            for place in own:
                matrices[place].grad = None
            under_way += [dist.broadcast(part, src=rank, async_op=True) for rank, part in enumerate(sent) if len(part)]
        for part in others:
            part.step()
        for work in under_way:
            work.wait()

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


@torch.no_grad()
def _side_by_side(matrices: list[Tensor]) -> Tensor:
    """One tensor (N,) that holds all of them, of which each becomes a view."""
    if not matrices:
        return torch.empty(0)
    together = torch.cat([matrix.detach().flatten() for matrix in matrices])
    start = 0
    for matrix in matrices:
        matrix.data = together[start : start + matrix.numel()].view_as(matrix)
        start += matrix.numel()
    return together
