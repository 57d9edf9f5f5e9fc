"""Writing the report into the result folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from recollect.reports.beside import curves_csv
from recollect.reports.files import write_bytes, write_text
from recollect.reports.results import load_results

# Only pictures by these names are the report's to remove: the folder may hold others.
_OURS = re.compile(
    r"(recall|mass)-perplexity|perplexity-memory|latency-(memory|larger-\d+)|pareto-(perplexity|recall|mass)|curves|footprint|"
    r"streaming"
)


@dataclass(frozen=True)
class ReportFiles:
    """What was written. table_parquet is None where pyarrow is not installed, curves_csv where none were measured."""

    page: Path
    markdown: Path
    table_csv: Path
    table_parquet: Path | None
    curves_csv: Path | None
    figures: tuple[Path, ...]


def write_report(folder: Path | str, *, output: Path | str | None = None) -> ReportFiles:
    """Reads the result folder and writes results.csv, results.parquet, curves.csv, results.md,
    report.html and figures/.

    output: another folder to write into; by default the result folder itself. Each file is replaced whole. Raises
    ReportError when the results cannot be read, before anything is written.
    """
    # Imported here: altair and what it needs take longer to import than a caller that only reads results should wait.
    from recollect.reports import page
    from recollect.reports.analysis import analyse
    from recollect.reports.drawing import draw
    from recollect.reports.figures import figures
    from recollect.reports.rows import write_csv, write_parquet

    results = load_results(folder)
    target = Path(output) if output is not None else results.folder
    analysis = analyse(results)
    # Everything is made before anything is written, so that an error leaves the former report as it was.
    made = figures(analysis)
    drawn = {figure.name: draw(figure) for figure in made}
    html = page.render_html(analysis, made, {name: svg for name, (svg, _) in drawn.items()})
    markdown = page.render_markdown(analysis, made)
    written = []
    for name, (svg, png) in drawn.items():
        written.append(write_text(target / "figures" / f"{name}.svg", svg))
        written.append(write_bytes(target / "figures" / f"{name}.png", png))
    table = write_csv(target / "results.csv", analysis.rows)
    parquet = write_parquet(target / "results.parquet", analysis.rows)
    points = results.curves
    curves = write_text(target / "curves.csv", curves_csv(points)) if points else None
    markdown_path = write_text(target / "results.md", markdown)
    page_path = write_text(target / "report.html", html)
    for path in (target / "figures").iterdir():  # a figure that these results no longer have must not stay behind
        if path.suffix in (".svg", ".png") and path not in written and _OURS.fullmatch(path.stem):
            path.unlink()
    return ReportFiles(page_path, markdown_path, table, parquet, curves, tuple(written))
