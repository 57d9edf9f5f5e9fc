"""Values that several verbs take as text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recollect.pretrained.evaluation import MemoryChoice


def layers_of(text: str | None) -> int | str | list[int] | None:
    """Layers as `attach_memory` takes them: numbers such as '3,5' or '-2', or a name, which it checks."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return text.strip()


def one_model(model: str | None, checkpoint: Path | None) -> str | Path | None:
    """The model's folder from --model or --checkpoint; None is the shipped one.

    Raises:
        ConfigurationError: both were given.
    """
    from recollect.model.configuration import ConfigurationError

    if model is not None and checkpoint is not None:
        raise ConfigurationError(f"--model {model} and --checkpoint {checkpoint} both name a model: give one")
    return checkpoint if model is None or model == "reference" else model


def memory_choice(
    folder: str | Path | None, *, layers: str | None, gate: str | None, window: int | None
) -> MemoryChoice | None:
    """What only a Hugging Face model can be told; None for a checkpoint.

    Raises:
        ConfigurationError: something of it was given for a checkpoint, which has its own.
    """
    from recollect.model.configuration import ConfigurationError
    from recollect.pretrained.loading import is_pretrained_folder

    if is_pretrained_folder(folder):
        from recollect.pretrained.evaluation import MemoryChoice

        return MemoryChoice(layers=layers_of(layers), gate=gate, window=window)
    for name, value in (("layers", layers), ("gate", gate), ("window", window)):
        if value is not None:
            raise ConfigurationError(
                f"--{name} {value} is for Hugging Face models; a recollect checkpoint has its own, which were trained"
            )
    return None


def prompt_of(text: str | None, file: Path | None) -> str:
    """The prompt from an argument, from standard input (`-`) or from a file.

    Raises:
        GenerationError: none or two were given, or the file is not text.
    """
    from recollect.model.sampling import GenerationError

    if (text is None) == (file is None):
        raise GenerationError("give a prompt as an argument, `-` for standard input, or --file, and only one of them")
    try:
        if file is not None:
            return file.expanduser().read_text(encoding="utf-8")
        return sys.stdin.read() if text == "-" else str(text)
    except UnicodeDecodeError as error:
        raise GenerationError(f"{file or 'standard input'} is not UTF-8 text ({error.reason})") from error
