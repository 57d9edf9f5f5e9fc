"""The model families that can be given a memory, and where each keeps what attaching needs.

Nothing of a model is copied: a family is the path to its layers and to their attention, and how it tells positions
apart. Everything else (heads, scaling, masks, normalisation of queries and keys) reaches the memory through the
attention interface of transformers, after the model's own code has dealt with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from recollect.model.configuration import ConfigurationError
from recollect.pretrained.errors import UnsupportedModel
from recollect.pretrained.records import LayerShape

NAMED_LAYERS = ("bottom", "middle", "near_top", "top", "every_third", "all")


@dataclass(frozen=True)
class Family:
    """Where a family keeps its layers.

    Attributes:
        name: the name people know it by.
        layers: attribute of the base model that lists its layers.
        attention: attribute of a layer that holds its attention.
        rotary: queries and keys carry a rotary embedding; otherwise positions are learned and added to the input.
    """

    name: str
    layers: str
    attention: str
    rotary: bool


FAMILIES = {
    "gpt2": Family("GPT-2", "h", "attn", rotary=False),
    "gpt_neox": Family("GPT-NeoX (Pythia)", "layers", "attention", rotary=True),
    "llama": Family("Llama", "layers", "self_attn", rotary=True),
    "mistral": Family("Mistral", "layers", "self_attn", rotary=True),
    "qwen2": Family("Qwen2", "layers", "self_attn", rotary=True),
    "qwen3": Family("Qwen3", "layers", "self_attn", rotary=True),
}
"""By transformers' `config.model_type`."""


def causal_model(model: Any) -> Any:
    """The transformers model inside `model`: itself, or what an adapter library has wrapped.

    Raises:
        UnsupportedModel: it is no causal language model of a supported family, or cannot be given a memory as it is.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"attach_memory takes a Hugging Face causal language model, got {type(model).__name__}; "
            "load one with transformers.AutoModelForCausalLM.from_pretrained"
        )
    kind = str(getattr(model.config, "model_type", "?"))
    if kind not in FAMILIES:
        known = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
        raise UnsupportedModel(
            f"models of the family {kind!r} can't be given a memory; the supported ones are: {known}"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no language modelling head; load it as AutoModelForCausalLM"
        )
    if getattr(model.config, "add_cross_attention", False) or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} attends to an encoder; memory is for decoders alone")
    return model


def family_of(model: Any) -> Family:
    """The family of a model that `causal_model` has let through."""
    return FAMILIES[model.config.model_type]


def attention_modules(model: Any) -> list[nn.Module]:
    """The attention of every layer, from the bottom."""
    family = family_of(model)
    return [getattr(layer, family.attention) for layer in getattr(model.base_model, family.layers)]


def layer_shapes(model: Any, layers: Sequence[int]) -> tuple[LayerShape, ...]:
    """Heads and head dimension of some layers."""
    config = model.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    form = "unrotated" if family_of(model).rotary else "as_projected"
    return tuple(LayerShape(layer, heads, key_heads, head_dim, form) for layer in layers)


def choose_layers(layers: int | str | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Layer numbers, rising, of a model with `count` layers.

    Args:
        layers: a number, several, negative ones counted from the top; or one of "bottom", "middle", "near_top" (three
            quarters up, the paper's 9 of 12), "top", "every_third", "all". None is "near_top".

    Raises:
        ConfigurationError: a layer does not exist, is named twice, or the name is unknown.
    """
    if layers is None:
        layers = "near_top"
    if isinstance(layers, str):
        named = {
            "bottom": (0,),
            "middle": ((count - 1) // 2,),
            "near_top": (min(count - 1, (3 * count) // 4 - 1 if count >= 4 else count // 2),),
            "top": (count - 1,),
            "every_third": tuple(range(min(2, count - 1), count, 3)),
            "all": tuple(range(count)),
        }
        if layers not in named:
            raise ConfigurationError(
                f"layers={layers!r} is not known; give numbers from 0 to {count - 1} "
                f"or one of {', '.join(NAMED_LAYERS)}"
            )
        return named[layers]
    given = [layers] if isinstance(layers, int) else list(layers)
    if not given:
        raise ConfigurationError("layers is empty; name at least one layer that gets a memory")
    chosen = []
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise ConfigurationError(
                f"layer {layer!r} does not exist: the model has {count} layers, 0 to {count - 1} (or -{count} to -1)"
            )
        chosen.append(layer % count)
    if len(set(chosen)) != len(chosen):
        raise ConfigurationError(f"layers {given} name a layer twice")
    return tuple(sorted(chosen))


def context_length(model: Any) -> int:
    """How many tokens the model was made to read at once."""
    return int(model.config.max_position_embeddings)


def sliding_window(model: Any, layer: int) -> int | None:
    """How many tokens a layer's own attention reaches back, itself included; None where it sees all."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and types[layer] != "sliding_attention"):
        return None
    if types is None and not getattr(config, "use_sliding_window", True):
        return None
    return int(window)


def choose_window(model: Any, layers: Sequence[int], window: int | None) -> int:
    """The tokens that the model attends to by itself, checked against what its positions and layers can serve.

    Raises:
        ConfigurationError: the window is longer than learned positions reach, or than a memory layer's own sliding
            window, which would leave tokens that neither attention nor memory shows.
    """
    context = context_length(model)
    slides = {layer: slide for layer in layers if (slide := sliding_window(model, layer)) is not None}
    if window is None:
        return min([context, *slides.values()])
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ConfigurationError(f"window={window!r} must be a whole number of at least 2 tokens")
    if window > context and not family_of(model).rotary:
        raise ConfigurationError(
            f"window={window} is longer than the {context} positions that the model has learned; "
            f"give at most {context}: longer texts are read window by window"
        )
    for layer, slide in slides.items():
        if window > slide:
            raise ConfigurationError(
                f"layer {layer} attends to a sliding window of {slide} tokens, so window={window} would leave tokens "
                f"that neither its attention nor its memory shows; give window={slide} or less, or another layer"
            )
    return window
