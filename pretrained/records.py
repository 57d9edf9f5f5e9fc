"""What the parts of this room hand to each other: settings, stored keys, retrieved neighbours, and where keys lie.

Letters: B batch rows, H query heads, G key heads (H is a multiple of G; equal without grouped-query attention), T
tokens, K neighbours, D head dimension, N keys of a store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from recollect.model.configuration import ConfigurationError


@dataclass(frozen=True)
class LayerShape:
    """The shape of one memory layer's attention.

    Attributes:
        layer: its number, from 0 at the bottom.
        heads: H, query heads.
        key_heads: G, key-value heads; each has one memory, searched by the H / G query heads that share it.
        head_dim: D.
        key_form: how keys are stored. "unrotated": the rotary embedding is taken out again, so that a key is the same
            wherever its token stood. "as_projected": the layer's keys as they are (GPT-2, whose learned positions
            are in the hidden state and cannot be taken out).
    """

    layer: int
    heads: int
    key_heads: int
    head_dim: int
    key_form: str


@dataclass(frozen=True)
class MemorySettings:
    """Everything that `attach_memory` decides; saved in the model's config.json under "recollect_memory".

    Attributes:
        layers: the layers that have a memory, rising.
        backend: canonical registry string of the index.
        memory_size: C, keys kept for each batch row and key head; 0 when only a store is searched.
        k: K, pairs retrieved for each query.
        gate: how memory and local attention are joined, see `recollect.pretrained.gates`.
        gate_share: the share of memory where a gate needs one to start from.
        window: tokens that the model attends to by itself; older ones are reached through the memory alone.
        overlap: tokens that are read again at the start of a window when a text is longer than one window.
        distance: rotary models: how many tokens back a remembered key seems to lie.
        seed: decides everything random in the index.
    """

    layers: tuple[int, ...]
    backend: str
    memory_size: int
    k: int
    gate: str
    gate_share: float
    window: int
    overlap: int
    distance: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values alone; `from_dict` is its inverse."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MemorySettings:
        """Settings from what `to_dict` gave.

        Raises:
            ConfigurationError: an entry is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        wrong = sorted(names ^ set(content))
        if wrong:
            raise ConfigurationError(
                f"saved memory settings have {', '.join(wrong)} missing or unknown; "
                "they were written by another release: attach the memory again and save the model"
            )
        return cls(**{**content, "layers": tuple(content["layers"])})


@dataclass(frozen=True)
class StoredKeys:
    """Tokens that have just entered one layer's memory.

    Attributes:
        layer: the layer.
        keys, values: (B, G, T, D) in the model's type, oldest first, keys in the layer's `key_form`.
        positions: (B, T) int64: which token of the row's text each one is, counted from the last reset, padding not
            counted; -1 where nothing was stored (the row had fewer tokens to store).
    """

    layer: int
    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Retrieved:
    """What one layer retrieved for the tokens of one call.

    A neighbour is a token of the row's own text or an entry of the attached store: one of `positions` and
    `store_entries` is not -1; both are where nothing was found.

    Attributes:
        layer: the layer.
        query_positions: (B, T) int64: which token of the row's text each query is, counted from the last reset,
            padding not counted; -1 for padding and for tokens that are only read again at a window's start.
        positions: (B, H, T, K) int64: which token of the row's text was found, counted in the same way.
        store_entries: (B, H, T, K) int64: which entry of the store was found.
        logits: (B, H, T, K) float32 scaled as the layer scales its own; -inf where nothing was found.
        weights: (B, H, T, K) float32: softmax of the logits, 0 where nothing was found.
        share: (B, H, T) float32: how much of the layer's attention output comes from memory; 0 where it is empty.
    """

    layer: int
    query_positions: Tensor
    positions: Tensor
    store_entries: Tensor
    logits: Tensor
    weights: Tensor
    share: Tensor


@runtime_checkable
class KeyStore(Protocol):
    """What `attach_memory(store=...)` asks of a durable store; `MemoryStore` is the one that is written to disk."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose keys it holds."""

    def check_fits(self, shapes: tuple[LayerShape, ...], model: Any) -> None:
        """Raises the store's error, with the reason, if it was not made by this model and these layers."""

    def layer_keys(self, layer: int) -> Tensor:
        """(G, N, D) in the layer's `key_form`."""

    def layer_values(self, layer: int) -> Tensor:
        """(G, N, D)."""


__all__ = ["KeyStore", "LayerShape", "MemorySettings", "Retrieved", "StoredKeys"]
