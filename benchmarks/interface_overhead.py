"""What our interface costs on top of the library: search and append through it against the library called directly.

    python benchmarks/interface_overhead.py [--keys 65536] [--queries 512] [--rounds 9] [--library faiss-flat ...]

One memory of 65536 keys, 512 queries, k 32, one thread on both sides, the same keys and the same index settings. The
two sides take turns, and a ratio is the median over rounds of ours / direct. Times are the process's CPU time: on one
thread that is what the clock shows on an idle machine, and a busy one changes it little.
The direct side does the same work with the library's own calls and no more: for indexes that are kept in sealed parts
it searches parts of the same size and merges them with NumPy; `one_index_search_ms` tells what a single static index
over all keys would take instead, which cannot forget a key. Appending overwrites the oldest keys of a full memory, one
segment of 512 at a time; where a part is built from the keys, both sides build it.

Writes benchmarks/results/interface_overhead.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.registry import make_backend
from recollect.suites.provenance import describe

DIM, K, SEGMENT = 64, 32, 512
RESULT = Path(__file__).parent / "results" / "interface_overhead.json"


class Direct(ABC):
    """A library as its own users call it."""

    appended = SEGMENT
    """Keys that one call of `append` takes."""

    @abstractmethod
    def append(self, keys: np.ndarray, slot: int) -> None:
        """Overwrites the keys from slot on."""

    @abstractmethod
    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and slots (Q, K)."""


class Flat(Direct):
    def __init__(self, keys: np.ndarray) -> None:
        import faiss

        self.index = faiss.IndexFlatIP(DIM)
        self.index.add(keys)
        self.rows = faiss.rev_swig_ptr(self.index.get_xb(), keys.size).reshape(keys.shape)

    def append(self, keys: np.ndarray, slot: int) -> None:
        self.rows[slot : slot + len(keys)] = keys

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.index.search(queries, K)


class Ivf(Direct):
    def __init__(self, keys: np.ndarray) -> None:
        import faiss

        self.quantizer = faiss.IndexFlatIP(DIM)
        self.index = self.make(faiss, round(len(keys) ** 0.5))
        self.index.cp.seed, self.index.cp.niter, self.index.cp.min_points_per_centroid = 0, 10, 1
        self.index.set_direct_map_type(faiss.DirectMap.Array)
        self.index.train(keys)
        self.index.add(keys)
        self.index.nprobe = 16

    def make(self, faiss: Any, nlist: int) -> Any:
        return faiss.IndexIVFFlat(self.quantizer, DIM, nlist, faiss.METRIC_INNER_PRODUCT)

    def append(self, keys: np.ndarray, slot: int) -> None:
        self.index.update_vectors(np.arange(slot, slot + len(keys)), keys)

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.index.search(queries, K)


