"""What a stream costs: appending at small and large memories, stalls, and recall as a memory turns over.

    python benchmarks/streams.py [--spec hnswlib faiss-ivf ...] [--capacity 8192 131072 1000000] [--turnovers 10]

Keys of a drifting text come in steps of 512, each followed by a search for 128 queries, as a model's do. For every
backend there are memories of all capacities at once, filled beforehand, and appended to in turns:

1. unpaced: steps as fast as they go, one memory after another, waiting at the end for what is built in the
   background. That gives the sustained cost of a step (and keys a second), builds included.
2. paced: a round of steps, one to each memory, begins every `--pace` (1.5) times the sum of sustained appends and
   searches, so that the builder has time. Every append and search is timed on the wall clock.
3. turnovers: a memory of the smallest capacity is turned over ten times, and its recall taken beside that of an index
   made anew of the same keys.

Printed: the median append of a step and its 99th percentile over the median (target: below 3); the median over that of
the smallest memory, from ratios within rounds (target: at most 1.5); the time that appends have waited for builds; the
median search; recall in the first turnover (which begins when the memory has been filled twice) and the last, of the
memory and of the index made anew; and the drift, by which the memory fell back more, with its 95 % interval.
Capacities of a million and more take as many minutes as their index takes to build twice. Writes
benchmarks/results/streams.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recollect.memory_backends import BackendUnavailable, MemoryBackend, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.suites.noise import describe_reference, ratio_interval, reference_operation_ms
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "streams.json"
SPECS = ("exact", "faiss-flat", "faiss-ivf", "faiss-ivfpq", "scann", "faiss-hnsw", "hnswlib", "pynndescent")
DIM, K, STEP, QUERIES = 64, 32, 512, 128
FLAT, STALLS = 1.5, 3.0
"""The targets: median append of a memory over that of the smallest, and 99th percentile over median."""
SETTLING = 2
"""Turnovers left out of the recall: the memory fills, and then an index serves that learnt while it did."""

ANEW = 4
"""Steps from one index made anew, which the recall is compared with, to the next."""


class Text:
    """Keys and queries of a text whose topics move on: both are views of one topic, through different matrices."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.to_key = self.rng.standard_normal((24, DIM)).astype(np.float32)
        other = self.rng.standard_normal((24, DIM)).astype(np.float32)
        self.to_query = 0.7 * self.to_key + 0.5 * other
        self.topics = self.rng.standard_normal((16, 24)).astype(np.float32)

    def _content(self, count: int) -> np.ndarray:
        chosen = self.topics[self.rng.integers(16, size=count)]
        return chosen + self.rng.standard_normal((count, 24), dtype=np.float32)

    def step(self, count: int = STEP) -> torch.Tensor:
        """The next keys (1, count, D), of unit length; topics move by as much as `count` keys should."""
        moved = 0.15 * np.sqrt(min(count, 4 * STEP) / STEP)
        # They stay as far apart as they were, or recall would change with them.
        self.topics *= np.float32(np.sqrt(1 - moved**2))
        self.topics += moved * self.rng.standard_normal(self.topics.shape, dtype=np.float32)
        keys = self._content(count) @ self.to_key + self.rng.standard_normal((count, DIM), dtype=np.float32)
        return torch.from_numpy(keys / np.linalg.norm(keys, axis=1, keepdims=True))[None]

    def queries(self) -> torch.Tensor:
        """Queries (1, QUERIES, D) of the topics of now."""
        asked = self._content(QUERIES) @ self.to_query
        return torch.from_numpy(8 * asked / np.linalg.norm(asked, axis=1, keepdims=True))[None]

    def long(self, count: int) -> Iterator[torch.Tensor]:
        """Keys to fill a memory with, in pieces of many steps."""
        for start in range(0, count, 4 * STEP):
            yield self.step(min(4 * STEP, count - start))


def timed(call: Any, *arguments: Any) -> tuple[float, Any]:
    """Milliseconds on the wall clock, and the result."""
    start = time.perf_counter()
    result = call(*arguments)
    return 1000 * (time.perf_counter() - start), result


def recall(found: torch.Tensor, true: torch.Tensor) -> np.ndarray:
    """Share of the true neighbours found by each query: slots (1, Q, K) both."""
    return (found[..., :, None] == true[..., None, :]).any(-2).float().mean(-1).flatten().numpy()


def filled(spec: str, capacity: int, text: Text) -> MemoryBackend:
    """A full memory, its indexes built."""
    memory = make_backend(spec, num_memories=1, capacity=capacity, dim=DIM)
    memory.add(torch.cat(list(text.long(capacity)), dim=1))
    memory.wait()
    return memory


