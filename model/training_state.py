"""The state of an unfinished training run on disk, so that an interrupted run goes on as if nothing had happened.

It holds the float32 weights, the optimisers' moments, caches and memories with what they count, the streams' positions,
and torch's random state. Rows lie in folders of their own, one for each process that read some of them:

    state.json                     streams, progress, which rows lie where
    state.safetensors              weights, random state
    optimizer0.safetensors ...     moments, from each process those that it keeps
    rows0-4/state.safetensors      caches, values and counts of rows 0 to 3
    rows0-4/memory0/ ...           the backend of each memory layer for these rows

So one process and many write the same format, and a run goes on with another number of processes than before: every
process takes its rows from the folders that hold them. Where those are the very rows of a folder, indexes come back as
they were; otherwise they are made anew of the keys.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from recollect.memory_backends.assembling import Piece, assemble_backend
from recollect.memory_backends.atomic import atomic_folder, write_json
from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.errors import MemoryBackendError
from recollect.memory_backends.registry import load_backend
from recollect.model.attention import LayerState
from recollect.model.checkpoints import CheckpointError, read_tensors
from recollect.model.distributed import Ranks
from recollect.model.optimizers import Optimizers
from recollect.model.parallel import load_whole_state, whole_state, whole_tensor
from recollect.model.streams import DocumentStreams
from recollect.model.transformer import MemorizingTransformer, ModelState

FOLDER = "training"
VERSION = 3


@dataclass(frozen=True)
class _Rows:
    """Rows `start` to `stop` - 1 and the folder that holds them."""

    folder: Path
    start: int
    stop: int


def save_training_state(
    output: Path,
    model: MemorizingTransformer,
    optimizers: Optimizers,
    state: ModelState,
    streams: DocumentStreams,
    progress: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Writes the state into `output`/training, replacing an older one whole or not at all; every rank calls it.

    Args:
        state: of this rank's rows.
        progress: JSON values of the loop itself; must hold "step" and "options".
    """
    weights = {f"model.{name}": tensor for name, tensor in whole_state(model, ranks).items()}
    moments = {name: whole_tensor(tensor) for name, tensor in optimizers.state_tensors().items()}
    with _shared_folder(output / FOLDER, ranks) as folder:
        start, stop = ranks.rows(streams.batch_size)
        own = folder / f"rows{start}-{stop}"
        own.mkdir()
        _write(own / "state.safetensors", _row_tensors(state))
        for number, memory in enumerate(state.memories):
            memory.backend.save(own / f"memory{number}")
        if ranks.first or not optimizers.replicated:
            _write(folder / f"optimizer{ranks.rank}.safetensors", moments)
        if ranks.first:
            _write(folder / "state.safetensors", {**weights, "random.torch": torch.get_rng_state()})
            share = stop - start
            header = {
                "version": VERSION,
                "streams": streams.state_dict(),
                "progress": progress,
                "rows": [[first, first + share] for first in range(0, streams.batch_size, share)],
                "optimizers": 1 if optimizers.replicated else ranks.count,
            }
            write_json(folder / "state.json", header)


