"""Exact top-k of inner products or distances, at about the cost of the matrix product alone.

Letters as in `base`: M' memories searched, Q queries, D dimension, K neighbours, C capacity; n keys alive.

The idea: split n scores into blocks and keep each block's maximum. The k blocks with the highest maxima hold a top k:
if a score x lies in no chosen block, each of the k chosen blocks has a maximum at least as high as the maximum of x's
block, hence at least as high as x, so k other scores do as well as x. That holds under ties, and for any data. A block
is BLOCK scores that lie a fixed stride apart, so that the maximum runs over a middle dimension, whole vectors at a
time, instead of along a row.

Two ways to use it, chosen by size:

* the scores of a batch of queries fit in cache: compute them all, then select among them (`_search_kept`);
* they do not: compute the scores a chunk of keys at a time, keep only block maxima, then gather the keys of the
  winning blocks and score those once more (`_search_chunked`). Most of what torch matmul plus topk takes at 65536 keys
  is neither: it is touching 128 MiB of fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Select = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From scores (G, Q, n) and k <= n to the chosen scores (G, Q, k), falling, and their positions; see `select_top`."""

BLOCK = 8
"""Scores in a block. 4 leaves more maxima to select from, 16 more candidates to look at again; 8 measured best."""

SELECT_BY_BLOCKS = 32
"""Select by block maxima from rows of at least this many times k scores, else with one topk. For 128 rows and k 32 on
one thread of a Xeon, topk against blocks: 0.46 and 0.46 ms for rows of 512 scores, 0.89 and 0.53 for 1024, 2.1 and 1.2
for 8192; for k 128, 2.1 and 2.0 for 2048, 3.7 and 2.3 for 4096. Not below BLOCK, or fewer than k blocks would be left.
"""

SHORTEST_BLOCKED_ROW = 512
"""The same for any k: from rows of 256 scores there is nothing to gain by blocks for k 1, from 512 on there is."""

WIDEST_PARTITION = 2048
"""Block maxima among which a partition selects at once; more are looked at by blocks themselves."""

PARTITION_THREADS = 2
"""Threads of torch up to which NumPy's partition, which has one, is used. For 128 rows of 8192 scores and k 32 on one
thread of a Xeon with AVX-512: 1.8 ms without, 1.0 ms with it, beside 1.1 ms for the product that makes the scores."""

KEPT_SCORES = {"cpu": 1 << 22, "other": 1 << 26}
"""Scores that are held at once, by device. On a CPU 16 MiB: at 128 queries, keeping the scores of 32768 keys took 6.1
ms against 7.1 in chunks, and those of 65536 keys 17 against 13. A GPU has no such cliff, only an end of memory."""

CHUNK_SCORES = 1 << 21
"""Scores of one chunk of keys: 8 MiB, so 4096 keys at 512 queries, which took 55 ms; 2048 took 58 and 8192 69."""

QUERY_BATCH = 128
"""Queries whose scores are kept at a time: fewer make the matrix product slower, more fall out of cache."""

DIRECT_QUERIES = 4
"""Queries whose distances are taken directly, without the copy of the keys that a product needs. One thread of an EPYC,
10000 keys of dimension 128: 0.7, 1.4, 2.7 and 5.4 ms for 1, 2, 4 and 8 queries against 8 to 11 ms by products; 65536 of
dimension 64: 2.3, 4.5, 9 and 18 ms against 9 to 12."""