def unpaced(memory: MemoryBackend, text: Text, steps: int, bar: Any) -> float:
    """Milliseconds that a step takes in the long run."""
    total = 0.0
    for _ in range(steps):
        keys = text.step()
        total += timed(memory.add, keys)[0]
        bar()
    return (total + timed(memory.wait)[0]) / steps


def paced(
    memories: dict[int, MemoryBackend], text: Text, steps: int, interval_ms: float, bar: Any
) -> tuple[dict[int, list[float]], dict[int, list[float]], list[float], int]:
    """Milliseconds of each append and search by capacity, of the reference operation, and rounds that came late."""
    appends: dict[int, list[float]] = {capacity: [] for capacity in memories}
    searches: dict[int, list[float]] = {capacity: [] for capacity in memories}
    references: list[float] = []
    order, late = np.random.default_rng(0), 0
    begun = time.perf_counter()
    for step in range(steps):
        start = begun + step * interval_ms / 1000
        wait = start - time.perf_counter()
        late += wait < -interval_ms / 1000
        if wait > 0:
            time.sleep(wait)
        keys, queries = text.step(), text.queries()
        for capacity in order.permutation(list(memories)).tolist():
            memory = memories[capacity]
            searches[capacity].append(timed(memory.search, queries, K)[0])
            appends[capacity].append(timed(memory.add, keys)[0])
        if step % 8 == 0:
            references.append(reference_operation_ms())
        bar()
    return appends, searches, references, late


