"""faiss's HNSW graph (IndexHNSWFlat) in sealed parts: it cannot forget a key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from recollect.memory_backends.background import checkpoint
from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.errors import UnsupportedOperation
from recollect.memory_backends.faiss_support import DEVICE_HELP, FAISS, FaissDevice, as_scores, metric_of
from recollect.memory_backends.inner_products import centred
from recollect.memory_backends.segments import PartOptions, SegmentedBackend
from recollect.memory_backends.threads import library_threads, set_faiss_threads

STRETCH = 1024
"""Keys that are linked between two checkpoints of a build: some 60 ms. faiss looks at every key once for each."""


@dataclass(frozen=True)
class FaissHnswOptions(PartOptions):
    """Options of `faiss-hnsw`."""

    M: int = field(default=16, metadata={"help": "links of a key in the upper layers, twice as many in the lowest"})
    ef_construction: int = field(default=100, metadata={"help": "candidates kept while linking a key (efConstruction)"})
    ef_search: int = field(default=64, metadata={"help": "candidates kept while searching, at least k (efSearch)"})
    device: FaissDevice = field(default="cpu", metadata={"help": DEVICE_HELP + "; faiss has no HNSW for a GPU"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("M", 2), ("ef_construction", 1), ("ef_search", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")


class FaissHnsw(SegmentedBackend):
    """One graph to a sealed part, over centred keys for the inner product (see `inner_products`)."""

    name = "faiss-hnsw"
    summary = "faiss HNSW graphs over sealed parts (IndexHNSWFlat)"
    Options: ClassVar[type] = FaissHnswOptions
    capabilities: ClassVar[Capabilities] = Capabilities(eviction="rebuilt")
    requires = (FAISS,)
    search_options = ("ef_search",)
    sweep = ("faiss-hnsw:M=4,ef_construction=32,ef_search=32", "faiss-hnsw", "faiss-hnsw:ef_search=128")
    curve: ClassVar = {"ef_search": (16, 32, 64, 128, 256, 512)}
    builds: ClassVar = {"M": (8, 16, 32), "ef_construction": (50, 100, 200)}
    recall_floor = 0.6

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.faiss = self.import_library("faiss")
        self._metric = metric_of(self.faiss, self.metric)
        if self.options.device == "cuda":
            raise UnsupportedOperation(
                f"{self.name}:device=cuda: faiss has no HNSW graph for a GPU; leave device=cpu, or take faiss-flat, "
                "faiss-ivf or faiss-ivfpq with device=cuda"
            )

    def _build_part(self, keys: np.ndarray, seed: int) -> tuple[Any, np.ndarray | None]:
        # One thread: the graph depends on the order in which keys are linked.
        set_faiss_threads(self.faiss, 1)
        index = self.faiss.IndexHNSWFlat(self.dim, self.options.M, self._metric)
        index.hnsw.efConstruction = self.options.ef_construction
        index.hnsw.rng = self.faiss.RandomGenerator(seed)
        around, mean = (keys, None) if self.metric == "l2" else centred(keys)
        for start in range(0, len(around), STRETCH):
            index.add(around[start : start + STRETCH])
            checkpoint()
        return index, mean

    def _search_part(
        self, part: tuple[Any, np.ndarray | None], queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        index, mean = part
        set_faiss_threads(self.faiss, library_threads())
        parameters = self.faiss.SearchParametersHNSW()
        parameters.efSearch = max(k, self.options.ef_search)
        # `faiss.contrib.torch_utils`, which a program may import, puts a `search` without parameters in its place.
        search = getattr(index, "search_numpy", index.search)
        distances, positions = search(queries, k, params=parameters)
        scores = as_scores(distances, self.metric)
        return (scores if mean is None else scores + (queries @ mean)[:, None]), positions

    @classmethod
    def _planned_index_bytes(cls, options: FaissHnswOptions, *, capacity: int, dim: int, metric: str) -> int:
        # As `_part_bytes`, with a few upper layers; and beside it the centred keys of a part while it is built.
        links = (2 * options.M + 2) * 4 + 8 + 4
        return capacity * (dim * 4 + links) + capacity * dim * 4

    def _part_bytes(self, part: tuple[Any, np.ndarray | None]) -> int:
        # Vectors, links (32 bits each), their offsets (64) and levels (32), and the mean.
        index, mean = part
        links = index.hnsw.neighbors.size() * 4 + index.ntotal * (8 + 4)
        return index.ntotal * self.dim * 4 + links + (0 if mean is None else mean.nbytes)
