"""Checkpoints: a folder with `model.safetensors`, `config.json` and `tokenizer.json`, written whole or not at all.

Nothing is ever unpickled. The weights may be stored in bfloat16, half the size; they are computed with in float32.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from recollect.memory_backends.atomic import write_bytes, write_json
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.tokenizer import Tokenizer, load_tokenizer
from recollect.model.transformer import MemorizingTransformer

WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "MODEL_CARD.md"
REFERENCE = "reference"
"""Stands for the shipped model where a checkpoint is asked for by name."""
FORMAT = "recollect-checkpoint"
VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CheckpointError(ValueError):
    """A folder that holds no usable checkpoint; the message names the file and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A model, its tokenizer, and what is known about how it came to be.

    metadata: free JSON values (steps, tokens, seeds, corpus digest, ...).
    digest: sha256 of the weights' file and the configuration; names the model in result files.
    """

    model: MemorizingTransformer
    tokenizer: Tokenizer
    config: ModelConfig
    metadata: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    path: Path | None = None


def save_checkpoint(
    directory: str | Path,
    model: MemorizingTransformer,
    tokenizer: Tokenizer,
    *,
    metadata: dict[str, Any] | None = None,
    dtype: str = "float32",
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint into `directory`, made if missing; other files in it stay.

    Each file replaces its predecessor in one move; `config.json` comes last and holds the digests of the others, so
    that a folder written half is recognised as such.

    Args:
        weights: by name, whole, where the model's own are spread over several processes.

    Raises:
        CheckpointError: `dtype` is not float32 or bfloat16, or the vocabularies of model and tokenizer do not fit.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    _check_vocabularies(model.config, tokenizer, Path(directory))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in (model.state_dict() if weights is None else weights).items()
    }
    # Not safetensors' own writer: on a full disk it raises an error of its own, not one that names disk and file.
    write_bytes(directory / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": FORMAT}))
    tokenizer.save(directory / TOKENIZER)
    write_json(
        directory / CONFIG,
        {
            "format": FORMAT,
            "version": VERSION,
            "model": model.config.to_dict(),
            "weights": {"dtype": dtype, "sha256": _digest(directory / WEIGHTS)},
            "tokenizer": {"digest": tokenizer.digest},
            "metadata": metadata or {},
        },
    )


def load_checkpoint(directory: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads a checkpoint that `save_checkpoint` wrote.

    Raises:
        CheckpointError: a file is missing, truncated, altered or foreign, or the files do not belong together.
    """
    directory = Path(directory).expanduser()
    header = _read_header(directory)
    try:
        config = ModelConfig.from_dict(header["model"])
        expected, tokenizer_digest = header["weights"]["sha256"], header["tokenizer"]["digest"]
    except ConfigurationError as error:
        raise CheckpointError(f"{directory / CONFIG} describes a model that cannot be made: {error}") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory / CONFIG} lacks {error}: it is not from this program; save it again"
        ) from error
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{directory} is no checkpoint: {WEIGHTS} is missing")
    tensors = read_tensors(weights)
    if _digest(weights) != expected:
        raise CheckpointError(
            f"{weights} is not the file that {CONFIG} was written for; copy or save the checkpoint again"
        )
    try:
        tokenizer = load_tokenizer(directory / TOKENIZER)
    except ValueError as error:
        raise CheckpointError(f"{directory} holds no usable tokenizer: {error}") from error
    if tokenizer.digest != tokenizer_digest:
        raise CheckpointError(f"{directory / TOKENIZER} is not the tokenizer that the model was trained with")
    _check_vocabularies(config, tokenizer, directory)
    model = MemorizingTransformer(config, tokenizer)
    _load_weights(model, tensors, weights)
    metadata = header.get("metadata")
    return Checkpoint(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        config=config,
        metadata=metadata if isinstance(metadata, dict) else {},
        digest=_digest(weights, directory / CONFIG),
        path=directory,
    )


def reference_checkpoint() -> Path:
    """The folder of the reference model that ships with the package."""
    folder = Path(__file__).parent / "reference"
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"this installation has no reference model in {folder}; train one with: "
            f"recollect train --preset reference --output {folder}"
        )
    return folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all read into memory; raises CheckpointError for anything else."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); copy or save the checkpoint again"
        ) from error


def _read_header(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no checkpoint folder {str(directory)!r}; give one that `recollect train` or save_pretrained "
            f"wrote, or, to MemorizingTransformer.from_pretrained, {REFERENCE!r} for the shipped model"
        )
    if not path.is_file():
        raise CheckpointError(f"{directory} is no checkpoint: {CONFIG} is missing")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is truncated or not JSON ({error}); copy or save the checkpoint again"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        hint = "; a Hugging Face model is given a memory by attach_memory" if _is_hugging_face(header) else ""
        raise CheckpointError(f"{path} is of another program: its format is not {FORMAT!r}{hint}")
    if header.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {header.get('version')!r}; this release reads version {VERSION}")
    return header


def _is_hugging_face(header: object) -> bool:
    return isinstance(header, dict) and "model_type" in header


def _check_vocabularies(config: ModelConfig, tokenizer: Tokenizer, directory: Path) -> None:
    if tokenizer.vocabulary_size > config.vocabulary_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocabulary_size} tokens and the model only "
            f"{config.vocabulary_size}"
        )


def _load_weights(model: MemorizingTransformer, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    missing, foreign = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or foreign:
        parts = [f"lacks {', '.join(missing[:3])}"] * bool(missing) + [f"has {', '.join(foreign[:3])}"] * bool(foreign)
        raise CheckpointError(f"{path} holds the weights of another model: it {' and '.join(parts)}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} holds the weights of another model: {name} has shape {tuple(tensors[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})


def _digest(*paths: Path) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()
