"""What a token sees near by (the Transformer-XL cache and its own segment), and what a layer carries between segments.

Two variations live here. A sliding window (Longformer's causal form, Beltagy et al. 2020) hides all but the last
`attention_window` tokens. A compressed memory (Compressive Transformer, Rae et al. 2019) stands before the cache and
takes up what the cache evicts.

Letters: B batch rows, H heads, T tokens of the segment, X cached tokens, Z compressed slots, N keys seen (compressed
slots, cache and segment), D head dimension, S taps of the convolution.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.model.compressive import Compression
from recollect.model.configuration import ModelConfig
from recollect.model.position_bias import RelativePositionBias


@dataclass
class LayerState:
    """What one layer carries from segment to segment; never part of a gradient.

    cached_keys, cached_values: (B, H, X, D), the newest last.
    cached_tokens: (B,) int64, how many of the X are real (counted from the end).
    convolution: (B, S-1, 2*H*D), the last queries and keys before the convolution, the newest last.
    compressed_keys, compressed_values: (B, H, Z, D), the newest last.
    compressed_slots: (B,) int64, how many of the Z are real (counted from the end).
    """

    cached_keys: Tensor
    cached_values: Tensor
    cached_tokens: Tensor
    convolution: Tensor
    compressed_keys: Tensor
    compressed_values: Tensor
    compressed_slots: Tensor

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, device: torch.device) -> LayerState:
        cache = torch.zeros(batch_size, config.heads, config.xl_cache, config.head_dim, device=device)
        compressed = torch.zeros(batch_size, config.heads, config.compressed_memory, config.head_dim, device=device)
        taps = max(0, config.qk_convolution_width - 1)
        return cls(
            cached_keys=cache,
            cached_values=cache.clone(),
            cached_tokens=torch.zeros(batch_size, dtype=torch.int64, device=device),
            convolution=torch.zeros(batch_size, taps, 2 * config.heads * config.head_dim, device=device),
            compressed_keys=compressed,
            compressed_values=compressed.clone(),
            compressed_slots=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def without(self, rows: Tensor) -> LayerState:
        """The state with the rows marked in `rows` (B,) bool as they were before any token."""
        return dataclasses.replace(
            self,
            cached_tokens=self.cached_tokens.masked_fill(rows, 0),
            convolution=self.convolution.masked_fill(rows[:, None, None], 0.0),
            compressed_slots=self.compressed_slots.masked_fill(rows, 0),
        )

    def opened(self) -> OpenLayerState:
        """The state as the first part of a segment reads it, which then is continued and not yet complete."""
        return OpenLayerState(**{item.name: getattr(self, item.name) for item in dataclasses.fields(self)})


@dataclass
class OpenLayerState(LayerState):
    """A state within a segment (`reading.py`): its cache grows, so that the segment's later tokens see the earlier."""


@dataclass
class LocalLogits:
    """Logits (B, H, T, N) float32 with bias and masks, not yet under a softmax, and the values (B, H, N, D) they weigh.

    The N keys are the compressed slots, the cache's and the segment's, each oldest first.
    """

    logits: Tensor
    values: Tensor


def local_logits(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: LayerState,
    position_bias: RelativePositionBias,
    scale: Tensor,
    *,
    window: int = 0,
) -> LocalLogits:
    """The logits of every query over compressed slots, cache and segment, -inf where a query may not look.

    A compressed slot counts as one place before the cache, as in Rae et al. 2019.

    Args:
        queries, keys, values: (B, H, T, D) of the segment.
        state: with the cache; rows that start a document were reset.
        scale: (H,) multiplies the inner products.
        window: tokens of cache and segment that a query sees, itself among them; 0 is all. Compressed slots are seen
            whatever the window.
    """
    tokens, cached, slots = queries.shape[2], state.cached_keys.shape[2], state.compressed_keys.shape[2]
    older = slots + cached
    bias = position_bias(tokens, older)
    if older:
        keys = torch.cat([state.compressed_keys.to(keys.dtype), state.cached_keys.to(keys.dtype), keys], dim=2)
        values = torch.cat(
            [state.compressed_values.to(values.dtype), state.cached_values.to(values.dtype), values], dim=2
        )
    if window:
        places = torch.arange(cached, cached + tokens, device=bias.device)[:, None]
        beyond = places - torch.arange(cached + tokens, device=bias.device) >= window  # (T, X+T)
        bias = bias.masked_fill(functional.pad(beyond, (slots, 0)), -torch.inf)
    scaled = queries * scale[:, None, None]
    logits = (scaled @ keys.transpose(2, 3)).float() + bias
    if older:
        empty = torch.arange(cached, device=logits.device) < cached - state.cached_tokens[:, None]  # (B, X)
        if slots:
            unfilled = torch.arange(slots, device=logits.device) < slots - state.compressed_slots[:, None]  # (B, Z)
            empty = torch.cat([unfilled, empty], dim=1)
        logits = logits.masked_fill(functional.pad(empty, (0, tokens))[:, None, None, :], -torch.inf)
    return LocalLogits(logits, values)


def advance(
    state: LayerState,
    keys: Tensor,
    values: Tensor,
    convolution: Tensor,
    *,
    compression: Compression | None = None,
    queries: Tensor | None = None,
    scale: Tensor | None = None,
) -> LayerState:
    """The state after a segment; the cache of an open one only grows.

    Args:
        keys, values: (B, H, T, D) of the segment.
        convolution: the convolution's new past.
        compression: takes up what the cache evicts; None forgets it.
        queries, scale: (B, H, T, D) and (H,), for the loss of the compression; None leaves the loss out.
    """
    state = dataclasses.replace(state, convolution=convolution)
    size = state.cached_keys.shape[2]
    is_open = isinstance(state, OpenLayerState)
    if size == 0 and compression is None and not is_open:
        return state
    all_keys = torch.cat([state.cached_keys, keys.detach().float()], dim=2)
    all_values = torch.cat([state.cached_values, values.detach().float()], dim=2)
    real = state.cached_tokens + keys.shape[2]
    evicted = 0 if is_open else keys.shape[2]
    if compression is not None and not is_open:
        # Whole groups only: the first tokens of a group wait in the cache for the rest of it.
        evicted = (all_keys.shape[2] - compression.cache) // compression.rate * compression.rate
    if compression is not None and evicted > 0:
        old_keys, old_values = all_keys[:, :, :evicted], all_values[:, :, :evicted]
        old_real = (real - (all_keys.shape[2] - evicted)).clamp_min(0)
        new_keys, new_values, made = compression.evict(old_keys, old_values, old_real, queries, scale)
        slots = state.compressed_keys.shape[2]
        state = dataclasses.replace(
            state,
            compressed_keys=torch.cat([state.compressed_keys, new_keys], dim=2)[:, :, -slots:],
            compressed_values=torch.cat([state.compressed_values, new_values], dim=2)[:, :, -slots:],
            compressed_slots=(state.compressed_slots + made).clamp_max(slots),
        )
    all_keys, all_values = all_keys[:, :, evicted:], all_values[:, :, evicted:]
    return dataclasses.replace(
        state, cached_keys=all_keys, cached_values=all_values, cached_tokens=real.clamp_max(all_keys.shape[2])
    )
