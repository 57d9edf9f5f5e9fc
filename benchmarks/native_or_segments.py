"""Should an index forget keys by itself, or should it stand behind sealed parts?

For each library that offers deletion or overwriting, both ways hold the same sliding window that turns over several
times, on keys that drift as a text's do, with queries from another distribution. The ways of one library take turns
step by step, so that a busy machine slows them alike. Each implementation follows the winner; the losers live only
here.

    python benchmarks/native_or_segments.py [--capacity 2048 8192] [--turnovers 5] [--library hnswlib ...]

Writes benchmarks/results/native_or_segments.json. Columns: recall of the true 32 neighbours over all turnovers after
the first and in the last one, microseconds to append a key (training and building included) and the longest append
of one segment in milliseconds, milliseconds to search one segment's 128 queries, and the two together: microseconds to
append one key and search for one query, which is what a token costs. Times are CPU time on one thread, which a busy
machine changes little. The winner is the cheapest to a token among those within 0.01 of the best recall.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.registry import make_backend
from recollect.memory_backends.segments import SegmentedBackend
from recollect.suites.provenance import describe

DIM, K, SEGMENT = 64, 32, 128
RESULT = Path(__file__).parent / "results" / "native_or_segments.json"


def training_is_due(capacity: int, total: int, trained: int, *, retrain: bool) -> bool:
    """Whether an index is to be trained after `total` keys, having last been trained at `trained` (0: never).

    First as early as a sealed part of the other way would have it, then when the memory is full, then every turnover.
    """
    if trained == 0:
        return total >= capacity // 4
    return trained < capacity <= total or (retrain and total >= trained + capacity)


class Window(ABC):
    """One way to hold the newest C keys of one stream: key number n lies at slot n mod C."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    @abstractmethod
    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Takes keys (T, D) at slots (T,), overwriting what lay there."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Slots (Q, k)."""


class Through(Window):
    """A backend of this package."""

    def __init__(self, capacity: int, backend: MemoryBackend) -> None:
        super().__init__(capacity)
        self.backend = backend

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        self.backend.add(torch.from_numpy(keys)[None])

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.backend.search(torch.from_numpy(queries)[None], k).slots[0].numpy()


def backend(spec: str) -> Callable[[int], Window]:
    return lambda capacity: Through(capacity, make_backend(spec, num_memories=1, capacity=capacity, dim=DIM))


def segmented(cls: type[SegmentedBackend]) -> Callable[[int], Window]:
    return lambda capacity: Through(capacity, cls(num_memories=1, capacity=capacity, dim=DIM))


# faiss ---------------------------------------------------------------------------------------------------------------


class FlatOverwrite(Window):
    """IndexFlat, rows overwritten in place."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        import faiss

        self.index = faiss.IndexFlatIP(DIM)
        self.faiss = faiss

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        new = slots >= self.index.ntotal
        if new.any():
            self.index.add(keys[new])
        if not new.all():
            rows = self.faiss.rev_swig_ptr(self.index.get_xb(), self.index.ntotal * DIM).reshape(-1, DIM)
            rows[slots[~new]] = keys[~new]

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.search(queries, k)[1]


class FlatRing(Window):
    """faiss.knn over the ring itself: IndexFlat's search without IndexFlat's copy of the keys."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        import faiss

        self.faiss, self.ring, self.length = faiss, np.zeros((capacity, DIM), np.float32), 0

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        self.ring[slots] = keys
        self.length = min(self.capacity, self.length + len(keys))

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.faiss.knn(queries, self.ring[: self.length], k, metric=self.faiss.METRIC_INNER_PRODUCT)[1]


def nlist_for(keys: int) -> int:
    return max(1, round(keys**0.5))


