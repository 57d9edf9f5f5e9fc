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
    SINGLES: tl.constexpr,
    OPENED: tl.constexpr,
    BLOCKS: tl.constexpr,
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
        counts: (G * Q, 3) int32: how many of either, and 1 where they did not fit or a number is too large.
        wanted: (G,) int32, K or the keys alive where they are fewer.
        total, count, blocks: G * Q, Q, N.
        guard: 1.0 for the proven margin, 0.0 for none.
    """
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = row < total
    group = row // count
    memory = tl.load(rows + group, mask=real, other=0).to(tl.int64)
    few = tl.load(wanted + group, mask=real, other=0)
    block = tl.arange(0, BLOCKS)[None, :]
    inside = (block < blocks) & real[:, None]
    at = row.to(tl.int64)[:, None] * blocks + block
    first = tl.load(firsts + at, mask=inside, other=_LOWEST)
    bounds = block_bounds + (memory * 3 * bound_blocks)[:, None] + block
    length = tl.load(query_bounds + row * 2, mask=real, other=0.0)[:, None]
    error = tl.load(query_bounds + row * 2 + 1, mask=real, other=0.0)[:, None]
    key_error = tl.load(bounds, mask=inside, other=0.0)
    norms = tl.load(bounds + bound_blocks, mask=inside, other=0.0)
    bias_error = tl.load(bounds + 2 * bound_blocks, mask=inside, other=0.0)
    epsilon = guard * (length * key_error + error * norms + bias_error)
    too_large = tl.max((length + error) * (norms + key_error), axis=1) > _LARGEST_SCORE
    too_large = too_large | (tl.max(bias_error, axis=1) > _LARGEST_BIAS_ERROR)
    held = inside & (first > _HALF_LOWEST)
    order = _ordered(tl.where(held, first - epsilon, _LOWEST).to(tl.int32, bitcast=True))
    tau = tl.where(tl.sum((order >= 0).to(tl.int32), axis=1) >= few, 0, _LOWEST_INTEGER)
    # The last bits are left zero: that makes tau lower by a hundred-thousandth, and so only more careful.
    for step in range(24):
        higher = tau + (1 << (30 - step))
        tau = tl.where(tl.sum((order >= higher[:, None]).to(tl.int32), axis=1) >= few, higher, tau)
    threshold = _ordered(tau).to(tl.float32, bitcast=True)[:, None]
    single = held & (first + epsilon >= threshold)
    open_count = tl.zeros((QUERIES,), dtype=tl.int32)
    start = block // _LANES * (_LANES * ROUNDS) + block % _LANES
    if SECOND:
        second = tl.load(seconds + at, mask=inside, other=_LOWEST)
        open_block = held & (second > _HALF_LOWEST) & (second + epsilon >= threshold)
        single = single & (open_block == 0)
        place = tl.cumsum(open_block.to(tl.int32), axis=1) - 1
        into = opened + row.to(tl.int64)[:, None] * OPENED + place
        tl.store(into, start + tl.zeros_like(place), mask=open_block & (place < OPENED))
        open_count = tl.sum(open_block.to(tl.int32), axis=1)
    slot = start + (first.to(tl.int32, bitcast=True) & (ROUNDS - 1)) * _LANES
    place = tl.cumsum(single.to(tl.int32), axis=1) - 1
    tl.store(singles + row.to(tl.int64)[:, None] * SINGLES + place, slot, mask=single & (place < SINGLES))
    single_count = tl.sum(single.to(tl.int32), axis=1)
    too_few = tl.sum(held.to(tl.int32), axis=1) < few
    failed = too_large | (single_count > SINGLES) | (open_count > OPENED) | too_few
    tl.store(counts + row * 3, tl.minimum(single_count, SINGLES), mask=real)
    tl.store(counts + row * 3 + 1, tl.minimum(open_count, OPENED), mask=real)
    tl.store(counts + row * 3 + 2, failed.to(tl.int32), mask=real)


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
        singles, opened, counts: of `select_candidates`.
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
    for first in range(0, single_count, BLOCK_C):
        number = first + tl.arange(0, BLOCK_C)
        here = number < single_count
        slot = tl.load(singles + row.to(tl.int64) * SINGLES + number, mask=here, other=0)
        tl.store(into + number, _score_slots(keys, asked, slot, here, D, P, DISTANCE), mask=here)
    member = tl.arange(0, MEMBERS)
    for number in range(tl.load(counts + row * 3 + 1)):
        block_start = tl.load(opened + row.to(tl.int64) * OPENED + number)
        for first in range(0, ROUNDS, MEMBERS):
            slot = block_start + (first + member) * _LANES
            found = _score_slots(keys, asked, slot, slot < length, D, P, DISTANCE)
            tl.store(into + single_count + number * ROUNDS + first + member, found)


@triton.jit
def _best_of(
    candidates: tl.tensor,
    stored: tl.tensor,
    few: tl.tensor,
    best: tl.tensor,
    real: tl.tensor,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """Writes the `few` highest of `stored` candidates, in any order, by bisection on the integers themselves."""
    number = tl.arange(0, WIDTH)[None, :]
    found = tl.load(candidates[:, None] + number, mask=number < stored[:, None], other=_NO_CANDIDATE)
    zero = tl.zeros_like(stored).to(tl.int64)
    tau = tl.where(tl.sum((found >= 0).to(tl.int32), axis=1) >= few, zero, zero + _NO_CANDIDATE)
    for step in range(63):
        higher = tau + ((zero + 1) << (62 - step))
        tau = tl.where(tl.sum((found >= higher[:, None]).to(tl.int32), axis=1) >= few, higher, tau)
    # Candidates differ, since their slots do: exactly `few` of them reach tau.
    kept = (found >= tau[:, None]) & (found > _NO_CANDIDATE) & real[:, None]
    place = tl.cumsum(kept.to(tl.int32), axis=1) - 1
    tl.store(best[:, None] + place, found, mask=kept & (place < K))


@triton.jit
def keep_best(
    candidates: tl.tensor,
    counts: tl.tensor,
    wanted: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    K: tl.constexpr,
    ROUNDS: tl.constexpr,
    SINGLES: tl.constexpr,
    OPENED: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    QUERIES: tl.constexpr,
) -> None:
    """The K best candidates of each query, in any order. QUERIES queries to a program.

    Args:
        candidates: of `score_candidates`; counts: of `select_candidates`; wanted: (G,) int32, K or the keys alive.
        best: (G * Q, K) int64 to write, `NO_CANDIDATE` beforehand.
        total, count: G * Q, Q.
        NARROW, WIDE: powers of two; all candidates fit into WIDE, those of most queries into NARROW.
    """
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = row < total
    few = tl.load(wanted + row // count, mask=real, other=0)
    stored = tl.load(counts + row * 3, mask=real, other=0) + tl.load(counts + row * 3 + 1, mask=real, other=0) * ROUNDS
    candidates += row.to(tl.int64) * (SINGLES + OPENED * ROUNDS)
    best += row.to(tl.int64) * K
    if tl.max(stored, axis=0) <= NARROW:
        _best_of(candidates, stored, few, best, real, NARROW, K)
    else:
        _best_of(candidates, stored, few, best, real, WIDE, K)
