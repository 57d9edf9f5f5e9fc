"""hnswlib's HNSW graph in sealed parts.

hnswlib can overwrite a key (`mark_deleted` and `replace_deleted`, or adding an old label again), but mending the
graph around it costs five times as much as linking a key into a new graph, and the whole of appending and searching a
segment comes dearer than with sealed parts: see benchmarks/native_or_segments.py and its results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from recollect.memory_backends.background import checkpoint
from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.inner_products import centred
from recollect.memory_backends.records import Requirement
from recollect.memory_backends.segments import PartOptions, SegmentedBackend
from recollect.memory_backends.threads import library_threads

STRETCH = 512
"""Keys that are linked between two checkpoints of a build: some 30 ms."""


@dataclass(frozen=True)
class HnswlibOptions(PartOptions):
    """Options of `hnswlib`."""

    M: int = field(default=16, metadata={"help": "links of a key in the upper layers, twice as many in the lowest"})
    ef_construction: int = field(default=100, metadata={"help": "candidates kept while a key is linked"})
    ef_search: int = field(default=64, metadata={"help": "candidates kept while searching (set_ef), at least k"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("M", 2), ("ef_construction", 1), ("ef_search", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")


class Hnswlib(SegmentedBackend):
    """One graph to a sealed part, over centred keys for the inner product (see `inner_products`)."""

    name = "hnswlib"
    summary = "hnswlib HNSW graphs over sealed parts"
    Options: ClassVar[type] = HnswlibOptions
    capabilities: ClassVar[Capabilities] = Capabilities(eviction="rebuilt")
    requires = (Requirement("hnswlib", "hnswlib>=0.8"),)
    search_options = ("ef_search",)
    sweep = ("hnswlib:M=4,ef_construction=32,ef_search=32", "hnswlib", "hnswlib:ef_search=128")
    curve: ClassVar = {"ef_search": (16, 32, 64, 128, 256, 512)}
    builds: ClassVar = {"M": (8, 16, 32), "ef_construction": (50, 100, 200)}
    recall_floor = 0.6

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.library = self.import_library("hnswlib")

    def _build_part(self, keys: np.ndarray, seed: int) -> tuple[Any, np.ndarray | None]:
        index = self.library.Index("l2" if self.metric == "l2" else "ip", self.dim)
        index.init_index(len(keys), M=self.options.M, ef_construction=self.options.ef_construction, random_seed=seed)
        around, mean = (keys, None) if self.metric == "l2" else centred(keys)
        # One thread: the graph depends on the order in which keys are linked.
        for start in range(0, len(around), STRETCH):
            index.add_items(around[start : start + STRETCH], num_threads=1)
            checkpoint()
        index.set_ef(self.options.ef_search)
        return index, mean

    def _search_part(
        self, part: tuple[Any, np.ndarray | None], queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        index, mean = part
        # It keeps max(ef, k) candidates, so that ef is the same for every k, and searches side by side need not set it.
        if index.ef != self.options.ef_search:
            index.set_ef(self.options.ef_search)
        # hnswlib raises when it finds fewer than k keys, which it may wherever a key cannot be reached from the graph's
        # entry: then the part answers with as many as every query finds.
        labels, distances = self._reachable(index, queries, k)
        if mean is None:
            return -distances, labels
        return 1 - distances + (queries @ mean)[:, None], labels

    def _reachable(self, index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            labels, distances = index.knn_query(queries, k, num_threads=library_threads())
            return labels.astype(np.int64), distances
        except RuntimeError:
            if k == 1:
                raise
        all_labels = np.full((len(queries), k), -1, dtype=np.int64)
        all_distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        for row in range(len(queries)):
            low, high = 0, k  # the most that this query finds lies from low to high - 1
            while high - low > 1:
                middle = (low + high) // 2
                try:
                    labels, distances = index.knn_query(queries[row : row + 1], middle, num_threads=1)
                except RuntimeError:
                    high = middle
                else:
                    low = middle
                    all_labels[row, :middle], all_distances[row, :middle] = labels[0], distances[0]
        return all_labels, all_distances

    @classmethod
    def _planned_index_bytes(cls, options: HnswlibOptions, *, capacity: int, dim: int, metric: str) -> int:
        # As `_part_bytes`, with a few upper layers; and beside it the centred keys of a part while it is built.
        links = (2 * options.M + 2) * 4 + 16 + 8
        return capacity * (dim * 4 + links) + capacity * dim * 4

    def _part_bytes(self, part: tuple[Any, np.ndarray | None]) -> int:
        index, mean = part
        return int(index.index_file_size()) + (0 if mean is None else mean.nbytes)
