"""`recollect ablate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recollect.commands._options import AddressOption, EngineOption, JsonOption
from recollect.commands._printing import print_figures, print_json, ray_kept_quiet


def ablate(
    grids: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of shipped grids, or paths of TOML files; without any, the shipped ones are listed."
        ),
    ] = None,
    scale: Annotated[str, typer.Option("--scale", help="small (a laptop) or gpu (one large GPU).")] = "small",
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            "--corpus",
            help="`stdlib`, a path, or name=path; repeatable: each is a section of its own in every grid.",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many. Default: the grid's own.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="Run this variant and its reference alone; repeatable.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder that grids share: nothing in it is trained or evaluated twice.")
    ] = Path("out/ablate"),
    mix: Annotated[
        bool,
        typer.Option(
            "--mix",
            help="Go on in a folder of another machine, thread count, version or code; with --engine ray, use machines "
            "that are not alike.",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=1, help="Processes at a time. Default: 1; with --engine ray as many as there is room for."
        ),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of each process.")] = 1,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda ... Default: the scale's own.")] = None,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Time the training steps when everything else is done.")
    ] = True,
    engine: EngineOption = "local",
    address: AddressOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, run nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Trains and evaluates grids of models that differ in one choice each, and says what the choice is worth.

    Everything in a grid is checked before the first step. Interrupt it at any time: the same command goes on where it
    stopped. With `--engine ray` trainings and evaluations are tasks on the machines of a Ray cluster.

    **Examples**

        recollect ablate

        recollect ablate gate layers --jobs 2 --dry-run

        recollect ablate memory --corpus books=books.jsonl.xz --corpus code=code.jsonl.xz --jobs 2

        recollect ablate my_grid.toml --scale small --seeds 1

        recollect ablate gate layers --engine ray --address 10.0.0.1:6379
    """
    if not grids:
        _list(scale, as_json)
        return
    from recollect.suites.ablation.options import AblateOptions
    from recollect.suites.ablation.runner import ablate as run

    options = AblateOptions(
        grids=tuple(grids),
        scale=scale,
        corpora=tuple(corpus or ("stdlib",)),
        seeds=seeds,
        variants=tuple(variant or ()),
        output=output,
        mix=mix,
        jobs=jobs,
        threads=threads,
        device=device,
        timing=timing,
        engine=engine,
        address=address,
    )
    if dry_run:
        _show_plan(options, as_json)
        return
    with ray_kept_quiet(engine):
        result = run(options)
    answer: dict[str, Any] = {
        "output": str(result.output),
        "report": str(result.report) if result.report else None,
        "folders": [str(folder) for folder in result.folders],
        "trained": result.trained,
        "evaluated": result.evaluated,
        "reused": result.reused,
        "diverged": [_told(item) for item in result.diverged],
        "failed": [_told(item) for item in result.failed],
        "notes": list(result.notes),
        "seconds": round(result.seconds, 1),
    }
    if as_json:
        print_json(answer)
    else:
        print_figures("Ablation", {key: value for key, value in answer.items() if value not in ([], None)})
    if result.failed:
        raise typer.Exit(1)


def _told(item: tuple[str, str, str, int, str]) -> dict[str, Any]:
    return dict(zip(("grid", "section", "variant", "seed", "reason"), item, strict=True))


def _list(scale: str, as_json: bool) -> None:
    from recollect.suites.ablation.grid import load_grid, shipped_grids

    grids = {name: load_grid(name, scale) for name in shipped_grids()}
    if as_json:
        print_json(
            {
                name: {"question": grid.question, "variants": [variant.name for variant in grid.variants]}
                for name, grid in grids.items()
            }
        )
    else:
        print_figures("Shipped grids", {name: grid.question for name, grid in grids.items()})


def _show_plan(options: Any, as_json: bool) -> None:
    from recollect.suites.ablation.describe import describe_plan

    answer = describe_plan(options)
    if as_json:
        print_json(answer)
        return
    for grid in answer["grids"]:
        print_figures(f"{grid['grid']}: {grid['question']}", grid["variants"])
    print_figures("Plan", answer["plan"])
