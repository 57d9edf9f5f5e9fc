"""The HDF5 layout of ann-benchmarks (https://github.com/erikbern/ann-benchmarks) and of VIBE, written and read.

A file holds `train` (N, D) and `test` (Q, D), `neighbors` (Q, K) places in `train` and `distances` (Q, K), both by
rising distance, and the attributes `distance`, `dimension`, `point_type` and, where ann-benchmarks wrote it, `type`.
VIBE (https://github.com/vector-index-bench/vibe) adds `avg_distances` (Q,), the mean distance of a query to every key,
and to some files `learn` (L, D) and `learn_neighbors` (L, K): queries of the same kind as `test`, to train on. What a
distance means there:

    angular, cosine   1 - cosine            euclidean    the Euclidean distance, with its root
    ip, dot           - inner product       normalized   1 - inner product, of vectors of length 1

An inner-product workload becomes `angular` as ann-benchmarks does it for its lastfm data (Bachrach et al. 2014,
doi 10.1145/2645710.2645741): one more dimension gives every key the same length and leaves the queries at 0 there, so
that the angle orders the keys as the inner product does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from recollect.memory_backends.atomic import atomic_file
from recollect.model.distances import DISTANCE_OF_METRIC, METRIC_OF_DISTANCE, true_neighbors
from recollect.model.documents import CorpusError

ROWS_AT_ONCE = 65_536
"""Keys that are read at once: 32 MiB at dimension 128."""
COMMON_POINT_TYPES = ("float", "float32", "uint8", "int8")
"""Types of coordinates that are read; all become float32."""


@dataclass(frozen=True)
class AnnBenchmark:
    """One file: keys `train` (N, D), queries `test` (Q, D), their `neighbors` (Q, K) and `distances` (Q, K).

    `distance` is the file's own word, `metric` the one that a backend takes for it.
    """

    train: NDArray[np.float32]
    test: NDArray[np.float32]
    neighbors: NDArray[np.int64]
    distances: NDArray[np.float64]
    distance: str
    point_type: str = "float"

    @property
    def metric(self) -> str:
        """The metric of `make_backend` that orders the keys as `distance` does."""
        return METRIC_OF_DISTANCE[self.distance]

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.train.shape[1])


class AnnBenchmarkFile:
    """A file of ann-benchmarks or VIBE, open and checked, of which only what is asked for is read.

    Use as a context manager.

    Attributes:
        path, name: the file, and its name without the ending, which is the dataset's.
        distance: the file's own word; `metric` is the one that a backend takes for it.
        point_type: of the coordinates in the file: float, uint8 or int8.
        keys, queries, dimension, neighbors_known: N, Q, D and K.
        learn_queries: L, 0 where the file has none.

    Raises:
        CorpusError: a missing, damaged or foreign file, sparse or binary vectors, or a distance that no backend orders
            keys by (hamming, jaccard, chamfer).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.name = self.path.stem
        if not self.path.is_file():
            raise CorpusError(f"no such file: {str(self.path)!r}")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise _unreadable(self.path, error) from error
        try:
            self._check()
        except CorpusError:
            self._file.close()
            raise
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            self._file.close()
            raise _unreadable(self.path, error) from error

    def _check(self) -> None:
        file, path = self._file, self.path
        kind, self.distance, self.point_type = (
            _word(file.attrs.get(name, default))
            for name, default in (("type", "dense"), ("distance", ""), ("point_type", "float"))
        )
        missing = [name for name in ("train", "test", "neighbors", "distances") if name not in file]
        if missing:
            raise CorpusError(f"{path} is not of ann-benchmarks: it has no {', '.join(missing)}")
        if kind != "dense" or self.distance not in METRIC_OF_DISTANCE:
            raise CorpusError(
                f"{path} is {kind} with distance {self.distance or 'unnamed'!r}: want dense vectors with one of "
                f"{', '.join(METRIC_OF_DISTANCE)}"
            )
        if self.point_type not in COMMON_POINT_TYPES:
            raise CorpusError(
                f"{path} holds points of type {self.point_type!r}: no backend searches packed bits; want one of "
                f"{', '.join(COMMON_POINT_TYPES)}"
            )
        shapes = {name: tuple(file[name].shape) for name in ("train", "test", "neighbors", "distances")}
        train, test, neighbors, distances = shapes.values()
        fits = len(train) == len(test) == len(neighbors) == 2 and train[1] == test[1]
        if not fits or neighbors != distances or neighbors[0] != test[0]:
            described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise CorpusError(f"{path} does not fit together: {described}")
        self.keys, self.dimension = train
        self.queries, self.neighbors_known = neighbors
        self.learn_queries = int(file["learn"].shape[0]) if "learn" in file else 0

    @property
    def metric(self) -> str:
        """The metric of `make_backend` that orders the keys as `distance` does."""
        return METRIC_OF_DISTANCE[self.distance]

    def check_k(self, k: int) -> None:
        """Raises CorpusError where the file does not know the k nearest keys of its queries."""
        if not 1 <= k <= self.neighbors_known:
            raise CorpusError(
                f"k is {k}: the file holds {self.neighbors_known} true neighbours for each query; choose k from 1 to "
                f"{self.neighbors_known}"
            )

    def train_chunks(self, rows: int = ROWS_AT_ONCE) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The keys in order, at most `rows` at a time: the first one's place and keys (n, D)."""
        for start in range(0, self.keys, rows):
            yield start, self.train(start, start + rows)

    def train(self, start: int, stop: int) -> NDArray[np.float32]:
        """The keys (n, D) from place `start` to before `stop`."""
        return self._read("train", slice(start, stop), np.float32)

    def test(self) -> NDArray[np.float32]:
        """The queries (Q, D)."""
        return self._read("test", slice(None), np.float32)

    def truth(self, k: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The k nearest keys of each query (all K when None), nearest first: places (Q, k) and distances (Q, k)."""
        which = slice(0, self.neighbors_known if k is None else k)
        neighbors = self._read("neighbors", (slice(None), which), np.int64)
        if neighbors.size and not (neighbors.min() >= 0 and neighbors.max() < self.keys):
            raise CorpusError(f"{self.path} names neighbours outside its {self.keys} keys")
        return neighbors, self._read("distances", (slice(None), which), np.float64)

    def whole(self) -> AnnBenchmark:
        """Everything, in memory."""
        neighbors, distances = self.truth()
        return AnnBenchmark(self.train(0, self.keys), self.test(), neighbors, distances, self.distance, self.point_type)

    def _read(self, name: str, which: Any, dtype: type[Any]) -> NDArray[Any]:
        try:
            return np.asarray(self._file[name][which], dtype=dtype)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise _unreadable(self.path, error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> AnnBenchmarkFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_ann_benchmarks(path: str | Path) -> AnnBenchmark:
    """Reads a dense file of ann-benchmarks or VIBE, whole, as float32.

    Raises CorpusError for a missing, damaged or foreign file, and for distances that no backend orders keys by
    (hamming, jaccard).
    """
    with AnnBenchmarkFile(path) as file:
        return file.whole()


def write_ann_benchmarks(
    path: str | Path,
    train: NDArray[Any],
    test: NDArray[Any],
    k: int = 100,
    *,
    metric: str = "inner_product",
    augment: bool = True,
    metadata: Mapping[str, Any] | None = None,
    beside: Mapping[str, NDArray[Any]] | None = None,
    on_queries: Callable[[int, int], None] | None = None,
) -> AnnBenchmark:
    """Writes keys `train` (N, D) and queries `test` (Q, D) with their k true neighbours; whole or not at all.

    metric: what orders the keys. `inner_product` is written as `angular` with one more dimension, which every tool
    that reads ann-benchmarks understands; with `augment=False` as `ip`, which VIBE reads, keys and queries untouched.
    metadata: JSON, kept in the attribute `recollect`.
    beside: further datasets, which other readers pass over.
    on_queries: told how many of how many queries have their neighbours.

    Returns what the file holds. Raises CorpusError for shapes that do not fit, k beyond N, an unknown metric.
    """
    train, test = (np.ascontiguousarray(array, dtype=np.float32) for array in (train, test))
    if metric not in DISTANCE_OF_METRIC:
        raise CorpusError(f"unknown metric {metric!r}: want one of {', '.join(DISTANCE_OF_METRIC)}")
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or not len(test):
        raise CorpusError(
            f"keys {train.shape} and queries {test.shape} do not fit: want (N, D) and (Q, D), Q at least 1"
        )
    if not 1 <= k <= len(train):
        raise CorpusError(f"k is {k}, and there are {len(train)} keys: want k from 1 to the number of keys")
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise CorpusError("keys or queries are not finite: nothing is near or far from them")
    distance = DISTANCE_OF_METRIC[metric]
    if metric == "inner_product" and augment:
        train, test = augmented(train, test)
        distance = "angular"
    neighbors, distances = true_neighbors(distance, test, train, k, on_queries=on_queries)
    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(type="dense", distance=distance, dimension=train.shape[1], point_type="float")
        file.attrs["recollect"] = json.dumps({"metric": metric, **(metadata or {})})
        file.create_dataset("train", data=train)
        file.create_dataset("test", data=test)
        file.create_dataset("neighbors", data=neighbors.astype(np.int32))
        file.create_dataset("distances", data=distances.astype(np.float32))
        for name, values in (beside or {}).items():
            file.create_dataset(name, data=values)
    return AnnBenchmark(train, test, neighbors, distances, distance)


def augmented(train: NDArray[np.float32], test: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Keys and queries with one more dimension, in which angular order is the inner-product order of the arguments."""
    squares = (train.astype(np.float64) ** 2).sum(1)
    rest = np.sqrt(np.maximum(squares.max() - squares, 0)).astype(np.float32)
    return np.hstack([train, rest[:, None]]), np.hstack([test, np.zeros((len(test), 1), dtype=np.float32)])


def _unreadable(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"{path} cannot be read as HDF5 ({error}): is it cut short, or another kind of file?")


def _word(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
