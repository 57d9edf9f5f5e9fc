"""`recollect report`"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from recollect.commands._options import JsonOption
from recollect.commands._printing import print_figures, print_json


def report(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder that `recollect compare` or `recollect ablate` wrote.", show_default="out/compare"),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="The same, as those verbs call it.")] = None,
    publish: Annotated[
        Path | None,
        typer.Option(
            "--publish",
            help="Also copy an ablation's findings, tables and figures (no page, no losses) into this folder.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Writes tables, figures and HTML pages from the result files of a comparison or an ablation; measures nothing.

    **Examples**

        recollect report

        recollect report out/ablate

        recollect report out/ablate/gate
    """
    from recollect.reports import ReportError, is_ablation, publish_ablation, write_ablation_report, write_report

    if folder is not None and output is not None and folder != output:
        raise ReportError(f"two folders are named, {folder} and --output {output}: give one")
    chosen = folder or output or Path("out/compare")
    answer: dict[str, Any]
    if is_ablation(chosen):
        made = write_ablation_report(chosen)
        answer = {"page": made.page, "grids": [str(grid.page) for grid in made.grids]}
        if publish is not None:
            answer["published"] = [str(path) for path in publish_ablation(chosen, publish)]
    elif publish is not None:
        raise ReportError(f"{chosen} holds no ablation: --publish is for what `recollect ablate` wrote")
    else:
        files = write_report(chosen)
        answer = {field.name: getattr(files, field.name) for field in dataclasses.fields(files)}
    if as_json:
        print_json(answer)
    else:
        print_figures("Report", answer)
