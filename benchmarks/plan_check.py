"""A plan's predictions against measurements of a larger memory.

    python benchmarks/plan_check.py [--up-to 65536] [--size 262144] [--backend exact ...] [--threads 1] [--clock cpu]

Measures each backend at 4096 to `--up-to` keys, fits the laws of `recollect plan`, predicts what a memory of `--size`
keys costs, measures that, and prints predicted over measured, for filling, appending and searching, and whether the
measured figure lies within the predicted range. Points are kept in the result's folder until all are there, so that an
interrupted run goes on. Writes benchmarks/results/plan_check.json.
"""

from __future__ import annotations

import argparse
import datetime
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recollect.memory_backends.atomic import write_json
from recollect.suites.environment import commit_of, describe_machine, library_versions, usable_cores
from recollect.suites.planning.calibration import Point
from recollect.suites.planning.growth import growth_of
from recollect.suites.planning.laws import fit_law
from recollect.suites.planning.measuring import DIM, QUERIES, Effort, K, measure, measure_point, without_larger

RESULT = Path(__file__).parent / "results" / "plan_check.json"
BACKENDS = ("exact", "faiss-ivf", "faiss-ivfpq", "hnswlib", "scann")
FIGURES = {"build_seconds": "filling", "append_us": "append", "search_ms": "search"}


def check(spec: str, points: list[Point], measured: Point) -> dict[str, Any]:
    """One row of the result: each figure predicted from smaller points, and as it was measured."""
    figures = {}
    for figure in FIGURES:
        law = fit_law([(one.keys, one.dim, getattr(one, figure)) for one in points], growth_of(spec).figures[figure])
        found, truth = law.at(measured.keys, measured.dim), float(getattr(measured, figure))
        figures[figure] = {
            "predicted": found.value,
            "low": found.low,
            "high": found.high,
            "measured": truth,
            "ratio": found.value / truth,
            "within": found.low <= truth <= found.high,
            "law": str(law),
        }
    return {"spec": spec, "keys": measured.keys, "noisy": measured.noisy, "figures": figures}


def show(rows: list[dict[str, Any]], up_to: int, size: int) -> None:
    """Prints the table and the typical error."""
    table = Table(title=f"Predicted over measured at {size:,} keys, from at most {up_to:,} ({size / up_to:.3g} times)")
    table.add_column("backend")
    for name in FIGURES.values():
        table.add_column(name, justify="right")
    for row in rows:
        cells = [
            f"{one['ratio']:.2f}{'' if one['within'] else ' (outside its range)'}" for one in row["figures"].values()
        ]
        table.add_row(row["spec"] + (" (noisy)" if row["noisy"] else ""), *cells)
    Console().print(table)
    every = [one for row in rows for one in row["figures"].values()]
    error = math.exp(sum(abs(math.log(one["ratio"])) for one in every) / len(every))
    print(
        f"off by {error:.2f} times on average; within the range: {sum(one['within'] for one in every)} of {len(every)}"
    )


def main() -> None:
    """Measures, predicts, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--up-to", type=int, default=65536, help="keys of the largest memory that is planned from")
    parser.add_argument("--size", type=int, default=262144, help="keys of the memory that is predicted")
    parser.add_argument("--backend", nargs="+", default=list(BACKENDS))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.size <= arguments.up_to:
        parser.error(f"--size {arguments.size} must exceed --up-to {arguments.up_to}")
    effort = without_larger(Effort(tuple(arguments.backend), other=()), arguments.up_to)
    kept = arguments.output.with_suffix(".points.json")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring what is planned from", total=None)
        calibration, notes = measure(
            effort,
            kept,
            threads=arguments.threads,
            clock=arguments.clock,
            on_point=lambda done, total, what: progress.update(task, completed=done, total=total),
        )
        rows = []
        task = progress.add_task(f"measuring {arguments.size:,} keys", total=len(arguments.backend))
        torch.set_num_threads(arguments.threads)
        for spec in calibration.specs:
            point = measure_point(spec, arguments.size, DIM, queries=QUERIES, k=K, device="cpu", clock=arguments.clock)
            rows.append(check(spec, calibration.of(spec), point))
            progress.advance(task)
    for note in notes:
        print(note)
    show(rows, arguments.up_to, arguments.size)
    write_json(
        arguments.output,
        {
            "schema": 1,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "libraries": library_versions(),
            "threads": arguments.threads,
            "clock": arguments.clock,
            "commit": commit_of(),
            "up_to": arguments.up_to,
            "size": arguments.size,
            "dim": DIM,
            "queries": QUERIES,
            "k": K,
            "rows": rows,
        },
    )
    kept.unlink(missing_ok=True)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
