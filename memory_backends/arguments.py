"""Checks of what a caller hands to a backend. Letters as in `base`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.errors import InvalidInput, NotFinite, UnsupportedOperation


def check_device(device: str | torch.device, name: str, can_live_on: Sequence[str]) -> torch.device:
    """The torch device that is meant, if backend `name` can live there and it is there."""
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(f"device {device!r} is not a torch device: {error}") from None
    if checked.type not in can_live_on:
        can = ", ".join(can_live_on)
        raise UnsupportedOperation(f"{name!r} can't live on device {str(checked)!r}; it can live on {can}")
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedOperation(f"device {str(checked)!r} was asked for, but torch sees no CUDA device here")
    return checked


def check_memories(memories: Iterable[int] | Tensor | None, num_memories: int) -> Tensor:
    """The memories that are meant, (M',) int64 on the CPU: distinct and within 0..M-1."""
    if memories is None:
        return torch.arange(num_memories)
    if isinstance(memories, Tensor):
        which = memories.detach().to("cpu")
    else:
        listed = list(memories)
        which = torch.tensor(listed) if listed else torch.zeros(0, dtype=torch.int64)
    if which.dim() != 1 or which.dtype not in (torch.int64, torch.int32):
        raise InvalidInput(f"memories are a 1-D list of whole numbers, got {memories!r}")
    which = which.to(torch.int64)
    if len(which) and (int(which.min()) < 0 or int(which.max()) >= num_memories):
        raise InvalidInput(f"memories {which.tolist()} are not all within 0..{num_memories - 1}")
    if len(which.unique()) != len(which):
        raise InvalidInput(f"memories {which.tolist()} name a memory twice")
    return which


SUMMED_BY_ONE_THREAD = 1 << 20
"""Elements whose sum one thread takes in some 0.1 ms. torch would wake its threads for it, which spin for milliseconds
afterwards and take a core from the search that follows: checking 512 queries took 1.2 ms and made their
search take half as long again."""


def _sum(numbers: Tensor) -> float:
    if numbers.device.type != "cpu" or numbers.numel() > SUMMED_BY_ONE_THREAD:
        return float(numbers.sum())
    with np.errstate(over="ignore", invalid="ignore"):
        return float(numbers.numpy().sum())


def check_vectors(
    vectors: Tensor, which: Tensor, *, what: str, dim: int, device: torch.device, finite: bool = True
) -> Tensor:
    """Keys or queries (M', any, D) as float32 on `device`, every value finite unless that is looked at later."""
    if not isinstance(vectors, Tensor):
        raise InvalidInput(f"{what} must be a torch tensor, got {type(vectors).__name__}")
    if vectors.dim() != 3 or vectors.shape[0] != len(which) or vectors.shape[2] != dim:
        raise InvalidInput(
            f"{what} have shape {tuple(vectors.shape)}; expected (memories={len(which)}, any, dim={dim})"
        )
    if not vectors.is_floating_point():
        raise InvalidInput(f"{what} have type {vectors.dtype}; expected a floating type")
    prepared = vectors.detach().to(device=device, dtype=torch.float32)
    if finite:
        check_finite(prepared, what=what)
    return prepared


def check_finite(prepared: Tensor, *, what: str, total: Tensor | None = None) -> None:
    """Refuses vectors that are not all finite; `total` is their sum, where it is known."""
    # A sum is one cheap pass and is not finite if any element is not; only then look at every element.
    known = 0.0 if not prepared.numel() else _sum(prepared) if total is None else float(total)
    if not math.isfinite(known) and not bool(torch.isfinite(prepared).all()):
        bad = (~torch.isfinite(prepared)).nonzero()[0].tolist()
        raise NotFinite(f"{what} hold {float(prepared[tuple(bad)])} at index {bad}; every value must be finite")
