"""Bytes of keys and index of a full memory, by what each backend itself plans (`memory_backends.budget`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from recollect.memory_backends.budget import PlannedBytes, plan_bytes
from recollect.memory_backends.key_ring import bytes_of_key
from recollect.memory_backends.options import IN_MEMORY, IN_TEMPORARY, KEY_STORAGES, KeyStorage, KeyStorageOptions
from recollect.memory_backends.registry import class_and_options


@dataclass(frozen=True)
class Placement:
    """Where the raw keys of a memory lie, and in how many bytes each.

    Attributes:
        storage: how they are stored.
        in_file: in a memory-mapped file; for int8 the codes stay in main memory, whole keys in the file.
    """

    storage: KeyStorage = "float32"
    in_file: bool = False

    def key_bytes(self, dim: int) -> tuple[int, int]:
        """Bytes of main memory and of a file that a key takes."""
        return bytes_of_key(dim, self.storage, in_file=self.in_file)

    def __str__(self) -> str:
        if not self.in_file:
            return f"keys as {self.storage}"
        return "keys as int8, whole ones in a file" if self.storage == "int8" else f"keys as {self.storage} in a file"


EVERY_PLACEMENT = tuple(Placement(storage, in_file) for in_file in (False, True) for storage in KEY_STORAGES)


def placements_of(spec: str) -> tuple[Placement, ...]:
    """How a backend can keep its raw keys: as its spec says where it says so, else every way that its options allow."""
    _, options = class_and_options(spec)
    if not isinstance(options, KeyStorageOptions):
        return (Placement(),)
    if options.storage != "float32" or options.keys_in != IN_MEMORY:
        return (Placement(options.storage, options.keys_in != IN_MEMORY),)
    return EVERY_PLACEMENT


def bytes_of(spec: str, placement: Placement, *, memories: int, keys: int, dim: int) -> PlannedBytes:
    """What full memories of a backend take with their raw keys placed so; the index at most, also while it is built."""
    cls, options = class_and_options(spec)
    if isinstance(options, KeyStorageOptions):
        keys_in = IN_TEMPORARY if placement.in_file else IN_MEMORY
        options = dataclasses.replace(options, storage=placement.storage, keys_in=keys_in, max_bytes="")
    return plan_bytes(cls, options, num_memories=memories, capacity=keys, dim=dim)
