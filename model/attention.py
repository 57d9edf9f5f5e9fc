"""Multi-head attention over a segment, a Transformer-XL cache and, where a layer has one, a memory.

Letters: B batch rows, H heads, T tokens of the segment, X cached tokens, D head dimension, W model width,
S taps of the convolution.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from recollect.model.closed_form import normalise
from recollect.model.compiling import eagerly
from recollect.model.compressive import make_compression
from recollect.model.configuration import ModelConfig
from recollect.model.gates import Scores, make_gate
from recollect.model.hidden_keys import AnyMemory, HiddenMemory, KeyValueMap
from recollect.model.local_attention import LayerState, advance, local_logits
from recollect.model.memory_layer import LayerMemory
from recollect.model.position_bias import RelativePositionBias

__all__ = ["Attention", "LayerState", "QueryKeyConvolution"]

INITIAL_NORMALISED_SCALE = 8.0
"""Logit scale at the start where queries and keys have length 1; a cosine of 1 then weighs e^8 times a cosine of 0."""


class QueryKeyConvolution(nn.Module):
    """Causal depthwise convolution over time on queries and keys (Primer, So et al. 2021), starting as the identity.

    With `token_shift`, the second half of each head's key channels starts as the previous token's key. A query that
    looks for its own token then meets the keys of the tokens *after* earlier occurrences: retrieval finds what to copy.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        weight = torch.zeros(config.qk_convolution_width, 2, config.heads, config.head_dim)
        weight[-1] = 1.0
        if config.token_shift:
            shifted = slice(config.head_dim // 2, None)
            weight[-1, 1, :, shifted] = 0.0
            weight[-2, 1, :, shifted] = 1.0
        self.weight = nn.Parameter(weight.flatten(1))  # (S, 2*H*D); the last tap is the present token

    def forward(self, inputs: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Convolved `inputs` (B, T, 2*H*D), given the S-1 inputs before them (`past`), and the new `past`."""
        tokens = inputs.shape[1]
        padded = torch.cat([past.to(inputs.dtype), inputs], dim=1)
        weight = self.weight.to(inputs.dtype)
        output = padded[:, -tokens:] * weight[-1]
        for tap in range(len(weight) - 1):
            output = torch.addcmul(output, padded[:, tap : tap + tokens], weight[tap])
        return output, padded[:, -past.shape[1] :].detach().float()


class Attention(nn.Module):
    """Causal attention with T5 position bias; with `has_memory`, kNN-augmented as in Wu et al. 2022, section 3.2."""

    def __init__(self, config: ModelConfig, *, has_memory: bool) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.output = nn.Linear(inner, config.width, bias=False)
        self.position_bias = RelativePositionBias(config.heads, config.position_buckets, config.position_max_distance)
        self.convolution = QueryKeyConvolution(config) if config.qk_convolution_width else None
        start = INITIAL_NORMALISED_SCALE if config.normalise_queries_and_keys else 1.0 / math.sqrt(config.head_dim)
        # Kept as a logarithm: the scale stays positive, and a step changes it by a share of itself.
        self.log_scale = nn.Parameter(torch.full((config.heads,), math.log(start)))
        self.compression = make_compression(config)
        self.has_memory = has_memory
        if has_memory:
            self.gate = make_gate(config)
            if config.separate_memory_scale:
                self.log_memory_scale = nn.Parameter(torch.full((config.heads,), math.log(start)))

    @torch.no_grad()
    def match_shifted_channels(self) -> None:
        """Copies the keys' projection into the queries' for the channels that the token shift moves."""
        heads, dim = self.config.heads, self.config.head_dim
        query, key = (layer.weight.view(heads, dim, -1) for layer in (self.query, self.key))
        query[:, dim // 2 :] = key[:, dim // 2 :]

    def forward(self, hidden: Tensor, state: LayerState, memory: AnyMemory | None) -> tuple[Tensor, LayerState]:
        """Attention output (B, T, W) for normalised input `hidden` (B, T, W), and the state after these tokens.

        Rows that start a document must have been reset in `state` and `memory` by the caller. The memory is searched
        first and extended afterwards, so that no token retrieves itself or its future.
        """
        queries, keys, values, convolution = self._project(hidden, state)
        near = local_logits(
            queries,
            keys,
            values,
            state,
            self.position_bias,
            self.log_scale.exp(),
            window=self.config.attention_window,
        )
        local = torch.softmax(near.logits, dim=-1) @ near.values
        if memory is not None:
            stores_hidden = self.config.memory_key == "hidden"
            log_scale = self.log_memory_scale if self.config.separate_memory_scale else self.log_scale
            with torch.autocast(hidden.device.type, enabled=False):
                if stores_hidden:
                    retrieved = eagerly(cast(HiddenMemory, memory).attend)(
                        queries, log_scale.exp(), self._key_value_map()
                    )
                else:
                    retrieved = eagerly(cast(LayerMemory, memory).attend)(queries, log_scale.exp())
                uses = self.gate.uses_scores
                # A constant for each head: it moves weight between the two attentions, never within the retrieved.
                far = self.position_bias.weight[:, -1:, None] if self.config.memory_position_bias else 0.0
                scores = Scores.of(near.logits, retrieved.logits + far, retrieved.found) if uses else None
            local = self.gate(local, retrieved.remembered.to(local.dtype), retrieved.found, hidden, scores)
            if stores_hidden:
                eagerly(cast(HiddenMemory, memory).append)(hidden)
            else:
                eagerly(cast(LayerMemory, memory).append)(keys, values)
        joined = self.output(local.transpose(1, 2).flatten(2))
        return joined, self.advance(state, keys, values, convolution, queries)

    def advance(
        self, state: LayerState, keys: Tensor, values: Tensor, convolution: Tensor, queries: Tensor | None = None
    ) -> LayerState:
        """As `local_attention.advance`; `queries` (B, H, T, D), where given, are for the compression's loss."""
        return advance(
            state,
            keys,
            values,
            convolution,
            compression=self.compression,
            queries=queries,
            scale=self.log_scale.exp(),
        )

    def _key_value_map(self) -> KeyValueMap:
        """How keys and values are made of this layer's inputs, for a memory that stores those."""
        inner = self.config.heads * self.config.head_dim
        taps = None if self.convolution is None else self.convolution.weight[:, inner:]
        return KeyValueMap.of(
            self.key.weight, self.value.weight, taps, normalise=self.config.normalise_queries_and_keys
        )

    def _project(self, hidden: Tensor, state: LayerState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D), ready to be compared, and the convolution's new past."""
        batch, tokens, _ = hidden.shape
        heads, dim = self.config.heads, self.config.head_dim
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        projected = functional.linear(hidden, weight)
        inner = heads * dim
        convolution = state.convolution
        # `split` and `unbind`: their gradients are one concatenation, those of slices a sum of tensors full of zeros.
        queries_and_keys, values = projected.split((2 * inner, inner), dim=-1)
        if self.convolution is not None:
            queries_and_keys, convolution = self.convolution(queries_and_keys, convolution)
        queries_and_keys = queries_and_keys.view(batch, tokens, 2, heads, dim).permute(2, 0, 3, 1, 4)
        if self.config.normalise_queries_and_keys:
            queries_and_keys = normalise(queries_and_keys)
        values = values.view(batch, tokens, heads, dim).transpose(1, 2)
        queries, keys = queries_and_keys.unbind()
        return queries, keys, values, convolution
