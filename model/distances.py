"""Distances as ann-benchmarks, VIBE and big-ann-benchmarks name and measure them, and true neighbours by brute force.

Letters: Q queries, N keys, D dimension, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

METRIC_OF_DISTANCE = {
    "angular": "cosine",
    "cosine": "cosine",
    "euclidean": "l2",
    "dot": "inner_product",
    "ip": "inner_product",
    "normalized": "inner_product",
}
"""The distances of others' files and the metric of a backend that orders keys in the same way."""
DISTANCE_OF_METRIC = {"inner_product": "ip", "l2": "euclidean", "cosine": "angular"}
QUERIES_AT_ONCE = 512
KEYS_AT_ONCE = 16_384


def distances_of(distance: str, queries: NDArray[Any], keys: NDArray[Any]) -> NDArray[np.float64]:
    """(Q, D) and (N, D) to (Q, N) distances, in float64; smaller is nearer."""
    queries, keys = np.asarray(queries, dtype=np.float64), np.asarray(keys, dtype=np.float64)
    return _from_products(distance, queries @ keys.T, (queries**2).sum(1)[:, None], (keys**2).sum(1)[None])


def pair_distances(
    distance: str, queries: NDArray[Any], places: NDArray[np.int64], chunks: Iterable[tuple[int, NDArray[Any]]]
) -> NDArray[np.float64]:
    """(Q, k) float64: the distance of each query to the keys at `places` (Q, k); infinity where a place is -1.

    The keys are read once, in `chunks` of (first place, keys (n, D)), so that they need not fit into memory.
    """
    queries = np.asarray(queries, dtype=np.float64)
    squares = (queries**2).sum(1)
    reached = np.full(places.shape, np.inf)
    for start, keys in chunks:
        rows, columns = np.nonzero((places >= start) & (places < start + len(keys)))
        for first in range(0, len(rows), KEYS_AT_ONCE):
            row, column = rows[first : first + KEYS_AT_ONCE], columns[first : first + KEYS_AT_ONCE]
            near = np.asarray(keys[places[row, column] - start], dtype=np.float64)
            products = np.einsum("nd,nd->n", queries[row], near)
            reached[row, column] = _from_products(distance, products, squares[row], (near**2).sum(1))
    return reached


def _from_products(
    distance: str, products: NDArray[np.float64], squares: NDArray[np.float64], key_squares: NDArray[np.float64]
) -> NDArray[np.float64]:
    if METRIC_OF_DISTANCE[distance] == "inner_product":
        return 1 - products if distance == "normalized" else -products
    if METRIC_OF_DISTANCE[distance] == "l2":
        return np.sqrt(np.maximum(squares + key_squares - 2 * products, 0))
    lengths = np.sqrt(squares * key_squares)
    return 1 - np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)


def true_neighbors(
    distance: str,
    queries: NDArray[Any],
    keys: NDArray[Any],
    k: int,
    *,
    on_queries: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k nearest keys of each query by brute force: places (Q, k) and distances (Q, k), nearest first; of equally
    near keys the earlier one. At most `QUERIES_AT_ONCE` x `KEYS_AT_ONCE` distances are held at once.

    on_queries: told how many of how many queries are done.
    """
    places, reached = [], []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some = queries[start : start + QUERIES_AT_ONCE]
        best = np.zeros((len(some), 0), dtype=np.int64)
        best_distances = np.zeros((len(some), 0))
        for first in range(0, len(keys), KEYS_AT_ONCE):
            block = distances_of(distance, some, keys[first : first + KEYS_AT_ONCE])
            numbers = np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)
            # Earlier keys stand to the left, and nearest_of keeps the leftmost of equals.
            best_distances, best = nearest_of(
                np.concatenate([best_distances, block], axis=1), np.concatenate([best, numbers], axis=1), k
            )
        places.append(best)
        reached.append(best_distances)
        if on_queries is not None:
            on_queries(min(start + QUERIES_AT_ONCE, len(queries)), len(queries))
    return np.concatenate(places), np.concatenate(reached)


def nearest_of(
    distances: NDArray[np.float64], numbers: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k smallest of each row (or all where there are fewer), rising, of equals the leftmost; and their numbers."""
    k = min(k, distances.shape[1])
    if k < distances.shape[1]:
        limit = np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
        rows, columns = np.nonzero(distances <= limit)
    else:
        rows, columns = (axis.ravel() for axis in np.indices(distances.shape))
    values = distances[rows, columns]
    order = np.lexsort((columns, values, rows))
    rows, columns = rows[order], columns[order]
    # Each row kept at least k candidates, in one run: its first k are its nearest.
    starts = np.searchsorted(rows, np.arange(len(distances)))
    kept = (starts[:, None] + np.arange(k)).ravel()
    picked = columns[kept].reshape(len(distances), k)
    return np.take_along_axis(distances, picked, axis=1), np.take_along_axis(numbers, picked, axis=1)
