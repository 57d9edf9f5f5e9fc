"""The attention function of a model with memory, under transformers' attention interface.

Every layer of the model calls it; a layer without memory is passed on to the function that it would have called
otherwise, so it computes what it always did, bit for bit.

Letters: B batch rows, N windows folded into them (1 unless a call is longer than a window), H query heads, G key
heads, T queries, S columns in sight, D head dimension.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from recollect.pretrained.layer import AttachedLayer

ATTRIBUTE = "recollect_layer"
"""Where a layer's attention module holds its memory."""

PLAIN = ("sdpa", "eager")
"""The attention implementations that a memory can stand on."""

LOGITS_AT_ONCE = 1 << 24
"""Logits of local attention that are held at once: 64 MiB."""

CAUSAL_QUERIES = 128
"""Queries at a time under a causal mask: keys behind the last of them are left out, and what is left fits in cache."""


def interface_name(plain: str) -> str:
    """The name under which attention with memory is registered, on top of the implementation `plain`."""
    return f"recollect_{plain}"


def register() -> None:
    """Makes the attention functions and their masks known to transformers; harmless to repeat."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    for plain in PLAIN:
        AttentionInterface.register(interface_name(plain), functools.partial(memory_attention, plain))
        AttentionMaskInterface.register(interface_name(plain), ALL_MASK_ATTENTION_FUNCTIONS[plain])


def plain_attention(module: nn.Module, plain: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the layer would call without memory: eager attention is each model file's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if plain == "eager":
        own: Callable[..., tuple[Tensor, Tensor | None]] = sys.modules[type(module).__module__].eager_attention_forward
        return own
    return ALL_ATTENTION_FUNCTIONS[plain]


def memory_attention(
    plain: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer; arguments and result as transformers defines them, (B, H, T, D) to (B, T, H, D)."""
    attached: AttachedLayer | None = getattr(module, ATTRIBUTE, None)
    local = plain_attention(module, plain)
    if attached is None or not attached.reading.active:
        return local(module, query, key, value, attention_mask, **kwargs)
    return attached.attend(local, module, query, key, value, attention_mask, **kwargs)


def attention_with_mass(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention, and how much stands in the denominator of its softmax.

    Args:
        query: (B, H, T, D).
        key, value: (B, G, S, D).
        mask: (B, 1, T, S), bool with True for what is seen, or added to the logits; None is causal.
        scaling: multiplies inner products.
        dropout: probability, already 0 outside training.

    Returns:
        (B, H, T, D) in the type of `value`, and (B, H, T) float32 the logarithm of the summed exponentials.
    """
    batch, heads, tokens, dim = query.shape
    key_heads, seen = key.shape[1], key.shape[2]
    causal = mask is None and tokens > 1
    step = max(1, min(tokens, LOGITS_AT_ONCE // max(1, batch * heads * seen)))
    if causal and query.device.type == "cpu":
        step = min(step, CAUSAL_QUERIES)
    outputs, masses = [], []
    transposed = key.transpose(2, 3)
    for start in range(0, tokens, step):
        part = query[:, :, start : start + step]
        # With a causal mask the keys after the last query of this part are masked for all of it.
        end = min(seen, start + part.shape[2]) if causal else seen
        folded = part.reshape(batch, key_heads, -1, dim) * scaling
        logits = torch.matmul(folded, transposed[..., :end]).view(batch, heads, -1, end)
        if causal:
            later = torch.ones(part.shape[2], part.shape[2], dtype=torch.bool, device=query.device).triu_(1)
            least = torch.finfo(logits.dtype).min
            if logits.requires_grad:
                logits = torch.cat((logits[..., :start], logits[..., start:].masked_fill(later, least)), -1)
            else:
                logits[..., start:].masked_fill_(later, least)
        elif mask is not None:
            own = mask[:, :, start : start + step, :end]
            if own.dtype == torch.bool:
                logits = logits.masked_fill(~own, torch.finfo(logits.dtype).min)
            else:
                logits = logits + own
        weights = torch.softmax(logits, -1, dtype=torch.float32)
        # The greatest logit and its weight tell the mass: w = exp(l - mass). No weight but this one is surely not 0.
        masses.append(logits.amax(-1).float() - weights.amax(-1).log())
        weights = weights.to(value.dtype)
        if dropout:
            weights = torch.nn.functional.dropout(weights, dropout)
        weights = weights.view(batch, key_heads, -1, end)
        outputs.append(torch.matmul(weights, value[:, :, :end]).view(batch, heads, -1, value.shape[-1]))
    return torch.cat(outputs, 2), torch.cat(masses, 2)
