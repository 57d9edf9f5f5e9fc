"""How a memory lies on disk: a folder with one JSON file and raw little-endian arrays, each with its checksum.

The JSON file holds the checksum of every other file, and its own. Only slots that were ever written are saved, and
nothing is held in memory as a whole on the way, so that a memory that fills a machine can be saved and loaded there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.atomic import atomic_folder, recover_folder, write_text
from recollect.memory_backends.errors import CorruptMemory, DiskFull
from recollect.memory_backends.out_of_memory import readable

if TYPE_CHECKING:
    from recollect.memory_backends.base import MemoryBackend

FORMAT = "recollect-memory"
VERSION = 2
READABLE = (1, 2)
"""Version 1 saved every slot as float32 and had no checksum of its JSON file."""
HEADER = "memory.json"
CHUNK_BYTES = 1 << 24
_CHECKSUM = re.compile(rb'("checksum": ")([0-9a-f]{64})(")')
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "<f4": torch.float32}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_backend(backend: MemoryBackend, directory: Path) -> None:
    """Writes `backend` into `directory`, replacing what a former save left there, whole or not at all.

    Raises:
        DiskFull: there is no room for it.
    """
    arrays = dict(backend.ring.named_arrays())
    if backend._norms is not None:
        arrays["norms"] = backend._norms
    filled = int(backend.ring.lengths.max())
    size = sum(_row_bytes(array) for array in arrays.values()) * filled * backend.num_memories
    try:
        with atomic_folder(directory) as folder:
            # Told beforehand where it can be: an hour of writing that must fail helps nobody.
            if size > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, "No space left on device")
            described = {
                name: _write_array(folder / f"{name}.bin", array, filled, backend) for name, array in arrays.items()
            }
            index = folder / "index"
            index.mkdir()
            backend._save(index)
            files = sorted(file for file in index.rglob("*") if file.is_file())
            _write_header(
                folder / HEADER,
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "spec": backend.spec,
                    "num_memories": backend.num_memories,
                    "capacity": backend.capacity,
                    "dim": backend.dim,
                    "metric": backend.metric,
                    "seed": backend.seed,
                    "totals": backend.ring.totals.tolist(),
                    "arrays": described,
                    "index": {str(file.relative_to(index)): _file_digest(file) for file in files},
                },
            )
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise DiskFull(
            f"{directory} has no room for a {backend.spec!r} memory ({readable(size)} of keys and its index, "
            f"{readable(shutil.disk_usage(_existing(directory)).free)} free): free some space or save it elsewhere; "
            "what was saved there before is as it was"
        ) from error


def read_header(directory: Path) -> dict[str, Any]:
    """The JSON that describes a saved memory.

    Raises:
        CorruptMemory: the folder holds no memory, or one that is incomplete or of an unknown version.
    """
    recover_folder(directory)
    path = directory / HEADER
    try:
        raw = path.read_bytes()
        header = json.loads(raw.decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptMemory(f"{directory} holds no saved memory: {HEADER} is missing") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptMemory(f"{path} is not readable JSON ({error}); save the memory again") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CorruptMemory(f"{path} was not written by recollect")
    version = header.get("version")
    if version not in READABLE:
        can = " and ".join(map(str, READABLE))
        raise CorruptMemory(f"{path} has version {version!r}; this release reads versions {can}")
    if (version > 1 or "checksum" in header) and header.get("checksum") != _header_digest(raw):
        raise CorruptMemory(f"{path} is altered: its checksum differs; save the memory again")
    return header


def restore_backend(backend: MemoryBackend, directory: Path, header: dict[str, Any]) -> None:
    """Fills an empty backend, made with the header's values, from its saved arrays.

    Raises:
        CorruptMemory: a file is missing, truncated or altered; the message names it.
    """
    index = directory / "index"
    for name, digest in header["index"].items():
        if not (index / name).is_file() or _file_digest(index / name) != digest:
            raise CorruptMemory(f"{index / name} is missing or altered; save the memory again")
    arrays = backend.ring.named_arrays()
    if backend._norms is not None:
        arrays["norms"] = backend._norms
    for name, array in arrays.items():
        _read_array(directory / f"{name}.bin", header["arrays"][name], array, backend)
    totals = torch.tensor(header["totals"], dtype=torch.int64)
    if totals.shape != backend.ring.totals.shape or bool((totals < 0).any()):
        raise CorruptMemory(f"{directory / HEADER} counts keys for {len(totals)} memories, not {backend.num_memories}")
    backend.ring.totals.copy_(totals)
    backend._restore(index)


def _write_array(path: Path, array: Tensor, filled: int, backend: MemoryBackend) -> dict[str, Any]:
    """Writes the first `filled` slots of an array (M, C, ...) and returns what is needed to read them back."""
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for part in _parts(array, filled):
            raw = _raw(part.cpu().contiguous())
            # Not `tofile`: on a full disk it raises an error without a number, which nobody can tell from another.
            stream.write(raw.data)
            digest.update(raw.data)
            backend.ring.touch(len(raw))
    shape = [array.shape[0], filled, *array.shape[2:]]
    return {"shape": shape, "dtype": str(array.dtype).removeprefix("torch."), "sha256": digest.hexdigest()}


def _read_array(path: Path, about: dict[str, Any], into: Tensor, backend: MemoryBackend) -> None:
    """Reads what `_write_array` wrote into the first slots of `into` (M, C, ...)."""
    shape, dtype = tuple(about["shape"]), _TYPES.get(about["dtype"])
    if dtype != into.dtype or len(shape) != into.dim() or shape[1] > into.shape[1] or shape[::2] != into.shape[::2]:
        raise CorruptMemory(
            f"{path} holds {about['dtype']} of shape {shape}, not {str(into.dtype).removeprefix('torch.')} of shape "
            f"{tuple(into.shape)}; save the memory again"
        )
    expected = math.prod(shape) * into.element_size()
    if not path.is_file():
        raise CorruptMemory(f"{path} is missing; save the memory again")
    if path.stat().st_size != expected:
        raise CorruptMemory(f"{path} has {path.stat().st_size} bytes instead of {expected}; save the memory again")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for part in _parts(into, shape[1]):
            read = torch.empty(part.shape, dtype=part.dtype)
            raw = _raw(read, copied=False)
            stream.readinto(raw.data)
            digest.update(raw.data)
            if sys.byteorder == "big":
                raw.reshape(-1, read.element_size())[:] = raw.reshape(-1, read.element_size())[:, ::-1].copy()
            part.copy_(read)
            backend.ring.touch(len(raw))
    if digest.hexdigest() != about["sha256"]:
        raise CorruptMemory(f"{path} is altered: its checksum differs; save the memory again")


def _parts(array: Tensor, filled: int) -> Iterator[Tensor]:
    """The first `filled` slots of an array (M, C, ...), in order, some MiB at a time."""
    step = max(1, CHUNK_BYTES // _row_bytes(array))
    for memory in array:
        for start in range(0, filled, step):
            yield memory[start : min(filled, start + step)]


def _raw(part: Tensor, *, copied: bool = True) -> np.ndarray[Any, Any]:
    """The bytes of a contiguous tensor on the CPU, lowest first; its own memory as it is where not copied."""
    raw: np.ndarray[Any, Any] = part.view(-1).view(torch.uint8).numpy()
    if copied and sys.byteorder == "big":
        raw = np.ascontiguousarray(raw.reshape(-1, part.element_size())[:, ::-1]).reshape(-1)
    return raw


def _row_bytes(array: Tensor) -> int:
    return math.prod(array.shape[2:]) * array.element_size()


def _write_header(path: Path, header: dict[str, Any]) -> None:
    """Writes JSON whose last entry is the checksum of the file's bytes with 64 zeros in its place."""
    text = json.dumps({**header, "checksum": "0" * 64}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    raw = text.encode("utf-8")
    write_text(path, _CHECKSUM.sub(rf"\g<1>{hashlib.sha256(raw).hexdigest()}\g<3>".encode(), raw).decode("utf-8"))


def _header_digest(raw: bytes) -> str:
    return hashlib.sha256(_CHECKSUM.sub(rb"\g<1>" + b"0" * 64 + rb"\g<3>", raw)).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_full(error: BaseException) -> bool:
    """Whether an error of Python, or of a library that writes its own index, says that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(saying in str(error) for saying in ("No space left", "Disk quota exceeded", "File too large"))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
