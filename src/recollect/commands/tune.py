"""`recollect tune`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recollect.commands._options import (
    CheckpointOption,
    CorpusOption,
    DeviceOption,
    JsonOption,
    KOption,
    SeedOption,
)
from recollect.commands._printing import print_figures, print_json


def tune(
    backend: Annotated[
        list[str],
        typer.Option(
            "--backend",
            help="Name or registry string; options that it names are kept, the others tuned. Repeatable: the cheapest "
            "of all is chosen.",
        ),
    ],
    target_recall: Annotated[
        float | None, typer.Option("--target-recall", help="Share of the true k nearest keys to find, at least.")
    ] = None,
    target_mass: Annotated[
        float | None,
        typer.Option(
            "--target-mass",
            help="Share of the softmax mass of the true k nearest keys that the found ones hold, at least.",
        ),
    ] = None,
    target_loss: Annotated[
        float | None,
        typer.Option("--target-loss", help="Relative increase of perplexity over exact search, at most: 0.01 is 1 %."),
    ] = None,
    builds: Annotated[
        bool, typer.Option("--builds", help="Try the options fixed at building too; takes as many times longer.")
    ] = False,
    cost: Annotated[
        str, typer.Option("--cost", help="What is to be cheap: `step` (searches and appends) or `search` alone.")
    ] = "step",
    memory_size: Annotated[
        int | None, typer.Option("--memory-size", min=1, help="Keys each memory holds. Default: the checkpoint's own.")
    ] = None,
    k: KOption = None,
    checkpoint: CheckpointOption = None,
    corpus: CorpusOption = "stdlib",
    split: Annotated[str, typer.Option("--split", help="Documents that options are chosen on.")] = "validation",
    verify_split: Annotated[
        str, typer.Option("--verify-split", help="Other documents, that the choice is verified on.")
    ] = "test",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Tokens of each of the two texts.")] = 20_480,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Documents read side by side.")] = 2,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of torch and every library. Default: all cores.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the results; an earlier run in it is resumed.")
    ] = Path("out/tune"),
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Picks the cheapest options that reach a recall, a softmax mass or a perplexity, and verifies them on other text.

    Options are chosen by the worse end of each figure's interval on tuning documents; what is reported of the chosen
    ones is measured anew on documents that had no part in the choice. Ends with exit code 1 where nothing reaches the
    target, or the choice misses it on the other documents. The same command again goes on where it stopped.

    **Examples**

        recollect tune --backend hnswlib --target-mass 0.99

        recollect tune --backend faiss-ivf --backend scann --target-loss 0.01 --memory-size 8192

        recollect tune --backend hnswlib:M=32 --target-recall 0.95 --builds --corpus my_texts.jsonl.xz
    """
    from recollect.suites.tuning_options import TuneError, TuneOptions
    from recollect.suites.tuning_run import tune as run

    given = {"recall": target_recall, "mass": target_mass, "loss": target_loss}
    targets = {kind: value for kind, value in given.items() if value is not None}
    if len(targets) != 1:
        raise TuneError("give one target: --target-recall, --target-mass or --target-loss")
    ((kind, target),) = targets.items()
    choices: dict[str, Any] = {"kind": kind, "cost": cost}
    result = run(
        TuneOptions(
            backends=tuple(backend),
            target=target,
            builds=builds,
            memory_size=memory_size,
            k=k,
            checkpoint=checkpoint,
            corpus=corpus,
            split=split,
            verify_split=verify_split,
            max_tokens=max_tokens,
            rows=rows,
            output=output,
            threads=threads,
            seed=seed,
            device=device,
            **choices,
        )
    )
    if as_json:
        answer = {"outcome": result.outcome, "spec": result.spec, "message": result.message}
        print_json({**answer, "tuning": result.tuning, "verified": result.verified, "points": list(result.points)})
    else:
        _show(result, kind)
    if not result.held:
        raise typer.Exit(1)


def _show(result: Any, kind: str) -> None:
    """The curve, then the choice."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Tuning documents", caption="cost and search: times exact search's; intervals are of 95 %")
    for column in ("spec", "cost", "search", "recall", "softmax mass", "perplexity loss"):
        table.add_column(column, overflow="fold", justify="left" if column == "spec" else "right")
    for point in result.points:
        style = "bold" if point["spec"] == result.spec else ""
        table.add_row(*_cells(point, kind), style=style)
    Console().print(table)
    figures: dict[str, Any] = {"spec": result.spec, "outcome": result.outcome}
    if result.verified is not None:
        names = ("cost", "search", "recall", "softmax_mass", "perplexity_loss")
        figures |= dict(zip(names, _cells(result.verified)[1:], strict=True))
        figures["machine"] = "busy: small differences of time mean nothing" if result.verified["noisy"] else "quiet"
    title = "Nothing reaches the target" if result.verified is None else "Verified on other documents"
    print_figures(title, {**figures, "finding": result.message, "output": str(result.output)})


def _cells(point: dict[str, Any], kind: str | None = None) -> tuple[str, ...]:
    """Spec, cost, search, recall, mass and loss, with intervals for the figure of `kind` or, where None, for all."""

    def figure_of(name: str, digits: int = 3) -> str:
        figure = point[name]
        if figure is None:
            return "–"
        value, low, high = (round(figure[end], digits) + 0.0 for end in ("value", "low", "high"))  # no minus zero
        if kind not in (None, name):
            return f"{value:.{digits}f}"
        return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    return (
        point["spec"],
        f"{point['cost']:.2f}",
        figure_of("search_ratio", 2),
        figure_of("recall"),
        figure_of("mass"),
        figure_of("loss", 4),
    )
