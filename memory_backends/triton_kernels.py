"""Triton kernel of the fused search's first pass; imported only where triton is installed (see `triton_topk`).

Annotations here are names that Triton's compiler knows: it refuses others, which its interpreter does not.

Letters as in `base`; G memories searched at once, P the padded dimension (a power of two), N blocks of keys.

A block is `rounds` keys that lie LANES slots apart: lane j of run u holds slots u * LANES * rounds + r * LANES + j for
r = 0 .. rounds - 1. A maximum over a block is then taken number by number between the results of one matrix product
and the next, in registers, and the keys of neighbouring tokens, which are alike, fall into different blocks.

The round r of a maximum is written over the last bits of its score, so that one comparison moves both; the error that
makes is part of the margin (`triton_keys.margin_coefficient`).
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = 128
"""Blocks of a run of keys; the width of the tiles divides it."""

LOWEST = -3.0e38
"""Stands for 'no score': finite, since the round written into its last bits would make a NaN of minus infinity."""

_LANES = tl.constexpr(LANES)
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _product(left: tl.tensor, right: tl.tensor, QUANTISED: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """left (q, d) times right (n, d) transposed, float32."""
    if UPCAST:
        product = tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)), input_precision="ieee")
    elif QUANTISED:
        product = tl.dot(left, tl.trans(right), out_dtype=tl.int32).to(tl.float32)
    else:
        product = tl.dot(left, tl.trans(right))
    return product


@triton.jit
def _scored_round(
    queries: tl.tensor,
    keys: tl.tensor,
    query_rows: tl.tensor,
    positions: tl.tensor,
    query_mask: tl.tensor,
    key_mask: tl.tensor,
    held: tl.tensor,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    QUANTISED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Scores (BLOCK_Q, BLOCK_N) of one tile of queries and one of keys; `held` are the queries where P == BLOCK_D."""
    depth = tl.arange(0, BLOCK_D)
    if P == BLOCK_D:
        pointers = keys + positions[:, None] * P + depth[None, :]
        tile = tl.load(pointers, mask=key_mask[:, None], other=0.0) if MASKED else tl.load(pointers)
        scores = _product(held, tile, QUANTISED, UPCAST)
    else:
        scores = tl.zeros((query_rows.shape[0], positions.shape[0]), dtype=tl.float32)
        for first in tl.static_range(0, P, BLOCK_D):
            asked = tl.load(
                queries + query_rows[:, None] * P + first + depth[None, :], mask=query_mask[:, None], other=0.0
            )
            pointers = keys + positions[:, None] * P + first + depth[None, :]
            tile = tl.load(pointers, mask=key_mask[:, None], other=0.0) if MASKED else tl.load(pointers)
            scores += _product(asked, tile, QUANTISED, UPCAST)
    return scores


@triton.jit
def _packed(scores: tl.tensor, number: tl.tensor, ROUNDS: tl.constexpr) -> tl.tensor:
    """Scores with their round in the last bits."""
    bits = scores.to(tl.int32, bitcast=True)
    return ((bits & (-ROUNDS)) | number).to(tl.float32, bitcast=True)


@triton.jit
def scan_blocks(
    queries: tl.tensor,
    keys: tl.tensor,
    query_scales: tl.tensor,
    key_scales: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    lengths: tl.tensor,
    firsts: tl.tensor,
    seconds: tl.tensor,
    count: tl.tensor,
    blocks: tl.tensor,
    capacity: tl.tensor,
    HINT: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUNDS: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The highest, and with SECOND the second highest, score of every block for every query; no score is written.

    Args:
        queries: (G, Q, P), keys: (M, C, P), both of the first pass's type.
        query_scales: (G, Q), key_scales: (M, C) float32, by which the products are multiplied where HAS_SCALES.
        bias: (M, C) float32, added to a key's scores where HAS_BIAS.
        rows: (G,) int32, the memory of each group member; lengths: (G,) int32, its keys alive.
        firsts, seconds: (G, Q, N) float32 to write; below -1e38 where a block has no such key.
        count, blocks, capacity: Q, N, C; C * P is below 2^31.
        HINT: Q rounded up, by which the tile sizes are tuned. QUANTISED: queries and keys are int8.
        UPCAST: take the products in float32, as the interpreter must.
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
    key_scales += memory * capacity
    depth = tl.arange(0, BLOCK_D)
    held = tl.load(queries + query_rows[:, None] * P + depth[None, :], mask=query_mask[:, None], other=0.0)
    if HAS_SCALES:
        query_scale = tl.load(query_scales + group.to(tl.int64) * count + query_rows, mask=query_mask, other=0.0)
    best = tl.full((BLOCK_Q, BLOCK_N), _LOWEST, dtype=tl.float32)
    next_best = best
    start = run * (_LANES * ROUNDS)
    whole = tl.minimum(tl.maximum(length - start, 0) // _LANES, ROUNDS)
    for number in range(whole):
        positions = start + number * _LANES + lanes
        scores = _scored_round(
            queries, keys, query_rows, positions, query_mask, query_mask, held, P, BLOCK_D, False, QUANTISED, UPCAST
        )
        if HAS_SCALES:
            scores = scores * query_scale[:, None] * tl.load(key_scales + positions)[None, :]
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
        scores = _scored_round(
            queries, keys, query_rows, positions, query_mask, alive, held, P, BLOCK_D, True, QUANTISED, UPCAST
        )
        if HAS_SCALES:
            scores = scores * query_scale[:, None] * tl.load(key_scales + positions, mask=alive, other=0.0)[None, :]
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
