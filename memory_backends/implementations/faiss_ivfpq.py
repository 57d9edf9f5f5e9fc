"""faiss inverted lists over product-quantised keys (IndexIVFPQ), the found candidates scored anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.errors import InvalidSpec
from recollect.memory_backends.faiss_ivf_support import FaissIvfBackend, IvfOptions, planned_list_bytes
from recollect.memory_backends.faiss_support import as_scores
from recollect.memory_backends.options import IN_MEMORY
from recollect.memory_backends.threads import library_threads, set_faiss_threads

CODEBOOK_ITERATIONS = 4
"""k-means iterations of the codebooks, by far the dearest part of training: 10 of them give no better recall here,
where a memory is trained anew at every turnover and candidates are scored by their raw keys."""
CODEBOOK_POINTS = 16
"""Keys to a codebook entry at most in training."""
CODEBOOK_TURNOVERS = 4
"""Turnovers of a full memory that a codebook serves. The cells are learnt anew at each one, and codes are of what a key
differs from its cell's centre by, which drifts far less than the keys do."""

GPU_SUB_VECTORS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
"""Sub-vectors to a key that faiss has kernels for on a GPU."""


@dataclass(frozen=True)
class FaissIvfpqOptions(IvfOptions):
    """Options of `faiss-ivfpq`."""

    m: int = field(default=0, metadata={"help": "sub-vectors to a key, a divisor of its dimension; 0: of some 4 each"})
    nbits: int = field(default=8, metadata={"help": "bits of a sub-vector's code, 1 to 12"})
    k_factor: int = field(
        default=2,
        metadata={"help": "k_factor * k candidates are found by code, then scored by raw key"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m < 0:
            raise ValueError(f"m={self.m} is below 0")
        if not 1 <= self.nbits <= 12:
            raise ValueError(f"nbits={self.nbits} is not within 1..12")
        if self.k_factor < 1:
            raise ValueError(f"k_factor={self.k_factor} is below 1")


def sub_vectors(asked: int, dim: int) -> int:
    """How many sub-vectors a key of dimension `dim` is cut into; some 4 numbers each unless a number is asked for."""
    return asked or next(dim // size for size in (4, 5, 3, 2, 6, 7, 1) if dim % size == 0)


class FaissIvfpq(FaissIvfBackend):
    """Lists hold codes of m sub-vectors; scores are those of the raw keys, never of the codes."""

    name = "faiss-ivfpq"
    summary = "faiss inverted lists over product-quantised keys (IndexIVFPQ), rescored by raw keys"
    Options: ClassVar[type] = FaissIvfpqOptions
    capabilities: ClassVar[Capabilities] = Capabilities(needs_training=True)
    search_options = ("nprobe", "k_factor")
    exact_scores = False
    sweep = ("faiss-ivfpq:k_factor=1,nprobe=4", "faiss-ivfpq", "faiss-ivfpq:k_factor=8,nprobe=48")
    curve: ClassVar = {"nprobe": (2, 4, 8, 16, 32, 64), "k_factor": (1, 2, 4, 8)}
    builds: ClassVar = {"nlist": (0, 128, 256), "m": (0, 8, 32)}
    recall_floor = 0.25

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.m = sub_vectors(self.options.m, self.dim)
        if self.dim % self.m:
            raise InvalidSpec(f"{self.name!r}: m={self.m} does not divide the keys' dimension {self.dim}")
        if self.options.device == "cuda" and (self.options.nbits != 8 or self.m not in GPU_SUB_VECTORS):
            raise InvalidSpec(
                f"{self.name!r}: nbits={self.options.nbits} and m={self.m} cannot go with device=cuda, where faiss "
                f"searches codes of 8 bits and m of {', '.join(map(str, GPU_SUB_VECTORS))}"
            )
        entries = 2**self.options.nbits
        if entries > self.capacity and self.options.nbits != type(self.options)().nbits:
            raise InvalidSpec(
                f"{self.name!r}: nbits={self.options.nbits} needs {entries} keys to learn from, more than the capacity "
                f"of {self.capacity}"
            )

    def _empty_index(self, quantizer: Any, nlist: int, seed: int) -> Any:
        index = self.faiss.IndexIVFPQ(quantizer, self.dim, nlist, self.m, self.options.nbits, self._metric)
        index.pq.cp.seed = seed
        index.pq.cp.niter = CODEBOOK_ITERATIONS
        index.pq.cp.min_points_per_centroid = 1
        index.pq.cp.max_points_per_centroid = CODEBOOK_POINTS
        return index

    def _teach(self, index: Any, keys: np.ndarray, older: Any, turnover: int) -> None:
        if older is None or turnover % CODEBOOK_TURNOVERS == 0:
            index.train(keys)
            return
        index.train_q1(len(keys), self.faiss.swig_ptr(keys), False, self._metric)
        self.faiss.copy_array_to_vector(self.faiss.vector_to_array(older.pq.centroids), index.pq.centroids)
        index.is_trained = True
        if self.metric == "l2":
            index.precompute_table()

    def _fewest_keys(self) -> int:
        return max(2**self.options.nbits, self.options.nlist)

    def _true_scores(self, memory: int, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        if self.key_options.storage != "float32" or self.key_options.keys_in != IN_MEMORY:
            return super()._true_scores(memory, queries, positions)
        # What faiss's own IndexRefine calls: half the time of gathering the keys first.
        set_faiss_threads(self.faiss, library_threads())
        scores = np.empty(positions.shape, dtype=np.float32)
        keys = self.ring.keys[memory].numpy()
        score = self.faiss.fvec_L2sqr_by_idx if self.metric == "l2" else self.faiss.fvec_inner_products_by_idx
        arrays = [self.faiss.swig_ptr(array) for array in (scores, queries, keys, np.ascontiguousarray(positions))]
        score(*arrays, self.dim, *positions.shape)
        return as_scores(scores, self.metric)

    def _fetch(self, k: int) -> int:
        return k * self.options.k_factor

    @classmethod
    def _planned_index_bytes(cls, options: FaissIvfpqOptions, *, capacity: int, dim: int, metric: str) -> int:
        m, entries = sub_vectors(options.m, dim), 2**options.nbits
        cells = options.nlist or round(capacity**0.5)
        tables = cells * m * entries * 4 if metric == "l2" else 0
        codes = planned_list_bytes(options, capacity, dim, code_size=-(-m * options.nbits // 8))
        return codes + entries * dim * 4 + tables

    def _bytes_of(self, index: Any, keys: int) -> int:
        tables = index.precomputed_table.size() * 4  # of the l2 alone
        return super()._bytes_of(index, keys) + 2**self.options.nbits * self.dim * 4 + tables
