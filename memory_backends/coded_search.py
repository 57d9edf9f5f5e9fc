"""Exact search where whole keys lie in a file and int8 codes of them in memory: codes find, whole keys decide.

Letters as in `base`; n keys searched, N candidates to a query.

A component of a decoded key is off by at most half the key's scale s. So an inner product is off by at most
|q|_1 s / 2, and a distance by at most sqrt(D) s / 2. The N best by code are scored by whole key; a key that is not
among them is no better than the N-th by code and that bound, and where the k-th best of the candidates is as good, none
was missed. Queries of which that cannot be said look at more candidates, in the end at every whole key.

Only rows of the file that are candidates are read, some hundred for a query, and not the whole of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recollect.memory_backends import cpu_search
from recollect.memory_backends.block_topk import search_by_score
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.raw_keys import rescore

CANDIDATES = 4
"""Candidates to a neighbour at first. Of 512 queries among 400000 clustered unit keys of dimension 64 and k 32, 54 had
to look at more after twice as many, and none after four times."""
WIDEST = 4096
"""Candidates to a query at most; beyond, the file is read."""
DECODED_FLOATS = 1 << 23
"""Numbers decoded at a time: 32 MiB."""
ROUNDING = 1e-5
"""By how much float32 may be off, relative to |q| times the longest key."""


def search_codes(
    ring: KeyRing, queries: Tensor, k: int, memory: int, start: int, stop: int, metric: str
) -> tuple[Tensor, Tensor]:
    """The k best keys in slots start to stop - 1 of one memory, by whole keys.

    Args:
        ring: with `scales` and `whole`.
        queries: (Q, D) float32.
        k: at most stop - start.
        memory, start, stop: the run of slots.
        metric: "inner_product" or "l2".

    Returns:
        Scores (Q, k) float32, falling, and slots (Q, k) int64.
    """
    assert ring.scales is not None
    scale = float(ring.scales[memory, start:stop].max())
    one = torch.tensor([memory])
    scores = queries.new_empty(len(queries), k)
    slots = torch.empty(len(queries), k, dtype=torch.int64)
    left = torch.arange(len(queries))
    wanted = CANDIDATES * k
    while len(left):
        asked = queries[left]
        if wanted >= stop - start or wanted > WIDEST:
            scores[left], slots[left] = _best(ring, asked, k, memory, start, stop, metric, whole=True)
            break
        by_code, where = _best(ring, asked, wanted, memory, start, stop, metric, whole=False)
        best, places = rescore(ring, asked[None], where[None], k, one, metric=metric)
        scores[left], slots[left] = best[0], places[0]
        left = left[best[0, :, -1] < _at_best(by_code[:, -1], asked, scale, metric)]
        wanted *= 4
    return scores, slots


def _at_best(by_code: Tensor, queries: Tensor, scale: float, metric: str) -> Tensor:
    """(Q,) the best true score that a key of this score (Q,) by its code may have."""
    dim = queries.shape[1]
    if metric == "l2":
        longest = queries.norm(dim=1) + by_code.neg().clamp(min=0).sqrt()
        nearest = (by_code.neg().clamp(min=0).sqrt() - math.sqrt(dim) * scale / 2).clamp(min=0)
        return -nearest.square() + ROUNDING * longest.square()
    largest = 127 * scale * math.sqrt(dim)
    return by_code + queries.abs().sum(1) * scale / 2 + ROUNDING * queries.norm(dim=1) * largest


def _best(
    ring: KeyRing, queries: Tensor, count: int, memory: int, start: int, stop: int, metric: str, *, whole: bool
) -> tuple[Tensor, Tensor]:
    """The `count` best (Q, count) by code or by whole key, decoded or read a chunk at a time, and their slots."""
    chunk = max(1024, DECODED_FLOATS // queries.shape[1])
    room = queries.new_empty(min(chunk, stop - start), queries.shape[1])
    scores, slots = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for begin in range(start, stop, chunk):
        end = min(stop, begin + chunk)
        keys = ring.chunk(memory, begin, end) if whole else ring.decode(memory, begin, end, room[: end - begin])
        asked = queries[None], keys[None], [end - begin], min(count, end - begin)
        fused = cpu_search.search_by_score(*asked, memories=[0], metric=metric)
        found, places = fused or search_by_score(*asked, metric=metric)
        scores, slots = torch.cat((scores, found[0]), 1), torch.cat((slots, places[0] + begin), 1)
        scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
        slots = slots.gather(1, order)
    return scores, slots
