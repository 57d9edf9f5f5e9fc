"""What tells that memory ran out, whichever library it ran out in, and what to do about it."""

from __future__ import annotations

import contextlib
import os
import re
from functools import cache
from pathlib import Path

import torch

from recollect.memory_backends.errors import OutOfMemory

REMEDY = (
    "Take less: storage=bfloat16 or storage=int8 in the spec where the backend has it, a smaller capacity, fewer "
    "queries in one call, or a backend that keeps codes instead of keys, such as faiss-ivfpq"
)
_SAYINGS = (
    "can't allocate memory",  # torch's DefaultCPUAllocator
    "not enough memory",  # the same on Windows, and hnswlib
    "out of memory",  # CUDA, MPS
    "bad_alloc",  # C++: faiss, ScaNN
    "posix_memalign",  # faiss's aligned tables
    "cudamalloc",  # faiss on a GPU
    "alloc failed",
)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[kmg]i?b)", re.IGNORECASE)


def ran_out(error: BaseException) -> bool:
    """Whether an error of any library says that memory ran out."""
    if isinstance(error, OutOfMemory):
        return False  # already told
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


def as_out_of_memory(error: BaseException, doing: str) -> OutOfMemory:
    """The error to raise instead, which names the bytes that were asked for, where the library says so."""
    asked = _ASKED.search(str(error))
    size = f" for {readable(round(float(asked[1]) * _UNITS[asked[2].lower()]))}" if asked else ""
    return OutOfMemory(f"not enough memory{size} {doing}. {REMEDY}. ({_first_line(error)})")


def check_fits(size: int, doing: str) -> None:
    """Refuses what this machine can never hold; otherwise the system would end the process without a word.

    Args:
        size: bytes of main memory that are needed at once.
        doing: what for, such as "to make ...".

    Raises:
        OutOfMemory: it is more than the machine, or the container that this process runs in, has in all.
    """
    have = machine_bytes()
    if have is not None and size > have:
        raise OutOfMemory(
            f"not enough memory {doing}: {readable(size)} are needed, and this machine has {readable(have)}. {REMEDY}"
        )


@cache
def machine_bytes() -> int | None:
    """Main memory of this machine, or of the container that this process runs in; None where nobody says."""
    sizes = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no container, or one without a limit ("max")
            continue
    return min((size for size in sizes if size > 0), default=None)


def readable(size: int) -> str:
    """Bytes as people write them: 1.5 GiB."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
