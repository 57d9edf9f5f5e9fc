"""Memory in a model that was trained without one, and nothing trained: as Unlimiformer and Extended Mind retrieve.

    model = with_memory(twin, memory_layers=(3, 5))
    result = replay(model, compute_trunk(model, text), memory_size=8192)

The layer retrieves with the queries and keys that it has, and one softmax weighs the retrieved logits against the local
ones (Bertsch et al. 2023; Klett and Ahle 2024): the retrieved keys count as keys far back in the layer's own attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.transformer import MemorizingTransformer

TRAINING_FREE_GATES = ("joint", "fixed", "mean", "sum")
"""Gates without weights of their own; the others would have to be trained."""


def with_memory(
    model: MemorizingTransformer,
    memory_layers: Sequence[int],
    gate: str = "joint",
    *,
    gate_share: float | None = None,
    memory_size: int | None = None,
    k: int | None = None,
) -> MemorizingTransformer:
    """A model with memory in other layers, made of the very parameters of `model`: what trains one trains both.

    Retrieved logits have the scale of local ones and the position bias of the farthest bucket. So with the joint
    softmax a layer that retrieves all keys of the past attends as it would with a cache of that length.

    Args:
        model: trained without memory, or with it in other layers; it stays as it is.
        memory_layers: 0-based layers that retrieve.
        gate: 'joint', one softmax over local and retrieved logits; 'fixed', a constant share `gate_share`; 'mean' or
            'sum'. Gates with weights of their own are refused, since nothing trains them here.
        gate_share: for 'fixed'; None is the model's own.
        memory_size, k: new defaults; None is the model's own.

    Raises:
        ConfigurationError: a layer that does not exist, no layer at all, or a gate that has to be trained.
    """
    config = _config(model.config, memory_layers, gate, gate_share, memory_size, k)
    with torch.random.fork_rng(devices=[]):  # its own start is replaced at once, and must not move the caller's draws
        made = MemorizingTransformer(config)
    own = dict(model.named_parameters())
    for name, _ in list(made.named_parameters()):
        path, _, leaf = name.rpartition(".")
        made.get_submodule(path).register_parameter(leaf, own[name])
    return made.train(model.training)


def _config(
    config: ModelConfig,
    memory_layers: Sequence[int],
    gate: str,
    gate_share: float | None,
    memory_size: int | None,
    k: int | None,
) -> ModelConfig:
    if not memory_layers:
        raise ConfigurationError("memory_layers is empty: name the layers that are to retrieve")
    if gate not in TRAINING_FREE_GATES:
        raise ConfigurationError(
            f"gate={gate!r} has weights that nothing trains here; choose one of {', '.join(TRAINING_FREE_GATES)}"
        )
    return config.replace(
        memory_layers=tuple(memory_layers),
        gate=gate,
        gate_share=config.gate_share if gate_share is None else gate_share,
        memory_size=config.memory_size if memory_size is None else memory_size,
        k=config.k if k is None else k,
        separate_memory_scale=False,
        memory_position_bias=True,
    )
