"""Options that the built-in backends share: how keys are stored, where, and in how many bytes at most.

A backend's own options inherit from `KeyStorageOptions`, and the base class makes the key ring by them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

KeyStorage = Literal["float32", "bfloat16", "int8"]
KEY_STORAGES: tuple[KeyStorage, ...] = ("float32", "bfloat16", "int8")

IN_MEMORY = "memory"
IN_TEMPORARY = "temporary"

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")


def parse_bytes(text: str) -> int:
    """Bytes as people write them, such as 2GiB, 500MB or 1.5 TiB; a bare number is bytes.

    Raises:
        ValueError: it is not so written, or not above zero.
    """
    match = _SIZE.match(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"{text!r} is no number of bytes: write 2GiB, 500MB or 1000000 (units are B, kB, KiB, MB ... TiB)"
        )
    size = int(float(match[1]) * unit)
    if size < 1:
        raise ValueError(f"{text!r} is no budget: it must be at least one byte")
    return size


@dataclass(frozen=True, kw_only=True)
class KeyStorageOptions:
    """Options of every backend that keeps its raw keys in the key ring; by keyword, whatever a subclass adds."""

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

    def __post_init__(self) -> None:
        if not self.keys_in:
            raise ValueError("keys_in is empty: write memory, temporary or a folder")
        if self.max_bytes:
            try:
                parse_bytes(self.max_bytes)
            except ValueError as error:
                raise ValueError(f"max_bytes={error}") from None

    @property
    def budget(self) -> int | None:
        """`max_bytes` as a number; None where no budget is stated."""
        return parse_bytes(self.max_bytes) if self.max_bytes else None
