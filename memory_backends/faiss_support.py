"""What the faiss backends share: metrics, threads, sizes, and what a GPU needs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import numpy as np

from recollect.memory_backends.errors import BackendUnavailable, UnsupportedOperation
from recollect.memory_backends.records import Requirement

FAISS = Requirement("faiss", "faiss-cpu>=1.13")
FAISS_GPU = "faiss-gpu-cu12>=1.13"
DEVICE_HELP = "where the index lives: cpu, or cuda, which needs faiss-gpu"

FaissDevice = Literal["cpu", "cuda"]

GPU_LARGEST_K = 2048
"""Neighbours that faiss finds at once on a GPU."""

GPU_CHANGED_SHARE = 8
"""A copy on a GPU is renewed when more than this part of its keys has changed since."""


def metric_of(faiss: ModuleType, metric: str) -> int:
    """faiss's number for a metric. Always pass it: an index made without one searches by distance."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def gpu_resources(faiss: ModuleType, name: str) -> Any:
    """Resources for faiss on a GPU.

    Raises:
        BackendUnavailable: this faiss is built without GPU support.
        UnsupportedOperation: faiss sees no GPU.
    """
    if not hasattr(faiss, "StandardGpuResources"):
        raise BackendUnavailable(
            f"{name}:device=cuda needs faiss with GPU support, and the faiss {faiss.__version__} installed here has "
            f"none: pip uninstall faiss-cpu && pip install '{FAISS_GPU}'"
        )
    if faiss.get_num_gpus() < 1:
        raise UnsupportedOperation(f"{name}:device=cuda was asked for, but faiss sees no GPU here")
    return faiss.StandardGpuResources()


def as_scores(distances: Any, metric: str) -> Any:
    """faiss's answers as scores: inner products as they are, distances with their sign changed."""
    return -distances if metric == "l2" else distances


@dataclass
class GpuCopy:
    """An index on a GPU, which cannot overwrite a key, and the keys that have changed since it was copied there.

    Changed keys are searched exactly beside it, and its own answers for their positions do not count. A copy takes as
    long as reading the whole index, so it is made once for every eighth of the keys that changes, not at every step.
    """

    index: Any
    keys_copied: int
    changed: dict[int, np.ndarray] = field(default_factory=dict)

    def change(self, positions: np.ndarray, keys: np.ndarray) -> None:
        """Notes that keys (T, D) now stand at positions (T,)."""
        self.changed.update(zip(positions.tolist(), keys, strict=True))

    @property
    def is_stale(self) -> bool:
        """Whether so much has changed that a new copy is due."""
        return len(self.changed) * GPU_CHANGED_SHARE > self.keys_copied

    def search(self, faiss: ModuleType, queries: np.ndarray, k: int, metric: int) -> tuple[np.ndarray, np.ndarray]:
        """faiss's distances (Q, k) and positions (Q, k), -1 where missing; not in order where keys have changed."""
        if not self.changed:
            distances, positions = self.index.search(queries, k)
            return distances, positions
        distances, positions = self.index.search(queries, min(k + len(self.changed), GPU_LARGEST_K, self.keys_copied))
        places = np.fromiter(self.changed, dtype=np.int64, count=len(self.changed))
        keys = np.stack(list(self.changed.values()))
        near, where = faiss.knn(queries, keys, min(k, len(keys)), metric=metric)
        positions = np.where(np.isin(positions, places), -1, positions)
        distances = np.concatenate((distances, near), 1)
        positions = np.concatenate((positions, places[where]), 1)
        worst = np.inf if metric == faiss.METRIC_L2 else -np.inf
        distances = np.where(positions < 0, worst, distances).astype(np.float32)
        order = np.argsort(distances if metric == faiss.METRIC_L2 else -distances, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(positions, order, 1)


GPU_LOCK = threading.Lock()
"""faiss's resources of a GPU serve one thread at a time."""
