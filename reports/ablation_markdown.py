"""One grid in Markdown, and what a documentation shows of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recollect.reports.ablation_analysis import AblationAnalysis
from recollect.reports.ablation_findings import REACH, findings, headline
from recollect.reports.ablation_page import facts, grid_tables, method, notes, repeat, subtitle
from recollect.reports.ablation_rows import narrow_table
from recollect.reports.contents import Table
from recollect.reports.drawing import Figure
from recollect.reports.page import code_markdown
from recollect.reports.rows import escape_markdown, markdown_table

ORDER = (
    *("memory", "memory-long", "domains", "layers", "neighbours", "gate", "normalisation", "search-pairs"),
    *("context", "stored-key", "eviction", "baselines"),
)
"""Grids in the order in which a reader wants them; others follow by name."""


def render_markdown(analysis: AblationAnalysis, figures: Sequence[Figure]) -> str:
    """The grid in Markdown; a documentation page can take its parts by name (`<!-- --8<-- [start:findings] -->`)."""
    tables = _tables(analysis)
    told = findings(analysis)
    parts = [f"# {escape_markdown(analysis.ablation.question)}\n", f"{code_markdown(subtitle(analysis))}\n"]
    parts.append(_part("notes", [f"> {code_markdown(note)}\n" for note in notes(analysis)]))
    parts.append(_part("findings", [f"**{code_markdown(f.question)}** {code_markdown(f.answer)}\n" for f in told]))
    for name, title in (
        ("quality", "Perplexity and accuracy"),
        ("paper", "Beside the paper"),
        ("cost", "Stability and cost"),
        ("probes", "What else was measured"),
        ("missing", "Without figures"),
    ):
        if tables[name]:
            parts.append(f"## {title}\n")
            parts.append(_part(name, [_markdown(table) for table in tables[name]]))
    if figures:
        parts.append("## Figures\n")
        parts += [f"![{escape_markdown(figure.alternative)}](figures/{figure.name}.svg)\n" for figure in figures]
    parts.append("## Method\n")
    parts += [f"{code_markdown(paragraph)}\n" for paragraph in method(analysis)]
    parts.append("## Where it was measured\n")
    facts_lines = [f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in facts(analysis)]
    parts.append(_part("machine", ["\n".join(facts_lines) + "\n"]))
    parts.append(f"Repeat it:\n\n```bash\n{repeat(analysis)}\n```\n")
    return "\n".join(parts)


def render_grids(analyses: Sequence[AblationAnalysis], folder: str, prose: Mapping[str, str]) -> str:
    """Sections of a documentation page beside `folder`, one a grid: what it varied, what it found, its main tables.

    prose: text by grid that stands under its heading; figures are taken from `folder`/<grid>/figures.
    """
    parts = []
    for analysis in sorted(analyses, key=_order):
        grid, place = analysis.ablation.grid, f"{folder}/{analysis.ablation.folder.name}"
        tables = _tables(analysis)
        parts.append(f"## {escape_markdown(grid.replace('-', ' ').capitalize())} {{#{grid}}}\n")
        parts.append(f"*{code_markdown(analysis.ablation.question)}*\n")
        if grid in prose:
            parts.append(f"{prose[grid].strip()}\n")
        parts.append(f"{code_markdown(subtitle(analysis))}\n")
        parts += [f"> {code_markdown(note)}\n" for note in notes(analysis)]
        # How far figures reach is said once, above all grids; how many seeds there were is said here.
        told = [f for f in findings(analysis) if f.question != REACH]
        if told and told[0].question == analysis.ablation.question:
            parts.append(f"**Answer at this scale.** {code_markdown(told[0].answer)}\n")
            told = told[1:]
        parts += [f"**{code_markdown(f.question)}** {code_markdown(f.answer)}\n" for f in told]
        parts += [_markdown(table) for name in ("quality", "paper", "probes") for table in tables[name]]
        for name in ("difference", "axis"):
            for path in sorted((analysis.ablation.folder / "figures").glob(f"*-{name}.svg")):
                parts.append(f"![{_FIGURES[name]}: {escape_markdown(grid)}]({place}/figures/{path.name})\n")
        parts.append(f"[All tables, method and machine]({place}/results.md), [as CSV]({place}/results.csv).\n")
    return "\n".join(parts) or "No grid has been published yet.\n"


def _tables(analysis: AblationAnalysis) -> dict[str, list[Table]]:
    """Those of the page, the widest of them narrowed."""
    sections = [section for section in analysis.ablation.sections if analysis.of(section)]
    return grid_tables(analysis) | {"quality": [narrow_table(analysis, section) for section in sections]}


_FIGURES = {
    "difference": "Differences to the reference with their intervals",
    "axis": "Perplexity along the grid's axis",
}


def _order(analysis: AblationAnalysis) -> tuple[int, str]:
    grid = analysis.ablation.grid
    return (ORDER.index(grid) if grid in ORDER else len(ORDER)), grid


def render_summary(analyses: Sequence[AblationAnalysis]) -> str:
    """A table over grids in Markdown, for the page that `render_grids` makes: what each asked and found."""
    lines = [
        (
            f"[{escape_markdown(analysis.ablation.grid)}](#{analysis.ablation.grid})",
            escape_markdown(analysis.ablation.question),
            code_markdown(headline(analysis)),
        )
        for analysis in sorted(analyses, key=_order)
    ]
    if not lines:
        return ""
    return markdown_table(["Grid", "Question", "Answer at this scale"], lines, right=[False] * 3)


def _part(name: str, lines: Sequence[str]) -> str:
    return "\n".join([f"<!-- --8<-- [start:{name}] -->\n", *lines, f"<!-- --8<-- [end:{name}] -->\n"])


def _markdown(table: Table) -> str:
    lines = [[code_markdown(cell) for cell in line] for line in table.lines]
    headings = [escape_markdown(f"{h.text} ({h.unit})" if h.unit else h.text) for h in table.headings]
    headings = [
        code_markdown(h.text) if "`" in h.text else made for h, made in zip(table.headings, headings, strict=True)
    ]
    return f"*{escape_markdown(table.caption)}.*\n\n" + markdown_table(
        headings, lines, right=[h.number for h in table.headings]
    )
