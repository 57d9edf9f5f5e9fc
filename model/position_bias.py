"""T5's relative position bias (Raffel et al. 2020, section 2.1), for causal attention over a cache and a segment."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def relative_position_buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance back in time.

    Half of the buckets hold one distance each, 0, 1, 2, ...; the others grow logarithmically up to `max_distance`, and
    all larger distances share the last one. Negative distances (the future, masked by the caller) fall into bucket 0.

    Args:
        distances: integers of any shape, query position minus key position.
    Returns:
        int64 of the same shape, between 0 and buckets - 1.
    """
    distances = distances.clamp_min(0)
    exact = buckets // 2
    scaled = torch.log(distances.clamp_min(1).to(torch.float32) / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (scaled * (buckets - exact)).to(torch.int64)).clamp_max(buckets - 1)
    return torch.where(distances < exact, distances, logarithmic)


class RelativePositionBias(nn.Module):
    """A learned number per head and bucket, added to attention logits."""

    def __init__(self, heads: int, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.zeros(heads, buckets))
        self._known: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, tokens: int, cached: int) -> Tensor:
        """Bias (H, T, X+T) for T = `tokens` queries over X = `cached` older keys and the segment; the future: -inf.

        Its rows are windows on the biases of all distances, each a step further along. To look up every pair by itself
        costs little forward, but its gradient adds millions of numbers into a few, one after another: on a GPU that was
        nine tenths of a training step.
        """
        lookup = (tokens, cached, self.weight.device)
        if lookup not in self._known:
            self._known = {lookup: self._selection(tokens, cached)}
        chosen, future = self._known[lookup]
        # Products with zeros and ones, not an index, for the same reason; and exact, as a matrix product need not be.
        falling = (self.weight[:, :, None] * chosen).sum(1) + future
        return falling.unfold(-1, cached + tokens, 1).flip(1)

    def _selection(self, tokens: int, cached: int) -> tuple[Tensor, Tensor]:
        """Of all distances from the greatest down: a 1 at their bucket (buckets, X+2T-1), and -inf at the future's."""
        distances = torch.arange(cached + tokens - 1, -tokens, -1, device=self.weight.device)
        buckets = relative_position_buckets(distances, self.buckets, self.max_distance)
        chosen = torch.nn.functional.one_hot(buckets, self.buckets).T.to(self.weight.dtype)
        future = torch.zeros_like(chosen[0]).masked_fill(distances < 0, -torch.inf)
        return chosen.masked_fill(distances < 0, 0.0), future