def load_training_state(
    output: Path,
    model: MemorizingTransformer,
    optimizers: Optimizers,
    state: ModelState,
    streams: DocumentStreams,
    options: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """Brings everything to where `save_training_state` left it and returns the saved progress.

    Raises:
        CheckpointError: the state is truncated or foreign, or of a run with other options.
    """
    folder = output / FOLDER
    try:
        header = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if header["version"] != VERSION:
            raise CheckpointError(f"{folder} has version {header['version']!r}; this release reads version {VERSION}")
        progress = header["progress"]
        _check_options(folder, progress["options"], options)
        tensors = read_tensors(folder / "state.safetensors")
        load_whole_state(model, _under("model.", tensors))
        moments: dict[str, Tensor] = {}
        for number in range(header["optimizers"]):
            moments |= read_tensors(folder / f"optimizer{number}.safetensors")
        optimizers.load_state_tensors(moments)
        _restore_rows(folder, header["rows"], state, ranks.rows(streams.batch_size))
        streams.load_state_dict(header["streams"])
        torch.set_rng_state(tensors["random.torch"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryBackendError) as error:
        raise CheckpointError(
            f"the training state in {folder} is damaged ({error}); remove that folder to start the run anew"
        ) from error
    return dict(progress)


@contextlib.contextmanager
def _shared_folder(path: Path, ranks: Ranks) -> Iterator[Path]:
    """`atomic_folder` for all ranks at once: it takes the place of `path` when every rank has ended the block well."""
    if not ranks.several:
        with atomic_folder(path) as folder:
            yield folder
        return
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(atomic_folder(path)) if ranks.first else None
        yield Path(ranks.from_first(lambda: str(made)))
        ranks.wait()  # a rank that failed does not come here, and the folder goes
    ranks.wait()


def _check_options(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(set(saved) | set(wanted)):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder} is of a run with {name}={saved.get(name)!r}, not {wanted.get(name)!r}: give the same "
                "options, or another output folder, or start anew without resuming"
            )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    # Not safetensors' own writer: on a full disk it raises an error of its own, not one that names disk and file.
    path.write_bytes(save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


# Rows -----------------------------------------------------------------------------------------------------------------


def _parts(state: ModelState) -> dict[str, list[LayerState]]:
    return {"trunk": state.trunk.layers, "upper": state.upper.layers}


def _row_tensors(state: ModelState) -> dict[str, Tensor]:
    """Everything of `state` but the backends by name; the first dimension of each counts rows, or parts of rows."""
    tensors = {
        f"state.{part}.{number}.{item.name}": getattr(layer, item.name)
        for part, layers in _parts(state).items()
        for number, layer in enumerate(layers)
        for item in fields(LayerState)
    }
    return tensors | {
        f"{name}.{number}": tensor
        for number, memory in enumerate(state.memories)
        for name, tensor in memory.state_tensors().items()
    }


def _restore_rows(folder: Path, saved: list[list[int]], state: ModelState, wanted: tuple[int, int]) -> None:
    """Fills `state` of rows `wanted` from the folders that hold them."""
    parts = [_Rows(folder / f"rows{start}-{stop}", start, stop) for start, stop in saved]
    sources = [part for part in parts if part.start < wanted[1] and part.stop > wanted[0]]
    if sum(min(part.stop, wanted[1]) - max(part.start, wanted[0]) for part in sources) != wanted[1] - wanted[0]:
        raise CheckpointError(f"{folder} lacks rows {wanted[0]} to {wanted[1] - 1}: it names {saved}")
    with contextlib.ExitStack() as stack:
        files = {part: stack.enter_context(_open(part.folder / "state.safetensors")) for part in sources}

        def read(name: str) -> Tensor:
            return torch.cat([_slice(files[part], name, part, wanted) for part in sources])

        for part, layers in _parts(state).items():
            for number, layer in enumerate(layers):
                for item in fields(LayerState):
                    old = getattr(layer, item.name)
                    setattr(layer, item.name, read(f"state.{part}.{number}.{item.name}").to(old.device))
        for number, memory in enumerate(state.memories):
            memory.backend = _restore_backend(number, sources, wanted, memory.per_row, memory.backend)
            for name, tensor in memory.state_tensors().items():
                tensor.copy_(read(f"{name}.{number}"))


def _restore_backend(
    number: int, sources: list[_Rows], wanted: tuple[int, int], per_row: int, former: MemoryBackend
) -> MemoryBackend:
    """The backend of a memory layer for rows `wanted`: as it was saved if they lie together, else assembled."""
    if (sources[0].start, sources[-1].stop) == wanted and len(sources) == 1:
        backend = load_backend(sources[0].folder / f"memory{number}", device=former.device)
        backend.number_from(former.first_memory)
        return backend
    pieces = []
    for part in sources:
        start, stop = max(part.start, wanted[0]) - part.start, min(part.stop, wanted[1]) - part.start
        pieces.append(Piece(part.folder / f"memory{number}", start * per_row, stop * per_row))
    return assemble_backend(pieces, device=former.device, first_memory=former.first_memory)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} is missing, truncated or not a safetensors file ({error})") from error


def _slice(file: Any, name: str, part: _Rows, wanted: tuple[int, int]) -> Tensor:
    """What a file of rows `part` holds of rows `wanted`."""
    try:
        stored = file.get_slice(name)
        shape = stored.get_shape()
        of_row = shape[0] // (part.stop - part.start)
        start, stop = max(part.start, wanted[0]) - part.start, min(part.stop, wanted[1]) - part.start
        if 0 in shape:  # which safetensors cannot cut
            return file.get_tensor(name)[start * of_row : stop * of_row]
        return stored[start * of_row : stop * of_row]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{part.folder} is truncated or of another model ({error})") from error
