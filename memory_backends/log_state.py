"""What a version of a `KeyLog` says of itself, in its manifest: sizes, how many keys, how often reset.

Letters: M memories, C capacity, D dimension.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends.errors import CorruptMemory, InvalidInput, WriteConflict
from recollect.memory_backends.lance_places import Place

FORMAT = "recollect-key-log"
VERSION = 1
STATE = "recollect"
"""Under which the manifest's metadata hold the state."""


@dataclass(frozen=True)
class LogState:
    """What a version of a log says of itself.

    Attributes:
        num_memories, capacity, dim: M, C, D.
        metric: by which its keys are compared.
        totals: for each memory, keys since its last reset.
        generations: for each memory, how often it was reset.
        about: what else the writer wants known, such as the spec of the backend that a snapshot was taken of.
    """

    num_memories: int
    capacity: int
    dim: int
    metric: str
    totals: tuple[int, ...]
    generations: tuple[int, ...]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def first_alive(self, memory: int) -> int:
        """The number of the oldest key alive."""
        return max(0, self.totals[memory] - self.capacity)

    @property
    def alive(self) -> int:
        """Keys alive in all memories."""
        return sum(min(total, self.capacity) for total in self.totals)

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None, place: Place) -> LogState:
        """Reads what a manifest says.

        Raises:
            CorruptMemory: it is no log's, or of another version.
        """
        try:
            found = json.loads(text or "null")
        except ValueError as error:
            raise CorruptMemory(
                f"{place} has metadata that are not JSON ({error}): bring it back from a copy"
            ) from None
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise CorruptMemory(f"{place} is a Lance dataset, but no log of keys: give the place of one")
        version = found.pop("version", None)
        if version != VERSION:
            raise CorruptMemory(f"{place} is a log of version {version!r}; this release reads version {VERSION}")
        try:
            state = cls(**{**found, "totals": tuple(found["totals"]), "generations": tuple(found["generations"])})
        except (KeyError, TypeError) as error:
            raise CorruptMemory(f"{place} has metadata without a usable {error}: bring it back from a copy") from None
        if not len(state.totals) == len(state.generations) == state.num_memories:
            raise CorruptMemory(f"{place} counts the keys of {len(state.totals)} memories, not {state.num_memories}")
        return state

    def appended(self, listed: Iterable[tuple[int, int]], new: int, place: Place) -> LogState:
        """The state after `new` keys were added to memories from given numbers on.

        Raises:
            WriteConflict: these are not their next numbers.
        """
        totals = list(self.totals)
        for memory, start in listed:
            if start != totals[memory]:
                what = "a gap" if start > totals[memory] else "an overlap"
                raise WriteConflict(
                    f"{place} has {totals[memory]} keys of memory {memory}, and keys from number {start} on were to be "
                    f"added: that is {what}; call refresh() and append what follows its totals"
                )
            totals[memory] += new
        return dataclasses.replace(self, totals=tuple(totals))

    def emptied(self, memories: set[int]) -> LogState:
        """The state after memories were reset."""
        return dataclasses.replace(
            self,
            totals=tuple(0 if memory in memories else total for memory, total in enumerate(self.totals)),
            generations=tuple(count + (memory in memories) for memory, count in enumerate(self.generations)),
        )


def starts_of(first: int | Iterable[int] | Tensor | None, totals: Tensor) -> Tensor:
    """(M',) int64: the number of each memory's first new key; `totals` (M',) where nothing is said."""
    if first is None:
        return totals
    if isinstance(first, int):
        return torch.full_like(totals, first)
    given = first.detach().to("cpu", torch.int64) if isinstance(first, Tensor) else torch.tensor(list(first))
    if given.shape != totals.shape or given.dtype != torch.int64:
        raise InvalidInput(f"first is {first!r}; it is a whole number for each of the {len(totals)} memories")
    return given
