"""The page: one HTML file with its data, figures, style and scripts inside, and the same in Markdown.

Every text from the results goes through Jinja's autoescape; JSON inside the page has <, > and & written as escapes.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from recollect.reports import contents
from recollect.reports.analysis import Analysis
from recollect.reports.drawing import Figure
from recollect.reports.findings import findings
from recollect.reports.rows import SHOWN, escape_markdown, markdown_table, shown
from recollect.reports.style import marks, svg_path
from recollect.reports.tables import Heading

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class _WholeCell:
    value: str  # what the table sorts by
    text: str
    kind: str


def code(text: object) -> Markup:
    """Escapes a text, then sets what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def json_for_html(value: Any) -> Markup:
    """JSON that may stand inside a script element whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


@cache
def bundle() -> Markup:
    """Vega, Vega-Lite and vega-embed as one script, from vl-convert."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return Markup(bundle.replace("</script", "<\\/script"))


def render_html(analysis: Analysis, figures: Sequence[Figure], stills: Mapping[str, str]) -> str:
    """The page as text. stills: SVG text by figure name, shown where scripts do not run."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = code
    template = environment.get_template("report.html.j2")
    tables = contents.tables(analysis)
    return template.render(
        **_text(analysis),
        tables=tables,
        figures=[
            {**embedded(figure, stills), "crossovers": [n for n in tables if n.partition(":")[2] == figure.name]}
            for figure in figures
        ],
        whole=_whole(analysis),
        curves=bool(analysis.results.curves),
        sizes=sorted({r.cell.memory_size for r in analysis.rows}),
        statuses=sorted({r.cell.status for r in analysis.rows}),
        css=asset("report.css"),
        script=asset("report.js"),
        bundle=bundle(),
        specifications=json_for_html({f.name: f.specification(standalone=False) for f in figures}),
    )


def _text(analysis: Analysis) -> dict[str, Any]:
    run = analysis.results.run
    return {
        "findings": findings(analysis),
        "notes": contents.notes(analysis),
        "subtitle": contents.subtitle(analysis),
        "corpus_name": contents.text(run, "corpus", "name"),
        "version": contents.text(run, "recollect_version"),
        "k": contents.text(run, "k"),
        "segment": contents.segment(analysis),
        "rules": contents.RULES,
        "cost_name": analysis.cost_name,
        "method": contents.method(analysis),
        "facts": contents.facts(run),
        "repeat": contents.repeat(run),
        "documents": contents.document_names(run),
    }


def asset(name: str) -> Markup:
    """A style or script of `templates`, to stand inside a page."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def embedded(figure: Figure, stills: Mapping[str, str]) -> dict[str, Any]:
    """What a template needs of a figure; `stills` holds each figure's SVG by name."""
    still = base64.b64encode(stills[figure.name].encode()).decode()
    legend = [
        {"backend": name, "colour": mark.colour, "path": svg_path(mark)}
        for name, mark in (marks(figure.backends) if figure.legend else {}).items()
    ]
    return {
        "name": figure.name,
        "title": figure.title,
        "short": figure.short or figure.title,
        "caption": figure.caption,
        "alternative": figure.alternative,
        "legend": legend,
        "still": Markup(f"data:image/svg+xml;base64,{still}"),
    }


def _whole(analysis: Analysis) -> dict[str, Any]:
    headings = [Heading(title, unit, digits is not None) for _, title, unit, digits in SHOWN]
    rows = []
    for row in analysis.rows:
        values = row.values()
        cells = []
        for name, _, _, digits in SHOWN:
            value = values[name]
            kind = "number" if digits is not None else {"spec": "spec", "reason": "text"}.get(name, "")
            plain = "" if value is None else str(value)
            cells.append(_WholeCell(plain, shown(value, digits), kind if not (kind == "text" and not plain) else ""))
        rows.append({"size": row.cell.memory_size, "status": row.cell.status, "cells": cells})
    return {"headings": headings, "rows": rows}


def render_markdown(analysis: Analysis, figures: Sequence[Figure]) -> str:
    """The findings, the advice, the whole table and where it was measured, as Markdown."""
    run = analysis.results.run
    parts = ["# Which index should hold the memory?\n", f"{escape_markdown(contents.subtitle(analysis))}\n"]
    for note in contents.notes(analysis):
        parts.append(f"> {code_markdown(note)}\n")
    for finding in findings(analysis):
        parts.append(f"**{finding.question}** {code_markdown(finding.answer)}\n")
    tables = contents.tables(analysis)
    rules = {"advice": f"{contents.RULES['size']} Time is that of {analysis.cost_name}."}
    rules |= {"ladder": contents.RULES["ladder"], "smallest": contents.RULES["footprint"]}
    for name, table in tables.items():
        parts.append(f"## {escape_markdown(table.caption)}\n")
        if name in rules:
            parts.append(f"{rules[name]}\n")
        lines = [[code_markdown(cell) for cell in line] for line in table.lines]
        parts.append(
            markdown_table([_heading(h) for h in table.headings], lines, right=[h.number for h in table.headings])
        )
    parts.append("## Figures\n")
    parts += [f"![{escape_markdown(figure.alternative)}](figures/{figure.name}.svg)\n" for figure in figures]
    parts.append("## Whole table\n")
    headings = [_heading(Heading(title, unit, digits is not None)) for _, title, unit, digits in SHOWN]
    lines = []
    for row in analysis.rows:
        values = row.values()
        lines.append([_cell_markdown(name, shown(values[name], digits)) for name, _, _, digits in SHOWN])
    parts.append(markdown_table(headings, lines, right=[digits is not None for *_, digits in SHOWN]))
    parts.append("## Method\n")
    parts += [f"{code_markdown(paragraph)}\n" for paragraph in contents.method(analysis)]
    parts.append("## What it was measured on\n")
    parts += [f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in contents.facts(run)]
    parts.append(f"\nRepeat it:\n\n```\n{contents.repeat(run)}\n```\n")
    return "\n".join(parts)


def _heading(heading: Heading) -> str:
    return escape_markdown(f"{heading.text} ({heading.unit})" if heading.unit else heading.text)


def _cell_markdown(name: str, text: str) -> str:
    if name == "spec":
        return code_markdown("`" + text.replace("`", "'") + "`")
    return escape_markdown(text)


def code_markdown(text: str) -> str:
    """Escapes a text except between backticks, where only what breaks a table has to go."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape_markdown(text)
    return "".join(
        "`" + part.replace("|", "\\|").replace("\n", " ") + "`" if i % 2 else escape_markdown(part)
        for i, part in enumerate(parts)
    )
