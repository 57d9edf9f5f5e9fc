"""What a model with memory has read so far, as one thing: put aside and taken up again, saved and loaded.

Evaluation in the middle of training reads other texts, and must find the training rows' memories as it left them; a
run that goes on from a checkpoint must find them as they were saved, not as today's weights would write them.

Letters: B batch rows, G key heads, S columns in sight, C capacity, D head dimension, M memories of a backend.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from recollect.memory_backends.atomic import atomic_folder, recover_folder, write_json
from recollect.memory_backends.errors import MemoryBackendError
from recollect.memory_backends.registry import load_backend
from recollect.model.checkpoints import CheckpointError, read_tensors
from recollect.pretrained.memory import RowMemory
from recollect.pretrained.reading import Reading
from recollect.pretrained.sight import Sight, SightLayer

VERSION = 1
HEADER = "reading.json"
TENSORS = "reading.safetensors"


@dataclass
class ReadingState:
    """The texts that the rows are reading; an empty one is a model that has read nothing.

    Attributes:
        memories: by layer, what left the rows' sight; None where nothing has yet.
        sight: what is in sight; None between texts.
        first: tokens of each row's text that came before the sight.
        holding: whether some memory holds a token.
    """

    memories: dict[int, RowMemory | None] = field(default_factory=dict)
    sight: Sight | None = None
    first: list[int] = field(default_factory=list)
    holding: bool = False


def exchange(reading: Reading, state: ReadingState) -> ReadingState:
    """Puts `state` in and gives what was there; nothing is copied."""
    former = ReadingState(
        {layer.shape.layer: layer.memory for layer in reading.layers}, reading.sight, reading.first, reading.holding
    )
    for layer in reading.layers:
        layer.memory = state.memories.get(layer.shape.layer)
    reading.sight, reading.first, reading.holding = state.sight, state.first, state.holding
    return former


def save_reading(reading: Reading, folder: Path) -> None:
    """Writes what has been read into `folder`, replacing an older state whole or not at all."""
    tensors: dict[str, Tensor] = {}
    sight = reading.sight
    with atomic_folder(folder) as new:
        for layer in reading.layers:
            if layer.memory is not None:
                name = str(layer.shape.layer)
                layer.memory.backend.save(new / f"layer{name}")
                tensors |= {
                    f"memory.{name}.values": layer.memory.values,
                    f"memory.{name}.numbers": layer.memory.numbers,
                }
        if sight is not None:
            tensors |= {f"sight.{name}": getattr(sight, name) for name in ("mask", "enters", "positions")}
            tensors |= {f"sight.piece.{number}": piece for number, piece in enumerate(sight.pieces)}
            for layer in reading.layers:
                held = sight.layers[layer.shape.layer]
                assert held.keys is not None
                assert held.values is not None
                tensors[f"sight.{layer.shape.layer}.keys"] = held.keys
                tensors[f"sight.{layer.shape.layer}.values"] = held.values
        # A copy: what is in sight may be a view of something larger.
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, new / TENSORS)
        header = {
            "version": VERSION,
            "settings": reading.settings.to_dict(),
            "first": reading.first,
            "holding": reading.holding,
            "memories": [layer.shape.layer for layer in reading.layers if layer.memory is not None],
            "sight": None
            if sight is None
            else {"counts": sight.counts, "pieces": len(sight.pieces), "restarted": sight.restarted},
        }
        write_json(new / HEADER, header)


def load_reading(reading: Reading, folder: Path) -> None:
    """Brings back what `save_reading` wrote.

    Raises:
        CheckpointError: there is no such state, it is damaged, or of a memory with other settings.
    """
    recover_folder(folder)
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["version"] != VERSION:
            raise CheckpointError(f"{folder} has version {header['version']!r}; this release reads version {VERSION}")
        saved, present = header["settings"], reading.settings.to_dict()
        for name in sorted(set(saved) | set(present)):
            if saved.get(name) != present.get(name):
                raise CheckpointError(
                    f"{folder} is of a memory with {name}={saved.get(name)!r}, this one has {present.get(name)!r}: "
                    "attach it with the settings that the run began with"
                )
        exchange(reading, _restored(reading, folder, header, read_tensors(folder / TENSORS)))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no state of a memory ({error.filename} is missing)") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryBackendError) as error:
        raise CheckpointError(f"the state of the memory in {folder} is damaged ({error})") from error


def _restored(reading: Reading, folder: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> ReadingState:
    device = next(reading.base.parameters()).device
    state = ReadingState(first=[int(count) for count in header["first"]], holding=bool(header["holding"]))
    for layer in reading.layers:
        name = layer.shape.layer
        if name not in header["memories"]:
            continue
        memory = RowMemory(layer.shape, layer.settings, len(state.first), device)
        memory.backend = load_backend(folder / f"layer{name}", device=memory.backend.device)
        memory.values.copy_(tensors[f"memory.{name}.values"])
        memory.numbers.copy_(tensors[f"memory.{name}.numbers"])
        state.memories[name] = memory
    about = header["sight"]
    if about is not None:
        state.sight = Sight(
            tensors["sight.mask"].to(device),
            tensors["sight.enters"].to(device),
            tensors["sight.positions"].to(device),
            [tensors[f"sight.piece.{number}"].to(device) for number in range(about["pieces"])],
            [int(count) for count in about["counts"]],
            restarted=bool(about["restarted"]),
        )
        for layer in reading.layers:
            held = SightLayer()
            held.update(*(tensors[f"sight.{layer.shape.layer}.{part}"].to(device) for part in ("keys", "values")))
            state.sight.layers[layer.shape.layer] = held
    return state


__all__ = ["ReadingState", "exchange", "load_reading", "save_reading"]
