"""What the cuVS backends share: metrics, the card, and how answers come back as tensors.

cuVS takes and gives device arrays by the CUDA array interface, which torch's tensors have. Each of its calls here makes
its own resources, works on a stream of its own and has finished when it returns; so torch's work that leads up to it
must have finished before (`settled`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends.errors import UnsupportedOperation
from recollect.memory_backends.records import Requirement

CUVS = Requirement("cuvs", "cuvs-cu12>=25.2")


def metric_name(metric: str) -> str:
    """cuVS's name for a metric as hooks see it. Always pass it: the default is the distance."""
    return "sqeuclidean" if metric == "l2" else "inner_product"


def card_for(device: torch.device, name: str) -> torch.device:
    """The card on which an index lies: the keys' own, or the first where keys lie on the CPU.

    Raises:
        UnsupportedOperation: torch sees none.
    """
    if not torch.cuda.is_available():
        raise UnsupportedOperation(f"{name!r} needs a CUDA device for its index, and torch sees none here")
    return device if device.type == "cuda" else torch.device("cuda")


def settled(tensor: Tensor, card: torch.device) -> Tensor:
    """A tensor as cuVS may read it: on the card, contiguous, written."""
    ready = tensor.to(card).contiguous()
    torch.cuda.current_stream(card).synchronize()
    return ready


def answer(distances: Any, neighbours: Any, metric: str, card: torch.device) -> tuple[Tensor, Tensor]:
    """Scores and positions (Q, k) from what cuVS returned; -1 where a position is no key's."""
    scores = torch.as_tensor(distances, device=card).float()
    positions = torch.as_tensor(neighbours, device=card)
    if positions.dtype == torch.uint32:
        positions = positions.view(torch.int32)  # 2^32 - 1, for none, becomes -1
    positions = positions.long()
    return (-scores if metric == "l2" else scores), positions.masked_fill(positions < 0, -1)


__all__ = ["CUVS", "answer", "card_for", "metric_name", "settled"]
