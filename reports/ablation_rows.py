"""The table of one grid: a row a section and variant, as CSV, on the page and in Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from recollect.reports.ablation_analysis import MEASURES, AblationAnalysis, Row
from recollect.reports.ablation_statistics import SeedInterval
from recollect.reports.contents import Heading, Table
from recollect.reports.rows import Value, shown

_FRONT = (
    *("section", "variant", "summary", "kind", "reference", "status", "reason", "seeds", "seeds_ok", "diverged"),
    *("perplexity", "perplexity_low", "perplexity_high"),
    *("perplexity_difference", "difference_low", "difference_high", "difference_text_low", "difference_text_high"),
    *("difference_percent", "percent_low", "percent_high"),
    *("accuracy", "accuracy_difference", "accuracy_low", "accuracy_high"),
)
_BACK = ("step_ms_ratio", "evaluation_tokens", "backend", "memory_size", "k", "machine")


def columns(analysis: AblationAnalysis) -> list[str]:
    """The columns of results.csv: the same for every grid, then the numbers of its probes and systems."""
    probes = sorted({name for row in analysis.rows for name in row.probes})
    middle = [name for f in MEASURES for name in (f.name, f"{f.name}_difference", f"{f.name}_low", f"{f.name}_high")]
    return [*_FRONT, *middle, *_BACK, *probes]


def values(row: Row) -> dict[str, Value]:
    """Column name to value; figures that were not measured are None."""
    found: dict[str, Value] = {
        "section": row.section,
        "variant": row.name,
        "summary": row.variant.summary,
        "kind": row.variant.kind,
        "reference": row.reference or "",
        "status": row.status,
        "reason": row.reason,
        "seeds": row.seeds,
        "seeds_ok": row.ok,
        "diverged": row.diverged,
    }
    found |= _named(row.perplexity, "perplexity", "perplexity_low", "perplexity_high")
    found |= _named(row.difference, "perplexity_difference", "difference_low", "difference_high")
    if row.difference is not None:
        found |= {"difference_text_low": row.difference.text_low, "difference_text_high": row.difference.text_high}
    found |= _named(row.percent, "difference_percent", "percent_low", "percent_high")
    found |= _named(row.accuracy, "accuracy", "", "")
    found |= _named(row.accuracy_difference, "accuracy_difference", "accuracy_low", "accuracy_high")
    for figure in MEASURES:
        if figure.name in row.figures:
            found[figure.name] = row.figures[figure.name].estimate
        difference = row.differences.get(figure.name)
        found |= _named(difference, *(f"{figure.name}_{end}" for end in ("difference", "low", "high")))
    own, gap, ratio = row.figures.get("step_ms"), row.differences.get("step_ms"), row.figures.get("step_ratio")
    if ratio is not None:
        found["step_ms_ratio"] = ratio.estimate
    elif own is not None and gap is not None and own.estimate > gap.estimate:
        found["step_ms_ratio"] = own.estimate / (own.estimate - gap.estimate)
    found["evaluation_tokens"] = row.evaluation.get("tokens")
    found |= {name: row.evaluation.get(name) for name in ("backend", "memory_size", "k", "machine")}
    found |= {name: value.estimate for name, value in row.probes.items()}
    return found


def _named(value: SeedInterval | None, middle: str, low: str, high: str) -> dict[str, Value]:
    if value is None:
        return {}
    found: dict[str, Value] = {middle: value.estimate}
    return found | ({low: value.low, high: value.high} if low else {})


def csv_text(analysis: AblationAnalysis) -> str:
    """The table as CSV; figures carry seven digits, missing ones are empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns(analysis), lineterminator="\n")
    writer.writeheader()
    for row in analysis.rows:
        writer.writerow({name: _text(value) for name, value in values(row).items()})
    return stream.getvalue()


