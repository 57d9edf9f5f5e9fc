"""One run at a time writes into a folder of results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def writing_alone(folder: Path, what: str, error: type[Exception]) -> Iterator[None]:
    """`with writing_alone(folder, "comparison", CompareError):` holds the folder's lock.

    Raises:
        error: another process holds it.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise error(f"another {what} is writing to {folder}: wait for it, or give another output folder") from None
    try:
        yield
    finally:
        lock.release()
