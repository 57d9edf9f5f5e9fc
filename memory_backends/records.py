"""The small records that a backend speaks in. Letters as in `base`: M' memories, Q queries, K neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Metric = Literal["inner_product", "l2", "cosine"]
METRICS: tuple[str, ...] = ("inner_product", "l2", "cosine")


@dataclass(frozen=True)
class Capabilities:
    """What is true of a backend, whatever its options.

    Attributes:
        exact: its answers are the true nearest neighbours.
        metrics: what it can search by.
        devices: kinds of torch device its index can live on.
        eviction: "native" when the index itself forgets keys, "rebuilt" when parts of it are rebuilt.
        needs_training: it learns from keys before it indexes them (until then keys are searched exactly).
        deterministic: the same seed and calls give the same answers.
        persistent: `save` and `load_backend` bring back a memory that answers alike.
    """

    exact: bool = False
    metrics: tuple[str, ...] = METRICS
    devices: tuple[str, ...] = ("cpu",)
    eviction: Literal["native", "rebuilt"] = "native"
    needs_training: bool = False
    deterministic: bool = True
    persistent: bool = True


@dataclass(frozen=True)
class Requirement:
    """A library that a backend imports when it is made.

    Attributes:
        module: the name it is imported by.
        pip: what stands after `pip install` to get it.
    """

    module: str
    pip: str


@dataclass(frozen=True)
class SearchResult:
    """Neighbours, best first.

    Attributes:
        scores: (M', Q, K) float32, falling along K, -inf where a neighbour is missing.
        slots: (M', Q, K) int64, -1 where a neighbour is missing.
    """

    scores: Tensor
    slots: Tensor


@dataclass(frozen=True)
class MemoryStats:
    """What a backend holds now, over all its memories.

    Attributes:
        keys: keys alive.
        key_bytes: bytes of main memory of the raw keys alive, which `gather_keys` answers from.
        index_bytes: bytes of the index beside the raw keys.
        build_seconds: time spent so far in training and building indexes.
        pending_builds: indexes that are being built in the background now.
        stalled_seconds: time that appends and searches have waited so far for builds in the background.
        mapped_bytes: bytes of the raw keys alive that lie in a memory-mapped file.
    """

    keys: int
    key_bytes: int
    index_bytes: int
    build_seconds: float
    pending_builds: int = 0
    stalled_seconds: float = 0.0
    mapped_bytes: int = 0

    @property
    def bytes_per_key(self) -> float:
        """Bytes of main memory of raw keys and index together for each key alive; 0.0 for an empty memory."""
        return (self.key_bytes + self.index_bytes) / self.keys if self.keys else 0.0


@dataclass(frozen=True)
class NoOptions:
    """The options of a backend that has none."""