def _text(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def signed(value: float | None, digits: int) -> str:
    """A number with its sign, a true minus; what rounds to nothing has none."""
    if value is None:
        return ""
    text = shown(abs(value), digits)
    return text if not text.strip("0.,") else ("+" if value > 0 else "−") + text


def ends(value: SeedInterval | None, digits: int) -> str:
    """'−1.20 to +0.30', empty where there is no interval."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{signed(value.low, digits)} to {signed(value.high, digits)}"


def _change(row: Row, name: str, digits: int) -> str:
    """A figure with its difference in brackets: '12.1 (+0.4; −0.1 to +0.9)'."""
    own, difference = row.figures.get(name), row.differences.get(name)
    if own is None:
        return ""
    text = shown(own.estimate, digits)
    if difference is None:
        return text
    between = ends(difference, digits) if difference.low != difference.high else ""
    return f"{text} ({signed(difference.estimate, digits)}{'; ' + between if between else ''})"


def quality_table(analysis: AblationAnalysis, section: str) -> Table:
    """Perplexity and accuracy of every variant, each with its difference to the reference."""
    lines = []
    for row in _rows(analysis, section):
        compared = row.reference is not None
        lines.append(
            (
                f"`{row.name}`",
                shown(row.perplexity.estimate if row.perplexity else None, 2),
                signed(row.percent.estimate, 1) if compared and row.percent else "" if compared else "reference",
                ends(row.percent, 1) if compared else "",
                shown(100 * row.accuracy.estimate if row.accuracy else None, 1),
                signed(100 * row.accuracy_difference.estimate, 2) if row.accuracy_difference else "",
                _scaled_ends(row.accuracy_difference),
                f"{row.ok} of {row.seeds}" + (f", {row.diverged} diverged" if row.diverged else ""),
                row.variant.summary,
            )
        )
    headings = (
        Heading("Variant"),
        Heading("Perplexity", "mean of seeds", True),
        Heading("Difference", "% of its reference", True),
        Heading("95 % interval", "%", True),
        Heading("Accuracy", "%", True),
        Heading("Difference", "points", True),
        Heading("95 % interval", "points", True),
        Heading("Seeds", "with figures"),
        Heading("What it is", prose=True),
    )
    return Table("Perplexity and next-token accuracy" + _where(analysis, section), headings, tuple(lines))


def narrow_table(analysis: AblationAnalysis, section: str) -> Table:
    """The same in fewer columns, for the width of a documentation page."""
    lines = []
    for row in _rows(analysis, section):
        change, points = "reference" if row.reference is None else "", ""
        if row.percent is not None:
            change = _with_ends(signed(row.percent.estimate, 1), ends(row.percent, 1))
        if row.accuracy_difference is not None:
            points = _with_ends(
                signed(100 * row.accuracy_difference.estimate, 1), _scaled_ends(row.accuracy_difference, 1)
            )
        lines.append(
            (
                f"`{row.name}`: {row.variant.summary}" if row.variant.summary else f"`{row.name}`",
                shown(row.perplexity.estimate if row.perplexity else None, 2),
                change,
                shown(100 * row.accuracy.estimate if row.accuracy else None, 1),
                points,
                f"{row.ok} of {row.seeds}" + (f", {row.diverged} diverged" if row.diverged else ""),
            )
        )
    headings = (
        Heading("Variant", prose=True),
        Heading("Perplexity", "", True),
        Heading("Difference", "%, 95 % interval", True),
        Heading("Accuracy", "%", True),
        Heading("Difference", "points, 95 % interval", True),
        Heading("Seeds"),
    )
    return Table("Perplexity and next-token accuracy" + _where(analysis, section), headings, tuple(lines))


def _with_ends(middle: str, between: str) -> str:
    return f"{middle} ({between})" if between else middle


def _scaled_ends(value: SeedInterval | None, digits: int = 2) -> str:
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{signed(100 * value.low, digits)} to {signed(100 * value.high, digits)}"


def cost_table(analysis: AblationAnalysis, section: str) -> Table:
    """Stability and cost, each with its difference to the reference over seeds in brackets."""
    present = [f for f in MEASURES if any(f.name in row.figures for row in analysis.of(section))]
    # What is the same everywhere says nothing in a table of differences; results.csv has it.
    told = [
        f for f in present if len({round(r.figures[f.name].estimate, 9) for r in _with(analysis, section, f.name)}) > 1
    ]
    lines = tuple(
        (f"`{row.name}`", *(_change(row, f.name, f.digits) for f in told)) for row in analysis.of(section) if told
    )
    headings = (Heading("Variant"), *(Heading(f.title, f.unit, True) for f in told))
    return Table("Stability and cost" + _where(analysis, section), headings, lines)


def probe_table(analysis: AblationAnalysis, section: str) -> Table:
    """What probes and systems measured besides, a row a number and a column a variant."""
    rows = [row for row in analysis.of(section) if row.probes]
    names = list(dict.fromkeys(name for row in rows for name in row.probes))
    lines = tuple((name.replace("_", " "), *(_probe(row.probes.get(name)) for row in rows)) for name in names)
    headings = (Heading("Figure"), *(Heading(f"`{row.name}`", "", True) for row in rows))
    return Table("What else was measured" + _where(analysis, section), headings, lines)


def _probe(value: SeedInterval | None) -> str:
    if value is None:
        return ""
    digits = 3 if abs(value.estimate) < 100 else 0
    return shown(value.estimate, digits)


def missing_table(analysis: AblationAnalysis) -> Table:
    """Every variant with seeds that have no figures, and why."""
    grouped: dict[tuple[str, str, str, str], list[int]] = {}
    for section in analysis.ablation.sections:
        for variant in analysis.ablation.variants:
            for seed in analysis.ablation.seeds:
                row = analysis.ablation.rows.get((section, variant.name, seed))
                if row is None or not row.ok:
                    status, reason = ("missing", "") if row is None else (row.status, row.reason)
                    grouped.setdefault((section, variant.name, status, reason or "not run yet"), []).append(seed)
    lines = tuple(
        (section, f"`{name}`", ", ".join(map(str, seeds)), status, reason.replace("`", "'"))
        for (section, name, status, reason), seeds in grouped.items()
    )
    headings = (Heading("Text"), Heading("Variant"), Heading("Seeds"), Heading("Status"), Heading("Why", prose=True))
    return Table("Seeds without figures", headings, lines)


def _rows(analysis: AblationAnalysis, section: str) -> Sequence[Row]:
    return [row for row in analysis.rows if row.section == section]


def _with(analysis: AblationAnalysis, section: str, name: str) -> list[Row]:
    return [row for row in analysis.of(section) if name in row.figures]


def _where(analysis: AblationAnalysis, section: str) -> str:
    return f" on {section}" if section and len(analysis.ablation.sections) > 1 else ""
