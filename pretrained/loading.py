"""A model folder of either kind: a checkpoint of this package, or a Hugging Face causal language model.

The tokenizer comes along as the package's own `Tokenizer`, so that corpora, token caches and reports treat both alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from recollect.model.checkpoints import (
    CONFIG,
    FORMAT,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    reference_checkpoint,
)
from recollect.model.tokenizer import Tokenizer, load_tokenizer
from recollect.pretrained.identity import MEMORY

REFERENCE = "reference"


@dataclass(frozen=True)
class PretrainedFolder:
    """A Hugging Face model with its tokenizer.

    Attributes:
        path: the folder.
        model: in evaluation mode, on its device; with its memory if the folder was saved with one.
        tokenizer: cuts text as the model's own does, without special tokens.
        prefix: the special tokens that the model's own tokenizer puts before a text, such as `<s>`.
        saved_memory: whether the folder's settings name a memory.
    """

    path: Path
    model: Any
    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    saved_memory: bool


def is_pretrained_folder(folder: str | Path | None) -> bool:
    """Whether a folder holds a Hugging Face model rather than a checkpoint of this package.

    Raises:
        CheckpointError: there is no such folder, or neither kind of model in it.
    """
    if folder is None or str(folder) == REFERENCE:
        return False
    path = Path(folder).expanduser()
    content = _config(path)
    if content.get("format") == FORMAT:
        return False
    if "model_type" in content:
        return True
    raise CheckpointError(
        f"{path / CONFIG} is of neither a recollect checkpoint (format {FORMAT!r}) nor a Hugging Face model "
        "('model_type' is missing)"
    )


def load_own(folder: str | Path | None, device: str = "cpu") -> Checkpoint:
    """A checkpoint of this package; None or 'reference' is the model that ships with it."""
    path = reference_checkpoint() if folder is None or str(folder) == REFERENCE else Path(folder)
    return load_checkpoint(path, device=device)


def load_pretrained(folder: str | Path, device: str = "cpu") -> PretrainedFolder:
    """A Hugging Face causal language model and its tokenizer, from files on this machine alone.

    Raises:
        CheckpointError: the folder cannot be read, or its tokenizer does not fit the model.
        CorpusError: it has no tokenizer, or one without a fast form.
    """
    path = Path(folder).expanduser()
    saved_memory = MEMORY in _config(path)
    tokenizer = load_tokenizer(path)
    model = _load_model(path, saved_memory).to(device).eval()
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if tokenizer.vocabulary_size > vocabulary:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocabulary_size} tokens and the model only {vocabulary}: they do "
            "not belong together"
        )
    return PretrainedFolder(path, model, tokenizer, _prefix(tokenizer), saved_memory)


def _load_model(path: Path, saved_memory: bool) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a Hugging Face model, and the package `transformers` is not installed: "
            "pip install 'recollect[transformers]'"
        ) from error
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # this package shows progress of its own
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        if saved_memory:
            from recollect.pretrained.attach import load_attached

            return load_attached(str(path), **options)
        return transformers.AutoModelForCausalLM.from_pretrained(str(path), **options)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, CheckpointError) or type(error).__module__.startswith("recollect."):
            raise
        raise CheckpointError(f"{path} cannot be read by AutoModelForCausalLM: {error}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not path.is_dir():
        raise CheckpointError(
            f"there is no model folder {str(path)!r}: give a recollect checkpoint, a Hugging Face model's folder, or "
            f"'{REFERENCE}' for the model that ships with recollect"
        )
    if not file.is_file():
        raise CheckpointError(f"{path} holds no model: {CONFIG} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is cut short or not JSON ({error}): copy or save the model again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a model's configuration: it holds a {type(content).__name__}")
    return content


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens before a text: what the tokenizer puts there when asked for its special tokens."""
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    plain, whole = (inner.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def device_of(model: Any) -> torch.device:
    """Where a model's weights are."""
    device: torch.device = next(model.parameters()).device
    return device
