"""What a token sees near by (the Transformer-XL cache and its own segment), and what a layer carries between segments.

Letters: B batch rows, H heads, T tokens of the segment, X cached tokens, N keys seen (cache and segment), D head
dimension, S taps of the convolution.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.model.configuration import ModelConfig
from recollect.model.position_bias import RelativePositionBias


@dataclass
class LayerState:
    """What one layer carries from segment to segment; never part of a gradient.

    cached_keys, cached_values: (B, H, X, D), the newest last.
    cached_tokens: (B,) int64, how many of the X are real (counted from the end).
    convolution: (B, S-1, 2*H*D), the last queries and keys before the convolution, the newest last.
    """

    cached_keys: Tensor
    cached_values: Tensor
    cached_tokens: Tensor
    convolution: Tensor

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, device: torch.device) -> LayerState:
        cache = torch.zeros(batch_size, config.heads, config.xl_cache, config.head_dim, device=device)
        taps = max(0, config.qk_convolution_width - 1)
        return cls(
            cached_keys=cache,
            cached_values=cache.clone(),
            cached_tokens=torch.zeros(batch_size, dtype=torch.int64, device=device),
            convolution=torch.zeros(batch_size, taps, 2 * config.heads * config.head_dim, device=device),
        )

    def without(self, rows: Tensor) -> LayerState:
        """The state with the rows marked in `rows` (B,) bool as they were before any token."""
        return dataclasses.replace(
            self,
            cached_tokens=self.cached_tokens.masked_fill(rows, 0),
            convolution=self.convolution.masked_fill(rows[:, None, None], 0.0),
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

    The N keys are the cache's, oldest first, and then the segment's.
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
) -> LocalLogits:
    """The logits of every query over the cache and the segment, -inf where a query may not look.

    Args:
        queries, keys, values: (B, H, T, D) of the segment.
        state: with the cache; rows that start a document were reset.
        scale: (H,) multiplies the inner products.
    """
    cached = state.cached_keys.shape[2]
    bias = position_bias(queries.shape[2], cached)
    if cached:
        keys = torch.cat([state.cached_keys.to(keys.dtype), keys], dim=2)
        values = torch.cat([state.cached_values.to(values.dtype), values], dim=2)
    scaled = queries * scale[:, None, None]
    logits = (scaled @ keys.transpose(2, 3)).float() + bias
    if cached:
        empty = torch.arange(cached, device=logits.device) < cached - state.cached_tokens[:, None]  # (B, X)
        empty = functional.pad(empty, (0, logits.shape[-1] - cached))
        logits = logits.masked_fill(empty[:, None, None, :], -torch.inf)
    return LocalLogits(logits, values)


def advance(state: LayerState, keys: Tensor, values: Tensor, convolution: Tensor) -> LayerState:
    """The state after a segment of `keys` and `values` (B, H, T, D); `convolution` is the convolution's new past."""
    size = state.cached_keys.shape[2] + (keys.shape[2] if isinstance(state, OpenLayerState) else 0)
    if size == 0:
        return dataclasses.replace(state, convolution=convolution)
    return dataclasses.replace(
        state,
        cached_keys=torch.cat([state.cached_keys, keys.detach().float()], dim=2)[:, :, -size:],
        cached_values=torch.cat([state.cached_values, values.detach().float()], dim=2)[:, :, -size:],
        cached_tokens=(state.cached_tokens + keys.shape[2]).clamp_max(size),
        convolution=convolution,
    )
