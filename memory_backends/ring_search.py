"""Exact search over the slots of a `KeyRing`, in whatever type it stores its keys: the one entry for backends.

Letters as in `base`: M' memories searched, Q queries, D dimension, K neighbours, C capacity; n keys alive.

Keys that are stored as float32 are searched where they lie. Others are decoded a chunk at a time, so that no float32
copy of a whole memory is ever made; what is exact then is the search among the decoded keys. Where whole keys lie in a
file beside int8 codes, the codes find and the whole keys decide (`coded_search`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import cpu_search
from recollect.memory_backends.block_topk import KEPT_SCORES, QUERY_BATCH, Select, search_by_score
from recollect.memory_backends.coded_search import search_codes
from recollect.memory_backends.key_ring import KeyRing

DECODED_FLOATS = 1 << 23
"""Numbers decoded at a time from keys that are not stored as float32: 32 MiB."""


def search_ring(
    ring: KeyRing,
    queries: Tensor,
    k: int,
    memories: Sequence[int] | Tensor,
    lengths: Sequence[int] | Tensor,
    metric: str,
    first: int = 0,
    select: Select | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best keys for every query among slots first to first + length - 1 of its memory.

    Args:
        ring: the keys, on one device.
        queries: (M', Q, D) float32 on the ring's device.
        k: at least 1.
        memories: M' memories, distinct.
        lengths: M' numbers of slots searched, each from slot `first` on and all alive; 0 for none of that memory.
        metric: "inner_product", or "l2" for minus the squared Euclidean distance ("cosine" is the inner product of
            what a ring holds then).
        first: the slot at which the searched run begins, the same in all memories.
        select: chooses among the scores of all keys; exactly when None. It is given no more keys than are searched.

    Returns:
        Scores (M', Q, k) float32, falling, and slots (M', Q, k) int64 as the ring counts them; -inf and -1 beyond
        what is there. Which of equally good keys are returned is not defined, but it is the same on every call.
    """
    which = memories.tolist() if isinstance(memories, Tensor) else [int(memory) for memory in memories]
    alive = lengths.tolist() if isinstance(lengths, Tensor) else [int(length) for length in lengths]
    plain = "l2" if metric == "l2" else "inner_product"
    # Of keys in a file no more is mapped at a time than a chunk.
    in_file = bool(getattr(ring, "mapped_key_bytes", 0))
    if getattr(ring, "storage", "float32") == "float32" and not in_file:
        if select is None and queries.device.type == "cpu":
            found = cpu_search.search_by_score(queries, ring.keys, alive, k, memories=which, metric=plain, start=first)
        else:
            found = None
        keys = ring.keys[:, first:] if first else ring.keys
        scores, slots = found or search_by_score(queries, keys, alive, k, memories=which, metric=plain, select=select)
        if first:
            slots.add_(slots.ge(0), alpha=first)
        return scores, slots
    shape = (*queries.shape[:2], k)
    scores = torch.full(shape, -torch.inf, device=queries.device)
    slots = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
    for row, (memory, length) in enumerate(zip(which, alive, strict=True)):
        if not length or not queries.shape[1]:
            continue
        if select is None and getattr(ring, "whole", None) is not None:
            found_in_codes = search_codes(ring, queries[row], min(k, length), memory, first, first + length, plain)
            scores[row, :, : min(k, length)], slots[row, :, : min(k, length)] = found_in_codes
            continue
        one = _search_decoded if select is None else _select_decoded
        best, where = one(ring, queries[row], k, memory, first, first + length, plain, select)
        scores[row, :, : best.shape[1]] = best
        slots[row, :, : best.shape[1]] = where
    return scores, slots


def _search_decoded(
    ring: Any, queries: Tensor, k: int, memory: int, start: int, stop: int, metric: str, select: Select | None
) -> tuple[Tensor, Tensor]:
    """Queries (Q, D) against slots start to stop - 1, decoded a chunk at a time: the k best of each, merged."""
    chunk = max(1024, DECODED_FLOATS // queries.shape[1])
    on_cpu = queries.device.type == "cpu"
    # One room for all: fresh memory for every chunk would be mapped and cleared each time.
    room = queries.new_empty(min(chunk, stop - start) if ring.storage != "float32" else 0, queries.shape[1])
    best: Tensor | None = None
    where: Tensor | None = None
    for begin in range(start, stop, chunk):
        end = min(stop, begin + chunk)
        keys = ring.chunk(memory, begin, end, room[: end - begin])
        asked = queries[None], keys[None], [end - begin], min(k, end - begin)
        fused = cpu_search.search_by_score(*asked, memories=[0], metric=metric) if on_cpu else None
        found, places = fused or search_by_score(*asked, metric=metric)
        found, places = found[0], places[0] + begin
        if best is not None and where is not None:
            found, places = torch.cat((best, found), 1), torch.cat((where, places), 1)
            found, order = found.topk(min(k, found.shape[1]), dim=1)
            places = places.gather(1, order)
        best, where = found, places
    assert best is not None
    assert where is not None
    return best, where


def _select_decoded(
    ring: Any, queries: Tensor, k: int, memory: int, start: int, stop: int, metric: str, select: Select | None
) -> tuple[Tensor, Tensor]:
    """The same where `select` must see the scores of all keys at once, for as many queries as the budget holds."""
    assert select is not None
    count = stop - start
    chunk = max(1024, DECODED_FLOATS // queries.shape[1])
    budget = KEPT_SCORES["cpu" if queries.device.type == "cpu" else "other"]
    step = min(QUERY_BATCH, max(1, budget // count))
    found = []
    for part in queries.split(step):
        scores = part.new_empty(len(part), count)
        centre = None
        for begin in range(start, stop, chunk):
            end = min(stop, begin + chunk)
            keys = ring.chunk(memory, begin, end)
            into = scores[:, begin - start : end - start]
            if metric == "l2":
                # Ranks like the distance; around a centre, since the two terms cancel badly far from the origin.
                centre = keys.mean(0) if centre is None else centre
                keys = keys - centre
                torch.mm(2 * (part - centre), keys.T, out=into)
                into -= keys.square().sum(1)
            else:
                torch.mm(part, keys.T, out=into)
        best, where = select(scores[None], min(k, count))
        best, where = best[0], where[0] + start
        if metric == "l2":
            rows = torch.tensor([memory])
            best = -(ring.gather(where[None], rows)[0] - part[:, None]).square().sum(-1)
            best, order = best.sort(dim=1, descending=True)
            where = where.gather(1, order)
        found.append((best, where))
    return torch.cat([best for best, _ in found]), torch.cat([where for _, where in found])


__all__ = ["search_ring"]
