"""Loading a model that was saved with its memory attached.

Nothing special is needed to save one: `model.save_pretrained(folder)`, and so the Trainer's checkpoints, write the
settings into config.json under "recollect_memory" and the gates' parameters among the weights. What the memory holds
is not saved; a `MemoryStore` is the durable form of that. Loaded without this module, the model is the plain one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from recollect.model.checkpoints import CheckpointError
from recollect.pretrained.handle import SETTINGS, AttachedMemory, attach_settings
from recollect.pretrained.records import KeyStore, MemorySettings
from recollect.pretrained.store import opened_store

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def load_attached(path: str | Path, *, store: KeyStore | str | Path | None = None, **kwargs: Any) -> Any:
    """A causal language model saved with its memory, the memory attached as it was, empty.

    Args:
        path: a folder, or a name on the Hugging Face Hub.
        store: as in `attach_memory`.
        kwargs: handed to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model; the handle is at `model.recollect_memory`.

    Raises:
        CheckpointError: the model was saved without a memory, or its gates' parameters are missing.
        ConfigurationError: the saved settings do not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    settings = saved_settings(AutoConfig.from_pretrained(path), path)
    loader: Any = AutoModelForCausalLM
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or it would call the gates unexpected, which are read below
    try:
        model, report = loader.from_pretrained(path, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        raise CheckpointError(
            f"{path} lacks the weights {', '.join(sorted(report['missing_keys']))}; save the model again"
        )
    model.eval()
    memory = attach_settings(model, settings, opened_store(store))
    names = [name for name in report["unexpected_keys"] if name.startswith(f"{SETTINGS}.")]
    load_gates(memory, _read(path, names))
    return model


def saved_settings(config: Any, path: str | Path) -> MemorySettings:
    """The settings in a model's configuration, which came from `path`."""
    saved = getattr(config, SETTINGS, None)
    if not isinstance(saved, dict):
        raise CheckpointError(
            f"{path} was saved without a memory (its config.json has no {SETTINGS!r}); load it with "
            "AutoModelForCausalLM.from_pretrained and give it one with attach_memory"
        )
    return MemorySettings.from_dict(saved)


def load_gates(memory: AttachedMemory, tensors: dict[str, Tensor]) -> None:
    """Sets the gates' parameters, named as in a saved model; all must be there.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    wanted = memory.state_dict()
    own = {name.removeprefix(f"{SETTINGS}."): tensor for name, tensor in tensors.items()}
    missing = sorted(set(wanted) - set(own))
    if missing:
        raise CheckpointError(
            f"the saved model lacks the gate parameters {', '.join(missing)}; it was saved by something that left them "
            "out: save it again with model.save_pretrained while the memory is attached"
        )
    wrong = sorted(name for name in wanted if wanted[name].shape != own[name].shape)
    if wrong:
        raise CheckpointError(f"the saved gate parameters {', '.join(wrong)} have another shape than the model's heads")
    memory.load_state_dict({name: own[name] for name in wanted})


def _read(path: str | Path, names: list[str]) -> dict[str, Tensor]:
    """Some tensors of a saved model's safetensors files, whether one or several."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    if not names:
        return {}
    single = cached_file(path, WEIGHTS[0], _raise_exceptions_for_missing_entries=False)
    if single is not None:
        files = dict.fromkeys(names, single)
    else:
        index = cached_file(path, WEIGHTS[1], _raise_exceptions_for_missing_entries=False)
        if index is None:
            raise CheckpointError(f"{path} holds no {' or '.join(WEIGHTS)} to read the gates from; save it again")
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {name: str(cached_file(path, places[name])) for name in names}
    tensors = {}
    for name, file in files.items():
        with safe_open(file, framework="pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


__all__ = ["load_attached", "load_gates", "saved_settings"]
