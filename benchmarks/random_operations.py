"""Random operations on a memory against a memory in plain NumPy: appends, searches, resets, options, saving, waiting.

    python benchmarks/random_operations.py [--operations 1000000] [--spec hnswlib ...] [--seed 0]

Each backend holds 2 memories of 96 keys, so that they turn over every hundred operations or so, with indexes of 16 keys
and more that are built, merged and trained in the background. After every operation its answer is held to the contract:
the slots of what was added; the scores and slots of what was found (falling, true, alive, none twice; for an exact
backend all of the best); the keys gathered. What differs ends the run with the number of the operation, and the same
seed repeats it: with the same calls a deterministic backend does the same. At the default of 20 000 operations a
backend takes some ten seconds; a million for all of them, an hour or so. Writes
benchmarks/results/random_operations.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from recollect.memory_backends import BackendUnavailable, MemoryBackend, load_backend, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.segments import SegmentedBackend
from recollect.memory_backends.trained import TrainedBackend
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "random_operations.json"
PARTS = "run_size=16,part_size=48,fan_out=3"
SPECS = (
    "exact",
    "approx-topk",
    f"rerank:source='hnswlib:{PARTS}',candidates=16",
    "faiss-flat",
    "faiss-ivf:nlist=4,nprobe=2",
    "faiss-ivfpq:nlist=4,nprobe=3,nbits=4",
    "scann:num_leaves=4,num_leaves_to_search=3",
    f"faiss-hnsw:{PARTS}",
    f"hnswlib:{PARTS}",
    "pynndescent:run_size=24,part_size=48,fan_out=2,n_neighbors=8",
)
M, C, D = 2, 96, 8
SHARES = {"add": 50, "search": 38, "gather": 5, "options": 3, "reset": 2, "wait": 1.7, "save": 0.3}
"""Per cent of the operations."""
TOLERANCE = 1e-4
"""By how much, relative to the largest score of a query (at least 1), float32 may be off."""


class Plain:
    """The same memories in NumPy: nothing here is shared with a backend."""

    def __init__(self) -> None:
        self.keys = np.zeros((M, C, D), np.float32)
        self.totals = [0] * M

    def add(self, memory: int, keys: np.ndarray) -> np.ndarray:
        """The slots that the contract gives to keys (T, D)."""
        numbers = self.totals[memory] + np.arange(len(keys))
        self.totals[memory] += len(keys)
        stay = numbers >= self.totals[memory] - C
        self.keys[memory, numbers[stay] % C] = keys[stay]
        return np.where(stay, numbers % C, -1)

    def length(self, memory: int) -> int:
        """How many keys a memory holds."""
        return min(C, self.totals[memory])


def check(answer: Any, plain: Plain, queries: np.ndarray, k: int, memories: list[int], exact: bool) -> tuple[int, int]:
    """Holds an answer to the contract; how many of how many true neighbours it has."""
    found_of = wanted_of = 0
    all_scores, all_slots = answer.scores.numpy(), answer.slots.numpy()
    for row, memory in enumerate(memories):
        scores, slots = all_scores[row], all_slots[row]
        truth = queries[row] @ plain.keys[memory, : plain.length(memory)].T
        here = slots >= 0
        assert (here == (scores > -np.inf)).all(), "slot -1 and score -inf come together"
        assert (scores[:, :-1] >= scores[:, 1:]).all(), "scores fall"
        assert slots.max(initial=-1) < plain.length(memory), "a slot that holds no key"
        ordered = np.sort(slots, axis=1)
        assert ((ordered[:, 1:] != ordered[:, :-1]) | (ordered[:, 1:] < 0)).all(), "a slot twice"
        if not truth.shape[1]:
            continue
        largest = np.abs(truth).max(axis=1, initial=1.0)[:, None]
        true = np.take_along_axis(truth, np.where(here, slots, 0), axis=1)
        assert (np.abs(np.where(here, scores - true, 0)) <= TOLERANCE * largest).all(), "scores of other keys"
        best = -np.sort(-truth, axis=1)[:, :k]
        hits = int((here & (true >= best[:, -1:] - TOLERANCE * largest)).sum())
        if exact:
            assert hits >= best.size, "exact search left out a better key"
        found_of, wanted_of = found_of + min(hits, best.size), wanted_of + best.size
    return found_of, wanted_of


class Trial:
    """One backend, its double in NumPy, and what is drawn next."""

    def __init__(self, spec: str, seed: int, folder: Path) -> None:
        self.rng = np.random.default_rng(seed)
        self.memory: MemoryBackend = make_backend(spec, num_memories=M, capacity=C, dim=D, seed=seed)
        self.exact = self.memory.capabilities.exact
        self.plain = Plain()
        self.folder = folder
        self.found = self.wanted = 0
        self.counts: Counter[str] = Counter()
        self.names = list(SHARES)
        self.shares = np.array(list(SHARES.values())) / sum(SHARES.values())

    def some(self) -> list[int]:
        """Memories in any order, at least one."""
        return self.rng.permutation(M)[: self.rng.integers(1, M + 1)].tolist()

    def vectors(self, *shape: int) -> np.ndarray:
        """Gaussian ones; for an exact backend often on a grid, so that ties are common."""
        drawn = self.rng.standard_normal((*shape, D), dtype=np.float32)
        return np.round(2 * drawn) / 2 if self.exact and self.rng.random() < 0.5 else drawn

    def step(self) -> None:
        """One operation."""
        name = str(self.rng.choice(self.names, p=self.shares))
        self.counts[name] += 1
        getattr(self, name)()

    def add(self) -> None:
        memories = self.some()
        longest = 8 if self.rng.random() < 0.97 else 2 * C
        keys = self.vectors(len(memories), int(self.rng.integers(1, longest)))
        slots = self.memory.add(torch.from_numpy(keys), memories=memories).numpy()
        for row, memory in enumerate(memories):
            assert (slots[row] == self.plain.add(memory, keys[row])).all(), "slots of what was added"

    def search(self) -> None:
        memories, k = self.some(), int(self.rng.integers(1, 24))
        queries = self.vectors(len(memories), int(self.rng.integers(1, 5)))
        answer = self.memory.search(torch.from_numpy(queries), k, memories=memories)
        found, wanted = check(answer, self.plain, queries, k, memories, self.exact)
        self.found, self.wanted = self.found + found, self.wanted + wanted

    def gather(self) -> None:
        slots = np.stack([self.rng.integers(-1, max(1, self.plain.length(m)), (2, 5)) for m in range(M)])
        slots[[not self.plain.length(memory) for memory in range(M)]] = -1
        keys = self.memory.gather_keys(torch.from_numpy(slots)).numpy()
        expected = np.stack([self.plain.keys[memory][slots[memory]] for memory in range(M)])
        assert (keys == np.where(slots[..., None] < 0, 0, expected)).all(), "keys as they were added"

    def options(self) -> None:
        curve = self.memory.curve
        if curve:
            name = str(self.rng.choice(list(curve)))
            self.memory.set_search_options(**{name: curve[name][self.rng.integers(len(curve[name]))]})

    def reset(self) -> None:
        memories = self.some()
        self.memory.reset(memories)
        for memory in memories:
            self.plain.totals[memory] = 0

    def wait(self) -> None:
        self.memory.wait()
        assert self.memory.stats().pending_builds == 0

    def save(self) -> None:
        """Saves, closes, and goes on with what was loaded; both answer the same."""
        queries = torch.from_numpy(self.vectors(M, 2))
        self.memory.save(self.folder)
        loaded = load_backend(self.folder)
        one, other = self.memory.search(queries, 8), loaded.search(queries, 8)
        if self.memory.capabilities.deterministic:
            assert torch.equal(one.slots, other.slots), "a loaded memory answers as the saved one"
        self.memory.close()
        self.memory = loaded


def run(spec: str, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """One backend's operations."""
    task = progress.add_task(spec, total=arguments.operations)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(spec, arguments.seed, Path(folder) / "memory")
        for number in range(arguments.operations):
            try:
                trial.step()
            except Exception as error:
                raise SystemExit(f"{spec}: operation {number} of seed {arguments.seed}: {error!r}") from error
            if number % 100 == 99:
                progress.update(task, completed=number + 1)
        progress.update(task, completed=arguments.operations)
        trial.memory.close()
    return {
        "spec": spec,
        "operations": arguments.operations,
        "counts": dict(trial.counts),
        "recall": round(trial.found / max(1, trial.wanted), 4),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=20_000, help="for each backend")
    parser.add_argument("--spec", nargs="+", default=list(SPECS), help="memories to try (all built-in ones)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result file instead of the table")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # These memories are small; build in the background all the same.
    SegmentedBackend.background_from = TrainedBackend.background_from = 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results, skipped = [], {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for spec in arguments.spec:
            try:
                results.append(run(spec, arguments, progress))
            except BackendUnavailable as error:
                skipped[spec] = str(error)
    content = {
        "schema": 1,
        "provenance": describe(threads=1, seed=arguments.seed),
        "seed": arguments.seed,
        "skipped": skipped,
        "results": results,
    }
    write_json(arguments.output, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
        return
    table = Table(title=f"{arguments.operations} operations agree with plain NumPy")
    for heading in ("memory", "recall", "seconds", *SHARES):
        table.add_column(heading, justify="right")
    for row in results:
        cells = (row["spec"], f"{row['recall']:.3f}", f"{row['seconds']:.0f}")
        table.add_row(*cells, *(str(row["counts"].get(name, 0)) for name in SHARES))
    Console(width=180).print(table)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
