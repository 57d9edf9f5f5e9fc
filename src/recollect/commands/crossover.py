"""`recollect crossover`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recollect.commands._options import CheckpointOption, CorpusOption, DeviceOption, JsonOption, SeedOption
from recollect.commands._printing import print_figures, print_json


def crossover(
    memories: Annotated[
        int, typer.Option("--memories", min=1, help="Memories searched in a step: batch rows times heads.")
    ] = 8,
    queries: Annotated[
        list[int] | None,
        typer.Option("--queries", min=1, help="Queries of a step for each memory; repeatable. Default: 512."),
    ] = None,
    recall: Annotated[
        list[float] | None,
        typer.Option("--recall", help="Recall that an index must reach to count; repeatable. Default: 0.95."),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of each query.")] = 32,
    dim: Annotated[
        int | None, typer.Option("--dim", min=1, help="Dimension of the keys. Default: that of the source, 64.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            help="Index that may overtake exact search, a name or registry string; repeatable. Default: every "
            "approximate one whose library is here.",
        ),
    ] = None,
    keys: Annotated[
        str,
        typer.Option(
            "--keys",
            help="`model` (attention's own, of a model on a text), `synthetic` (random with their coarse statistics), "
            "or a file: a trace of `recollect trace`, or HDF5 as of ann-benchmarks.",
        ),
    ] = "model",
    checkpoint: CheckpointOption = None,
    corpus: CorpusOption = "stdlib",
    min_keys: Annotated[int, typer.Option("--min-keys", min=1, help="Smallest memory to measure.")] = 512,
    max_keys: Annotated[int, typer.Option("--max-keys", min=1, help="Largest memory to measure.")] = 131_072,
    minutes: Annotated[
        float, typer.Option("--minutes", help="Time to spend, roughly; what it does not suffice for is told.")
    ] = 10.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of torch and every library. Default: all cores.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the results; an earlier run in it is resumed.")
    ] = Path("out/crossover"),
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measures from which memory size on an index is quicker than exact search, on this machine, for your numbers.

    Memories double in size until every question is answered or the time is spent; then sizes around a crossing are
    measured. An index counts only with search options that reach the recall. That no index overtakes is an answer too.
    Writes crossover.html, crossover.csv and crossover.json. The same command again goes on where it stopped.

    **Examples**

        recollect crossover

        recollect crossover --memories 32 --queries 1 --queries 512 --recall 0.9 --recall 0.99 --dim 128

        recollect crossover --backend hnswlib:M=32 --backend faiss-ivf --max-keys 1000000 --minutes 30

        recollect crossover --keys out/trace.hdf5 --threads 1 --output out/mine
    """
    from recollect.suites.crossover_options import CrossoverOptions
    from recollect.suites.crossover_run import crossover as run

    result = run(
        CrossoverOptions(
            memories=memories,
            queries=tuple(queries or (512,)),
            recalls=tuple(recall or (0.95,)),
            k=k,
            dim=dim,
            backends=tuple(backend or ()),
            keys=keys,
            checkpoint=checkpoint,
            corpus=corpus,
            min_keys=min_keys,
            max_keys=max_keys,
            minutes=minutes,
            threads=threads,
            output=output,
            seed=seed,
            device=device,
        )
    )
    answer: dict[str, Any] = {
        "answers": list(result.answers),
        "page": str(result.page),
        "output": str(result.output),
        "measured": result.measured,
        "reused": result.reused,
        "failed": [{"index": index, "reason": reason} for index, reason in result.failed],
        "seconds": round(result.seconds, 1),
    }
    if as_json:
        print_json({**answer, "crossings": list(result.crossings)})
    else:
        print_figures("Crossover", {key: value for key, value in answer.items() if value not in ([], None)})
    if result.failed:
        raise typer.Exit(1)
