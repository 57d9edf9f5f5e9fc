"""Keys and queries for runbooks: files of ann-benchmarks, or the raw ones of big-ann-benchmarks; and ground truth.

A raw file begins with two uint32, the number of vectors and their dimension, and goes on with the vectors: float32 in
.fbin, uint8 in .u8bin, int8 in .i8bin. A ground-truth file begins with the numbers of queries and of neighbours, and
goes on with the neighbours' numbers (Q, K) uint32 and the distances (Q, K) float32 (`benchmark/dataset_io.py` there).
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from recollect.memory_backends.atomic import atomic_file
from recollect.model.ann_benchmarks import AnnBenchmarkFile
from recollect.model.distances import METRIC_OF_DISTANCE
from recollect.model.documents import CorpusError

TYPES: dict[str, np.dtype[Any]] = {".fbin": np.dtype("<f4"), ".u8bin": np.dtype("u1"), ".i8bin": np.dtype("i1")}


class StreamData(Protocol):
    """What a runbook needs of its data; `AnnBenchmarkFile` has it too."""

    name: str
    distance: str
    keys: int
    queries: int
    dimension: int

    @property
    def metric(self) -> str: ...
    def train(self, start: int, stop: int) -> NDArray[np.float32]: ...
    def test(self) -> NDArray[np.float32]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RawVectors:
    """Two raw files of big-ann-benchmarks, keys and queries, read where they are asked.

    Raises:
        CorpusError: a missing file, an unknown ending, a size that does not fit the header, or two dimensions.
    """

    def __init__(self, path: Path, queries: Path, distance: str) -> None:
        self.name, self.distance = path.name.partition(".")[0], distance
        self._keys, self._queries = _map(path), _map(queries)
        (self.keys, self.dimension), (self.queries, other) = self._keys.shape, self._queries.shape
        if other != self.dimension:
            raise CorpusError(f"{path} is of dimension {self.dimension} and {queries} of {other}")
        if distance not in METRIC_OF_DISTANCE:
            raise CorpusError(f"distance {distance!r} is none of {', '.join(METRIC_OF_DISTANCE)}")

    @property
    def metric(self) -> str:
        """The metric of `make_backend` that orders the keys as `distance` does."""
        return METRIC_OF_DISTANCE[self.distance]

    def train(self, start: int, stop: int) -> NDArray[np.float32]:
        """The keys (n, D) from place `start` to before `stop`."""
        return np.asarray(self._keys[start:stop], dtype=np.float32)

    def test(self) -> NDArray[np.float32]:
        """The queries (Q, D)."""
        return np.asarray(self._queries, dtype=np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._keys, self._queries


def open_data(path: str | Path, queries: str | Path | None = None, distance: str | None = None) -> StreamData:
    """Opens keys and queries.

    Args:
        path: a file of ann-benchmarks or VIBE, or a raw one.
        queries: for a raw one, the file of the queries.
        distance: for a raw one: euclidean, ip or angular.

    Raises:
        CorpusError: something is missing or too much, or a file cannot be used.
    """
    path = Path(path).expanduser()
    raw = _type_of(path) is not None
    if raw and (queries is None or distance is None):
        raise CorpusError(f"{path} holds keys alone: give --queries and --distance (euclidean, ip or angular) too")
    if not raw and (queries is not None or distance is not None):
        raise CorpusError(f"{path} has its own queries and distance: leave out --queries and --distance")
    if queries is not None and distance is not None:
        return RawVectors(path, Path(queries).expanduser(), distance)
    return AnnBenchmarkFile(path)


def _type_of(path: Path) -> np.dtype[Any] | None:
    # Cropped files are called base1b.fbin.crop_nb_10000000.
    return next((TYPES[suffix] for suffix in path.suffixes if suffix in TYPES), None)


def _map(path: Path) -> NDArray[Any]:
    kind = _type_of(path)
    if kind is None:
        raise CorpusError(f"{path} is none of {', '.join(TYPES)}")
    if not path.is_file():
        raise CorpusError(f"no such file: {str(path)!r}")
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<u4", count=2)
    rows, dimension = (int(value) for value in header) if len(header) == 2 else (0, 0)
    if size != 8 + rows * dimension * kind.itemsize or not rows * dimension:
        raise CorpusError(
            f"{path} has {size} bytes, and its header tells of {rows} vectors of dimension {dimension} and "
            f"{kind.itemsize} bytes a number: is it cut short?"
        )
    return np.memmap(path, dtype=kind, mode="r", offset=8, shape=(rows, dimension))


def write_ground_truth(path: str | Path, numbers: NDArray[Any], distances: NDArray[Any]) -> None:
    """Writes true neighbours (Q, K) and their distances, nearest first; whole or not at all."""
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.array(numbers.shape, dtype="<u4").tofile(stream)
        numbers.astype("<u4").tofile(stream)
        distances.astype("<f4").tofile(stream)


def read_ground_truth(path: str | Path, queries: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Reads true neighbours (Q, K) and their distances (Q, K).

    Raises:
        CorpusError: a missing file, one whose size does not fit its header, or of another number of queries.
    """
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"no ground truth {str(path)!r}: leave out --ground-truth and it is computed here")
    content = np.fromfile(path, dtype="<u4")
    rows, columns = (int(value) for value in content[:2]) if len(content) > 1 else (0, 0)
    if path.stat().st_size != 8 + 8 * rows * columns or rows != queries:
        raise CorpusError(f"{path} is no ground truth for {queries} queries: its header tells of {rows} by {columns}")
    numbers, distances = content[2:].reshape(2, rows, columns)
    return numbers.astype(np.int64), distances.view("<f4").astype(np.float32)
