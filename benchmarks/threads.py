"""Whether memories use every core: many small ones side by side, one large one, and several searching threads.

    python benchmarks/threads.py [--spec hnswlib faiss-ivf ...] [--rounds 9] [--threads 2]

For every backend, in rounds that time each way once in a turning order:

    many memories   64 memories of 2048 keys, 64 queries each, searched in one call by 1 and by `--threads` threads
    one memory      65536 keys, 512 queries, by 1 and by `--threads` threads
    lock            two Python threads that each search the one memory on one library thread, against one of them alone
    building        a search of the one memory by `--threads` threads while indexes are built in the background all
                    the time, against the same search with none

Printed: how many times faster the threads are (the number of threads at most, 1 if they bring nothing); how much of two
searches' time two Python threads save (2.0: the interpreter lock is released all the time, 1.0: never); and how many
times slower a search is beside builders. A busy machine spoils all of these: run it on an idle one. Writes
benchmarks/results/threads.json.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recollect.memory_backends import BackendUnavailable, MemoryBackend, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.background import checkpoint, submit
from recollect.suites.noise import describe_reference, interleave, ratio_interval
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "threads.json"
SPECS = ("exact", "faiss-flat", "faiss-ivf", "faiss-ivfpq", "scann", "faiss-hnsw", "hnswlib", "pynndescent")
DIM, K = 64, 32
MANY, FEW_KEYS, FEW_QUERIES = 64, 2048, 64
LARGE_KEYS, LARGE_QUERIES = 65536, 512


def vectors(*shape: int, seed: int) -> torch.Tensor:
    """Unit vectors."""
    drawn = torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def filled(spec: str, memories: int, keys: int) -> MemoryBackend:
    """Full memories, their indexes built."""
    memory = make_backend(spec, num_memories=memories, capacity=keys, dim=DIM)
    memory.add(vectors(memories, keys, seed=0))
    memory.wait()
    return memory


def on(threads: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with so many torch threads, which all libraries follow."""

    def work() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return work


def side_by_side(call: Callable[[], Any], count: int) -> None:
    """`count` Python threads that each make the call."""
    workers = [threading.Thread(target=call) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


class Building:
    """`with Building(threads):` as many builds as there may be go on in the background without end."""

    def __enter__(self) -> Building:
        keys = vectors(4096, seed=7).numpy()

        def build() -> None:
            while True:
                keys @ keys[:512].T  # what a builder does: numbers, without the interpreter lock
                checkpoint()

        self.jobs = [submit(build, size=1 << 40) for _ in range(8)]
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs:
            job.abandon()
        for job in self.jobs:
            job.join()


def measure(spec: str, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All ratios of one backend."""
    task = progress.add_task(f"{spec}: filling", total=4)
    many, one = filled(spec, MANY, FEW_KEYS), filled(spec, 1, LARGE_KEYS)
    few, lots = vectors(MANY, FEW_QUERIES, seed=1), vectors(1, LARGE_QUERIES, seed=2)
    threads = arguments.threads
    calls: dict[str, Callable[[], Any]] = {
        "many, 1": on(1, lambda: many.search(few, K)),
        "many, n": on(threads, lambda: many.search(few, K)),
        "one, 1": on(1, lambda: one.search(lots, K)),
        "one, n": on(threads, lambda: one.search(lots, K)),
        "alone": on(1, lambda: side_by_side(lambda: one.search(lots, K), 1)),
        "two": on(1, lambda: side_by_side(lambda: one.search(lots, K), 2)),
    }
    for call in calls.values():
        call()
    progress.update(task, description=f"{spec}: searching", advance=1)
    taken = interleave(calls, rounds=arguments.rounds)
    progress.update(task, description=f"{spec}: beside builders", advance=2)
    torch.set_num_threads(threads)
    building: list[float] = []
    for _ in range(arguments.rounds):
        with Building():
            building += interleave({"building": calls["one, n"]}, rounds=1)["building"]
    quiet = taken["one, n"]
    progress.update(task, description=f"{spec}: done", advance=1)
    many.close()
    one.close()
    ratios = {
        "many": ratio_interval(taken["many, 1"], taken["many, n"]),
        "one": ratio_interval(taken["one, 1"], taken["one, n"]),
        "lock": ratio_interval([2 * time for time in taken["alone"]], taken["two"]),
        "building": ratio_interval(building, quiet),
    }
    reference = describe_reference(taken["reference operation"])
    return {
        "spec": spec,
        "median_ms": {name: round(float(np.median(times)), 3) for name, times in taken.items()},
        "noisy": reference.noisy,
        **{name: [round(value, 3) for value in (r.value, r.low, r.high)] for name, r in ratios.items()},
    }


def show(results: list[dict[str, Any]], threads: int) -> None:
    """Prints the table."""
    table = Table(title=f"{threads} threads; ratios with 95 % intervals")
    headings = (f"{MANY} memories: {threads} against 1", f"one memory: {threads} against 1", "two Python threads", "beside builders")  # fmt: skip # noqa: E501
    table.add_column("memory")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in results:
        cells = [f"{row[name][0]:.2f} ({row[name][1]:.2f} to {row[name][2]:.2f})" for name in ("many", "one", "lock", "building")]  # fmt: skip # noqa: E501
        table.add_row(row["spec"] + (" (noisy)" if row["noisy"] else ""), *cells)
    Console(width=160).print(table)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", nargs="+", default=list(SPECS), help="memories to measure (all built-in ones)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="the larger number of threads")
    parser.add_argument("--json", action="store_true", help="print the result file instead of the table")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.threads < 2:
        parser.error("--threads is below 2: there is nothing to compare with one thread")
    results, skipped = [], {}
    with Progress(console=Console(stderr=True)) as progress:
        for spec in arguments.spec:
            try:
                results.append(measure(spec, arguments, progress))
            except BackendUnavailable as error:
                skipped[spec] = str(error)
    content = {
        "schema": 1,
        "provenance": describe(threads=arguments.threads),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "dim": DIM,
        "k": K,
        "skipped": skipped,
        "results": results,
    }
    write_json(arguments.output, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        show(results, arguments.threads)
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
