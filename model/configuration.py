"""The configuration of a memorizing transformer: every choice that an ablation varies is a value here.

Letters used throughout `model/`: B batch rows, H heads, T new tokens, X tokens in the Transformer-XL cache, D head
dimension, W model width, V vocabulary, M memories (M = B*H, m = b*H + h), C memory capacity, K neighbours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

ACTIVATIONS = ("relu", "gelu", "squared_relu")
GATE_NAMES = [
    "head",
    "token",
    "layer",
    "confidence",
    "fixed",
    "sum",
    "mean",
    "weighted_sum",
    "concatenation",
    "joint",
]
"""Gates that a configuration may name: those of `recollect.model.gates`, and what `register_gate` adds."""
MEMORY_KEYS = ("key", "hidden")
EVICTIONS = ("fifo", "most_used")
COMPRESSION_FUNCTIONS = ("convolution", "mean")


class ConfigurationError(ValueError):
    """A configuration value that cannot be used; the message names the value and what would be accepted."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a `MemorizingTransformer`.

    The default sizes are those of the `laptop` preset. `to_dict` and `from_dict` convert to and from plain JSON values.
    """

    vocabulary_size: int = 2048
    """V: number of tokens of the tokenizer."""
    layers: int = 3
    width: int = 256
    """W: size of the residual stream."""
    heads: int = 4
    head_dim: int = 64
    """D: size of one head's queries, keys and values; heads * head_dim need not equal width."""
    feed_forward: int = 1024
    """Hidden size of the feed-forward blocks."""
    activation: str = "squared_relu"
    """Feed-forward non-linearity: relu, gelu or squared_relu (Primer, So et al. 2021)."""
    segment_length: int = 128
    """T: tokens read at one step, in training and evaluation."""
    xl_cache: int = 0
    """X: keys and values of the last X tokens that each layer still attends to (Dai et al. 2019); 0 is no cache."""
    memory_layers: tuple[int, ...] = (1,)
    """0-based layers with kNN-augmented attention; empty is a plain transformer."""
    memory_size: int = 2048
    """C: keys that each (row, head) memory holds while training; evaluation may choose another."""
    k: int = 32
    """K: pairs retrieved per query and head."""
    gate: str = "head"
    """How memory and local attention are joined: a name in `recollect.model.gates.GATES`."""
    gate_share: float = 0.5
    """Memory's share before training, for learned gates; its constant share for the `fixed` gate. Between 0 and 1."""
    memory_key: str = "key"
    """What a memory stores: 'key', each head's keys and values as they were (Wu et al. 2022), or 'hidden', the layer's
    input, from which keys and values are computed anew at each use (Unlimiformer, Bertsch et al. 2023)."""
    eviction: str = "fifo"
    """What a full memory forgets: 'fifo', the oldest keys, or 'most_used', the oldest but those attention used most."""
    eviction_kept_share: float = 0.5
    """For `most_used`: keys that stay for each new key. Of the oldest (1 + share) T keys the share * T most used stay.
    Above 0, at most 4."""
    normalise_queries_and_keys: bool = True
    """Queries and keys of length 1 with a learned scale per head (Henry et al. 2020), so old keys stay comparable."""
    separate_memory_scale: bool = False
    """A learned scale of its own for the logits of retrieved keys; otherwise they share the local attention's."""
    memory_position_bias: bool = False
    """Logits of retrieved keys get the last bucket's position bias, as if they lay far back in the cache. It matters
    to gates that weigh them against local logits: `joint` and `confidence`."""
    qk_convolution_width: int = 0
    """Width of a causal depthwise convolution on queries and keys (Primer, So et al. 2021); 0 is none."""
    token_shift: bool = False
    """Half of each head's key channels start out carrying the previous token's key; needs qk_convolution_width >= 2."""
    matched_start: bool = False
    """Queries of the shifted channels start with the keys' projection, so that from the first step a token's query
    matches the keys after earlier occurrences of that token; needs token_shift."""
    position_buckets: int = 32
    """Buckets of the T5 relative position bias (Raffel et al. 2020)."""
    position_max_distance: int = 128
    """Distances from here on share the last bucket."""
    attention_window: int = 0
    """Sliding-window local attention (Longformer's causal form, Beltagy et al. 2020): a token sees itself and the
    attention_window - 1 tokens before it; 0 is the whole segment and cache."""
    compressed_memory: int = 0
    """Slots of a Compressive Transformer's memory in each layer (Rae et al. 2019): what the XL cache evicts is
    compressed into them; 0 is none."""
    compression_rate: int = 4
    """Evicted tokens that make one compressed slot."""
    compression_function: str = "convolution"
    """How they are made into one: 'convolution' (learned) or 'mean'."""
    compression_loss: float = 1.0
    """Weight of the attention-reconstruction loss that trains a learned compression, which starts as the mean; 0 leaves
    it there, since the main loss never reaches it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_layers", tuple(int(layer) for layer in self.memory_layers))
        for name in ("vocabulary_size", "layers", "width", "heads", "head_dim", "feed_forward", "segment_length", "k"):
            self._at_least(name, 1)
        for name in ("xl_cache", "memory_size", "qk_convolution_width", "attention_window", "compressed_memory"):
            self._at_least(name, 0)
        self._at_least("compression_rate", 1)
        self._at_least("position_buckets", 2)
        self._at_least("position_max_distance", 2)
        if self.position_max_distance <= self.position_buckets // 2:
            raise ConfigurationError(
                f"position_max_distance={self.position_max_distance} must exceed half of "
                f"position_buckets={self.position_buckets}"
            )
        self._one_of("activation", ACTIVATIONS)
        self._one_of("gate", GATE_NAMES)
        self._one_of("memory_key", MEMORY_KEYS)
        self._one_of("eviction", EVICTIONS)
        self._one_of("compression_function", COMPRESSION_FUNCTIONS)
        if not 0.0 < self.gate_share < 1.0:
            raise ConfigurationError(f"gate_share={self.gate_share} must lie between 0 and 1")
        if not 0.0 < self.eviction_kept_share <= 4.0:
            raise ConfigurationError(
                f"eviction_kept_share={self.eviction_kept_share} must be above 0 and at most 4; "
                "to keep none choose eviction='fifo'"
            )
        if not self.compression_loss >= 0.0:
            raise ConfigurationError(f"compression_loss={self.compression_loss} must be 0 or more")
        if self.attention_window and self.xl_cache < self.attention_window - 1:
            raise ConfigurationError(
                f"attention_window={self.attention_window} needs an xl_cache of at least {self.attention_window - 1} "
                f"tokens to look back on at a segment's first token, not {self.xl_cache}"
            )
        if self.compressed_memory and not self.xl_cache:
            raise ConfigurationError(
                f"compressed_memory={self.compressed_memory} needs an xl_cache: what the cache evicts is compressed"
            )
        if self.compressed_memory and (
            self.segment_length % self.compression_rate or self.xl_cache % self.compression_rate
        ):
            raise ConfigurationError(
                f"compression_rate={self.compression_rate} must divide segment_length={self.segment_length} and "
                f"xl_cache={self.xl_cache}, so that no slot mixes two documents"
            )
        if list(self.memory_layers) != sorted(set(self.memory_layers)):
            raise ConfigurationError(f"memory_layers={self.memory_layers} must rise and not repeat")
        for layer in self.memory_layers:
            if not 0 <= layer < self.layers:
                raise ConfigurationError(
                    f"memory_layers={self.memory_layers}: this model has layers 0 to {self.layers - 1}"
                )
        if self.memory_layers and 0 < self.memory_size < self.k:
            raise ConfigurationError(
                f"k={self.k} is above memory_size={self.memory_size}: retrieve at most as many pairs as a memory holds"
            )
        if self.qk_convolution_width == 1:
            raise ConfigurationError(
                "qk_convolution_width=1 would only rescale channels; use 0 for none, or at least 2"
            )
        if self.token_shift and self.qk_convolution_width < 2:
            raise ConfigurationError(
                "token_shift needs qk_convolution_width of at least 2: the shift lives in the convolution"
            )

        if self.matched_start and not self.token_shift:
            raise ConfigurationError("matched_start needs token_shift: it is about the shifted channels")

    def _at_least(self, name: str, smallest: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ConfigurationError(f"{name}={value!r} must be an integer of at least {smallest}")

    def _one_of(self, name: str, known: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in known:
            near = get_close_matches(str(value), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}{hint}")

    @property
    def first_upper_layer(self) -> int:
        """First layer that is not trunk: the first memory layer, or `layers` where there is none."""
        return self.memory_layers[0] if self.memory_layers else self.layers

    @property
    def memories_per_row(self) -> int:
        """Memories that a memory layer has for each batch row: one a head, or one where hidden states are stored."""
        return 1 if self.memory_key == "hidden" else self.heads

    @property
    def memory_dim(self) -> int:
        """Numbers that a memory stores as a key: D, or where hidden states are stored the inputs that a key is made of
        (W for each tap of the convolution)."""
        return self.width * max(1, self.qk_convolution_width) if self.memory_key == "hidden" else self.head_dim

    @property
    def memory_numbers_per_token(self) -> int:
        """Numbers that one memory layer remembers of a token: keys and values, or the hidden states."""
        return self.memory_dim if self.memory_key == "hidden" else 2 * self.heads * self.head_dim

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some values changed, checked again."""
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in declaration order."""
        return {**dataclasses.asdict(self), "memory_layers": list(self.memory_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; unknown names raise `ConfigurationError`."""
        _refuse_unknown(values)
        for name, value in values.items():
            wanted = _FIELD_TYPES[name]
            fits = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
            if not fits:
                raise ConfigurationError(f"{name}={value!r} must be {' or '.join(kind.__name__ for kind in wanted)}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"the configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigurationError(f"the configuration must be a JSON object, not {type(values).__name__}")
        return cls.from_dict(values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named configuration from `PRESETS`, with `changes` applied."""
        if name not in PRESETS:
            raise ConfigurationError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return PRESETS[name].replace(**changes)


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    field.name: {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}.get(
        str(field.type), (list, tuple)
    )
    for field in dataclasses.fields(ModelConfig)
}


def _refuse_unknown(values: dict[str, Any]) -> None:
    unknown = sorted(set(values) - set(_FIELD_TYPES))
    if unknown:
        raise ConfigurationError(
            f"unknown configuration values: {', '.join(unknown)}; known are {', '.join(_FIELD_TYPES)}"
        )


PRESETS: dict[str, ModelConfig] = {
    # Wu et al. 2022, section 4.2: 12 layers of width 1024, 8 heads of 128, feed-forward 4096, segments and XL cache of
    # 512, the ninth layer (counted from one) has the memory, 32 neighbours, a sentencepiece vocabulary of 32k.
    "paper": ModelConfig(
        vocabulary_size=32000,
        layers=12,
        width=1024,
        heads=8,
        head_dim=128,
        feed_forward=4096,
        activation="relu",
        segment_length=512,
        xl_cache=512,
        memory_layers=(8,),
        memory_size=8192,
    ),
    # Small enough to train on two CPU cores in minutes. The convolution with token shift lets so small a model find the
    # token that followed an earlier occurrence of the present one, which is what makes a memory worth having (see
    # attention.py).
    "laptop": ModelConfig(qk_convolution_width=3, token_shift=True, matched_start=True, separate_memory_scale=True),
    "tiny": ModelConfig(
        vocabulary_size=64,
        layers=3,
        width=32,
        heads=2,
        head_dim=16,
        feed_forward=64,
        segment_length=16,
        memory_size=64,
        k=4,
    ),
}
