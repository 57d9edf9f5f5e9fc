"""Options that the built-in backends share: how keys are stored, where, and in how many bytes at most.

A backend's own options inherit from `KeyStorageOptions`, and the base class makes the key ring by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

KeyStorage = Literal["float32", "bfloat16", "int8"]
KEY_STORAGES: tuple[KeyStorage, ...] = ("float32", "bfloat16", "int8")

IN_MEMORY = "memory"
IN_TEMPORARY = "temporary"


@dataclass(frozen=True)
class KeyStorageOptions:
    """Options of every backend that keeps its raw keys in the key ring."""

    storage: KeyStorage = field(
        default="float32",
        metadata={"help": "how raw keys are stored: float32, bfloat16 (half the bytes), int8 (a quarter, and a scale)"},
    )
    keys_in: str = field(
        default=IN_MEMORY,
        metadata={
            "help": "where raw keys lie: memory, or a memory-mapped file in a folder named here (temporary: the "
            "system's own); int8 keeps its codes in memory and whole keys in the file, by which it scores anew"
        },
    )
    max_bytes: str = field(
        default="",
        metadata={"help": "refuse to be made if keys and index would take more main memory than this, such as 2GiB"},
    )