def train_ivf(keys: np.ndarray, pq: bool, direct_map: str | None) -> Any:
    import faiss

    quantizer = faiss.IndexFlatIP(DIM)
    nlist = nlist_for(len(keys))
    if pq:
        index = faiss.IndexIVFPQ(quantizer, DIM, nlist, DIM // 4, 8, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid = 1
        index.pq.cp.niter, index.pq.cp.max_points_per_centroid = 4, 16
    else:
        index = faiss.IndexIVFFlat(quantizer, DIM, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.nprobe = max(1, nlist // 4)
    if direct_map:
        index.set_direct_map_type(getattr(faiss.DirectMap, direct_map))
    index.train(keys)
    return index


class IvfNative(Window):
    """An IVF index that forgets by itself, trained at a full window and again at each turnover (or never again)."""

    def __init__(self, capacity: int, *, pq: bool, way: str, retrain: bool, k_factor: int = 2) -> None:
        super().__init__(capacity)
        self.pq, self.way, self.retrain, self.k_factor = pq, way, retrain, k_factor
        self.index: Any = None
        self.ring, self.total, self.trained = np.zeros((capacity, DIM), np.float32), 0, 0

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:

        self.ring[slots] = keys
        self.total += len(keys)
        length = min(self.total, self.capacity)
        if training_is_due(self.capacity, self.total, self.trained, retrain=self.retrain):
            self.index = train_ivf(self.ring[:length], self.pq, "Array" if self.way == "update" else "Hashtable")
            if self.way == "update":
                self.index.add(self.ring[:length])
            else:
                self.index.add_with_ids(self.ring[:length], np.arange(length))
            self.trained = self.total
        elif self.index is not None:
            if self.way == "remove":
                self.index.remove_ids(slots[slots < self.index.ntotal])
                self.index.add_with_ids(keys, slots)
            else:
                new = slots >= self.index.ntotal
                if new.any():
                    self.index.add(keys[new])
                if not new.all():
                    ids = np.ascontiguousarray(slots[~new])
                    old = np.ascontiguousarray(keys[~new])
                    self.index.update_vectors(ids, old)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        if self.index is None:
            scores = queries @ self.ring[: min(self.total, self.capacity)].T
            return np.argsort(-scores, axis=1)[:, :k]
        if self.pq:
            found = self.index.search(queries, self.k_factor * k)[1]
            scores = np.matmul(self.ring[found], queries[:, :, None])[:, :, 0]
            order = np.argsort(-np.where(found < 0, -np.inf, scores), axis=1)[:, :k]
            return np.take_along_axis(found, order, axis=1)
        return self.index.search(queries, k)[1]


class IvfParts(SegmentedBackend):
    """The same IVF index, one for each sealed part."""

    name = "ivf-parts"
    pq = False

    def _build_part(self, keys: np.ndarray, seed: int) -> Any:
        index = train_ivf(keys, self.pq, None)
        index.add(keys)
        return index

    def _search_part(self, part: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return part.search(queries, k)

    def _part_bytes(self, part: Any) -> int:
        return 0


class IvfpqParts(IvfParts):
    name = "ivfpq-parts"
    pq = True
    exact_scores = False

    def _fetch(self, k: int) -> int:
        return 2 * k


# hnswlib -------------------------------------------------------------------------------------------------------------


class HnswNative(Window):
    """One graph for ever: `label` gives an old label a new key; `replace` marks it deleted and lets a new key in."""

    def __init__(self, capacity: int, *, way: str) -> None:
        super().__init__(capacity)
        import hnswlib

        self.way, self.total = way, 0
        self.index = hnswlib.Index("ip", DIM)
        self.index.init_index(
            capacity, M=16, ef_construction=100, random_seed=1, allow_replace_deleted=way == "replace"
        )
        self.index.set_num_threads(1)
        self.index.set_ef(64)

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        replace = self.way == "replace" and self.total >= self.capacity
        numbers = self.total + np.arange(len(keys))
        if replace:
            # Labels must be new ones: hnswlib loses a label that is deleted and added again in the same batch, since
            # it takes any deleted node for any new label and then forgets the node's former label.
            for number in numbers:
                self.index.mark_deleted(int(number) - self.capacity)
        self.index.add_items(keys, numbers if self.way == "replace" else slots, replace_deleted=replace)
        self.total += len(keys)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.knn_query(queries, k)[0].astype(np.int64) % self.capacity


class HnswParts(SegmentedBackend):
    """The same graph, one for each sealed part."""

    name = "hnswlib-parts"

    def _build_part(self, keys: np.ndarray, seed: int) -> Any:
        import hnswlib

        index = hnswlib.Index("ip", DIM)
        index.init_index(len(keys), M=16, ef_construction=100, random_seed=seed)
        index.add_items(keys, num_threads=1)
        index.set_ef(64)
        return index

    def _search_part(self, part: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        labels, distances = part.knn_query(queries, k, num_threads=1)
        return 1 - distances, labels.astype(np.int64)

    def _part_bytes(self, part: Any) -> int:
        return 0


# ScaNN ---------------------------------------------------------------------------------------------------------------


def build_scann(keys: np.ndarray, docids: list[str] | None = None) -> Any:
    from scann.scann_ops.py import scann_ops_pybind

    leaves = nlist_for(len(keys))
    return (
        scann_ops_pybind.builder(keys, K, "dot_product")
        .tree(leaves, max(1, leaves // 3), training_sample_size=len(keys), min_partition_size=1)
        .score_ah(2, anisotropic_quantization_threshold=0.2, training_sample_size=len(keys))
        .reorder(100)
        .set_n_training_threads(1)
        .build(docids=docids)
    )


class ScannNative(Window):
    """One searcher, changed by `upsert`; trained again at each turnover or never."""

    def __init__(self, capacity: int, *, retrain: bool) -> None:
        super().__init__(capacity)
        self.retrain, self.total, self.trained = retrain, 0, 0
        self.index: Any = None
        self.ring = np.zeros((capacity, DIM), np.float32)

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        self.ring[slots] = keys
        self.total += len(keys)
        length = min(self.total, self.capacity)
        if training_is_due(self.capacity, self.total, self.trained, retrain=self.retrain):
            self.index = build_scann(self.ring[:length], [str(slot) for slot in range(length)])
            self.trained = self.total
        elif self.index is not None:
            self.index.upsert([str(slot) for slot in slots], keys, batch_size=len(keys))

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        if self.index is None:
            scores = queries @ self.ring[: min(self.total, self.capacity)].T
            return np.argsort(-scores, axis=1)[:, :k]
        # Slots are positions as long as nothing is deleted, so the searcher below the wrapper is asked directly:
        # the wrapper's translation of document ids is a Python loop.
        return np.asarray(self.index.searcher.search_batched(queries, k, -1, -1, False, 0)[0]).astype(np.int64)


class ScannParts(SegmentedBackend):
    name = "scann-parts"

    def _build_part(self, keys: np.ndarray, seed: int) -> Any:
        return build_scann(keys)

    def _search_part(self, part: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        positions, scores = part.search_batched(queries, k)
        positions = positions.astype(np.int64)
        positions[~np.isfinite(scores)] = -1
        return scores, positions

    def _part_bytes(self, part: Any) -> int:
        return 0


# The measurement -----------------------------------------------------------------------------------------------------


def ways() -> dict[str, dict[str, Callable[[int], Window]]]:
    return {
        "faiss-flat": {"native, IndexFlat overwritten": FlatOverwrite, "native, knn over the ring": FlatRing},
        "faiss-ivf": {
            "native, update_vectors, retrained": lambda c: IvfNative(c, pq=False, way="update", retrain=True),
            "native, update_vectors, trained once": lambda c: IvfNative(c, pq=False, way="update", retrain=False),
            "native, remove_ids, retrained": lambda c: IvfNative(c, pq=False, way="remove", retrain=True),
            "segments": segmented(IvfParts),
        },
        "faiss-ivfpq": {
            "native, update_vectors, retrained": lambda c: IvfNative(c, pq=True, way="update", retrain=True),
            # Each of the four parts rescores its own 2 k candidates: one index does as well with 4 k.
            "native, update_vectors, retrained, k_factor 4": lambda c: IvfNative(
                c, pq=True, way="update", retrain=True, k_factor=4
            ),
            "segments": segmented(IvfpqParts),
        },
        "hnswlib": {
            "native, label overwritten": lambda c: HnswNative(c, way="label"),
            "native, mark_deleted and replace_deleted": lambda c: HnswNative(c, way="replace"),
            "segments": segmented(HnswParts),
        },
        "scann": {
            "native, upsert, retrained": lambda c: ScannNative(c, retrain=True),
            "native, upsert, trained once": lambda c: ScannNative(c, retrain=False),
            "segments": segmented(ScannParts),
        },
    }


def drifting_stream(steps: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Segments of unit keys and of queries: both are views of one topic that moves on, through different matrices."""
    rng = np.random.default_rng(seed)
    to_key, to_query = rng.standard_normal((2, 24, DIM)).astype(np.float32)
    to_query = 0.7 * to_key + 0.5 * to_query
    topics = rng.standard_normal((16, 24)).astype(np.float32)
    for _ in range(steps):
        topics += 0.15 * rng.standard_normal(topics.shape).astype(np.float32)
        content = topics[rng.integers(16, size=(2, SEGMENT))] + rng.standard_normal((2, SEGMENT, 24)).astype(np.float32)
        keys, queries = content[0] @ to_key, content[1] @ to_query
        keys += 1.0 * rng.standard_normal(keys.shape).astype(np.float32)
        yield (
            keys / np.linalg.norm(keys, axis=1, keepdims=True),
            8 * queries / np.linalg.norm(queries, axis=1, keepdims=True),
        )


@dataclasses.dataclass
class Tally:
    append_seconds: list[float] = dataclasses.field(default_factory=list)
    search_seconds: list[float] = dataclasses.field(default_factory=list)
    recall: list[float] = dataclasses.field(default_factory=list)


def measure(makers: dict[str, Callable[[int], Window]], capacity: int, turnovers: int) -> dict[str, dict[str, float]]:
    windows = {label: make(capacity) for label, make in makers.items()}
    tallies = {label: Tally() for label in makers}
    ring = np.zeros((capacity, DIM), np.float32)
    per_turnover = capacity // SEGMENT
    total = 0
    for step, (keys, queries) in enumerate(drifting_stream(per_turnover * turnovers, seed=1)):
        slots = (total + np.arange(SEGMENT)) % capacity
        ring[slots] = keys
        total += SEGMENT
        true_scores = queries @ ring[: min(total, capacity)].T
        threshold = np.sort(true_scores, axis=1)[:, -K][:, None] - 1e-4
        # The order changes from step to step, so that no way always runs on warm caches.
        labels = list(windows)
        for label in labels[step % len(labels) :] + labels[: step % len(labels)]:
            started = time.process_time()
            windows[label].add(keys, slots)
            added = time.process_time()
            found = windows[label].search(queries, K)
            searched = time.process_time()
            missing = found < 0
            hits = np.take_along_axis(true_scores, np.where(missing, 0, found), axis=1) >= threshold
            tally = tallies[label]
            tally.append_seconds.append(added - started)
            tally.search_seconds.append(searched - added)
            tally.recall.append(float((hits & ~missing).mean()))
    results = {}
    for label, tally in tallies.items():
        later = slice(per_turnover, None)
        results[label] = {
            "recall": round(float(np.mean(tally.recall[later])), 4),
            "recall_last_turnover": round(float(np.mean(tally.recall[-per_turnover:])), 4),
            "append_us_per_key": round(float(np.mean(tally.append_seconds[later])) / SEGMENT * 1e6, 2),
            "longest_append_ms": round(float(np.max(tally.append_seconds[later])) * 1e3, 2),
            "search_ms": round(float(np.mean(tally.search_seconds[later])) * 1e3, 3),
            "us_per_token": round(
                float(np.mean(tally.append_seconds[later]) + np.mean(tally.search_seconds[later])) / SEGMENT * 1e6, 2
            ),
        }
    return results


def processor() -> str:
    import cpuinfo

    return str(cpuinfo.get_cpu_info().get("brand_raw", "unknown"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--turnovers", type=int, default=5)
    parser.add_argument("--library", nargs="+", default=None)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import faiss

    faiss.omp_set_num_threads(1)
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    winners: dict[str, dict[str, str]] = {}
    for library, makers in ways().items():
        if arguments.library and library not in arguments.library:
            continue
        for capacity in arguments.capacity:
            measured = measure(makers, capacity, arguments.turnovers)
            results.setdefault(library, {})[str(capacity)] = measured
            best = max(row["recall"] for row in measured.values())
            fit = {label: row["us_per_token"] for label, row in measured.items() if row["recall"] >= best - 0.01}
            winners.setdefault(library, {})[str(capacity)] = min(fit, key=lambda label: fit[label])
            for label, row in measured.items():
                print(f"{library:12} {capacity:6} {label:42}", *(f"{name}={value}" for name, value in row.items()))
    write_json(
        arguments.output,
        {
            "processor": processor(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "threads": 1,
            "provenance": describe(threads=1, seed=0),
            "clock": "process CPU time",
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "faiss-cpu", "hnswlib", "scann", "numpy")
            },
            "dim": DIM,
            "k": K,
            "segment": SEGMENT,
            "turnovers": arguments.turnovers,
            "winners": winners,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
