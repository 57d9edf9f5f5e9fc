"""Triton kernels after the first pass: which keys may be among the best, their whole scores, and the best of them.

Letters and blocks as in `triton_kernels`; the queries of all memories follow each other.

A candidate is one int64: its float32 score as an integer that rises with it, and below it the slot, the lower the
better. So one comparison orders both, and equal scores are chosen among in the same way on every call.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.memory_backends.triton_kernels import LANES, LOWEST

LARGEST_SCORE = 1e37
"""A search whose scores may exceed this is left to plain torch: the finite number for 'no score' lies not far off."""
LARGEST_BIAS_ERROR = 1e30
NO_CANDIDATE = -(2**63)
SLOT_BITS = 0xFFFFFFFF

_LANES = tl.constexpr(LANES)
_LOWEST = tl.constexpr(LOWEST)
_HALF_LOWEST = tl.constexpr(LOWEST / 2)
_LARGEST_SCORE = tl.constexpr(LARGEST_SCORE)
_LARGEST_BIAS_ERROR = tl.constexpr(LARGEST_BIAS_ERROR)
_LOWEST_INTEGER = tl.constexpr(-(2**31))
_NO_CANDIDATE = tl.constexpr(NO_CANDIDATE)
_SLOT_BITS = tl.constexpr(SLOT_BITS)


@triton.jit
def _ordered(bits: tl.tensor) -> tl.tensor:
    """Integers that rise with the float32 numbers whose bits these are; applied twice it gives them back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _as_ordered(numbers: tl.tensor) -> tl.tensor:
    """int64 numbers that rise with float32 ones; `_as_float` gives those back."""
    return _ordered(numbers.to(tl.int32, bitcast=True)).to(tl.int64)


