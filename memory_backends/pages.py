"""Large arrays whose pages come into being when they are first written: in main memory, or in a file.

A memory of ten million keys that holds a thousand should take the bytes of a thousand. `torch.zeros` writes every page
of what it makes, so arrays of some size are made of the operating system's own zero pages instead.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from recollect.memory_backends.errors import DiskFull, InvalidInput
from recollect.memory_backends.options import IN_TEMPORARY
from recollect.memory_backends.out_of_memory import readable

SMALL_BYTES = 1 << 20
"""Below this an ordinary tensor is made: nothing is lost by writing it all, and mappings come in whole pages."""

RESIDENT_BYTES = 128 << 20
"""Bytes of a file that may be mapped into the process before the mapping is let go: the pages stay in the system's
cache, from where they come back without reading the disk as long as nobody else wants that memory."""


def lazy_zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Zeros of which only the pages that are written take memory; on a GPU, `torch.zeros`."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < SMALL_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Rows that are gathered from all over a large memory miss the address cache at every row otherwise.
        with contextlib.suppress(OSError):  # a kernel that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class FileArray:
    """A tensor in a memory-mapped file that has no name: it is gone when the process ends, however it ends.

    The file's blocks are reserved at once, so that a full disk is an error here and never a crash while writing.

    Args:
        shape: of the tensor.
        dtype: its type.
        where: a folder, made if need be, or "temporary" for the system's own.

    Attributes:
        tensor: zeros until written; a view of the file.

    Raises:
        DiskFull: the folder's file system has not enough room.
        InvalidInput: the folder cannot be made or written to.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, where: str) -> None:
        self.nbytes = math.prod(shape) * dtype.itemsize
        folder = Path(tempfile.gettempdir()) if where == IN_TEMPORARY else Path(where).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix="recollect-", suffix=".keys", dir=folder)
        except OSError as error:
            raise InvalidInput(f"keys_in={where!r}: no file can be made in {folder} ({error.strerror})") from error
        try:
            _reserve(descriptor, self.nbytes, folder)
            self._pages = mmap.mmap(descriptor, self.nbytes)
        finally:
            os.close(descriptor)
            # A mapped file without a name lives as long as the mapping. Windows cannot do so: there it stays behind.
            with contextlib.suppress(PermissionError):
                os.unlink(name)
        # Rows are read from all over; reading ahead would fetch what nobody asked for.
        if hasattr(mmap, "MADV_RANDOM"):
            self._pages.madvise(mmap.MADV_RANDOM)
        self.tensor = torch.frombuffer(self._pages, dtype=dtype).view(shape)
        self._touched = 0

    def touch(self, size: int) -> None:
        """Notes that `size` bytes were read or written, and lets the mapping go where it has grown too large.

        What was written stays in the system's cache until it is on disk; nothing is lost.
        """
        self._touched += size
        if self._touched >= RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    message = (
        f"{folder} has {readable(free)} free, and a file of keys of {readable(size)} was asked for: free some space, "
        "name another folder in keys_in, or take fewer keys"
    )
    if size > free:
        raise DiskFull(message)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(message) from error
        raise
