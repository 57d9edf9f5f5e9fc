"""A memory made of memories that others saved: rows that were written by four processes go on in two, or in one.

An index belongs to the memories that it was built for, so here only the keys are read, with their slots, and the index
is made anew of them. For an exact backend nothing differs. An approximate one finds other neighbours than before, by as
much as an index built at once differs from one that grew.

Letters: M memories, C capacity.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.calls import plain_tensors
from recollect.memory_backends.errors import CorruptMemory, InvalidInput
from recollect.memory_backends.registry import make_backend
from recollect.memory_backends.storage import HEADER, read_header

_SHARED = ("spec", "capacity", "dim", "metric", "seed")
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Piece:
    """Memories `start` to `stop` - 1 of those that were saved in `directory`."""

    directory: Path
    start: int
    stop: int


@plain_tensors
def assemble_backend(
    pieces: Sequence[Piece], *, device: str | torch.device = "cpu", first_memory: int = 0
) -> MemoryBackend:
    """A backend of the memories of `pieces`, in order, each as long as it was and with every key in its slot.

    Args:
        pieces: of backends with one spec, capacity, dimension, metric and seed.
        device: where the memory lives.
        first_memory: as for `MemoryBackend.number_from`.

    Raises:
        CorruptMemory: a folder is truncated, altered, or holds no memory.
        InvalidInput: there are no pieces, they lie outside of what was saved, or the saved ones do not fit together.
    """
    if not pieces:
        raise InvalidInput("a memory cannot be assembled of nothing: give at least one piece")
    headers = [read_header(piece.directory) for piece in pieces]
    for piece, header in zip(pieces, headers, strict=True):
        differing = [name for name in _SHARED if header.get(name) != headers[0].get(name)]
        if differing:
            name = differing[0]
            raise InvalidInput(
                f"{piece.directory} has {name}={header.get(name)!r} and {pieces[0].directory} "
                f"{headers[0].get(name)!r}: only memories of one kind can be put together"
            )
        if not 0 <= piece.start < piece.stop <= header["num_memories"]:
            raise InvalidInput(
                f"{piece.directory} holds {header['num_memories']} memories; {piece.start} to {piece.stop - 1} are not "
                "among them"
            )
    about = headers[0]
    backend = make_backend(
        about["spec"],
        num_memories=sum(piece.stop - piece.start for piece in pieces),
        capacity=about["capacity"],
        dim=about["dim"],
        metric=about["metric"],
        device=device,
        seed=about["seed"],
    )
    backend.number_from(first_memory)
    arrays = backend.ring.named_arrays()
    if backend._norms is not None:
        arrays["norms"] = backend._norms
    place = 0
    for piece, header in zip(pieces, headers, strict=True):
        after = place + piece.stop - piece.start
        totals = header["totals"]
        if len(totals) != header["num_memories"]:
            raise CorruptMemory(f"{piece.directory / HEADER} counts keys for {len(totals)} memories; save it again")
        for name, array in arrays.items():
            _read_some(piece, name, header["arrays"].get(name), array[place:after], backend)
        backend.ring.totals[place:after] = torch.tensor(totals[piece.start : piece.stop], dtype=torch.int64)
        place = after
    backend._index_anew(torch.arange(backend.num_memories))
    return backend


def _read_some(piece: Piece, name: str, about: dict[str, Any] | None, into: Tensor, backend: MemoryBackend) -> None:
    """Reads one array of some memories into `into` (M', C, ...), and the rest of its file for the checksum."""
    path = piece.directory / f"{name}.bin"
    dtype = str(into.dtype).removeprefix("torch.")
    if about is None or about["dtype"] != dtype or tuple(about["shape"][2:]) != tuple(into.shape[2:]):
        raise CorruptMemory(f"{path} does not hold {dtype} of shape {tuple(into.shape)}; save the memory again")
    memories, filled = about["shape"][:2]
    of_memory = filled * math.prod(into.shape[2:]) * into.element_size()
    if not path.is_file() or path.stat().st_size != memories * of_memory or filled > into.shape[1]:
        raise CorruptMemory(f"{path} is missing or truncated; save the memory again")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for memory in range(memories):
            wanted = piece.start <= memory < piece.stop
            raw = np.empty(of_memory if wanted else 0, dtype=np.uint8)
            for start in range(0, of_memory, _CHUNK_BYTES):
                part = np.frombuffer(stream.read(min(_CHUNK_BYTES, of_memory - start)), dtype=np.uint8)
                digest.update(part.data)
                if wanted:
                    raw[start : start + len(part)] = part
            if wanted and of_memory:
                if sys.byteorder == "big":
                    raw = np.ascontiguousarray(raw.reshape(-1, into.element_size())[:, ::-1]).reshape(-1)
                read = torch.from_numpy(raw).view(into.dtype).view(filled, *into.shape[2:])
                into[memory - piece.start, :filled].copy_(read)
                backend.ring.touch(of_memory)
    if digest.hexdigest() != about["sha256"]:
        raise CorruptMemory(f"{path} is altered: its checksum differs; save the memory again")


__all__ = ["Piece", "assemble_backend"]
