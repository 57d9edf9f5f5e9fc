"""What it costs to spread exact memories over the ranks of a job: beside `exact` in each process, and in bytes moved.

    python benchmarks/exact_ranks.py [--ranks 1 2 4] [--keys 16384] [--memories 4] [--rounds 24] [--threads 1]

Starts jobs of gloo processes on this machine. In each, every rank has the same keys twice: in `exact` by itself, and in
`exact-ranks`, of which it holds a part. In every round all ranks make each call of the one and then of the other, in
turns and together (a barrier stands before each); the time of a call is that of the slowest rank. So both do the same
products on the same cores at the same moment, and the ratio within a round is what spreading costs.

    own      each rank has memories of its own, spread over all
    shared   the ranks share the memories (shared=true): each holds 1/W of the keys that `exact` holds

Printed for each number of ranks and both ways: milliseconds of a search, an append and a gathering of the keys found
(which training needs), the ratios to `exact` with their 95 % intervals, bytes of keys on a rank, and the bytes that a
rank sends in a step, as measured and on paper. Processes that outnumber the cores wait for each other: their ratios
say less. At the end one rank of two is killed, and it is told how soon the other notices. Writes
benchmarks/results/exact_ranks.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.rank_group import RankLost
from recollect.memory_backends.rank_shards import step_bytes
from recollect.memory_backends.sharding import Share
from recollect.suites.environment import usable_cores
from recollect.suites.noise import describe_reference, ratio_interval, reference_operation_ms
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "exact_ranks.json"
DIM, K, STEP = 64, 32, 512
WARMING = 2
WAYS = {"own": "exact-ranks", "shared": "exact-ranks:shared=true"}
CALLS = ("search", "append", "gather")
DEADLINE_SECONDS = 5.0
"""Of the memory whose rank is killed."""


def draw(memories: int, count: int, seed: int) -> torch.Tensor:
    """Keys (M, count, D) of unit length."""
    drawn = torch.randn(memories, count, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def calls_of(memory: MemoryBackend, keys: torch.Tensor, queries: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """A step's calls by name; keys are gathered at the slots that the search found."""
    found: list[torch.Tensor] = []

    def search() -> None:
        found[:] = [memory.search(queries, K).slots]

    return {
        "search": search,
        "append": lambda: memory.add(keys),
        "gather": lambda: memory.gather_keys(found[0]),
    }


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of the slowest rank for a call that all ranks begin together."""
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    call()
    taken = torch.tensor([1000 * (time.perf_counter() - start)], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def measure(rank: int, ranks: int, way: str, arguments: argparse.Namespace, told: Any) -> dict[str, Any]:
    """All figures of one way on one number of ranks, the same on every rank but for what it sent."""
    sizes = {"num_memories": arguments.memories, "capacity": arguments.keys, "dim": DIM}
    spread, exact = make_backend(WAYS[way], **sizes), make_backend("exact", **sizes)
    own = 0 if way == "shared" else rank
    for start in range(0, arguments.keys, 4 * STEP):
        keys = draw(arguments.memories, min(4 * STEP, arguments.keys - start), 1000 * own + start)
        spread.add(keys)
        exact.add(keys)
    times: dict[str, dict[str, list[float]]] = {name: {call: [] for call in CALLS} for name in ("exact-ranks", "exact")}
    references, sent = [], dict.fromkeys(CALLS, 0)
    for step in range(-WARMING, arguments.rounds):
        keys, queries = draw(arguments.memories, STEP, 7 * own + step), draw(arguments.memories, STEP, 99 + rank + step)
        steps = {"exact-ranks": calls_of(spread, keys, queries), "exact": calls_of(exact, keys, queries)}
        names = list(steps) if step % 2 else list(steps)[::-1]
        for call in ("search", "gather", "append"):
            for name in names:
                before = spread.traffic.sent  # type: ignore[attr-defined]
                taken = timed(steps[name][call])
                if step >= 0:
                    times[name][call].append(taken)
                    sent[call] += spread.traffic.sent - before  # type: ignore[attr-defined]
        references.append(timed(reference_operation_ms))
        if rank == 0:
            told.put(1)
    on_paper = step_bytes(
        memories=arguments.memories,
        dim=DIM,
        queries=STEP,
        appended=STEP,
        k=K,
        ranks=ranks,
        part_length=Share(arguments.keys, ranks, 0).size,
        shared=way == "shared",
    )
    reference = describe_reference(references)
    return {
        "way": way,
        "ranks": ranks,
        "rounds": arguments.rounds,
        "noisy": reference.noisy,
        "milliseconds": {name: {call: _median(of[call]) for call in CALLS} for name, of in times.items()},
        "ratios": {call: _ratio(times["exact-ranks"][call], times["exact"][call]) for call in CALLS}
        | {"step": _ratio(*(_steps(times[name], ("search", "append")) for name in ("exact-ranks", "exact")))}
        | {"training_step": _ratio(*(_steps(times[name], CALLS) for name in ("exact-ranks", "exact")))},
        "key_bytes": {"exact-ranks": spread.stats().key_bytes, "exact": exact.stats().key_bytes},
        "sent_bytes": {call: round(size / arguments.rounds) for call, size in sent.items()},
        "sent_bytes_on_paper": {
            "search": on_paper.queries + on_paper.answers,
            "append": on_paper.appended,
            "gather_at_most": on_paper.requests + on_paper.gathered,
        },
    }


def _median(times: list[float]) -> float:
    return round(float(torch.tensor(times).median()), 4)


def _steps(times: dict[str, list[float]], calls: tuple[str, ...]) -> list[float]:
    return [sum(parts) for parts in zip(*(times[call] for call in calls), strict=True)]


def _ratio(one: list[float], other: list[float]) -> list[float]:
    found = ratio_interval(one, other)
    return [round(value, 4) for value in (found.value, found.low, found.high)]


def detect(rank: int) -> dict[str, Any]:
    """How long rank 0 takes to notice that rank 1 was killed between two calls."""
    memory = make_backend(f"exact-ranks:deadline_seconds={DEADLINE_SECONDS}", num_memories=1, capacity=1024, dim=DIM)
    memory.add(draw(1, STEP, rank))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.perf_counter()
    try:
        while True:
            memory.search(draw(1, 8, 0), 4)
    except RankLost as error:
        return {"seconds": round(time.perf_counter() - start, 4), "error": str(error)}


def work(rank: int, ranks: int, folder: str, arguments: argparse.Namespace, told: Any, what: str) -> None:
    """One process of a job."""
    torch.set_num_threads(arguments.threads)
    if ranks > 1:
        store = f"file://{folder}/{what}{ranks}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    found = detect(rank) if what == "killed" else [measure(rank, ranks, way, arguments, told) for way in WAYS]
    if rank == 0:
        write_json(Path(folder) / f"{what}{ranks}.json", {"found": found})
    if ranks > 1 and what != "killed":
        dist.destroy_process_group()


def run_job(ranks: int, folder: str, arguments: argparse.Namespace, what: str, on_step: Callable[[], Any]) -> Any:
    """What rank 0 of a job found.

    Raises:
        SystemExit: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    jobs = [
        context.Process(target=work, args=(rank, ranks, folder, arguments, told, what), daemon=True)
        for rank in range(ranks)
    ]
    try:
        for job in jobs:
            job.start()
        while any(job.is_alive() for job in jobs):
            for job in jobs:
                job.join(timeout=0.2)
            while not told.empty():
                told.get()
                on_step()
            if what != "killed" and any(job.exitcode for job in jobs):
                break
    finally:
        for job in jobs:
            job.kill()
            job.join()
    path = Path(folder) / f"{what}{ranks}.json"
    if not path.is_file():
        raise SystemExit(f"a job of {ranks} processes failed: see what it printed above")
    return json.loads(path.read_text(encoding="utf-8"))["found"]


