"""Writing the report of ablation grids into their folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recollect.reports.ablation_results import RUN, grid_folders, load_ablation
from recollect.reports.errors import ReportError
from recollect.reports.files import write_bytes, write_text

if TYPE_CHECKING:
    from recollect.reports.ablation_analysis import AblationAnalysis

PAGE, INDEX, MARKDOWN, TABLE = "report.html", "index.html", "results.md", "results.csv"
_NO_CONTENTS = b"---\nhide:\n  - toc\n---\n\n"  # of the documentation's theme: leaves wide tables their room
_OURS = re.compile(r".+-(difference|axis|cost)")


@dataclass(frozen=True)
class AblationReportFiles:
    """What was written for one grid.

    Attributes:
        page: report.html.
        markdown: results.md.
        table_csv: results.csv, a row a text and variant.
        figures: SVG and PNG of each figure.
    """

    page: Path
    markdown: Path
    table_csv: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class AblationReport:
    """What was written.

    Attributes:
        page: the grid's, or the page over the grids.
        grids: the files of each grid.
    """

    page: Path
    grids: tuple[AblationReportFiles, ...]


def write_ablation_report(folder: Path | str) -> AblationReport:
    """Writes results.csv, results.md, report.html and figures/ into a grid's folder.

    For a folder that holds grids it does so for each of them, and writes index.html beside them. Each file is replaced
    whole.

    Args:
        folder: of one grid, or the one that several lie in, as `recollect ablate --output` calls it.

    Raises:
        ReportError: the results of a grid cannot be read; nothing is written then.
    """
    folder = Path(folder)
    folders = grid_folders(folder)
    if not folders:
        raise ReportError(f"{folder} holds no ablation grid; name a folder that `recollect ablate --output` wrote")
    # Imported here: altair takes longer to import than a caller that only asks what a folder is should wait.
    from recollect.reports import ablation_page
    from recollect.reports.ablation_analysis import AblationAnalysis

    analyses = [AblationAnalysis(load_ablation(path)) for path in folders]
    written = tuple(_write_grid(analysis) for analysis in analyses)
    if folders == (folder,):
        return AblationReport(written[0].page, written)
    return AblationReport(write_text(folder / INDEX, ablation_page.render_index(analyses)), written)


def _write_grid(analysis: AblationAnalysis) -> AblationReportFiles:
    from recollect.reports import ablation_page
    from recollect.reports.ablation_figures import ablation_figures
    from recollect.reports.ablation_markdown import render_markdown
    from recollect.reports.ablation_rows import csv_text
    from recollect.reports.drawing import draw

    target = analysis.ablation.folder
    # Everything is made before anything is written, so that an error leaves the former report as it was.
    figures = ablation_figures(analysis)
    drawn = {figure.name: draw(figure) for figure in figures}
    html = ablation_page.render_grid(analysis, figures, {name: svg for name, (svg, _) in drawn.items()})
    markdown = render_markdown(analysis, figures)
    table = csv_text(analysis)
    paths = []
    for name, (svg, png) in drawn.items():
        paths.append(write_text(target / "figures" / f"{name}.svg", svg))
        paths.append(write_bytes(target / "figures" / f"{name}.png", png))
    if (target / "figures").is_dir():  # a figure that these results no longer have must not stay behind
        for path in (target / "figures").iterdir():
            if path.suffix in (".svg", ".png") and path not in paths and _OURS.fullmatch(path.stem):
                path.unlink()
    return AblationReportFiles(
        page=write_text(target / PAGE, html),
        markdown=write_text(target / MARKDOWN, markdown),
        table_csv=write_text(target / TABLE, table),
        figures=tuple(paths),
    )


def publish_ablation(folder: Path | str, target: Path | str) -> tuple[Path, ...]:
    """Copies what a documentation keeps of written grids: a folder a grid, and texts for a page beside `target`.

    Of each grid: results.md, results.csv, run.json and the figures as SVG; no page and no losses. Over them:
    summary.txt, a table, and grids.txt, a section a grid that begins with `target`/prose/<grid>.txt where there is one.
    Raises ReportError where a grid has no report yet.
    """
    from recollect.reports.ablation_analysis import AblationAnalysis
    from recollect.reports.ablation_markdown import render_grids, render_summary

    target, written, analyses = Path(target), [], []
    for grid in grid_folders(folder):
        analyses.append(AblationAnalysis(load_ablation(grid)))
        for path in (grid / MARKDOWN, grid / TABLE, grid / RUN, *sorted((grid / "figures").glob("*.svg"))):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ReportError(f"{path} cannot be read ({error.strerror}): write the grid's report first") from error
            if path.suffix == ".md":
                content = _NO_CONTENTS + content
            written.append(write_bytes(target / grid.name / path.relative_to(grid), content))
    prose = {path.stem: path.read_text(encoding="utf-8") for path in (target / "prose").glob("*.txt")}
    written.append(write_text(target / "summary.txt", render_summary(analyses)))
    written.append(write_text(target / "grids.txt", render_grids(analyses, target.name, prose)))
    return tuple(written)
