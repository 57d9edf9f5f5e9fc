"""Triton kernel that brings queries into the type of the fused search's first pass, in one launch.

What `triton_keys.encode` does for keys, with the same bounds; letters as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.memory_backends.triton_keys import LARGEST_NORM

_LARGEST_NORM = tl.constexpr(LARGEST_NORM)


@triton.jit
def _norm(vectors: tl.tensor) -> tl.tensor:
    """Norms of the rows of float64 vectors, as float32 rounded up."""
    norm = tl.sqrt(tl.sum(vectors * vectors, axis=1)) * (1 + 1e-6)
    return tl.minimum(norm, _LARGEST_NORM).to(tl.float32)


@triton.jit
def encode_queries(
    queries: tl.tensor,
    centres: tl.tensor,
    memories: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    bounds: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Images of queries, their scales, and how far they are from the queries. ROWS queries to a program.

    Args:
        queries: (G * Q, D) float32; centres: (M, D) float32, of which twice the distance is encoded where HAS_CENTRE.
        memories: (G,) int32.
        codes: (G * Q, P) to write, of any type, zero beyond D; scales: (G * Q,) float32 to write where HAS_SCALES.
        bounds: (G * Q, 2) float32 to write: the larger of |q| and |q^|, and |q - q^|, never too small.
        total, count: G * Q, Q.
        LARGEST: number of the codes' type. ROUNDED: codes are integers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < total
    depth = tl.arange(0, P)[None, :]
    fits = real[:, None] & (depth < D)
    asked = tl.load(queries + (row.to(tl.int64) * D)[:, None] + depth, mask=fits, other=0.0)
    if HAS_CENTRE:
        memory = tl.load(memories + row // count, mask=real, other=0).to(tl.int64)
        asked = 2.0 * (asked - tl.load(centres + (memory * D)[:, None] + depth, mask=fits, other=0.0))
    code = asked
    scale = tl.zeros((ROWS,), dtype=tl.float32) + 1.0
    if HAS_SCALES:
        scale = tl.max(tl.abs(asked), axis=1) / LARGEST
        code = asked / tl.where(scale > 0, scale, 1.0)[:, None]
        tl.store(scales + row, scale, mask=real)
    if ROUNDED:
        code = tl.floor(code + 0.5)
    # No NaN can arise here: queries are finite, and a scale so small that a quotient overflows is clamped.
    kept = tl.minimum(tl.maximum(code, -LARGEST), LARGEST).to(codes.dtype.element_ty)
    tl.store(codes + (row.to(tl.int64) * P)[:, None] + depth, kept, mask=real[:, None])
    image = kept.to(tl.float32).to(tl.float64) * scale.to(tl.float64)[:, None]
    exact = asked.to(tl.float64)
    tl.store(bounds + row * 2, tl.maximum(_norm(image), _norm(exact)), mask=real)
    tl.store(bounds + row * 2 + 1, _norm(exact - image), mask=real)


__all__ = ["encode_queries"]
