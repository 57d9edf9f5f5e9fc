"""pynndescent's nearest-neighbour descent in sealed parts.

Its own `update` runs the descent over all keys again, so the cost of an appended key would grow with the memory.

Its metrics "dot" and "cosine" bring keys to unit length and take all keys at a right angle or more from a query to be
equally far: neither is the inner product. So keys are searched by Euclidean distance, whose search function pynndescent
compiles once for all indexes, and where they are not equally long, one more coordinate makes them so.

That is at its best for keys of one length, as a model that normalises its keys has them. Among others the longest keys,
which inner products favour, are nobody's nearest neighbours; pynndescent prunes the edges that lead to them, and no
epsilon brings them back: Gaussian keys of dimension 32 gave a recall of 0.77, of lengths from 0.5 to 3 times that 0.36.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.inner_products import as_distances, queries_for_distances
from recollect.memory_backends.records import Requirement
from recollect.memory_backends.segments import PartOptions, SegmentedBackend

COMPILED: set[int] = set()
"""Orders of magnitude (base 4) of the parts built in this process: numba compiles other functions for larger ones."""
LARGEST_TRIAL = 32768
"""Parts with more keys are not built for trial: it would take longer than compiling does."""
_searching = threading.Lock()
"""A search sets the state of a random generator that the index holds, and works in the index's own workspace. numba
holds the interpreter lock, so that nothing is lost by letting one search go at a time."""


@dataclass(frozen=True)
class PynndescentOptions(PartOptions):
    """Options of `pynndescent`."""

    n_neighbors: int = field(default=16, metadata={"help": "neighbours of a key in the graph"})
    epsilon: float = field(
        default=0.1, metadata={"help": "how much farther than the k-th neighbour found the search still looks, 0 to 1"}
    )
    diversify_prob: float = field(default=1.0, metadata={"help": "probability that a redundant edge is pruned, 0 to 1"})
    pruning_degree_multiplier: float = field(
        default=1.5, metadata={"help": "edges that a key keeps at most, as a multiple of n_neighbors"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_neighbors < 2:
            raise ValueError(f"n_neighbors={self.n_neighbors} is below 2")
        for name in ("epsilon", "diversify_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not within 0..1")
        if self.pruning_degree_multiplier <= 0:
            raise ValueError(f"pruning_degree_multiplier={self.pruning_degree_multiplier} is not above 0")


class Pynndescent(SegmentedBackend):
    """One graph to a sealed part. The first one made in a process waits for numba to compile, half a minute or so."""

    name = "pynndescent"
    summary = "pynndescent graphs over sealed parts"
    Options: ClassVar[type] = PynndescentOptions
    capabilities: ClassVar[Capabilities] = Capabilities(eviction="rebuilt")
    requires = (Requirement("pynndescent", "pynndescent>=0.7"),)
    search_options = ("epsilon",)
    exact_scores = False  # distances of transformed keys; see `_is_exact`
    parallel = False  # numba holds the interpreter lock
    sweep = ("pynndescent:epsilon=0.0", "pynndescent", "pynndescent:epsilon=0.3")
    curve: ClassVar = {"epsilon": (0.0, 0.05, 0.1, 0.2, 0.3, 0.45)}
    builds: ClassVar = {"n_neighbors": (16, 32)}
    recall_floor = 0.25

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.library = self.import_library("pynndescent")
        for size in self.policy.sizes:
            order = (size.bit_length() + 1) // 2
            if order not in COMPILED and size <= LARGEST_TRIAL:
                # Once here, so that neither an append nor `build_seconds` is charged with a compiler's time.
                keys = np.random.default_rng(0).standard_normal((size, self.dim), dtype=np.float32)
                self._search_part(self._build_part(keys, 0), keys[:2], 1)
                COMPILED.add(order)

    def _smallest_part(self) -> int:
        return self.options.n_neighbors + 1

    def _build_part(self, keys: np.ndarray, seed: int) -> tuple[Any, float, np.ndarray]:
        length = 0.0
        if self.metric == "l2":
            prepared = keys.copy()
        else:
            prepared, length = as_distances(keys)
        with warnings.catch_warnings():
            # Equal keys leave the descent without enough different neighbours; search answers all the same.
            warnings.simplefilter("ignore")
            index = self.library.NNDescent(
                prepared,
                metric="euclidean",
                n_neighbors=self.options.n_neighbors,
                diversify_prob=self.options.diversify_prob,
                pruning_degree_multiplier=self.options.pruning_degree_multiplier,
                random_state=seed,
                n_jobs=1,  # another number of threads makes another graph
                compressed=True,
            )
            index.prepare()
        return index, length, index.search_rng_state.copy()

    def _is_exact(self, part: tuple[Any, float, np.ndarray]) -> bool:
        # A score taken back from a distance loses as many digits as the keys' length exceeds it: none among keys of one
        # length, all of them where one key is a million times as long as the others.
        return self.metric == "l2" or part[0].dim == self.dim

    def _search_part(
        self, part: tuple[Any, float, np.ndarray], queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        index, length, state = part
        asked = queries if self.metric == "l2" else queries_for_distances(queries, length, index.dim)
        # A search draws random starting points; from the same state, so that it can be repeated.
        with _searching:
            index.search_rng_state[:] = state
            positions, distances = index.query(np.ascontiguousarray(asked), k=k, epsilon=self.options.epsilon)
            # Copies: both are views of a workspace that the next query overwrites.
            positions, distances = positions.astype(np.int64), distances.copy()
        missing = ~np.isfinite(distances)
        if missing.any():
            positions[missing] = -1
        scores = -np.square(distances)
        if self.metric != "l2" and index.dim == self.dim:
            # |s - x|^2 = 2 R^2 - 2 s.x for the query scaled to the keys' length R.
            norms = np.linalg.norm(queries, axis=1, keepdims=True)
            scores = (scores / 2 + length * length) * (norms / max(length, float(np.finfo(np.float32).tiny)))
        return scores, positions

    def _part_bytes(self, part: tuple[Any, float, np.ndarray]) -> int:
        index = part[0]
        graph = index._search_graph
        arrays = [index._raw_data, graph.data, graph.indices, graph.indptr, index._vertex_order, index._visited]
        for tree in index._search_forest:
            arrays += [tree.hyperplanes, tree.offsets, tree.children, tree.indices]
        return int(sum(array.nbytes for array in arrays))
