"""Triton kernels of the fused search; imported only where triton is installed (see `triton_topk`).

Letters as in `base`; G memories searched at once, P the padded dimension (a power of two), N blocks of keys.

A block is `rounds` keys that lie LANES slots apart: lane j of run u holds slots u * LANES * rounds + r * LANES + j for
r = 0 .. rounds - 1. A maximum over a block is then taken number by number between the results of one matrix product
and the next, in registers, and the keys of neighbouring tokens, which are alike, fall into different blocks.

The round r of a maximum is written over the last bits of its score, so that one comparison moves both; the error that
makes is part of the margin (`triton_keys.margin_coefficient`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LANES = 128
"""Blocks of a run of keys; the width of the tiles divides it."""

LOWEST = -3.0e38
"""Stands for 'no score': finite, since the round written into its last bits would make a NaN of minus infinity."""

_LANES = tl.constexpr(LANES)
_LOWEST = tl.constexpr(LOWEST)
_HALF_LOWEST = tl.constexpr(LOWEST / 2)
_LOWEST_INTEGER = tl.constexpr(-(2**31))
_LARGEST_SCORE = tl.constexpr(1e37)


@triton.jit
def _scored_round(
    queries: Any,
    keys: Any,
    query_rows: Any,
    positions: Any,
    query_mask: Any,
    key_mask: Any,
    held: Any,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> Any:
    """Scores (BLOCK_Q, BLOCK_N) of one tile of queries and one of keys; `held` are the queries where P == BLOCK_D."""
    depth = tl.arange(0, BLOCK_D)
    if P == BLOCK_D:
        pointers = keys + positions[:, None] * P + depth[None, :]
        tile = tl.load(pointers, mask=key_mask[:, None], other=0.0) if MASKED else tl.load(pointers)
        if UPCAST:
            scores = tl.dot(held.to(tl.float32), tl.trans(tile.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(held, tl.trans(tile))
    else:
        scores = tl.zeros((query_rows.shape[0], positions.shape[0]), dtype=tl.float32)
        for first in tl.static_range(0, P, BLOCK_D):
            asked = tl.load(
                queries + query_rows[:, None] * P + first + depth[None, :], mask=query_mask[:, None], other=0.0
            )
            pointers = keys + positions[:, None] * P + first + depth[None, :]
            tile = tl.load(pointers, mask=key_mask[:, None], other=0.0) if MASKED else tl.load(pointers)
            if UPCAST:
                scores += tl.dot(asked.to(tl.float32), tl.trans(tile.to(tl.float32)), input_precision="ieee")
            else:
                scores = tl.dot(asked, tl.trans(tile), scores)
    return scores


@triton.jit
def _packed(scores: Any, number: Any, ROUNDS: tl.constexpr) -> Any:
    """Scores with their round in the last bits."""
    bits = scores.to(tl.int32, bitcast=True)
    return ((bits & (-ROUNDS)) | number).to(tl.float32, bitcast=True)


@triton.jit
def scan_blocks(
    queries: Any,
    keys: Any,
    bias: Any,
    rows: Any,
    lengths: Any,
    firsts: Any,
    seconds: Any,
    count: Any,
    blocks: Any,
    capacity: Any,
    HINT: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUNDS: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The highest, and with SECOND the second highest, score of every block for every query; no score is written.

    Args:
        queries: (G, Q, P) half; keys: (M, C, P) half; bias: (M, C) float32, added to a key's scores where HAS_BIAS.
        rows: (G,) int32, the memory of each group member; lengths: (G,) int32, its keys alive.
        firsts, seconds: (G, Q, N) float32 to write; below -1e38 where a block has no such key.
        count, blocks, capacity: Q, N, C. HINT: Q rounded up, by which the tile sizes are tuned.
    """
    group = tl.program_id(2)
    query_rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_mask = query_rows < count
    column = tl.program_id(1) * BLOCK_N
    run = column // _LANES
    lanes = column % _LANES + tl.arange(0, BLOCK_N)
    length = tl.load(lengths + group)
    memory = tl.load(rows + group).to(tl.int64)
    queries += group.to(tl.int64) * count * P
    keys += memory * capacity * P
    bias += memory * capacity
    depth = tl.arange(0, BLOCK_D)
    held = tl.load(queries + query_rows[:, None] * P + depth[None, :], mask=query_mask[:, None], other=0.0)
    best = tl.full((BLOCK_Q, BLOCK_N), _LOWEST, dtype=tl.float32)
    next_best = best
    start = run * (_LANES * ROUNDS)
    whole = tl.minimum(tl.maximum(length - start, 0) // _LANES, ROUNDS)
    for number in range(whole):
        positions = start + number * _LANES + lanes
        scores = _scored_round(
            queries, keys, query_rows, positions, query_mask, query_mask, held, P, BLOCK_D, False, UPCAST
        )
        if HAS_BIAS:
            scores += tl.load(bias + positions)[None, :]
        packed = _packed(scores, number, ROUNDS)
        if SECOND:
            next_best = tl.maximum(next_best, tl.minimum(best, packed))
        best = tl.maximum(best, packed)
    # The round in which the memory ends, if it ends in this run: the only one that needs a mask.
    if (whole < ROUNDS) & (start + whole * _LANES < length):
        positions = start + whole * _LANES + lanes
        alive = positions < length
        scores = _scored_round(queries, keys, query_rows, positions, query_mask, alive, held, P, BLOCK_D, True, UPCAST)
        if HAS_BIAS:
            scores += tl.load(bias + positions, mask=alive, other=0.0)[None, :]
        packed = tl.where(alive[None, :], _packed(scores, whole, ROUNDS), _LOWEST)
        if SECOND:
            next_best = tl.maximum(next_best, tl.minimum(best, packed))
        best = tl.maximum(best, packed)
    into = (group.to(tl.int64) * count + query_rows)[:, None] * blocks + (column + tl.arange(0, BLOCK_N))[None, :]
    tl.store(firsts + into, best, mask=query_mask[:, None])
    if SECOND:
        tl.store(seconds + into, next_best, mask=query_mask[:, None])


@triton.jit
def _ordered(bits: Any) -> Any:
    """Integers that rise with the float32 numbers whose bits these are; applied twice it gives them back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def select_candidates(
    firsts: Any,
    seconds: Any,
    block_bounds: Any,
    query_bounds: Any,
    singles: Any,
    opened: Any,
    counts: Any,
    count: Any,
    blocks: Any,
    wanted: Any,
    guard: Any,
    ROUNDS: tl.constexpr,
    SINGLES: tl.constexpr,
    OPENED: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Which keys may be among the `wanted` best: the best key of a block, or all its keys. One program to a query.

    With eps = |q^| E + |q - q^| N + B for a block, every true score lies within eps of the one that was computed.
    Let tau be the `wanted`-th highest of (maximum - eps): so many keys reach tau. A key whose computed score plus eps
    lies below tau is therefore not among them. A block whose second score may reach tau is opened: all its keys count.

    Args:
        firsts, seconds: (G * Q, N) of `scan_blocks`.
        block_bounds: (G, 3, N) float32: E, N and B of each block. query_bounds: (G * Q, 2): |q^| and |q - q^|.
        singles: (G * Q, SINGLES) int32 to write: slots. opened: (G * Q, OPENED) int32: the first slots of blocks.
        counts: (G * Q, 3) int32: how many of either, and 1 where they did not fit or a number is too large.
        guard: 1.0 for the proven margin, 0.0 for none.
    """
    row = tl.program_id(0)
    group = row // count
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    at = row.to(tl.int64) * blocks + block
    first = tl.load(firsts + at, mask=inside, other=_LOWEST)
    second = tl.load(seconds + at, mask=inside, other=_LOWEST)
    bounds = block_bounds + group.to(tl.int64) * 3 * blocks + block
    length = tl.load(query_bounds + row * 2)
    error = tl.load(query_bounds + row * 2 + 1)
    norms = tl.load(bounds + blocks, mask=inside, other=0.0)
    epsilon = length * tl.load(bounds, mask=inside, other=0.0) + error * norms
    epsilon = guard * (epsilon + tl.load(bounds + 2 * blocks, mask=inside, other=0.0))
    too_large = tl.max((length + error) * norms, axis=0) > _LARGEST_SCORE
    held = inside & (first > _HALF_LOWEST)
    order = _ordered(tl.where(held, first - epsilon, _LOWEST).to(tl.int32, bitcast=True))
    tau = tl.where(tl.sum((order >= 0).to(tl.int32), axis=0) >= wanted, 0, _LOWEST_INTEGER)
    # The last bits are left zero: that makes tau lower by a hundred-thousandth, and so only more careful.
    for step in range(24):
        higher = tau + (1 << (30 - step))
        tau = tl.where(tl.sum((order >= higher).to(tl.int32), axis=0) >= wanted, higher, tau)
    threshold = _ordered(tau).to(tl.float32, bitcast=True)
    open_block = held & (second > _HALF_LOWEST) & (second + epsilon >= threshold)
    single = held & (first + epsilon >= threshold) & (open_block == 0)
    start = block // _LANES * (_LANES * ROUNDS) + block % _LANES
    slot = start + (first.to(tl.int32, bitcast=True) & (ROUNDS - 1)) * _LANES
    place = tl.cumsum(single.to(tl.int32), axis=0) - 1
    tl.store(singles + row.to(tl.int64) * SINGLES + place, slot, mask=single & (place < SINGLES))
    place = tl.cumsum(open_block.to(tl.int32), axis=0) - 1
    tl.store(opened + row.to(tl.int64) * OPENED + place, start, mask=open_block & (place < OPENED))
    single_count = tl.sum(single.to(tl.int32), axis=0)
    open_count = tl.sum(open_block.to(tl.int32), axis=0)
    failed = too_large | (single_count > SINGLES) | (open_count > OPENED) | (threshold < _HALF_LOWEST)
    tl.store(counts + row * 3, tl.minimum(single_count, SINGLES))
    tl.store(counts + row * 3 + 1, tl.minimum(open_count, OPENED))
    tl.store(counts + row * 3 + 2, failed.to(tl.int32))


@triton.jit
def score_candidates(
    queries: Any,
    keys: Any,
    rows: Any,
    lengths: Any,
    singles: Any,
    opened: Any,
    counts: Any,
    scores: Any,
    slots: Any,
    count: Any,
    capacity: Any,
    D: tl.constexpr,
    P: tl.constexpr,
    ROUNDS: tl.constexpr,
    SINGLES: tl.constexpr,
    OPENED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DISTANCE: tl.constexpr,
) -> None:
    """Float32 scores of the candidates from whole keys. One program to a query; memories follow each other.

    Args:
        queries: (G, Q, D) float32; keys: (M, C, D), any floating type; rows, lengths: as for `scan_blocks`.
        singles, opened, counts: of `select_candidates`.
        scores: (G * Q, SINGLES + OPENED * ROUNDS) float32, minus infinity beforehand; slots: the same, int32.
        DISTANCE: minus the squared distance instead of the inner product.
    """
    row = tl.program_id(0)
    group = row // count
    memory = tl.load(rows + group).to(tl.int64)
    length = tl.load(lengths + group)
    depth = tl.arange(0, P)
    fits = depth < D
    keys += memory * capacity * D
    asked = tl.load(queries + row.to(tl.int64) * D + depth, mask=fits, other=0.0)
    into = row.to(tl.int64) * (SINGLES + OPENED * ROUNDS)
    single_count = tl.load(counts + row * 3)
    for first in range(0, single_count, BLOCK_C):
        number = first + tl.arange(0, BLOCK_C)
        here = number < single_count
        slot = tl.load(singles + row.to(tl.int64) * SINGLES + number, mask=here, other=0)
        tile = tl.load(
            keys + slot[:, None].to(tl.int64) * D + depth[None, :], mask=here[:, None] & fits[None, :], other=0.0
        )
        tile = tile.to(tl.float32)
        if DISTANCE:
            found = -tl.sum((tile - asked[None, :]) * (tile - asked[None, :]), axis=1)
        else:
            found = tl.sum(tile * asked[None, :], axis=1)
        tl.store(scores + into + number, found, mask=here)
        tl.store(slots + into + number, slot, mask=here)
    for number in range(tl.load(counts + row * 3 + 1)):
        member = tl.arange(0, ROUNDS)
        slot = tl.load(opened + row.to(tl.int64) * OPENED + number) + member * _LANES
        here = slot < length
        tile = tl.load(
            keys + slot[:, None].to(tl.int64) * D + depth[None, :], mask=here[:, None] & fits[None, :], other=0.0
        )
        tile = tile.to(tl.float32)
        if DISTANCE:
            found = -tl.sum((tile - asked[None, :]) * (tile - asked[None, :]), axis=1)
        else:
            found = tl.sum(tile * asked[None, :], axis=1)
        place = into + SINGLES + number * ROUNDS + member
        tl.store(scores + place, found, mask=here)
        tl.store(slots + place, slot, mask=here)