class Ivfpq(Ivf):
    """With faiss's own rescoring by whole keys, IndexRefineFlat."""

    def __init__(self, keys: np.ndarray) -> None:
        super().__init__(keys)
        import faiss

        self.whole = faiss.IndexFlatIP(DIM)
        self.whole.add(keys)
        self.rows = faiss.rev_swig_ptr(self.whole.get_xb(), keys.size).reshape(keys.shape)
        self.refine = faiss.IndexRefine(self.index, self.whole)
        self.refine.k_factor = 2

    def make(self, faiss: Any, nlist: int) -> Any:
        index = faiss.IndexIVFPQ(self.quantizer, DIM, nlist, DIM // 4, 8, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.niter, index.pq.cp.min_points_per_centroid, index.pq.cp.max_points_per_centroid = 4, 1, 16
        return index

    def append(self, keys: np.ndarray, slot: int) -> None:
        super().append(keys, slot)
        self.rows[slot : slot + len(keys)] = keys

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.refine.search(queries, K)


class Scann(Direct):
    def __init__(self, keys: np.ndarray) -> None:
        from scann.scann_ops.py import scann_ops_pybind

        leaves = round(len(keys) ** 0.5)
        self.index = (
            scann_ops_pybind.builder(keys, K, "dot_product")
            .tree(leaves, 16, training_sample_size=len(keys), min_partition_size=1)
            .score_ah(2, anisotropic_quantization_threshold=0.2, training_sample_size=len(keys))
            .reorder(128)
            .set_n_training_threads(1)
            .build()
        )
        self.index.set_num_threads(1)

    def append(self, keys: np.ndarray, slot: int) -> None:
        self.index.searcher.upsert(list(range(slot, slot + len(keys))), keys, len(keys))

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions, scores = self.index.search_batched(queries, K)
        return scores, positions


class Parts(Direct):
    """Four indexes over a quarter of the keys each, their answers merged; appending builds one of them anew."""

    def __init__(self, keys: np.ndarray, parts: int = 4) -> None:
        self.appended = len(keys) // parts
        self.starts = range(0, len(keys), self.appended)
        self.indexes = [self.build(keys[start : start + self.appended]) for start in self.starts]

    @abstractmethod
    def build(self, keys: np.ndarray) -> Any:
        """A static index over keys."""

    @abstractmethod
    def search_one(self, index: Any, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (Q, K) of one static index."""

    def append(self, keys: np.ndarray, slot: int) -> None:
        self.indexes[slot // self.appended] = self.build(keys)

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [self.search_one(index, queries) for index in self.indexes]
        scores = np.concatenate([part[0] for part in found], axis=1)
        slots = np.concatenate([part[1] + start for start, part in zip(self.starts, found, strict=True)], axis=1)
        best = np.argpartition(-scores, K - 1, axis=1)[:, :K]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1)
        return np.take_along_axis(scores, best, 1), np.take_along_axis(slots, best, 1)


class FaissHnsw(Parts):
    def build(self, keys: np.ndarray) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(DIM, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, 64
        index.add(keys)
        return index

    def search_one(self, index: Any, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return index.search(queries, K)


class Hnswlib(Parts):
    def build(self, keys: np.ndarray) -> Any:
        import hnswlib

        index = hnswlib.Index("ip", DIM)
        index.init_index(len(keys), M=16, ef_construction=100, random_seed=0)
        index.set_num_threads(1)
        index.add_items(keys)
        index.set_ef(64)
        return index

    def search_one(self, index: Any, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels, distances = index.knn_query(queries, K)
        return 1 - distances, labels


class Pynndescent(Parts):
    """Over unit keys, for which the Euclidean distance orders as the inner product does."""

    def build(self, keys: np.ndarray) -> Any:
        import pynndescent

        index = pynndescent.NNDescent(keys, metric="euclidean", n_neighbors=16, random_state=0, n_jobs=1)
        index.prepare()
        return index

    def search_one(self, index: Any, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions, distances = index.query(queries, K, epsilon=0.1)
        return -distances, positions


LIBRARIES: dict[str, Callable[[np.ndarray], Direct]] = {
    "faiss-flat": Flat,
    "faiss-ivf": Ivf,
    "faiss-ivfpq": Ivfpq,
    "faiss-hnsw": FaissHnsw,
    "scann": Scann,
    "hnswlib": Hnswlib,
    "pynndescent": Pynndescent,
}


def clustered(count: int, rng: np.random.Generator, matrix: np.ndarray, topics: np.ndarray) -> np.ndarray:
    """Unit vectors around topics, as float32."""
    content = topics[rng.integers(len(topics), size=count)] + rng.standard_normal((count, topics.shape[1]))
    vectors = content @ matrix + rng.standard_normal((count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def timed(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def recall(slots: np.ndarray, keys: np.ndarray, queries: np.ndarray) -> float:
    scores = queries @ keys.T
    least = np.partition(scores, -K, axis=1)[:, -K][:, None] - 1e-4
    return round(float((np.take_along_axis(scores, np.maximum(slots, 0), 1) >= least).mean()), 4)


def measure(name: str, keys: np.ndarray, queries: np.ndarray, rounds: int) -> dict[str, float]:
    count = len(keys)
    backend = make_backend(name, num_memories=1, capacity=count, dim=DIM)
    for start in range(0, count, SEGMENT):
        backend.add(torch.from_numpy(keys[None, start : start + SEGMENT]))
    direct = LIBRARIES[name](keys)
    asked = torch.from_numpy(queries)[None]
    found = backend.search(asked, K).slots[0].numpy()
    row = {"recall": recall(found, keys, queries), "direct_recall": recall(direct.search(queries)[1], keys, queries)}
    pairs = [(timed(lambda: backend.search(asked, K)), timed(lambda: direct.search(queries))) for _ in range(rounds)]
    row |= figures("search_ms", pairs, 1e3)
    # The same keys again, so that both sides still hold what they held. The slot goes round within the first part.
    appends = []
    for turn in range(5 * rounds if direct.appended == SEGMENT else 2):
        slot = turn * direct.appended % count
        new = keys[slot : slot + direct.appended].copy()

        def ours(new: np.ndarray = new) -> None:
            for start in range(0, len(new), SEGMENT):
                backend.add(torch.from_numpy(new[None, start : start + SEGMENT]))

        def theirs(new: np.ndarray = new, slot: int = slot) -> None:
            direct.append(new, slot)

        appends.append((timed(ours), timed(theirs)))
    row |= figures("append_us", appends, 1e6 / direct.appended)
    # What a model asks for at each step: one search and one append of as many keys as queries.
    step = [row[f"{side}search_ms"] + row[f"{side}append_us"] * len(queries) / 1e3 for side in ("", "direct_")]
    row["step_ratio"] = round(step[0] / step[1], 3)
    if isinstance(direct, Parts):
        whole = direct.build(keys)
        direct.search_one(whole, queries)
        row["one_index_search_ms"] = round(
            1e3 * min(timed(lambda: direct.search_one(whole, queries)) for _ in range(3)), 2
        )
        row["one_index_recall"] = recall(direct.search_one(whole, queries)[1], keys, queries)
    return row


def figures(name: str, pairs: list[tuple[float, float]], scale: float) -> dict[str, float]:
    ours, theirs = zip(*pairs, strict=True)
    return {
        name: round(statistics.median(ours) * scale, 3),
        f"direct_{name}": round(statistics.median(theirs) * scale, 3),
        f"{name.partition('_')[0]}_ratio": round(statistics.median(a / b for a, b in pairs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=65536)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--library", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import cpuinfo
    import faiss

    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    matrix, topics = rng.standard_normal((24, DIM)), 1.2 * rng.standard_normal((64, 24))
    keys = clustered(arguments.keys, rng, matrix, topics)
    queries = clustered(arguments.queries, rng, 0.7 * matrix + 0.5 * rng.standard_normal(matrix.shape), topics)
    results = {}
    for name in arguments.library:
        results[name] = measure(name, keys, queries, arguments.rounds)
        print(name, results[name], flush=True)
    write_json(
        arguments.output,
        {
            "processor": str(cpuinfo.get_cpu_info().get("brand_raw", "unknown")),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "threads": 1,
            "provenance": describe(threads=1, seed=0),
            "clock": "process CPU time",
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("torch", "numpy", "faiss-cpu", "hnswlib", "scann", "pynndescent")
            },
            "keys": arguments.keys,
            "queries": arguments.queries,
            "dim": DIM,
            "k": K,
            "rounds": arguments.rounds,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
