"""A stated budget of main memory (`max_bytes`): what a memory will take when it is full, and what would take less.

The keys' bytes are known beforehand. An index's are an estimate by its backend, of the most that it takes, also while
it is built; where a backend cannot say, keys and index are held to the budget as they grow. Keys in a memory-mapped
file count nothing: the system drops them from main memory when something else wants it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recollect.memory_backends.errors import OverBudget
from recollect.memory_backends.key_ring import bytes_of_key
from recollect.memory_backends.options import IN_MEMORY, IN_TEMPORARY, KeyStorageOptions
from recollect.memory_backends.out_of_memory import readable
from recollect.memory_backends.spec import format_spec, options_given

if TYPE_CHECKING:
    from recollect.memory_backends.base import MemoryBackend

FEWEST_CODES = "faiss-ivfpq"
"""The backend whose index takes the fewest bytes."""
NORM_BYTES = 4
"""Of a key's length, which is kept beside unit vectors for the cosine."""


@dataclass(frozen=True)
class PlannedBytes:
    """What memories take when every slot is written.

    Attributes:
        keys: bytes of main memory of the raw keys.
        index: bytes of the indexes at most, also while they are built; None where nobody can say.
        mapped: bytes of the keys in a memory-mapped file.
    """

    keys: int
    index: int | None
    mapped: int

    @property
    def total(self) -> int:
        """Bytes of main memory that are known of."""
        return self.keys + (self.index or 0)


def plan_bytes(
    cls: type[MemoryBackend],
    options: Any,
    *,
    num_memories: int,
    capacity: int,
    dim: int,
    metric: str = "inner_product",
) -> PlannedBytes:
    """What `num_memories` memories of a backend class with these options would take when they are full."""
    stored = options if isinstance(options, KeyStorageOptions) else KeyStorageOptions()
    in_memory, mapped = bytes_of_key(dim, stored.storage, in_file=stored.keys_in != IN_MEMORY)
    index = cls._planned_index_bytes(options, capacity=capacity, dim=dim, metric=metric)
    slots = num_memories * capacity if cls.keeps_keys(options) else 0
    return PlannedBytes(
        keys=slots * (in_memory + (NORM_BYTES if metric == "cosine" else 0)),
        index=None if index is None else num_memories * index,
        mapped=slots * mapped,
    )


def check_planned(backend: MemoryBackend) -> PlannedBytes:
    """What a backend that is being made will take when it is full.

    Raises:
        OverBudget: more than its `max_bytes`; the message says what of, and what would fit.
    """
    planned = _plan(backend, backend.options)
    limit = backend.key_options.budget
    if limit is None or planned.total <= limit:
        return planned
    index = "its index is not known beforehand" if planned.index is None else f"index {readable(planned.index)}"
    raise OverBudget(
        f"{backend.spec!r} with num_memories={backend.num_memories}, capacity={backend.capacity}, dim={backend.dim} "
        f"takes {readable(planned.total)} of main memory when it is full (keys as {backend.key_options.storage} "
        f"{readable(planned.keys)}, {index}), more than max_bytes={backend.key_options.max_bytes}. "
        f"{_what_fits(backend, planned, limit)}"
    )


def check_grown(backend: MemoryBackend) -> None:
    """Holds the keys alive and the index as it is now to the budget.

    Raises:
        OverBudget: they have outgrown it.
    """
    limit = backend.key_options.budget
    keys, index = int(backend.ring.lengths.sum()) * backend.ring.key_bytes, backend._index_bytes()
    if limit is not None and keys + index > limit:
        raise OverBudget(
            f"this append would bring a {backend.spec!r} memory to {readable(keys + index)} of main memory (keys "
            f"{readable(keys)}, index {readable(index)}), more than max_bytes={backend.key_options.max_bytes}: it was "
            f"not made. Take a capacity below {backend.capacity}, storage=int8, keys_in={IN_TEMPORARY}, or a larger "
            "max_bytes"
        )


def _plan(backend: MemoryBackend, options: Any) -> PlannedBytes:
    sizes = {"num_memories": backend.num_memories, "capacity": backend.capacity, "dim": backend.dim}
    return plan_bytes(type(backend), options, **sizes, metric=backend.metric)


def _what_fits(backend: MemoryBackend, planned: PlannedBytes, limit: int) -> str:
    """The sentence that names what would keep within the budget, with its bytes."""
    fitting = []
    for changes in ({"storage": "bfloat16"}, {"storage": "int8"}, {"keys_in": IN_TEMPORARY}):
        if backend.key_options.keys_in != IN_MEMORY or (backend.device.type != "cpu" and "keys_in" in changes):
            continue
        options = dataclasses.replace(backend.options, **changes)
        other = _plan(backend, options)
        if other.total <= limit:
            given = options_given(options)
            given.pop("max_bytes")
            fitting.append(f"{format_spec(backend.name, given)!r} ({readable(other.total)})")
    if backend.name != FEWEST_CODES and backend.device.type == "cpu":
        codes = _fewest_codes(backend)
        if codes is not None and codes.total <= limit:
            fitting.append(f"'{FEWEST_CODES}:keys_in={IN_TEMPORARY}' ({readable(codes.total)})")
    fewer = int(backend.capacity * limit / planned.total)
    if fewer:
        fitting.append(f"a capacity of about {fewer}")
    return f"What fits: {', or '.join(fitting)}." if fitting else f"Nothing fits: {limit} bytes do not hold one key."


def _fewest_codes(backend: MemoryBackend) -> PlannedBytes | None:
    from recollect.memory_backends.registry import backend_class

    cls = backend_class(FEWEST_CODES)
    if backend.metric not in cls.capabilities.metrics:
        return None
    sizes = {"num_memories": backend.num_memories, "capacity": backend.capacity, "dim": backend.dim}
    return plan_bytes(cls, cls.Options(keys_in=IN_TEMPORARY), **sizes, metric=backend.metric)


__all__ = ["PlannedBytes", "check_grown", "check_planned", "plan_bytes"]
