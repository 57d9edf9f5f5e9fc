"""Attention's keys beside the data sets that everybody measures on: the same indexes, counted in the same way.

    python benchmarks/common_data.py [--data sift-128-euclidean.hdf5 ...] [--threads 1] [--folder out/common-data]

Records the shipped model reading its longest test document and writes one memory (8192 keys, the 512 queries that come
after them) as a file of ann-benchmarks. Runs indexes on it, and on every data set given, along their whole curves, and
prints for each the cheapest setting that reaches 0.95 and 0.99 of the true ten neighbours: its recall, and how many
times as fast as exact search in the same run it answers all queries at once. Then the document's keys slide through a
window of 8192 (a runbook of big-ann-benchmarks' streaming track): recall at the first search and the last, and the
spread of appends of 512 keys.

Both parts go on where they were interrupted. Writes benchmarks/results/common_data.json; every single row stands in the
folder, in results.csv and steps.csv.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recollect.memory_backends.atomic import write_json
from recollect.model.ann_benchmarks import AnnBenchmarkFile
from recollect.model.checkpoints import load_checkpoint, reference_checkpoint
from recollect.model.evaluation_text import choose_text, load_documents
from recollect.model.recording import record
from recollect.model.trace import Trace
from recollect.model.trace_export import export_ann_benchmarks
from recollect.model.trunk import compute_trunk
from recollect.suites.ann_measure import AnnRow, AnnSettings
from recollect.suites.ann_run import AnnRunOptions, run_ann_benchmarks
from recollect.suites.row_process import OnProgress
from recollect.suites.runbook import sliding_window, write_runbook
from recollect.suites.runbook_run import RunbookOptions, RunbookRow, run_runbook

RESULT = Path(__file__).parent / "results" / "common_data.json"
BACKENDS = ("exact", "faiss-flat", "faiss-ivf", "faiss-hnsw", "hnswlib", "scann")
STREAMED = ("exact", "faiss-ivf", "hnswlib:ef_search=128", "scann")
TARGETS = (0.95, 0.99)
WINDOW, STEP, QUERY_STEPS, TOKENS = 8192, 512, 4, 40_000


def attention(folder: Path, tell: OnProgress) -> tuple[Path, Path]:
    """Files of the newest 8192 keys of a memory, and of all keys of its document, written where they are missing."""
    window, stream = folder / "attention-65-angular.hdf5", folder / "attention-stream-65-angular.hdf5"
    if window.is_file() and stream.is_file():
        return window, stream
    loaded = load_checkpoint(reference_checkpoint())
    documents = load_documents("stdlib", "test", loaded.tokenizer)
    length = loaded.model.config.segment_length
    text = choose_text(documents, rows=1, segment_length=length, max_tokens=TOKENS)
    trunk = compute_trunk(loaded.model, text, on_segment=lambda done: tell("reading", done, text.segments))
    trace = Trace.of(record(loaded.model, trunk), lengths=text.lengths, layer=loaded.model.config.memory_layers[0])
    for path, size in ((window, WINDOW), (stream, None)):
        export_ann_benchmarks(trace, path, 0, 100, memory_size=size, query_steps=QUERY_STEPS)
    return window, stream


def cheapest(rows: list[AnnRow], target: float) -> AnnRow | None:
    """The fastest row that reaches a recall."""
    enough = [row for row in rows if row.status == "ok" and (row.recall_strict or 0.0) >= target]
    return max(enough, key=lambda row: row.batch_queries_per_second or 0.0, default=None)


def points(rows: list[AnnRow]) -> list[dict[str, Any]]:
    """For each data set and backend the cheapest setting of each target, with its speed over exact search's."""
    found = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        here = [row for row in rows if row.dataset == dataset]
        exact = cheapest([row for row in here if row.backend == "exact"], 0.0)
        for backend in dict.fromkeys(row.backend for row in here):
            for target in TARGETS:
                best = cheapest([row for row in here if row.backend == backend], target)
                speed = None
                if best is not None and exact is not None:
                    speed = (best.batch_queries_per_second or 0.0) / (exact.batch_queries_per_second or 1.0)
                point = {"dataset": dataset, "backend": backend, "target": target, "over_exact": speed}
                found.append({**point, "row": None if best is None else best.as_json()})
    return found


def show(found: list[dict[str, Any]], streamed: list[RunbookRow]) -> None:
    """Prints both tables."""
    table = Table(title="the cheapest setting that reaches a recall; speed over exact search, all queries at once")
    for heading in ("data", "recall wanted", "index", "recall", "as ann-benchmarks", "x exact", "p50 ms alone"):
        table.add_column(heading)
    for point in found:
        row = point["row"]
        cells = [f"{point['backend']}: not reached"]
        if row is not None:
            recall = f"{row['recall_strict']:.4f}", f"{row['recall_ann_benchmarks']:.4f}"
            cells = [row["spec"], *recall, f"{point['over_exact']:.2f}", f"{row['single_p50_ms']:.3f}"]
        table.add_row(point["dataset"], str(point["target"]), *cells)
    console = Console(width=180)
    console.print(table)
    table = Table(title=f"a window of {WINDOW} keys sliding through one document, {STEP} keys an append")
    for heading in ("index", "recall at first", "at last", "least", "append p50 ms", "p99 ms", "queries/s"):
        table.add_column(heading)
    for one in streamed:
        figures = (one.first_recall, one.last_recall, one.least_recall, one.append_p50_ms, one.append_p99_ms)
        cells = [f"{value:.4f}" if value is not None else one.status for value in figures]
        table.add_row(one.spec, *cells, f"{one.queries_per_second or 0:,.0f}")
    console.print(table)
    if any(point["row"] and point["row"]["noisy"] for point in found) or any(one.noisy for one in streamed):
        console.print("the machine was busy: small differences in time mean nothing")


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="files of ann-benchmarks or VIBE")
    parser.add_argument("--backend", nargs="*", default=list(BACKENDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out/common-data"))
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        window, stream = attention(arguments.folder, tell)
        options = AnnRunOptions(
            files=[window, *arguments.data],
            backends=arguments.backend,
            output=arguments.folder,
            settings=AnnSettings(k=10),
            threads=arguments.threads,
        )
        rows = run_ann_benchmarks(options, tell).rows
        book = arguments.folder / "window.yaml"
        with AnnBenchmarkFile(stream) as file:
            write_runbook(book, sliding_window(file.name, keys=file.keys, window=WINDOW, step=STEP))
        streamed = run_runbook(
            RunbookOptions(
                runbook=book,
                data=stream,
                backends=STREAMED,
                output=arguments.folder / "stream",
                threads=arguments.threads,
            ),
            tell,
        ).rows
    found = points(rows)
    show(found, streamed)
    stream_rows = [one.as_json() for one in streamed]
    write_json(arguments.output, {**_about(arguments.folder), "points": found, "stream": stream_rows})
    print(f"written: {arguments.output}")


def _about(folder: Path) -> dict[str, Any]:
    """Machine, libraries, threads, commit and date, as the rows were measured with."""
    content: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in ("rows", "kind")}


if __name__ == "__main__":
    main()
