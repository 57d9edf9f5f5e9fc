"""Rotary positions, taken out of keys before they are stored and put into queries at a chosen distance.

A rotary embedding turns a query at position n by R(n) and a key at position m by R(m), so that their product depends
on n - m. A key that is stored as it comes would be found or not by where it stood, modulo the wave lengths of the
embedding. So keys are turned back to position 0, and a query is turned to the fixed position `distance`: the product
is then that of a key `distance` tokens ago, wherever either of them stands. Turning back what the model's own code
has made, rather than catching the projections, also holds for adapters and for normalised queries and keys (Qwen3).

Only the first dimensions are turned where the embedding is partial (GPT-NeoX), and the factor by which some scaled
embeddings lengthen queries and keys (YaRN's attention scaling) stays in, as in the layer's own logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rotary:
    """Turns queries and keys by positions as one model does.

    Args:
        embedding: the model's rotary embedding module: positions to cosines and sines.
    """

    def __init__(self, embedding: Any) -> None:
        self._embedding = [embedding]  # in a list, for no module of the model is to be registered twice

    def turn(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Vectors (B, H, T, D), turned by positions (B, T) or (1, T), which may be negative; float32."""
        embedding = self._embedding[0]
        # Asked for float32, whatever the model's type: positions are taken out and put in at full precision.
        with torch.no_grad():
            cosines, sines = embedding(torch.zeros(1, device=vectors.device), positions)
        length = float(getattr(embedding, "attention_scaling", 1.0))
        cosines, sines = (cosines / length)[:, None].float(), (sines / length)[:, None].float()
        vectors = vectors.float()
        size = cosines.shape[-1]
        turned, passed = vectors[..., :size], vectors[..., size:]
        first, second = turned.chunk(2, dim=-1)
        result = turned * cosines + torch.cat((-second, first), -1) * sines
        return torch.cat((result, passed), -1) if passed.shape[-1] else result
