"""ScaNN: a tree of cells, keys quantised anisotropically, the best candidates scored by whole keys.

Keys are overwritten in place by ScaNN's own `upsert`. The original paper is Guo et al. 2020, arXiv 1908.10396.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.errors import InvalidSpec
from recollect.memory_backends.records import Requirement
from recollect.memory_backends.trained import TrainedBackend, TrainedOptions

ASYMMETRIC_HASH_CLUSTERS = 16
"""Codebook entries of ScaNN's LUT16 hashing: it refuses to train on fewer keys."""
ANISOTROPIC_THRESHOLD = 0.2
"""As in ScaNN's own examples. No option: with a tree, ScaNN 1.4 answers the same whatever it is."""
_stderr = threading.Lock()


@dataclass(frozen=True)
class ScannOptions(TrainedOptions):
    """Options of `scann`, named as in its builder."""

    num_leaves: int = field(default=0, metadata={"help": "cells; 0: the square root of the keys learnt from"})
    num_leaves_to_search: int = field(default=16, metadata={"help": "cells searched for a query"})
    dimensions_per_block: int = field(default=2, metadata={"help": "dimensions that share one 4-bit code"})
    reordering_num_neighbors: int = field(
        default=128, metadata={"help": "candidates that are scored by whole keys; at least k are"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("num_leaves", 0),
            ("num_leaves_to_search", 1),
            ("dimensions_per_block", 1),
            ("reordering_num_neighbors", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")


class Scann(TrainedBackend):
    """A ScaNN searcher to a memory. Its scores are those of whole keys: every answer has been reordered."""

    name = "scann"
    summary = "ScaNN: tree, anisotropic hashing, reordering by whole keys"
    Options: ClassVar[type] = ScannOptions
    capabilities: ClassVar[Capabilities] = Capabilities(needs_training=True)
    requires = (Requirement("scann", "scann>=1.4"),)
    search_options = ("num_leaves_to_search", "reordering_num_neighbors")
    sweep = (
        "scann:num_leaves_to_search=4,reordering_num_neighbors=64",
        "scann",
        "scann:num_leaves_to_search=48,reordering_num_neighbors=256",
    )
    curve: ClassVar = {
        "num_leaves_to_search": (1, 2, 4, 8, 16, 32, 64),
        "reordering_num_neighbors": (64, 128, 256),
    }
    builds: ClassVar = {"num_leaves": (0, 64, 128, 256), "dimensions_per_block": (2, 4)}
    recall_floor = 0.3

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        if self.options.num_leaves > self.capacity:
            raise InvalidSpec(
                f"{self.name!r}: num_leaves={self.options.num_leaves} exceeds the capacity of {self.capacity} keys"
            )
        if self.options.dimensions_per_block > self.dim:
            raise InvalidSpec(
                f"{self.name!r}: dimensions_per_block={self.options.dimensions_per_block} exceeds the keys' dimension "
                f"{self.dim}"
            )
        self.library = self.import_library("scann.scann_ops.py.scann_ops_pybind")

    def _fewest_keys(self) -> int:
        return max(2 * ASYMMETRIC_HASH_CLUSTERS, self.options.num_leaves)

    def _train(self, keys: np.ndarray, seed: int, older: Any, turnover: int) -> Any:
        # ScaNN takes no seed: its training is the same for the same keys on one thread.
        leaves = self.options.num_leaves or max(1, round(len(keys) ** 0.5))
        builder = (
            self.library.builder(keys, 10, "squared_l2" if self.metric == "l2" else "dot_product")
            .tree(leaves, leaves, training_sample_size=len(keys), min_partition_size=1)
            .score_ah(
                self.options.dimensions_per_block,
                anisotropic_quantization_threshold=ANISOTROPIC_THRESHOLD,
                training_sample_size=len(keys),
            )
            .reorder(self.options.reordering_num_neighbors)
            .set_n_training_threads(1)
        )
        with _quiet_stderr():
            searcher = builder.build().searcher
        searcher.set_num_threads(1)
        return searcher

    def _append(self, index: Any, keys: np.ndarray) -> None:
        index.upsert([None] * len(keys), keys, len(keys))

    def _overwrite(self, index: Any, positions: np.ndarray, keys: np.ndarray) -> None:
        index.upsert(positions.tolist(), keys, len(keys))

    def _search_index(self, index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        reorder = max(k, self.options.reordering_num_neighbors)
        positions, scores = index.search_batched(queries, k, reorder, self.options.num_leaves_to_search, False, 0)
        # A missing neighbour is position 0 with the score NaN: row 0 was not found.
        places = np.where(np.isnan(scores), -1, positions.astype(np.int64))
        return (-scores if self.metric == "l2" else scores), places

    @classmethod
    def _planned_index_bytes(cls, options: ScannOptions, *, capacity: int, dim: int, metric: str) -> int:
        # The old index beside the new one while it is trained, each as `_bytes_of` estimates it.
        blocks = -(-dim // options.dimensions_per_block)
        leaves = options.num_leaves or round(capacity**0.5)
        return 2 * (capacity * (dim * 4 + -(-blocks // 2) + 8) + (leaves + 16) * dim * 4)

    def _bytes_of(self, index: Any, keys: int) -> int:
        # An estimate, ScaNN does not say: whole keys, half a byte to a code, a cell number of 4 bytes and an id of 4
        # for each key; centroids and codebooks of 16 entries.
        blocks = -(-self.dim // self.options.dimensions_per_block)
        leaves = self.options.num_leaves or round(keys**0.5)
        return keys * (self.dim * 4 + -(-blocks // 2) + 8) + leaves * self.dim * 4 + 16 * self.dim * 4

    def _write_index(self, index: Any, path: Path) -> None:
        path.mkdir()
        with _quiet_stderr():
            index.serialize(str(path), True)

    def _read_index(self, path: Path) -> Any:
        # The library's own loader would unpickle document ids if it found some; there are none here.
        if (path / "scann_docids.pkl").exists():
            raise ValueError(f"{path} holds a pickle, which ScaNN would run")
        with _quiet_stderr():
            searcher = self.library.load_searcher(str(path)).searcher
        searcher.set_num_threads(1)
        return searcher


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keeps the library's informational log lines, which no setting of it silences, off the terminal.

    Its errors come as exceptions all the same. What Python code writes to `sys.stderr` meanwhile, such as a progress
    bar while an index is trained in the background, still gets there; what other libraries write to file descriptor 2
    does not.
    """
    with _stderr:
        before = sys.stderr
        before.flush()
        kept = os.dup(2)
        around = io.TextIOWrapper(
            os.fdopen(kept, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True
        )
        try:
            if _writes_to_stderr(before):
                sys.stderr = around
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
                yield
        finally:
            if sys.stderr is around:
                sys.stderr = before
            around.flush()
            os.dup2(kept, 2)
            os.close(kept)


def _writes_to_stderr(stream: Any) -> bool:
    try:
        return bool(stream.fileno() == 2)
    except (AttributeError, OSError, ValueError):
        return False
