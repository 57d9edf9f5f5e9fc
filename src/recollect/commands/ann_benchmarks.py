"""`recollect ann-benchmarks`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recollect.commands._options import DeviceOption, JsonOption, SeedOption
from recollect.commands._printing import figure, print_json, print_rows, steps_of

COLUMNS = {
    "spec": "index",
    "recall_ann_benchmarks": "recall",
    "recall_strict": "strict",
    "batch_queries_per_second": "queries/s",
    "single_p50_ms": "p50 ms",
    "single_p99_ms": "p99 ms",
    "build_seconds": "build s",
}

TOO_FAR = 5e-4
"""Between a distance in the file and the same one measured here: half the margin of ann-benchmarks' recall."""


def ann_benchmarks(
    files: Annotated[
        list[Path], typer.Argument(help="HDF5 files of ann-benchmarks or VIBE, such as sift-128-euclidean.hdf5.")
    ],
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            help="Registry string; repeatable. Search options that it leaves open run through their whole curve: "
            "`hnswlib:M=32` is a curve over ef_search. Default: exact, faiss-ivf, hnswlib and scann.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours; the file must know as many.")] = 10,
    sweep: Annotated[
        bool, typer.Option("--sweep/--no-sweep", help="Whole curves, or the registry strings just as they are.")
    ] = True,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=0, help="Queries searched at once; 0 is all, as ann-benchmarks does.")
    ] = 0,
    single_queries: Annotated[
        int, typer.Option("--single-queries", min=0, help="Queries that are searched one by one as well.")
    ] = 1000,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Searches of all queries; the fastest counts.")] = 3,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of torch and every library. Default: every core.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the results; an earlier run in it is resumed.")
    ] = Path("out/ann-benchmarks"),
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Runs indexes on data sets of ann-benchmarks or VIBE: recall and queries per second, as those suites count them.

    Each index is built once and searched along the curve of its search options. `recall` is as ann-benchmarks and VIBE
    define it (distances up to 0.001 beyond the k-th neighbour's count); `strict`, shown where it differs, has no such
    margin. `queries/s` is of batches, `p50 ms` and `p99 ms` are of queries alone. Results are results.csv, results.json
    and, in ann-benchmarks' own layout, results/. Interrupt it at any time: the same command goes on where it stopped.

    **Examples**

        recollect ann-benchmarks sift-128-euclidean.hdf5

        recollect ann-benchmarks glove-100-angular.hdf5 --backend exact --backend hnswlib:M=32 --k 10 --threads 1

        recollect ann-benchmarks *.hdf5 --backend faiss-ivf:nlist=1024 --output out/ivf
    """
    from recollect.suites.ann_measure import AnnSettings
    from recollect.suites.ann_run import AnnRunOptions, on_front, run_ann_benchmarks

    options = AnnRunOptions(
        files=tuple(files),
        backends=tuple(backend or ("exact", "faiss-ivf", "hnswlib", "scann")),
        sweep=sweep,
        output=output,
        settings=AnnSettings(
            k=k, batch_size=batch_size, single_queries=single_queries, runs=runs, device=device, seed=seed
        ),
        threads=threads,
    )
    with steps_of("reading") as tell:
        result = run_ann_benchmarks(options, tell)
    failed = [row for row in result.rows if row.status == "failed"]
    if as_json:
        print_json(
            {
                "output": str(result.output),
                "measured": result.measured,
                "reused": result.reused,
                "others": result.others,
                "left_out": result.left_out,
                "rows": [row.as_json() for row in result.rows],
            }
        )
    else:
        for dataset in dict.fromkeys(row.dataset for row in result.rows):
            rows = [row for row in result.rows if row.dataset == dataset]
            one = rows[0]
            title = f"{dataset}: {one.keys} keys, {one.queries} queries, {one.distance}, k {k}, {one.threads} threads"
            front = on_front(rows)
            # A narrow terminal needs its room for the names of the indexes.
            alike = all(row.recall_strict == row.recall_ann_benchmarks for row in front)
            columns = {name: said for name, said in COLUMNS.items() if name != "recall_strict" or not alike}
            measured = [{name: figure(getattr(row, name)) for name in columns} for row in front]
            notes = [f"{row.spec}: {row.status}: {row.reason}" for row in rows if row.status != "ok"]
            dominated = sum(row.status == "ok" for row in rows) - len(front)
            if dominated:
                notes.append(
                    f"{dominated} rows that another of the same backend beats in both stand in results.csv only"
                )
            error = max((row.truth_error or 0.0 for row in rows), default=0.0)
            if error > TOO_FAR:
                notes.append(
                    f"the file's distances differ by up to {error:.2g} from {one.distance} distances measured here: "
                    "`recall` compares two measures, trust `strict`"
                )
            if any(row.noisy for row in rows):
                notes.append("the machine was busy: small differences in time mean nothing")
            print_rows(title, columns, measured, notes=list(dict.fromkeys(notes)))
        typer.echo(f"results: {result.output / 'results.csv'}")
        if result.left_out:
            typer.echo(f"{result.left_out} rows in {result.output} are of other settings, machine or code: left out")
    if failed:
        raise typer.Exit(1)
