"""What it costs to spread one memory over processes of Ray, beside the same index in this process.

    python benchmarks/ray_shards.py [--backend exact ...] [--capacity 100000 ...] [--shards 1 2 4] [--nodes 3]

For every backend and capacity there is one memory in this process and one for each number of shards, all of the same
keys. Searches for 512 queries (k 32) are timed in turns, so that the ratio within a round says what sharding costs;
appends of 512 keys likewise, many to a round, until the last of them is in its index. Shards have the threads of this
process between them, one each at least: two shards on two cores do the same work on the same cores.

Printed: the median search of each and its ratio to the one in process, with its 95 % interval (targets with two
shards: at most 1.3 at a hundred thousand keys, 1.05 at a million); keys appended a second (target: 160 thousand or
more); bytes that a step of 512 keys and 512 queries moves; and what happens when a shard's process is killed with -9:
seconds until that is noticed, until a process is there again, until it has all its keys, and how many were lost.

With `--nodes` several Ray nodes are started on this machine as if they were hosts of their own, shards are spread over
them, and besides a process a whole node is killed (without its process of shards being told). Writes
benchmarks/results/ray_shards.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.implementations.ray import Ray
from recollect.suites.noise import REFERENCE, describe_reference, interleave, ratio_interval
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "ray_shards.json"
DIM, K, STEP, QUERIES = 64, 32, 512, 512
OVERHEAD = {100_000: 1.3, 1_000_000: 1.05}
"""Two shards over one index in process: the targets by capacity."""
KEYS_PER_SECOND = 160_000
IN_PROCESS = "in process"
FILLED_AT_ONCE = 65_536


def keys_of(count: int, seed: int) -> torch.Tensor:
    """Normally distributed keys (1, count, DIM)."""
    drawn = np.random.default_rng(seed).standard_normal((1, count, DIM), dtype=np.float32)
    return torch.from_numpy(drawn)


def memories_of(backend: str, capacity: int, arguments: argparse.Namespace, address: str) -> dict[str, MemoryBackend]:
    """One memory in process and one for each number of shards, full of the same keys and built."""
    placed = f",address='{address}'" if address else ""
    specs = {IN_PROCESS: backend}
    for shards in arguments.shards:
        quoted = backend.replace("'", "''")
        specs[f"{shards} shards"] = f"ray:shards={shards},backend='{quoted}',deadline_seconds=300{placed}"
    made = {name: make_backend(spec, num_memories=1, capacity=capacity, dim=DIM) for name, spec in specs.items()}
    for start in range(0, capacity, FILLED_AT_ONCE):
        keys = keys_of(min(FILLED_AT_ONCE, capacity - start), arguments.seed + start)
        for memory in made.values():
            memory.add(keys)
    queries = keys_of(QUERIES, arguments.seed + 1)
    for memory in made.values():
        memory.wait()
        memory.search(queries, K)
    return made


def append_rate(memory: MemoryBackend, steps: list[torch.Tensor]) -> float:
    """Keys a second, until every one of them is in the index that holds it."""
    start = time.perf_counter()
    for keys in steps:
        memory.add(keys)
    memory.stats()  # which shards tell once they have every key
    return sum(keys.shape[1] for keys in steps) / (time.perf_counter() - start)


def moved(memory: Ray, keys: torch.Tensor, queries: torch.Tensor) -> int:
    """Bytes that one step moves."""
    before = memory.shards.moved_bytes
    memory.add(keys)
    memory.search(queries, K)
    return memory.shards.moved_bytes - before


def process_of(memory: Ray, shard: int) -> int:
    """The process that holds a shard."""
    import ray

    return int(ray.get(memory.shards.links[shard].host.actor.where.remote())["pid"])


def killed(memory: Ray, kill: Any) -> dict[str, Any]:
    """What happens when something is killed under a memory and it is searched."""
    queries = keys_of(QUERIES, 7)
    before, known = memory.search(queries, K), len(memory.recoveries)
    kill()
    start = time.perf_counter()
    after = memory.search(queries, K)
    taken = time.perf_counter() - start
    recoveries = memory.recoveries[known:]
    return {
        "search_seconds": round(taken, 3),
        "detection_seconds": round(max(one.detection_seconds for one in recoveries), 3),
        "away_seconds": round(max(one.away_seconds for one in recoveries), 3),
        "refill_seconds": round(max(one.refill_seconds for one in recoveries), 3),
        "shards": len(recoveries),
        "keys_refilled": sum(one.keys_refilled for one in recoveries),
        "keys_lost": sum(one.keys_lost for one in recoveries),
        "same_neighbours": round(float((before.slots == after.slots).float().mean()), 4),
    }


def measure(backend: str, capacity: int, arguments: argparse.Namespace, progress: Progress, nodes: Nodes) -> Any:
    """All figures of one backend at one capacity."""
    task = progress.add_task(f"{backend}, {capacity:,} keys: filling", total=3)
    memories = memories_of(backend, capacity, arguments, nodes.address)
    queries = keys_of(QUERIES, arguments.seed + 1)

    def search(memory: MemoryBackend) -> Any:
        return lambda: memory.search(queries, K)

    progress.update(task, description=f"{backend}, {capacity:,} keys: searches in turns", completed=1)
    calls = {name: search(memory) for name, memory in memories.items()}
    times = interleave(calls, rounds=arguments.rounds, least=5, seconds=arguments.seconds)
    reference = describe_reference(times[REFERENCE])
    progress.update(task, description=f"{backend}, {capacity:,} keys: appends, and a process killed", completed=2)
    steps = [keys_of(STEP, arguments.seed + 10 + step) for step in range(arguments.appends)]
    rates: dict[str, list[float]] = {name: [] for name in memories}
    for _ in range(arguments.append_rounds):
        for name, memory in memories.items():
            rates[name].append(append_rate(memory, steps))
    # Before anything is killed: memories share processes, so what ends one shard has others filled anew.
    bytes_of_a_step = {
        name: moved(memory, steps[0], queries) for name, memory in memories.items() if isinstance(memory, Ray)
    }
    rows = []
    for name, memory in memories.items():
        ratio = ratio_interval(times[name], times[IN_PROCESS])
        row: dict[str, Any] = {
            "backend": backend,
            "capacity": capacity,
            "where": name,
            "shards": len(memory.shards.links) if isinstance(memory, Ray) else 0,
            "search_p50_ms": round(float(np.median(times[name])), 3),
            "over_in_process": [round(value, 4) for value in (ratio.value, ratio.low, ratio.high)],
            "keys_per_second": round(float(np.median(rates[name]))),
            "reference_ms": round(reference.p50_ms, 3),
            "noisy": reference.noisy,
        }
        if isinstance(memory, Ray):
            row["bytes_of_a_step"] = bytes_of_a_step[name]
            shard = len(memory.shards.links) - 1
            row["process_killed"] = killed(memory, lambda m=memory, s=shard: os.kill(process_of(m, s), signal.SIGKILL))
            if nodes.address and nodes.can_kill():
                row["node_killed"] = killed(memory, nodes.kill_one)
        rows.append(row)
        memory.close()
    progress.update(task, description=f"{backend}, {capacity:,} keys: done", completed=3)
    return rows


class Nodes:
    """Ray nodes on this machine that stand for hosts of their own; none, where Ray is embedded."""

    def __init__(self) -> None:
        self.address = ""
        self._cluster: Any = None
        self._others: list[Any] = []

    def start(self, count: int, folder: str) -> None:
        """Starts a head, where this program runs, and `count` - 1 others."""
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": 2, "object_store_memory": 300 << 20, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={**arguments, "temp_dir": folder})
        self._others = [self._cluster.add_node(**arguments) for _ in range(count - 1)]
        self._cluster.wait_for_nodes()
        self.address = self._cluster.address

    def can_kill(self) -> bool:
        """Whether there is a node left beside the head."""
        return bool(self._others)

    def kill_one(self) -> None:
        """Kills a node without a word, and starts another in its place."""
        node = self._others.pop()
        self._cluster.remove_node(node, allow_graceful=False)
        self._others.append(self._cluster.add_node(num_cpus=2, object_store_memory=300 << 20))

    def stop(self) -> None:
        """Ends all of them."""
        if self._cluster is not None:
            self._cluster.shutdown()


@contextmanager
def running(count: int) -> Iterator[Nodes]:
    """Nodes, if any are asked for."""
    nodes = Nodes()
    with tempfile.TemporaryDirectory(prefix="rcl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        try:
            if count:
                nodes.start(count, folder)
            yield nodes
        finally:
            nodes.stop()


def verdict(row: dict[str, Any]) -> str:
    """Whether a row holds the target that it has."""
    bound = OVERHEAD.get(row["capacity"])
    if row["shards"] != 2 or bound is None:
        return ""
    return f"at most {bound:g}: {'held' if row['over_in_process'][0] <= bound else 'MISSED'}"


def show(rows: list[dict[str, Any]], nodes: int) -> None:
    """Prints the tables, with the targets judged."""
    console = Console(width=150)
    where = f"over {nodes} nodes of Ray on this machine" if nodes else "on this machine"
    table = Table(title=f"one memory {where}: searches of {QUERIES} queries, k {K}; appends of {STEP} keys")
    for heading in (
        "backend",
        "keys",
        "where",
        "search ms",
        "over in process",
        "target",
        "keys/s",
        "",
        "moved by a step",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        value, low, high = row["over_in_process"]
        enough = "" if not row["shards"] else "held" if row["keys_per_second"] >= KEYS_PER_SECOND else "MISSED"
        table.add_row(
            row["backend"] + (" (noisy)" if row["noisy"] else ""), f"{row['capacity']:,}", row["where"],
            f"{row['search_p50_ms']:.1f}", f"{value:.3f} ({low:.3f} to {high:.3f})", verdict(row),
            f"{row['keys_per_second']:,}", enough,
            f"{row['bytes_of_a_step'] / 1e3:,.0f} kB" if "bytes_of_a_step" in row else "",
        )  # fmt: skip
    console.print(table)
    back = Table(title="killed under a memory: seconds until the next search had its answer, and of what they were")
    for heading in (
        "backend",
        "keys",
        "where",
        "killed",
        "search",
        "noticed",
        "process back",
        "refilled",
        "keys",
        "lost",
    ):
        back.add_column(heading, justify="right")
    for row in rows:
        for what in ("process", "node"):
            about = row.get(f"{what}_killed")
            if about:
                back.add_row(
                    row["backend"], f"{row['capacity']:,}", row["where"], what, f"{about['search_seconds']:.2f}",
                    f"{about['detection_seconds']:.2f}", f"{about['away_seconds']:.2f}",
                    f"{about['refill_seconds']:.2f}", f"{about['keys_refilled']:,}", str(about["keys_lost"]),
                )  # fmt: skip
    console.print(back)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["exact", "faiss-flat"], help="indexes that are sharded")
    parser.add_argument("--capacity", type=int, nargs="+", default=[100_000, 1_000_000], help="keys of the memories")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4], help="numbers of shards")
    parser.add_argument("--rounds", type=int, default=40, help="searches of each, at most")
    parser.add_argument("--seconds", type=float, default=45.0, help="for the searches of one size, about")
    parser.add_argument("--appends", type=int, default=200, help="appends of a round")
    parser.add_argument("--append-rounds", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=0, help="Ray nodes started on this machine; 0: Ray is embedded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the index in process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result file instead of tables")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with running(arguments.nodes) as nodes, Progress(console=Console(stderr=True)) as progress:
        for backend in arguments.backend:
            for capacity in arguments.capacity:
                rows += measure(backend, capacity, arguments, progress, nodes)
    content = {
        "schema": 1,
        "provenance": describe(threads=arguments.threads, seed=arguments.seed),
        "dim": DIM,
        "k": K,
        "step": STEP,
        "queries": QUERIES,
        "nodes": arguments.nodes,
        "rows": rows,
    }
    write_json(arguments.output, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        show(rows, arguments.nodes)
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
