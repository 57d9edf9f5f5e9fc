"""A model that several processes train together: each reads its own rows, and gradients are averaged over all.

* `ddp` (`torch.nn.parallel.DistributedDataParallel`): every rank holds the whole model. For models that fit a device.
* `fsdp` (`torch.distributed.fsdp.fully_shard`, FSDP2): every rank holds its share of each layer's weights, gradients
  and moments, and layers are gathered while they are used. For models that do not.

Memories and caches belong to rows, so neither moves them.

Letters: W ranks, B batch rows, T tokens of a segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeGuard, cast

import torch.nn.functional as functional
from torch import Tensor, nn

from recollect.model.compressive import take_compression_loss
from recollect.model.distributed import Ranks
from recollect.model.streams import IGNORED, Segment
from recollect.model.transformer import MemorizingTransformer, ModelState

PORTIONS = 2
"""In how many portions the gradients of a small model are summed."""


class SharedLoss(nn.Module):
    """A segment's loss as this rank's part of it: the gradients' mean over the ranks is that of one process's loss.

    One process takes the mean over all rows' targets. A rank knows its own rows, so it takes their sum over the targets
    of all ranks, times W, since gradients are averaged in the end. A rank without any target then counts for nothing.
    """

    def __init__(self, model: MemorizingTransformer, ranks: Ranks) -> None:
        super().__init__()
        self.model = model
        self.ranks = ranks

    def forward(self, state: ModelState, segment: Segment, targets: int) -> tuple[Tensor, Tensor, ModelState]:
        """The loss to differentiate, the plain sum over this rank's targets, and the state after the segment.

        Args:
            segment: this rank's rows.
            targets: how many the rows of all ranks have.
        """
        total, after = summed_loss(self.model, state, segment)
        loss = total * (self.ranks.count / max(1, targets))
        compression = take_compression_loss(self.model, self._share_of_rows)
        if compression is not None:
            loss = loss + self.model.config.compression_loss * compression
        return loss, total.detach(), after

    def _share_of_rows(self, rows: Tensor) -> Tensor:
        """W times this rank's share of the rows that were compressed, for each layer."""
        return self.ranks.count * rows.clamp_min(1.0) / self.ranks.total(rows).clamp_min(1.0)


def summed_loss(model: MemorizingTransformer, state: ModelState, segment: Segment) -> tuple[Tensor, ModelState]:
    """Cross-entropy summed over a segment's targets, and the state after it."""
    output = model(segment.tokens.to(model.device), state, segment.document_starts.to(model.device))
    targets = segment.targets.to(model.device).flatten()
    total = functional.cross_entropy(
        output.logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )
    return total, output.state


def shard(model: MemorizingTransformer, ranks: Ranks) -> None:
    """Leaves each rank its share of every weight (FSDP2): a layer is gathered when it is used, and let go after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shared_loss(model: MemorizingTransformer, ranks: Ranks, kind: str, *, memory: bool) -> nn.Module:
    """`SharedLoss` of a model, under the wrapper that averages its gradients.

    Args:
        kind: one of `distributed.PARALLEL`; for `fsdp` the model was sharded already.
        memory: whether memory layers have a memory; their gates get no gradient otherwise.
    """
    loss = SharedLoss(model, ranks)
    if kind == "fsdp":
        return loss
    config = model.config
    return nn.parallel.DistributedDataParallel(
        loss,
        gradient_as_bucket_view=True,
        bucket_cap_mb=_bucket_mib(model),
        find_unused_parameters=bool(config.memory_layers and not memory) or bool(config.compressed_memory),
    )


def _bucket_mib(model: nn.Module) -> float:
    """Size of the portions in which gradients are summed over the ranks.

    The sum of one portion is under way while the gradients of the next are computed. Torch's 25 MiB would be the whole
    of a small model, which then waits for it.
    """
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20
    return min(25.0, max(1.0, size / PORTIONS))


@contextlib.contextmanager
def whole_root(model: nn.Module) -> Iterator[None]:
    """Parts of a sharded model may be called by themselves within: what no layer owns is gathered as long."""
    if not hasattr(model, "unshard"):
        yield
        return
    sharded = cast(Any, model)
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


# Weights that are sharded, as whole ones ------------------------------------------------------------------------------


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole one, for which every rank must ask; any other as it is."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, equal on every rank, as `other` is laid out."""
    if not _is_sharded(other) or _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def whole_state(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The weights by name, whole, on the first rank; every rank must call it, and the others get none."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        whole = whole_tensor(tensor)
        if ranks.first:
            tensors[name] = whole.detach().cpu() if _is_sharded(tensor) else whole
    return tensors


def load_whole_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fills a model, sharded or not, with whole weights."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(tensor, own.get(name, tensor)) for name, tensor in tensors.items()})


def _is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether it is a `DTensor`; not asked by its class, whose import takes a second that most runs can spare."""
    return hasattr(tensor, "full_tensor")


__all__ = ["SharedLoss", "shard", "shared_loss", "summed_loss", "whole_root"]
