"""Candidates of an approximate index, scored anew from the raw keys.

Letters as in `base`; N candidates to a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.memory_backends.block_topk import select_top
from recollect.memory_backends.key_ring import KeyRing

GATHERED_FLOATS = 1 << 20
"""Numbers gathered at a time: 4 MiB of keys, which stay in cache between the gather and the product."""


def true_scores(ring: KeyRing, queries: Tensor, slots: Tensor, memories: Tensor, *, metric: str) -> Tensor:
    """Scores (M', Q, N) of the raw keys at slots (M', Q, N), -inf where the slot is -1; `metric` not "cosine"."""
    count, candidates = slots.shape[1:]
    scores = torch.empty(slots.shape, device=queries.device)
    step = max(1, GATHERED_FLOATS // (candidates * queries.shape[2]))
    for row, memory in enumerate(memories.tolist()):
        for start in range(0, count, step):
            stop = min(count, start + step)
            places = slots[row, start:stop].clamp(min=0)
            keys = ring.rows(memory, places.flatten()).view(stop - start, candidates, -1)
            asked = queries[row, start:stop]
            if metric == "l2":
                scores[row, start:stop] = -(keys - asked[:, None]).square().sum(-1)
            else:
                scores[row, start:stop] = torch.bmm(keys, asked[:, :, None]).squeeze(2)
    return scores.masked_fill_(slots < 0, -torch.inf)


def rescore(
    ring: KeyRing, queries: Tensor, slots: Tensor, k: int, memories: Tensor, *, metric: str
) -> tuple[Tensor, Tensor]:
    """The k best of candidate slots (M', Q, N >= k) by their raw keys: scores and slots (M', Q, k), best first."""
    metric = "l2" if metric == "l2" else "inner_product"
    scores = true_scores(ring, queries, slots, memories, metric=metric)
    best, order = select_top(scores, k)
    return best, slots.gather(-1, order)
