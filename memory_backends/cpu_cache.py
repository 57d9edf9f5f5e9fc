"""Where the compiled loops of `cpu_kernels` are kept, so that a machine compiles them once.

Not beside the source, where numba would put them: that folder may not be ours to write, and numba would look only at
the file of a loop, not at the instructions that it is made of. So the folder is named by a digest of both files, in
the user's cache folder or the one that CACHE_VARIABLES name. Where none can be written, loops are compiled every time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import platformdirs
from numba.core import config as numba_config

config: Any = numba_config
Function = TypeVar("Function", bound=Callable[..., Any])

CACHE_VARIABLES = ("NUMBA_CACHE_DIR", "RECOLLECT_CACHE")
"""Environment variables that may name the folder, the first before the second."""

_SOURCES = ("cpu_kernels.py", "cpu_instructions.py", "cpu_cache.py")
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "nnan"}}


@cache
def folder() -> Path | None:
    """The folder of compiled code, made if need be; None where it cannot be written."""
    digest = hashlib.sha256(numba.__version__.encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    base = next(filter(None, map(os.environ.get, CACHE_VARIABLES)), platformdirs.user_cache_dir("recollect"))
    path = Path(base).expanduser() / "kernels" / digest.hexdigest()[:16]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path, os.W_OK) else None


def compiled(function: Function) -> Function:
    """`function` compiled by numba at its first call: without the interpreter lock, and kept if it can be."""
    path = folder()
    if path is None:
        return numba.njit(**_OPTIONS)(function)
    former, config.CACHE_DIR = config.CACHE_DIR, str(path)
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    finally:
        config.CACHE_DIR = former
