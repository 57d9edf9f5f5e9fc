"""`recollect compare`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recollect.commands._options import (
    AddressOption,
    CheckpointOption,
    CorpusOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    KOption,
    SeedOption,
)
from recollect.commands._printing import print_figures, print_json, ray_kept_quiet


def compare(
    checkpoint: CheckpointOption = None,
    corpus: CorpusOption = "stdlib",
    split: Annotated[
        str, typer.Option("--split", help="test, validation, train, or all documents of the corpus.")
    ] = "test",
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", help="Registry string; repeatable. Default: the declared sweep of every backend."),
    ] = None,
    memory_size: Annotated[
        list[int] | None, typer.Option("--memory-size", min=0, help="Keys each memory holds; repeatable.")
    ] = None,
    k: KOption = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Tokens each measurement reads.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the results; an earlier run in it is resumed.")
    ] = Path("out/compare"),
    curve_seconds: Annotated[
        float | None,
        typer.Option("--curve-seconds", min=0.0, help="Seconds of searching for each build's curve; 0: no curves."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure everything anew, even what is there with the same settings.")
    ] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    engine: EngineOption = "local",
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Swaps every index under one model, runs the suites on real text and writes the report.

    Interrupt it at any time: run again with the same options it goes on where it stopped. Measurements of another
    machine, thread count, library version, seed or changed code are put aside, with a note that says what differs.

    With `--engine ray` the measurements are tasks on the machines of a Ray cluster, each with a machine to itself and
    all machines alike, so that times compare. A run begun with one engine goes on with the other.

    **Examples**

        recollect compare

        recollect compare --backend exact --backend hnswlib:M=16,ef_search=64 --memory-size 8192

        recollect compare --checkpoint my_model --corpus my_texts.jsonl.xz --output out/mine

        recollect compare --engine ray --address 10.0.0.1:6379
    """
    from recollect.suites.comparison import CompareOptions
    from recollect.suites.comparison import compare as run

    given: dict[str, Any] = {
        "checkpoint": checkpoint,
        "corpus": corpus,
        "split": split,
        "k": k,
        "output": output,
        "fresh": fresh,
        "seed": seed,
        "device": device,
        "engine": engine,
        "address": address,
    }
    if backend:
        given["backends"] = tuple(backend)
    if memory_size:
        given["memory_sizes"] = tuple(memory_size)
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if curve_seconds is not None:
        given["curve_seconds"] = curve_seconds
    with ray_kept_quiet(engine):
        result = run(CompareOptions(**given))
    answer = {
        "output": str(result.output),
        "report": str(result.report) if result.report else None,
        "measured": result.measured,
        "reused": result.reused,
        "skipped": [{"spec": spec, "reason": reason} for spec, reason in result.skipped],
        "failed": [{"spec": spec, "memory_size": size, "reason": reason} for spec, size, reason in result.failed],
        "notes": list(result.notes),
        "seconds": round(result.seconds, 1),
    }
    if as_json:
        print_json(answer)
    else:
        print_figures("Comparison", {key: value for key, value in answer.items() if value not in ([], None)})
    if result.failed:
        raise typer.Exit(1)