def turned_over(spec: str, capacity: int, turnovers: int, seed: int, bar: Any) -> dict[str, Any]:
    """Recall of each turnover beside that of an index made anew of the same keys, and whether the two drift apart.

    What a memory holds changes as its text goes on, and with it how hard its search is, for any index. So the drift is
    that of the difference to a new index, which has seen nothing but the keys that are there.
    """
    text = Text(seed)
    memory, exact = (make_backend(name, num_memories=1, capacity=capacity, dim=DIM) for name in (spec, "exact"))
    per_turnover = -(-capacity // STEP)
    found: list[list[float]] = []
    for step in range((turnovers + SETTLING) * per_turnover):
        memory.add(keys := text.step())
        exact.add(keys)
        if step >= SETTLING * per_turnover and step % ANEW == ANEW - 1:
            with make_backend(spec, num_memories=1, capacity=capacity, dim=DIM) as new:
                new.add(exact.ring.keys)
                for _ in range(2):
                    queries = text.queries()
                    true = exact.search(queries, K).slots
                    found.append([recall(one.search(queries, K).slots, true).mean() for one in (memory, new)])
        bar()
    memory.close()
    both = np.array(found).reshape(turnovers, -1, 2)
    lost = both[..., 1] - both[..., 0]
    drawn = np.random.default_rng(seed).integers(0, lost.shape[1], (2, 1000, lost.shape[1]))
    differences = lost[0][drawn[1]].mean(1) - lost[-1][drawn[0]].mean(1)
    low, high = np.percentile(differences, (2.5, 97.5))
    return {
        "capacity": capacity,
        "recall": [round(float(value), 4) for value in both[..., 0].mean(1)],
        "recall_of_new": [round(float(value), 4) for value in both[..., 1].mean(1)],
        "last_less_first": round(float(lost[0].mean() - lost[-1].mean()), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
    }


def measure(spec: str, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All figures of one backend."""
    text = Text(arguments.seed)
    largest = max(arguments.capacity)
    steps = arguments.steps or max(256, min(2048, -(-largest // STEP)))
    turnover_steps = (arguments.turnovers + SETTLING) * -(-min(arguments.capacity) // STEP)
    total = len(arguments.capacity) * steps + steps + (turnover_steps if arguments.turnovers else 0)
    task = progress.add_task(spec, total=total)

    def bar() -> None:
        progress.advance(task)

    progress.update(task, description=f"{spec}: filling")
    memories = {capacity: filled(spec, capacity, text) for capacity in sorted(arguments.capacity)}
    progress.update(task, description=f"{spec}: unpaced")
    sustained = {capacity: unpaced(memory, text, steps, bar) for capacity, memory in memories.items()}
    looked = [np.median([timed(memory.search, text.queries(), K)[0] for _ in range(5)]) for memory in memories.values()]
    interval = arguments.pace * float(sum(sustained.values()) + sum(looked))
    stalled = {capacity: memory.stats().stalled_seconds for capacity, memory in memories.items()}
    progress.update(task, description=f"{spec}: paced, a round every {interval:.0f} ms")
    appends, searches, references, late = paced(memories, text, steps, interval, bar)
    rows = []
    smallest = min(memories)
    for capacity, memory in memories.items():
        p50, p99 = np.percentile(appends[capacity], (50, 99))
        ratio = ratio_interval(appends[capacity], appends[smallest])
        rows.append(
            {
                "spec": spec,
                "capacity": capacity,
                "sustained_ms": round(sustained[capacity], 4),
                "keys_per_second": round(1000 * STEP / sustained[capacity]),
                "append_p50_ms": round(float(p50), 4),
                "append_p99_ms": round(float(p99), 4),
                "append_longest_ms": round(max(appends[capacity]), 4),
                "p99_over_median": round(float(p99 / p50), 3),
                "median_over_smallest": [round(value, 3) for value in (ratio.value, ratio.low, ratio.high)],
                "stalled_seconds": round(memory.stats().stalled_seconds - stalled[capacity], 4),
                "search_p50_ms": round(float(np.median(searches[capacity])), 4),
                "search_p99_ms": round(float(np.percentile(searches[capacity], 99)), 4),
                "build_seconds": round(memory.stats().build_seconds, 2),
            }
        )
        memory.close()
    reference = describe_reference(references)
    result: dict[str, Any] = {
        "spec": spec,
        "steps": steps,
        "interval_ms": round(interval, 3),
        "late_rounds": late,
        "reference_ms": round(reference.p50_ms, 3),
        "noisy": reference.noisy,
        "rows": rows,
    }
    if arguments.turnovers:
        progress.update(task, description=f"{spec}: {arguments.turnovers} turnovers")
        result["turnovers"] = turned_over(spec, smallest, arguments.turnovers, arguments.seed, bar)
    progress.update(task, description=f"{spec}: done", completed=total)
    return result


def show(results: list[dict[str, Any]]) -> None:
    """Prints the tables, with the targets judged."""
    table = Table(title=f"one step of {STEP} keys; search for {QUERIES} queries, k {K}")
    headings = ("memory", "keys", "keys/s", "append ms", "p99 / median", "median / smallest", "waited s", "search ms")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        for row in result["rows"]:
            value, low, high = row["median_over_smallest"]
            table.add_row(
                row["spec"] + (" (noisy)" if result["noisy"] else ""),
                str(row["capacity"]),
                str(row["keys_per_second"]),
                f"{row['append_p50_ms']:.3f}",
                f"{row['p99_over_median']:.2f} {'' if row['p99_over_median'] < STALLS else 'MISSED'}",
                f"{value:.2f} ({low:.2f} to {high:.2f}) {'' if value <= FLAT else 'MISSED'}",
                f"{row['stalled_seconds']:.2f}",
                f"{row['search_p50_ms']:.2f}",
            )
    console = Console(width=160)
    console.print(table)
    drift = Table(title="recall as the memory turns over, beside an index made anew of the same keys")
    for heading in ("memory", "first turnover", "last", "anew: first", "last", "drift", "95 % interval"):
        drift.add_column(heading, justify="right")
    for result in results:
        if "turnovers" in result:
            about = result["turnovers"]
            low, high = about["interval"]
            drift.add_row(
                result["spec"], f"{about['recall'][0]:.3f}", f"{about['recall'][-1]:.3f}",
                f"{about['recall_of_new'][0]:.3f}", f"{about['recall_of_new'][-1]:.3f}",
                f"{about['last_less_first']:+.4f}", f"{low:+.4f} to {high:+.4f}",
            )  # fmt: skip
    console.print(drift)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", nargs="+", default=list(SPECS), help="memories to measure (all built-in ones)")
    parser.add_argument("--capacity", type=int, nargs="+", default=[8192, 131_072], help="keys of the memories")
    parser.add_argument("--steps", type=int, default=0, help="steps of each phase; 0: one turnover, 256 to 2048")
    parser.add_argument("--pace", type=float, default=1.5, help="time of a round over its sustained cost")
    parser.add_argument("--turnovers", type=int, default=10, help="turnovers of the recall; 0: leave it out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and the libraries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result file instead of tables")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results, skipped = [], {}
    with Progress(console=Console(stderr=True)) as progress:
        for spec in arguments.spec:
            try:
                results.append(measure(spec, arguments, progress))
            except BackendUnavailable as error:
                skipped[spec] = str(error)
    content = {
        "schema": 1,
        "provenance": describe(threads=arguments.threads, seed=arguments.seed),
        "threads": arguments.threads,
        "dim": DIM,
        "k": K,
        "step": STEP,
        "queries": QUERIES,
        "pace": arguments.pace,
        "seed": arguments.seed,
        "skipped": skipped,
        "results": results,
    }
    write_json(arguments.output, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        show(results)
        for spec, reason in skipped.items():
            print(f"{spec}: skipped: {reason}")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