@triton.jit
def _as_float(order: tl.tensor) -> tl.tensor:
    return _ordered(order.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _reached(
    numbers: tl.tensor, few: tl.tensor, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, QUERIES: tl.constexpr
) -> tl.tensor:
    """A bound (QUERIES,) that at least `few` of `numbers` (QUERIES, BLOCKS) reach, and seldom many more.

    The lowest of the highest numbers of GROUPS groups is reached by as many; for numbers in random order it is not far
    off, and bisection from there on takes a few steps, over the bits, so that one huge number does not make them many.
    It stops a little early: a few candidates too many cost less.
    """
    # A group's numbers may be any, so they need not be moved.
    grouped = tl.reshape(numbers, (QUERIES, GROUPS, BLOCKS // GROUPS), can_reorder=QUERIES == 1)
    lowest = tl.min(tl.max(grouped, axis=2), axis=1)
    low = tl.where(few <= GROUPS, _as_ordered(lowest), _LOWEST_INTEGER)
    above = _as_ordered(tl.max(numbers, axis=1)) + 1
    reaching = tl.sum((numbers >= _as_float(low)[:, None]).to(tl.int32), axis=1)
    enough = few + few // 8 + 4
    # The last bits of a score, a hundred-thousandth of it, are not worth a step either.
    active = (reaching > enough) & (above - low > 128)
    while tl.max(active.to(tl.int32), axis=0) > 0:
        middle = low + ((above - low) >> 1)
        number = tl.sum((numbers >= _as_float(middle)[:, None]).to(tl.int32), axis=1)
        rise = active & (number >= few)
        above = tl.where(active & (number < few), middle, above)
        low = tl.where(rise, middle, low)
        reaching = tl.where(rise, number, reaching)
        active = (reaching > enough) & (above - low > 128)
    return _as_float(low)


@triton.jit
def select_candidates(
    firsts: tl.tensor,
    seconds: tl.tensor,
    block_bounds: tl.tensor,
    query_bounds: tl.tensor,
    rows: tl.tensor,
    singles: tl.tensor,
    opened: tl.tensor,
    counts: tl.tensor,
    wanted: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    blocks: tl.tensor,
    bound_blocks: tl.tensor,
    guard: tl.tensor,
    ROUNDS: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SINGLES: tl.constexpr,
    OPENED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    QUERIES: tl.constexpr,
) -> None:
    """Which keys may be among the best: the best key of a block, or all its keys. QUERIES queries to a program.

    With eps = |q^| E + |q - q^| N + B for a block, every true score lies within eps of the one that was computed,
    since q.x - q^.x^ = q^.(x - x^) + (q - q^).x; E also holds what the arithmetic is off by, B the same for the bias.
    Let tau be the `wanted`-th highest of (maximum - eps): so many keys reach tau. A key whose computed score plus eps
    lies below tau is therefore not among them. A block whose second score may reach tau is opened: all its keys count.

    Args:
        firsts, seconds: (G * Q, N) of `scan_blocks`; without SECOND no block is opened.
        block_bounds: (M, 3, bound_blocks) float32: E, N and B of each block, bound_blocks >= N.
        query_bounds: (G * Q, 2): |q^|, or more, and |q - q^|.
        rows: (G,) int32, the memory of each group member.
        singles: (G * Q, SINGLES) int32 to write: slots. opened: (G * Q, OPENED) int32: the first slots of blocks.
        counts: (G * Q, 3) int32, zero beforehand: how many of either, more where they did not fit; and 1 where a number
            is too large.
        wanted: (G,) int32, K or the keys alive where they are fewer.
        total, count, blocks: G * Q, Q, N.
        guard: 1.0 for the proven margin, 0.0 for none.
        HAS_BIAS: whether the third of `block_bounds` is other than zero.
        GROUPS: as for `_reached`, at least the greatest of `wanted` where BLOCKS is.
        MASKED: whether N is not BLOCKS, or G * Q not a multiple of QUERIES.
    """
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = row < total
    group = row // count
    memory = tl.load(rows + group, mask=real, other=0).to(tl.int64)
    few = tl.load(wanted + group, mask=real, other=0)
    length = tl.load(query_bounds + row * 2, mask=real, other=0.0)
    error = tl.load(query_bounds + row * 2 + 1, mask=real, other=0.0)
    block = tl.arange(0, BLOCKS)[None, :]
    inside = (block < blocks) & real[:, None] if MASKED else None
    row = row.to(tl.int64)
    at = (row * blocks)[:, None] + block
    first = tl.load(firsts + at, mask=inside, other=_LOWEST if MASKED else None)
    bounds = block_bounds + (memory * 3 * bound_blocks)[:, None] + block
    key_error = tl.load(bounds, mask=inside, other=0.0 if MASKED else None)
    norms = tl.load(bounds + bound_blocks, mask=inside, other=0.0 if MASKED else None)
    epsilon = (guard * length)[:, None] * key_error + (guard * error)[:, None] * norms
    failed = (length + error) * tl.max(norms + key_error, axis=1) > _LARGEST_SCORE
    if HAS_BIAS:
        bias_error = tl.load(bounds + 2 * bound_blocks, mask=inside, other=0.0 if MASKED else None)
        epsilon += guard * bias_error
        failed = failed | (tl.max(bias_error, axis=1) > _LARGEST_BIAS_ERROR)
    # Where a block holds no key, `first` lies far below any score, and so does all that is made of it.
    threshold = _reached(first - epsilon, few, GROUPS, BLOCKS, QUERIES)
    failed = failed | ((few > 0) & (threshold < _HALF_LOWEST))
    tl.store(counts + row * 3 + 2, failed.to(tl.int32), mask=real)
    threshold = tl.maximum(threshold, _HALF_LOWEST)[:, None]
    single = first + epsilon >= threshold
    own_counts = (counts + row * 3)[:, None]
    start = block // _LANES * (_LANES * ROUNDS) + block % _LANES
    # Few of many are taken, each to the next free place, in any order: a running count of all would cost far more.
    none = tl.zeros_like(block + row[:, None]).to(tl.int32)
    if SECOND:
        second = tl.load(seconds + at, mask=single, other=_LOWEST)
        open_block = single & (second + epsilon >= threshold)
        single = single & (open_block == 0)
        place = tl.atomic_add(own_counts + 1 + none, 1, mask=open_block, sem="relaxed")
        tl.store((opened + row * OPENED)[:, None] + place, start + none, mask=open_block & (place < OPENED))
    slot = start + (first.to(tl.int32, bitcast=True) & (ROUNDS - 1)) * _LANES
    place = tl.atomic_add(own_counts + none, 1, mask=single, sem="relaxed")
    tl.store((singles + row * SINGLES)[:, None] + place, slot, mask=single & (place < SINGLES))


@triton.jit
def _score_slots(
    keys: tl.tensor,
    asked: tl.tensor,
    slot: tl.tensor,
    here: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    DISTANCE: tl.constexpr,
) -> tl.tensor:
    """Candidates (n,) int64 from slots (n,), where `here`."""
    depth = tl.arange(0, P)
    fits = depth < D
    tile = tl.load(
        keys + slot[:, None].to(tl.int64) * D + depth[None, :], mask=here[:, None] & fits[None, :], other=0.0
    ).to(tl.float32)
    if DISTANCE:
        # Where nothing is loaded, `asked` is zero as well.
        found = -tl.sum((tile - asked[None, :]) * (tile - asked[None, :]), axis=1)
    else:
        found = tl.sum(tile * asked[None, :], axis=1)
    order = _ordered(found.to(tl.int32, bitcast=True)).to(tl.int64)
    return tl.where(here, (order << 32) | (_SLOT_BITS - slot.to(tl.int64)), _NO_CANDIDATE)


@triton.jit
def score_candidates(
    queries: tl.tensor,
    keys: tl.tensor,
    rows: tl.tensor,
    lengths: tl.tensor,
    singles: tl.tensor,
    opened: tl.tensor,
    counts: tl.tensor,
    any_failed: tl.tensor,
    candidates: tl.tensor,
    count: tl.tensor,
    capacity: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    ROUNDS: tl.constexpr,
    SINGLES: tl.constexpr,
    OPENED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MEMBERS: tl.constexpr,
    DISTANCE: tl.constexpr,
) -> None:
    """Whole float32 scores of the candidates. One program to a query.

    Args:
        queries: (G, Q, D) float32; keys: (M, C, D), any floating type; rows, lengths: as for `scan_blocks`.
        singles, opened, counts: of `select_candidates`; a query whose candidates did not fit is marked there.
        any_failed: (1,) int32, set to 1 where any query is marked.
        candidates: (G * Q, SINGLES + OPENED * ROUNDS) int64 to write: the singles, then the keys of opened blocks,
            without a gap; what follows is left as it is.
        BLOCK_C, MEMBERS: singles, and keys of an opened block, that are read at a time; MEMBERS divides ROUNDS.
        DISTANCE: minus the squared distance instead of the inner product.
    """
    row = tl.program_id(0)
    group = row // count
    length = tl.load(lengths + group)
    depth = tl.arange(0, P)
    keys += tl.load(rows + group).to(tl.int64) * capacity * D
    asked = tl.load(queries + row.to(tl.int64) * D + depth, mask=depth < D, other=0.0)
    into = candidates + row.to(tl.int64) * (SINGLES + OPENED * ROUNDS)
    single_count = tl.load(counts + row * 3)
    open_count = tl.load(counts + row * 3 + 1)
    if (tl.load(counts + row * 3 + 2) > 0) | (single_count > SINGLES) | (open_count > OPENED):
        tl.store(counts + row * 3 + 2, 1)
        tl.store(any_failed, 1)
    single_count = tl.minimum(single_count, SINGLES)
    for first in range(0, single_count, BLOCK_C):
        number = first + tl.arange(0, BLOCK_C)
        here = number < single_count
        slot = tl.load(singles + row.to(tl.int64) * SINGLES + number, mask=here, other=0)
        tl.store(into + number, _score_slots(keys, asked, slot, here, D, P, DISTANCE), mask=here)
    member = tl.arange(0, MEMBERS)
    for number in range(tl.minimum(open_count, OPENED)):
        block_start = tl.load(opened + row.to(tl.int64) * OPENED + number)
        for first in range(0, ROUNDS, MEMBERS):
            slot = block_start + (first + member) * _LANES
            found = _score_slots(keys, asked, slot, slot < length, D, P, DISTANCE)
            tl.store(into + single_count + number * ROUNDS + first + member, found)


@triton.jit
def keep_best(
    candidates: tl.tensor,
    counts: tl.tensor,
    scores: tl.tensor,
    slots: tl.tensor,
    total: tl.tensor,
    K: tl.constexpr,
    ROUNDS: tl.constexpr,
    SINGLES: tl.constexpr,
    OPENED: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
) -> None:
    """The K best candidates of each query, falling; among equal scores the lowest slot first. QUERIES to a program.

    Args:
        candidates: of `score_candidates`; changed here. counts: of `select_candidates`.
        scores, slots: (G * Q, K) float32 and int64 to write; -inf and -1 beyond the candidates.
        total: G * Q.
        WIDTH: candidates sorted at once, a power of two of at least 2 K; those of most queries fit into it.
    """
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = row < total
    single_count = tl.minimum(tl.load(counts + row * 3, mask=real, other=0), SINGLES)
    stored = single_count + tl.minimum(tl.load(counts + row * 3 + 1, mask=real, other=0), OPENED) * ROUNDS
    row = row.to(tl.int64)
    own = (candidates + row * (SINGLES + OPENED * ROUNDS))[:, None]
    number = tl.arange(0, WIDTH)[None, :]
    found = tl.load(own + number, mask=number < stored[:, None], other=_NO_CANDIDATE)
    found = tl.sort(found, dim=1, descending=True)
    HALF: tl.constexpr = WIDTH // 2
    longest = tl.max(stored, axis=0)
    # More than fit at once: the best half so far, and so many more, again and again.
    for begin in range(WIDTH, longest, HALF):
        tl.store(own + number, found, mask=(number < HALF) & real[:, None])
        tl.debug_barrier()  # what one thread wrote another reads
        at = tl.where(number < HALF, number, begin + number - HALF)
        found = tl.load(own + at, mask=((number < HALF) | (at < stored[:, None])) & real[:, None], other=_NO_CANDIDATE)
        found = tl.sort(found, dim=1, descending=True)
        tl.debug_barrier()
    none = found == _NO_CANDIDATE
    score = _ordered((found >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    wanted = (number < K) & real[:, None]
    tl.store((scores + row * K)[:, None] + number, tl.where(none, float("-inf"), score), mask=wanted)
    slot = tl.where(none, -1, _SLOT_BITS - (found & _SLOT_BITS))
    tl.store((slots + row * K)[:, None] + number, slot, mask=wanted)