def search_by_score(
    queries: Tensor,
    keys: Tensor,
    lengths: Sequence[int],
    k: int,
    *,
    memories: Sequence[int] | None = None,
    metric: str = "inner_product",
    select: Select | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best keys for every query, each memory searched by its own queries.

    Args:
        queries: (M', Q, D) float32.
        keys: (M, C, D) float32 on the same device, of which row m holds lengths[m'] keys in its first slots.
        lengths: M' numbers of keys alive.
        k: at least 1.
        memories: M' rows of `keys`; all of them in order when None.
        metric: "inner_product", or "l2" for minus the squared Euclidean distance.
        select: chooses among the scores of all keys; exactly when None. It is given no more keys than are alive.

    Returns:
        Scores (M', Q, k) float32, falling, and slots (M', Q, k) int64; -inf and -1 beyond a memory's length. Which of
        equally good keys are returned is not defined, but it is the same on every call.
    """
    which = list(range(keys.shape[0])) if memories is None else list(memories)
    shape = (*queries.shape[:2], k)
    scores = torch.full(shape, -torch.inf, device=queries.device)
    slots = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
    if not queries.shape[1]:
        return scores, slots
    search = _search_l2 if metric == "l2" else _search_inner
    for length, rows in _groups(lengths, queries, keys):
        found = min(k, length)
        some_keys = _rows(keys, [which[row] for row in rows])[:, :length]
        best, where = search(_rows(queries, rows), some_keys, found, select)
        # A slice where it will do: writing by a list of rows is slower than the search of a small memory.
        into: slice | list[int] = slice(rows[0], rows[-1] + 1) if _is_run(rows) else rows
        scores[into, :, :found] = best
        slots[into, :, :found] = where
    return scores, slots


def select_top(scores: Tensor, k: int, *, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """`scores.topk(k)` along the last dimension by block maxima, where that is faster.

    Args:
        scores: (..., n) with n >= k >= 1.
        k: how many to select.
        in_order: best first; otherwise in any order.

    Returns:
        Scores (..., k) and their positions (..., k) int64.
    """
    n = scores.shape[-1]
    if n < max(SHORTEST_BLOCKED_ROW, SELECT_BY_BLOCKS * k):
        best = scores.topk(k, dim=-1, sorted=in_order)
        return best.values, best.indices
    stride = n // BLOCK
    blocked = BLOCK * stride
    maxima = scores[..., :blocked].unflatten(-1, (BLOCK, stride)).amax(-2)
    partitions = _partitions(scores)
    if partitions and stride <= WIDEST_PARTITION:
        blocks = torch.from_numpy(np.argpartition(maxima.numpy(), stride - k, axis=-1)[..., stride - k :])
    else:
        _, blocks = select_top(maxima, k, in_order=False)
    members = torch.arange(0, blocked, stride, device=scores.device)[:, None]
    candidates = (blocks[..., None, :] + members).flatten(-2)
    candidates = _with_rest(candidates, blocked, n)
    if partitions:
        return _partition_top(scores.gather(-1, candidates), candidates, k)
    best = scores.gather(-1, candidates).topk(k, dim=-1, sorted=in_order)
    return best.values, candidates.gather(-1, best.indices)


def _partitions(scores: Tensor) -> bool:
    """Whether NumPy selects among these scores faster than torch: it does so by vector instructions, in one thread."""
    plain = scores.device.type == "cpu" and scores.dtype == torch.float32 and not scores.requires_grad
    return plain and torch.get_num_threads() <= PARTITION_THREADS


def _partition_top(scores: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of float32 scores (..., n), falling, and their positions (..., k) out of `positions` (..., n) int64.

    Score and position make up one integer, the score above, so that one partition moves both.
    """
    packed = _ordered(scores.view(torch.int32)).long() << 32
    packed |= positions
    numbers = packed.numpy()
    numbers.partition(numbers.shape[-1] - k, axis=-1)
    best = np.ascontiguousarray(numbers[..., -k:])
    best.sort(axis=-1)
    packed = torch.from_numpy(best[..., ::-1].copy())
    return _ordered((packed >> 32).int()).view(torch.float32), packed & 0xFFFFFFFF


def _ordered(bits: Tensor) -> Tensor:
    """Integers that rise with the float32 numbers whose int32 `bits` these are; applied twice it gives them back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _groups(lengths: Sequence[int], queries: Tensor, keys: Tensor) -> list[tuple[int, list[int]]]:
    """Rows 0..M'-1 in groups of equal length (so that nothing is masked), each small enough to search at once."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            by_length.setdefault(int(length), []).append(row)
    # A quarter of what one memory may take, for each thread: small memories gain nothing from leaving the nearer
    # cache, and several threads need as much at once to share it out. (32 memories of 8192 keys, 128 queries: a
    # quarter takes 74 ms with one thread and 69 with two, a half 85 and 53.) Keys that are not neighbours are copied,
    # so they count as well.
    shares = max(1, 4 // torch.get_num_threads())
    per_key = max(shares * min(queries.shape[1], QUERY_BATCH), keys.shape[2])
    groups = []
    for length, rows in by_length.items():
        at_once = max(1, _kept_scores(queries.device) // (per_key * length))
        groups += [(length, rows[start : start + at_once]) for start in range(0, len(rows), at_once)]
    return groups


def _is_run(numbers: Sequence[int]) -> bool:
    return list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def _rows(tensor: Tensor, which: list[int]) -> Tensor:
    """Rows of a tensor: a view where they lie beside each other, else a copy."""
    if _is_run(which):
        return tensor[which[0] : which[0] + len(which)]
    return tensor[which]


def _kept_scores(device: torch.device) -> int:
    return KEPT_SCORES["cpu" if device.type == "cpu" else "other"]


def _search_inner(queries: Tensor, keys: Tensor, k: int, select: Select | None) -> tuple[Tensor, Tensor]:
    """Queries (G, Q, D) against keys (G, n, D) that are all alive, k <= n."""
    group, count, _ = queries.shape
    n = keys.shape[1]
    budget = _kept_scores(queries.device)
    batch = min(count, QUERY_BATCH)
    # Looking again at k blocks costs the same for every query whatever n, and is not worth it for a k near n.
    if select is None and group == 1 and batch * n > budget and n >= SELECT_BY_BLOCKS * BLOCK * k:
        # Maxima are an eighth of the scores, and are held within the same bound.
        step = min(512, max(1, budget * BLOCK // n))
        parts = [_search_chunked(part, keys[0], k) for part in queries[0].split(step)]
        return torch.cat([part[0] for part in parts])[None], torch.cat([part[1] for part in parts])[None]
    select = select or select_top
    step = min(batch, max(1, budget // (group * n)))
    if step >= count:
        return select(torch.bmm(queries, keys.transpose(1, 2)), k)
    best = queries.new_empty(group, count, k)
    slots = torch.empty(group, count, k, dtype=torch.int64, device=queries.device)
    scores = queries.new_empty(group, step, n)
    for start in range(0, count, step):
        part = queries[:, start : start + step]
        # One buffer for all batches: fresh memory costs more than the product that fills it.
        room = scores if part.shape[1] == step else queries.new_empty(group, part.shape[1], n)
        torch.bmm(part, keys.transpose(1, 2), out=room)
        best[:, start : start + step], slots[:, start : start + step] = select(room, k)
    return best, slots


def _search_chunked(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Queries (Q, D) against keys (n, D), n well above BLOCK * k, without ever holding (Q, n) scores."""
    count, n = len(queries), len(keys)
    chunk = min(8192, max(1024, CHUNK_SCORES // count // BLOCK * BLOCK))
    stride = chunk // BLOCK
    last = n % chunk // BLOCK
    blocked = n // BLOCK * BLOCK
    maxima = queries.new_empty(count, blocked // BLOCK)
    scores = queries.new_empty(count, chunk)
    for start in range(0, n - chunk + 1, chunk):
        torch.mm(queries, keys[start : start + chunk].T, out=scores)
        done = start // BLOCK
        torch.amax(scores.view(count, BLOCK, stride), 1, out=maxima[:, done : done + stride])
    if last:
        tail = torch.mm(queries, keys[blocked - last * BLOCK : blocked].T)
        torch.amax(tail.view(count, BLOCK, last), 1, out=maxima[:, -last:])
    _, blocks = select_top(maxima, k, in_order=False)
    # Block b of chunk c starts at slot c * chunk + b; in the last, shorter chunk its members lie closer together.
    firsts = blocks // stride * chunk + blocks % stride
    strides = torch.where(blocks < n // chunk * stride, stride, max(last, 1))
    members = torch.arange(BLOCK, device=queries.device)[:, None]
    candidates = _with_rest((firsts[:, None] + members * strides[:, None]).flatten(1), blocked, n)
    return _score_candidates(queries, keys, candidates, k)


def _with_rest(candidates: Tensor, blocked: int, n: int) -> Tensor:
    """Adds to every row of candidates the at most BLOCK - 1 positions from `blocked` to n - 1 that no block holds."""
    if blocked == n:
        return candidates
    rest = torch.arange(blocked, n, device=candidates.device)
    return torch.cat((candidates, rest.expand(*candidates.shape[:-1], -1)), -1)


def _score_candidates(queries: Tensor, keys: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of candidate slots (Q, c) for queries (Q, D) among keys (n, D)."""
    count, width = candidates.shape
    scores = queries.new_empty(count, width, 1)
    # Some 4 MiB of keys at a time, in one buffer that stays in cache.
    step = min(count, max(1, (1 << 20) // (width * keys.shape[1])))
    room = keys.new_empty(step * width, keys.shape[1])
    for start in range(0, count, step):
        stop = min(count, start + step)
        gathered = room[: (stop - start) * width]
        torch.index_select(keys, 0, candidates[start:stop].reshape(-1), out=gathered)
        torch.bmm(gathered.view(stop - start, width, -1), queries[start:stop, :, None], out=scores[start:stop])
    best = scores.squeeze(2).topk(k, dim=-1)
    return best.values, candidates.gather(1, best.indices)


def _search_l2(queries: Tensor, keys: Tensor, k: int, select: Select | None) -> tuple[Tensor, Tensor]:
    """By the squared distance, ranked by inner products (see `ranked_by_product`) unless there are few queries."""
    if queries.shape[1] <= DIRECT_QUERIES:
        distances = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
        _, slots = (select or select_top)(distances.neg_(), k)
    else:
        _, slots = _search_inner(*ranked_by_product(queries, keys), k, select)
    return by_distance(queries, keys, slots)


def ranked_by_product(queries: Tensor, keys: Tensor, copies: int = 1) -> tuple[Tensor, Tensor]:
    """Queries (G, Q, D + copies) and keys (G, n, D + copies) whose inner products fall as the distances rise.

    |q - x|^2 = |q|^2 - (2 q.x - |x|^2), where |q|^2 is the same for all x: the inner product [2q, -1].[x, |x|^2] ranks,
    also if |x|^2 is spread over several components. Around the mean of the keys rather than the origin, since the two
    terms cancel badly for keys that lie far from the origin and near each other.
    """
    centre = keys.mean(1, keepdim=True)
    centred = keys - centre
    squares = (centred.square().sum(-1, keepdim=True) / copies).expand(-1, -1, copies)
    minus_one = queries.new_full((*queries.shape[:2], copies), -1.0)
    return torch.cat(((queries - centre) * 2, minus_one), -1), torch.cat((centred, squares), -1)


def by_distance(queries: Tensor, keys: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the squared distances (G, Q, k) of the keys at slots (G, Q, k), falling, and those slots in that order.

    From the differences themselves, so that a key's distance to itself is zero.
    """
    scores = torch.empty(slots.shape, device=queries.device)
    step = max(1, _kept_scores(queries.device) // (slots.shape[2] * keys.shape[2]))
    for group in range(len(queries)):
        for start in range(0, queries.shape[1], step):
            found = slots[group, start : start + step]
            difference = keys[group][found] - queries[group, start : start + step, None]
            scores[group, start : start + step] = -difference.square().sum(-1)
    scores, order = scores.sort(dim=-1, descending=True)
    return scores, slots.gather(-1, order)
