"""Recall as the suites that publish it define it, and our stricter one, so that a figure can stand beside theirs.

`ann_benchmarks_recall`, of ann-benchmarks (`plotting/metrics.py`) and VIBE (`export_results.py`): a found key counts
when it lies no farther than the k-th true neighbour plus 0.001, and counts twice where it is found twice.

`big_ann_recall`, of big-ann-benchmarks (`benchmark/plotting/metrics.py`): a found key counts, once, when its number is
among the k true neighbours, or among those of the file that tie with the k-th.

`strict_recall`, ours: a found key counts, once, when it lies no farther than the k-th true neighbour, measured in
float64, up to rounding.

The margin of 0.001 is absolute: for angles between the keys of a memory it can let many a wrong key pass.

Letters: Q queries, K true neighbours known, k neighbours asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-3
"""The margin of ann-benchmarks and VIBE, added to the distance of the k-th true neighbour."""
ROUNDING = 1e-6
"""Keys this much farther (relative to distances above 1) are as near: backends and files compute in float32."""
TIE = 1e-6
"""big-ann-benchmarks takes a distance that differs by less from the k-th for equal to it."""


def ann_benchmarks_recall(
    true_distances: NDArray[Any], found_distances: NDArray[Any], k: int, epsilon: float = EPSILON
) -> float:
    """Mean recall as ann-benchmarks and VIBE compute it from the distances in their files.

    Args:
        true_distances: (Q, K) rising, K at least k, as the file gives them.
        found_distances: (Q, k) of the keys found, infinity where one is missing.
        k: neighbours.
        epsilon: the margin.
    """
    limit = np.asarray(true_distances, dtype=np.float64)[:, k - 1] + epsilon
    # Their result files hold what was found as float32, and that is what they compare.
    return float((np.asarray(found_distances, dtype=np.float32)[:, :k] <= limit[:, None]).sum(1).mean() / k)


def strict_recall(
    true_distances: NDArray[np.float64], found: NDArray[np.int64], found_distances: NDArray[np.float64], k: int
) -> float:
    """Mean share of the k nearest found: distinct keys, no farther than the farthest true neighbour up to rounding.

    Args:
        true_distances: (Q, k or more) of the true neighbours, measured like `found_distances` and not taken from a
            file, whose own may carry the rounding of whatever wrote them.
        found: (Q, k) numbers of the keys found, -1 where one is missing.
        found_distances: (Q, k) of those keys.
        k: neighbours.
    """
    limit = true_distances[:, :k].max(1)
    limit = limit + ROUNDING * np.maximum(1.0, np.abs(limit))
    hits = is_first(found[:, :k]) & (found_distances[:, :k] <= limit[:, None])
    return float(np.minimum(hits.sum(1), k).mean() / k)


def is_first(found: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(Q, k) bool: a key stands here, and nowhere to the left in its row."""
    order = np.argsort(found, axis=1, kind="stable")
    ordered = np.take_along_axis(found, order, axis=1)
    fresh = np.ones(found.shape, dtype=bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty(found.shape, dtype=bool)
    np.put_along_axis(first, order, fresh, axis=1)
    return first & (found >= 0)


def big_ann_recall(
    true_numbers: NDArray[np.integer[Any]], true_distances: NDArray[Any], found: NDArray[np.int64], k: int
) -> float:
    """Mean recall as big-ann-benchmarks computes it from a ground-truth file, ties counted.

    Beside the k nearest, those further neighbours in the file count that lie as far as the k-th, up to `TIE`. With ties
    a query can so reach k by other keys than the file's first k, and never more than k.

    Args:
        true_numbers, true_distances: (Q, K) in order, K at least k; ties beyond K are not known and do not count.
        found: (Q, k) numbers of the keys found, -1 where one is missing.
        k: neighbours.
    """
    distances = np.asarray(true_distances, dtype=np.float64)
    tied = np.abs(distances - distances[:, k - 1 : k]) < TIE
    tied[:, :k] = True
    counting = np.logical_and.accumulate(tied, axis=1).sum(1)
    hits = 0
    for numbers, last, keys in zip(np.asarray(true_numbers), counting, found[:, :k], strict=True):
        hits += len(set(numbers[:last].tolist()) & set(keys[keys >= 0].tolist()))
    return hits / (k * len(found))
