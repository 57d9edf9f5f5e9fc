"""`recollect runbook`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recollect.commands._options import DeviceOption, JsonOption, SeedOption
from recollect.commands._printing import figure, print_figures, print_json, print_rows, steps_of

COLUMNS = {
    "spec": "index",
    "mean_recall": "recall",
    "least_recall": "least",
    "queries_per_second": "queries/s",
    "inserts_per_second": "inserts/s",
    "append_p50_ms": "append p50",
    "append_p99_ms": "p99 ms",
}


def runbook(
    runbook: Annotated[Path, typer.Argument(help="YAML file in the form of big-ann-benchmarks' streaming track.")],
    data: Annotated[
        Path,
        typer.Option("--data", help="HDF5 file of ann-benchmarks or VIBE, or raw keys: .fbin, .u8bin or .i8bin."),
    ],
    queries: Annotated[Path | None, typer.Option("--queries", help="With raw keys: the file of the queries.")] = None,
    distance: Annotated[str | None, typer.Option("--distance", help="With raw keys: euclidean, ip or angular.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", help="Registry string; repeatable. Default: exact, faiss-ivf, hnswlib and scann."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="The name in the runbook, where it has steps for several.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours.")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=0, help="Queries searched at once; 0 is all.")] = 0,
    append_size: Annotated[
        int, typer.Option("--append-size", min=0, help="Keys appended at once; 0 is all of a step.")
    ] = 0,
    ground_truth: Annotated[
        Path | None,
        typer.Option("--ground-truth", help="Folder of the track's own stepN.gt100. Default: computed, and kept."),
    ] = None,
    make: Annotated[
        bool,
        typer.Option(
            "--make", help="First write a sliding-window runbook for the data; without --backend that is all."
        ),
    ] = False,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="With --make: keys alive. Default: half the data.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="With --make: keys a step. Default: a hundredth of the window.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of torch and every library. Default: every core.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the results; an earlier run in it is resumed.")
    ] = Path("out/runbook"),
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Replays a streaming runbook: keys come and go, and every search is judged against the keys alive then.

    A memory forgets the oldest keys as new ones come, so sliding-window runbooks can be replayed; any other is refused
    with the step that shows it. Recall is as big-ann-benchmarks defines it, with ties. Results are results.csv (a row
    for each index), steps.csv (a row for each step of each) and results.json.

    **Examples**

        recollect runbook window.yaml --data sift-128-euclidean.hdf5 --make --window 100000 --step 1000

        recollect runbook window.yaml --data sift-128-euclidean.hdf5 --backend exact --backend hnswlib

        recollect runbook msturing-10M_slidingwindow_runbook.yaml --data base1b.fbin.crop_nb_10000000
        --queries testQuery10K.fbin --distance euclidean --backend faiss-ivf:nlist=4096
    """
    from recollect.suites.runbook import sliding_window, write_runbook
    from recollect.suites.runbook_data import open_data
    from recollect.suites.runbook_run import RunbookOptions, run_runbook

    if make:
        with open_data(data, queries, distance) as opened:
            made = sliding_window(opened.name, keys=opened.keys, window=window, step=step)
        write_runbook(runbook, made)
        if not backend:
            answer = {"runbook": str(runbook), "steps": len(made.steps), "window": made.max_pts}
            if as_json:
                print_json(answer)
            else:
                print_figures("Runbook", answer)
            return
    elif window is not None or step is not None:
        raise typer.BadParameter("--window and --step are of a runbook that --make writes", param_hint="--make")
    options = RunbookOptions(
        runbook=runbook,
        data=data,
        queries=queries,
        distance=distance,
        backends=tuple(backend or ("exact", "faiss-ivf", "hnswlib", "scann")),
        dataset=dataset,
        k=k,
        batch_size=batch_size,
        append_size=append_size,
        ground_truth=ground_truth,
        output=output,
        threads=threads,
        device=device,
        seed=seed,
    )
    with steps_of("reading") as tell:
        result = run_runbook(options, tell)
    if as_json:
        print_json(
            {
                "output": str(result.output),
                "measured": result.measured,
                "reused": result.reused,
                "left_out": result.left_out,
                "rows": [row.as_json() for row in result.rows],
            }
        )
    else:
        one = result.rows[0]
        title = f"{one.runbook} over {one.dataset}: {one.capacity} keys alive, k {k}, {one.threads} threads"
        rows = [{name: figure(getattr(row, name)) for name in COLUMNS} for row in result.rows if row.status == "ok"]
        notes = [f"{row.spec}: {row.status}: {row.reason}" for row in result.rows if row.status != "ok"]
        if any(row.noisy for row in result.rows):
            notes.append("the machine was busy: small differences in time mean nothing")
        print_rows(title, COLUMNS, rows, notes=notes)
        typer.echo(f"results: {result.output / 'results.csv'} and {result.output / 'steps.csv'}")
        if result.left_out:
            typer.echo(f"{result.left_out} rows in {result.output} are of other settings, machine or code: left out")
    if any(row.status == "failed" for row in result.rows):
        raise typer.Exit(1)
