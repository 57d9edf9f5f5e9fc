"""Where a memory's values lie: beside their keys' slots, in float32 or bfloat16, in main memory or in a file.

Letters: M memories, C capacity, D head dimension, N queries, K neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.memory_backends.errors import InvalidSpec, UnsupportedOperation
from recollect.memory_backends.options import IN_MEMORY
from recollect.memory_backends.pages import FileArray, lazy_zeros
from recollect.memory_backends.spec import parse_spec

FLOAT32 = "float32"
_TYPES = {FLOAT32: torch.float32, "bfloat16": torch.bfloat16}


class ValueStore:
    """Values (M, C, D), read and written by row m * C + slot.

    Args:
        spec: 'float32' or 'bfloat16' (half the bytes), and where: 'bfloat16:in=temporary' is a memory-mapped file in
            the system's temporary folder, 'bfloat16:in=/scratch' one in that folder.
        shape: (M, C, D).
        device: where attention reads.

    Attributes:
        tensor: (M, C, D) of that type; a slot that was never written takes no main memory.

    Raises:
        DiskFull, InvalidInput: no file can be made in that folder.
        InvalidSpec: the string is none of these.
        UnsupportedOperation: a file was asked for values that lie on another device.
    """

    def __init__(self, spec: str, shape: tuple[int, int, int], device: torch.device) -> None:
        self.dtype, where = parse_values(spec)
        self._file: FileArray | None = None
        if where == IN_MEMORY:
            self.tensor = lazy_zeros(*shape, dtype=self.dtype, device=device)
        elif device.type != "cpu":
            raise UnsupportedOperation(f"values={spec!r} is for values on the CPU; on {str(device)!r} leave out 'in'")
        else:
            self._file = FileArray(shape, self.dtype, where)
            self.tensor = self._file.tensor

    @property
    def is_plain(self) -> bool:
        """Whether values are float32 in main memory, where any operation may read them."""
        return self.dtype == torch.float32 and self._file is None

    @property
    def value_bytes(self) -> int:
        """Bytes of main memory that a value takes."""
        return 0 if self._file is not None else self.tensor.shape[2] * self.tensor.element_size()

    def read(self, rows: Tensor) -> Tensor:
        """Values (N, K, D) float32 in rows (N, K) int64."""
        found = functional.embedding(rows, self.tensor.flatten(0, 1)).float()
        self._touch(rows.numel())
        return found

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Puts values (n, D) into rows (n,) int64."""
        self.tensor.view(-1, self.tensor.shape[2])[rows] = values.to(self.dtype)
        self._touch(len(rows))

    def _touch(self, rows: int) -> None:
        if self._file is not None:
            self._file.touch(rows * self.tensor.shape[2] * self.tensor.element_size())


def parse_values(spec: str) -> tuple[torch.dtype, str]:
    """Type and place that a string such as 'bfloat16:in=temporary' names.

    Raises:
        InvalidSpec: it names none.
    """
    name, options = parse_spec(spec)
    where = options.pop("in", IN_MEMORY)
    if name not in _TYPES or options:
        raise InvalidSpec(f"values={spec!r} is none of {', '.join(_TYPES)}, or one of them with ':in=FOLDER'")
    return _TYPES[name], where
