"""A cluster plan's predictions against a memory in shards, measured: time of a step, bytes moved, memory of a shard.

    python benchmarks/plan_cluster_check.py [--keys 100000 1000000] [--shards 2] [--backend exact] [--up-to 65536]

Measures what one memory of `--up-to` keys at most costs and, unless `--cluster-costs` names a file, what sharding costs
(`recollect plan --measure-cluster`). From both it plans memories of `--keys` keys over `--shards` processes of Ray on
this machine (so the network counts nothing), then makes them and measures: the search of a step, its append, both
together, the bytes that went to and from the shards, and the main memory of a shard's process. Prints predicted over
measured, and whether times lie within the predicted range. More shards than cores share them, which a plan does not
know of. Writes benchmarks/results/plan_cluster_check.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recollect.memory_backends import make_backend
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.registry import canonical_spec
from recollect.memory_backends.spec import format_spec
from recollect.suites.noise import REFERENCE, describe_reference, interleave
from recollect.suites.planning.calibration import Calibration
from recollect.suites.planning.cluster import ClusterBackend, ClusterQuestion, plan_on_cluster
from recollect.suites.planning.cluster_costs import ClusterCosts, read_costs
from recollect.suites.planning.cluster_measuring import measure_cluster, process_of
from recollect.suites.planning.laws import Estimate
from recollect.suites.planning.measuring import DIM, QUERIES, Effort, K, KeyStream, measure, without_larger
from recollect.suites.planning.question import Question
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "plan_cluster_check.json"
NO_NETWORK = 1e15
"""Bytes a second that count nothing: all processes are on this machine."""
APPENDS = 32
"""In a row; each takes its share."""
FILLED_AT_ONCE = 65_536


def predict(backend: str, keys: int, shards: int, calibration: Calibration, costs: ClusterCosts) -> ClusterBackend:
    """The plan of a step over so many shards."""
    memory = int(psutil.virtual_memory().total)
    asked = Question(keys=keys, dim=DIM, machine_bytes=memory, queries=QUERIES, k=K, backends=(backend,), values="none")
    # A machine for each shard, so that there are as many as are asked for.
    question = ClusterQuestion(asked, machines=shards, machine_cores=calibration.threads, network=NO_NETWORK)
    (found,) = plan_on_cluster(question, calibration, costs, []).backends
    if found.reason:
        raise SystemExit(f"{backend} cannot be planned: {found.reason}")
    return found


def run(backend: str, keys: int, shards: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The same, measured: milliseconds of a search and of an append, bytes."""
    stream = KeyStream(DIM, 0)
    spec = format_spec("ray", {"shards": shards, "backend": backend, "deadline_seconds": 300})
    with make_backend(spec, num_memories=1, capacity=keys, dim=DIM) as memory:
        link: Any = memory
        for start in range(0, keys, FILLED_AT_ONCE):
            memory.add(stream.keys(start, min(FILLED_AT_ONCE, keys - start)))
        memory.wait()
        queries, last = stream.queries(keys, QUERIES), stream.queries(keys, 1)
        # Other keys each time: the same ones again and again would be the best a hundred times over for some queries.
        fresh = iter(stream.keys(keys, (rounds + 2) * APPENDS * QUERIES).split(QUERIES, dim=1))

        def append() -> None:
            for new in itertools.islice(fresh, APPENDS):
                memory.add(new)
            memory.search(last, 1)  # which waits for all of them

        def search_one() -> None:
            memory.search(last, 1)

        calls: dict[str, Callable[[], Any]] = {
            "search": lambda: memory.search(queries, K),
            "appends": append,
            "one": search_one,
        }
        for call in calls.values():
            call()
        times = interleave(calls, rounds=rounds, least=4, seconds=seconds)
        before = link.shards.moved_bytes
        memory.search(queries, K)
        memory.add(next(fresh))
        memory.search(last, 1)
        after = link.shards.moved_bytes
        memory.search(last, 1)
        moved = after - before - (link.shards.moved_bytes - after)
        processes = [psutil.Process(process_of(memory, shard)).memory_full_info().uss for shard in range(shards)]
    waited = np.array(times["appends"]) - np.array(times["one"])
    return {
        "search_ms": float(np.median(times["search"])),
        "append_ms": float(np.median(waited)) / APPENDS,
        "moved_bytes": moved,
        "shard_bytes": int(np.mean(processes)),
        "noisy": describe_reference(times[REFERENCE]).noisy,
    }


