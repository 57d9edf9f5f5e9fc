"""The state of an unfinished training run on disk, so that an interrupted run goes on as if nothing had happened.

It holds the float32 weights, the optimisers' moments, caches and memories with what they count, the streams' positions,
and torch's random state.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from recollect.memory_backends.atomic import atomic_folder, write_json
from recollect.memory_backends.errors import MemoryBackendError
from recollect.memory_backends.registry import load_backend
from recollect.model.attention import LayerState
from recollect.model.checkpoints import CheckpointError, read_tensors
from recollect.model.optimizers import Optimizers
from recollect.model.streams import DocumentStreams
from recollect.model.transformer import MemorizingTransformer, ModelState

FOLDER = "training"
VERSION = 2


def save_training_state(
    output: Path,
    model: MemorizingTransformer,
    optimizers: Optimizers,
    state: ModelState,
    streams: DocumentStreams,
    progress: dict[str, Any],
) -> None:
    """Writes the state into `output`/training, replacing an older one whole or not at all.

    Args:
        progress: JSON values of the loop itself; must hold "step" and "options".
    """
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizers.state_tensors().items()}
    tensors |= {f"state.{name}": tensor for name, tensor in _layer_tensors(state).items()}
    tensors |= {
        f"{name}.{number}": tensor
        for number, memory in enumerate(state.memories)
        for name, tensor in memory.state_tensors().items()
    }
    tensors["random.torch"] = torch.get_rng_state()
    with atomic_folder(output / FOLDER) as folder:
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        (folder / "state.safetensors").write_bytes(save(plain))
        for number, memory in enumerate(state.memories):
            memory.backend.save(folder / f"memory{number}")
        write_json(folder / "state.json", {"version": VERSION, "streams": streams.state_dict(), "progress": progress})


def load_training_state(
    output: Path,
    model: MemorizingTransformer,
    optimizers: Optimizers,
    state: ModelState,
    streams: DocumentStreams,
    options: dict[str, Any],
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
        model.load_state_dict(_under("model.", tensors))
        optimizers.load_state_tensors(_under("optimizer.", tensors))
        _restore_layers(state, _under("state.", tensors))
        for number, memory in enumerate(state.memories):
            memory.backend = load_backend(folder / f"memory{number}", device=memory.backend.device)
            for name, tensor in memory.state_tensors().items():
                tensor.copy_(tensors[f"{name}.{number}"])
        streams.load_state_dict(header["streams"])
        torch.set_rng_state(tensors["random.torch"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryBackendError) as error:
        raise CheckpointError(
            f"the training state in {folder} is damaged ({error}); remove that folder to start the run anew"
        ) from error
    return dict(progress)


def _check_options(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(set(saved) | set(wanted)):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder} is of a run with {name}={saved.get(name)!r}, not {wanted.get(name)!r}: give the same "
                "options, or another output folder, or start anew without resuming"
            )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parts(state: ModelState) -> dict[str, list[LayerState]]:
    return {"trunk": state.trunk.layers, "upper": state.upper.layers}


def _layer_tensors(state: ModelState) -> dict[str, Tensor]:
    return {
        f"{part}.{number}.{item.name}": getattr(layer, item.name)
        for part, layers in _parts(state).items()
        for number, layer in enumerate(layers)
        for item in fields(LayerState)
    }


def _restore_layers(state: ModelState, tensors: dict[str, Tensor]) -> None:
    for part, layers in _parts(state).items():
        for number, layer in enumerate(layers):
            for item in fields(LayerState):
                old = getattr(layer, item.name)
                setattr(layer, item.name, tensors[f"{part}.{number}.{item.name}"].to(old.device))