def show(results: list[dict[str, Any]], killed: dict[str, Any], cores: int) -> None:
    """Prints the tables."""
    table = Table(title=f"one step: {STEP} queries and keys of each memory, dimension {DIM}, k {K}")
    for heading in ("", "ranks", "call", "exact ms", "exact-ranks ms", "ratio (95 %)", "sent", "on paper"):
        table.add_column(heading, justify="right")
    for row in results:
        label = row["way"] + (" (noisy)" if row["noisy"] else "")
        ranks = f"{row['ranks']}{' (more than cores)' if row['ranks'] > cores else ''}"
        for call in CALLS:
            paper = row["sent_bytes_on_paper"].get(call)
            shown = f"{paper:,}" if paper is not None else f"at most {row['sent_bytes_on_paper']['gather_at_most']:,}"
            table.add_row(
                label, ranks, call, f"{row['milliseconds']['exact'][call]:.2f}",
                f"{row['milliseconds']['exact-ranks'][call]:.2f}", _shown(row["ratios"][call]),
                f"{row['sent_bytes'][call]:,}", shown,
            )  # fmt: skip
            label, ranks = "", ""
        for name, call in (("a step", "step"), ("a training step", "training_step")):
            table.add_row("", "", name, "", "", _shown(row["ratios"][call]), "", "")
        keys = row["key_bytes"]
        table.add_row("", "", "bytes of keys", f"{keys['exact']:,}", f"{keys['exact-ranks']:,}", "", "", "")
    console = Console(width=150)
    console.print(table)
    console.print(f"a killed rank was noticed after {killed['seconds']} s: {killed['error']}", highlight=False)


def _shown(ratio: list[float]) -> str:
    value, low, high = ratio
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes of each job")
    parser.add_argument("--keys", type=int, default=16384, help="of each memory")
    parser.add_argument("--memories", type=int, default=4, help="of each rank")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--json", action="store_true", help="print the result file instead of tables")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    for name in ("keys", "memories", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if min(arguments.ranks) < 1:
        parser.error(f"--ranks {min(arguments.ranks)} must be at least 1")
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            total = len(WAYS) * (arguments.rounds + WARMING)
            task = progress.add_task(f"{ranks} rank{'s' if ranks > 1 else ''}", total=total)
            results += run_job(ranks, folder, arguments, "measured", functools.partial(progress.advance, task))
        killed = run_job(2, folder, arguments, "killed", lambda: None)
    content = {
        "schema": 1,
        "provenance": describe(threads=arguments.threads),
        "dim": DIM,
        "k": K,
        "queries": STEP,
        "appended": STEP,
        "keys": arguments.keys,
        "memories": arguments.memories,
        "cores": usable_cores(),
        "results": results,
        "killed_rank": killed,
    }
    write_json(arguments.output, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        show(results, killed, usable_cores())
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