def compare(plan: ClusterBackend, measured: dict[str, Any], costs: ClusterCosts) -> dict[str, Any]:
    """Each figure predicted and measured."""
    assert plan.search is not None
    assert plan.append is not None
    assert plan.calls is not None
    assert plan.moved is not None
    law = costs.law("append")
    of_appends = law.at(plan.shards, plan.moved.keys)
    of_search = costs.law("search").at(plan.shards, plan.moved.queries * plan.shards + plan.moved.answers)
    predicted: dict[str, Estimate] = {
        "search_ms": (plan.search + of_search) * 1e3,
        "append_ms": (plan.append + of_appends) * 1e3,
    }
    predicted["step_ms"] = predicted["search_ms"] + predicted["append_ms"]
    truth = {**measured, "step_ms": measured["search_ms"] + measured["append_ms"]}
    figures = {
        name: {
            "predicted": one.value,
            "low": one.low,
            "high": one.high,
            "measured": truth[name],
            "ratio": one.value / truth[name],
            "within": one.low <= truth[name] <= one.high,
        }
        for name, one in predicted.items()
    }
    exactly = {"moved_bytes": plan.moved.between_processes, "shard_bytes": plan.machine_memory}
    for name, value in exactly.items():
        figures[name] = {"predicted": value, "measured": truth[name], "ratio": value / truth[name]}
    return figures


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table(title="Predicted over measured")
    for heading in ("backend", "keys", "shards", "figure", "predicted", "measured", "ratio", "within its range"):
        table.add_column(heading, justify="right")
    for row in rows:
        label = (row["backend"] + (" (noisy)" if row["noisy"] else ""), f"{row['keys']:,}", str(row["shards"]))
        for name, one in row["figures"].items():
            whole = name.endswith("bytes")
            table.add_row(
                *label, name.replace("_", " "), f"{one['predicted']:,.{0 if whole else 2}f}",
                f"{one['measured']:,.{0 if whole else 2}f}", f"{one['ratio']:.3f}",
                {True: "yes", False: "no", None: ""}[one.get("within")],
            )  # fmt: skip
            label = ("", "", "")
    Console(width=140).print(table)


def main() -> None:
    """Measures, predicts, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["exact"], help="of the shards")
    parser.add_argument("--keys", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--up-to", type=int, default=65536, help="keys of the largest memory that is planned from")
    parser.add_argument("--threads", type=int, default=1, help="of each shard")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=30.0, help="for the rounds of one size, about")
    parser.add_argument("--cluster-costs", type=Path, help="measured before; measured anew without")
    parser.add_argument("--json", action="store_true", help="print the result file instead of a table")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    for name in ("shards", "threads", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if min(arguments.keys) < arguments.shards:
        parser.error(f"--keys {min(arguments.keys)} are fewer than --shards {arguments.shards}")
    backends = [canonical_spec(backend) for backend in arguments.backend]
    torch.set_num_threads(arguments.threads)
    rows = []
    with Progress(console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:

        def follow(what: str) -> Callable[[int, int, str], None]:
            task = progress.add_task(what, total=None)
            return lambda done, total, _: progress.update(task, completed=done, total=total)

        effort = without_larger(Effort(tuple(backends), other=()), arguments.up_to)
        calibration, notes = measure(
            effort, Path(folder) / "points.json", threads=arguments.threads, on_point=follow("one memory")
        )
        if arguments.cluster_costs is not None:
            costs = read_costs(arguments.cluster_costs)
        else:
            costs = measure_cluster(
                Path(folder) / "costs.json", threads=arguments.threads, on_point=follow("what sharding costs")
            )
        sizes = [(backend, keys) for backend in backends for keys in sorted(arguments.keys)]
        task = progress.add_task("memories in shards", total=len(sizes))
        for backend, keys in sizes:
            plan = predict(backend, keys, arguments.shards, calibration, costs)
            measured = run(backend, keys, arguments.shards, arguments.rounds, arguments.seconds)
            figures = compare(plan, measured, costs)
            row = {"backend": backend, "keys": keys, "shards": plan.shards, "noisy": measured["noisy"]}
            rows.append({**row, "figures": figures})
            progress.advance(task)
    content = {
        "schema": 1,
        "provenance": describe(threads=arguments.threads, seed=0),
        "up_to": arguments.up_to,
        "dim": DIM,
        "queries": QUERIES,
        "k": K,
        "costs": {"search": str(costs.law("search")), "append": str(costs.law("append"))},
        "notes": notes,
        "rows": rows,
    }
    write_json(arguments.output, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        for note in notes:
            print(note)
        show(rows)
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
