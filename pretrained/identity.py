"""Which model it is: a digest of everything that decides the keys it makes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

MEMORY = "recollect_memory"
"""Parameters and settings under this name belong to an attached memory and not to the model."""

_FREE = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", MEMORY}
)


def digest_pretrained(model: Any) -> str:
    """sha256 of a Hugging Face model's configuration and weights.

    What an attached memory adds (gates, settings), where the model was loaded from and by which release do not count.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _FREE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if MEMORY in name:
            continue
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
