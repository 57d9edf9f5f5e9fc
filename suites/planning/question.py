"""What a plan is asked for. Letters: B batch rows, H heads, L layers with memory, M = B * H * L memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from recollect.memory_backends.registry import canonical_spec

from .amounts import PlanError

Values = Literal["float32", "bfloat16", "file", "none"]
"""How values are kept: in main memory in one of two types, as float32 in a file, or not at all."""


@dataclass(frozen=True)
class Question:
    """A memory, and the machine that is to hold it.

    Attributes:
        keys: C, keys of each memory when it is full: tokens that a head can look back on.
        dim: D, of a key and a value.
        heads, layers, batch: how many memories there are.
        queries: queries of a memory at one step, which then appends as many keys.
        k: neighbours.
        backends: canonical registry strings; empty for all that the calibration has.
        machine_bytes: main memory of the machine.
        values: how values are kept.

    Raises:
        PlanError: a number is below 1 or `values` unknown.
        MemoryBackendError: a registry string is wrong.
    """

    keys: int
    dim: int
    machine_bytes: int
    heads: int = 1
    layers: int = 1
    batch: int = 1
    queries: int = 512
    k: int = 32
    backends: tuple[str, ...] = ()
    values: Values = "float32"

    def __post_init__(self) -> None:
        for name in ("keys", "dim", "machine_bytes", "heads", "layers", "batch", "queries", "k"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.values not in get_args(Values):
            raise PlanError(f"values is {self.values!r}; it is one of {', '.join(get_args(Values))}")
        object.__setattr__(self, "backends", tuple(dict.fromkeys(map(canonical_spec, self.backends))))

    @property
    def memories(self) -> int:
        """M."""
        return self.heads * self.layers * self.batch

    @property
    def memories_text(self) -> str:
        """M in words."""
        return f"{self.memories:,} {'memory' if self.memories == 1 else 'memories'}"

    @property
    def all_keys(self) -> int:
        """Keys of all memories together."""
        return self.memories * self.keys
