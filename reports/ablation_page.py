"""The page of one grid, the same in Markdown, and the page over all grids."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recollect.reports.ablation_analysis import AblationAnalysis
from recollect.reports.ablation_findings import findings, headline
from recollect.reports.ablation_paper import comparisons, paper_table
from recollect.reports.ablation_rows import cost_table, missing_table, probe_table, quality_table, values
from recollect.reports.ablation_statistics import RESAMPLES
from recollect.reports.contents import UNKNOWN, Heading, Table, text
from recollect.reports.drawing import Figure
from recollect.reports.page import TEMPLATES, asset, bundle, code, embedded, json_for_html
from recollect.reports.rows import shown

# Column of results.csv, heading and unit, and digits after the point (None: as it stands).
WHOLE: tuple[tuple[str, str, str, int | None], ...] = (
    ("section", "Text", "", None),
    ("variant", "Variant", "", None),
    ("kind", "Kind", "", None),
    ("status", "Status", "", None),
    ("seeds_ok", "Seeds", "with figures", 0),
    ("perplexity", "Perplexity", "", 3),
    ("perplexity_difference", "Difference", "perplexity", 3),
    ("difference_percent", "Difference", "%", 2),
    ("percent_low", "from", "%, 95 %", 2),
    ("percent_high", "to", "%, 95 %", 2),
    ("accuracy", "Accuracy", "share", 4),
    ("accuracy_difference", "Difference", "share", 4),
    ("spikes", "Loss spikes", "per training", 2),
    ("gradient_norm_max", "Gradient norm", "largest", 2),
    ("step_ms", "Training step", "ms", 1),
    ("evaluation_us_per_token", "Evaluation", "µs per token", 1),
    ("memory_bytes", "Memory", "bytes per sequence", 0),
    ("backend", "Backend", "at evaluation", None),
    ("memory_size", "Memory size", "keys", 0),
    ("k", "k", "", 0),
    ("reason", "Reason", "", None),
)


@dataclass(frozen=True)
class _Cell:
    value: str
    text: str
    kind: str


def grid_tables(analysis: AblationAnalysis) -> dict[str, list[Table]]:
    """The tables by place on the page; those without lines are left out."""
    sections = [section for section in analysis.ablation.sections if analysis.of(section)]
    made = {
        "quality": [quality_table(analysis, section) for section in sections],
        "paper": [paper_table(found)] if (found := comparisons(analysis)) else [],
        "cost": [cost_table(analysis, section) for section in sections],
        "probes": [probe_table(analysis, section) for section in sections],
        "missing": [missing_table(analysis)],
    }
    return {name: [table for table in tables if table.lines] for name, tables in made.items()}


def render_grid(analysis: AblationAnalysis, figures: Sequence[Figure], stills: Mapping[str, str]) -> str:
    """The page of one grid. stills: SVG text by figure name, shown where scripts do not run."""
    rows = []
    for row in analysis.rows:
        found = values(row)
        cells = []
        for name, _, _, digits in WHOLE:
            value = found.get(name)
            kind = "number" if digits is not None else {"variant": "spec", "reason": "text"}.get(name, "")
            plain = "" if value is None else str(value)
            cells.append(_Cell(plain, shown(value, digits), kind if plain or kind != "text" else ""))
        rows.append({"size": row.section, "status": row.status, "cells": cells})
    whole = {"headings": [Heading(title, unit, digits is not None) for _, title, unit, digits in WHOLE], "rows": rows}
    return _template("ablation.html.j2").render(
        grid=analysis.ablation.grid,
        subtitle=subtitle(analysis),
        findings=findings(analysis),
        notes=notes(analysis),
        tables=grid_tables(analysis),
        figures=[embedded(figure, stills) for figure in figures],
        whole=whole,
        sections=analysis.ablation.sections,
        statuses=sorted({row.status for row in analysis.rows}),
        method=method(analysis),
        facts=facts(analysis),
        repeat=repeat(analysis),
        version=text(analysis.ablation.run, "recollect_version"),
        css=asset("report.css"),
        script=asset("report.js"),
        bundle=bundle(),
        specifications=json_for_html({f.name: f.specification(standalone=False) for f in figures}),
    )


def render_index(analyses: Sequence[AblationAnalysis]) -> str:
    """The page over several grids: what each asked and found, with the way to its page."""
    grids = [
        {
            "name": analysis.ablation.grid,
            "folder": analysis.ablation.folder.name,
            "question": analysis.ablation.question,
            "answer": headline(analysis),
            "paper": next((f.answer for f in findings(analysis) if f.question.startswith("Does it agree")), ""),
            "subtitle": subtitle(analysis),
            "notes": notes(analysis),
        }
        for analysis in analyses
    ]
    version = text(analyses[0].ablation.run, "recollect_version") if analyses else UNKNOWN
    return _template("ablations.html.j2").render(grids=grids, css=asset("report.css"), version=version)


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = code
    return environment.get_template(name)


def subtitle(analysis: AblationAnalysis) -> str:
    """One line: how much was run, at which scale, on what."""
    ablation = analysis.ablation
    seeds, variants = len(ablation.seeds), len(ablation.variants)
    texts = ", ".join(ablation.sections)
    return (
        f"{variants} variants, {seeds} {'seed' if seeds == 1 else 'seeds'}, scale `{text(ablation.run, 'scale')}`, on "
        f"{texts or UNKNOWN}, measured on {text(ablation.run, 'machine', 'cpu')}."
    )


def notes(analysis: AblationAnalysis) -> list[str]:
    """What a reader must know before trusting the figures."""
    ablation = analysis.ablation
    found = []
    planned = len(ablation.sections) * len(ablation.variants) * len(ablation.seeds)
    run = sum(row.status != "missing" for row in ablation.rows.values())
    if not ablation.run.get("finished", True) or run < planned:
        found.append("This grid is not finished: what stands here is what was run so far.")
    alone = [row for row in analysis.measured if row.reference is not None and row.percent is None]
    waiting = [row for row in alone if row.reference and analysis.row(row.section, row.reference) is None]
    if waiting:
        references = ", ".join(f"`{name}`" for name in dict.fromkeys(str(row.reference) for row in waiting))
        found.append(f"The reference ({references}) has no figures yet, so nothing can be compared with it.")
    without = [row.name for row in alone if row not in waiting]
    if without:
        found.append(
            "No difference can be taken for "
            + ", ".join(f"`{name}`" for name in dict.fromkeys(without))
            + ": they share no text or no seed with their reference."
        )
    if analysis.measured and max(row.ok for row in analysis.measured) == 1:
        found.append("One seed was run: the intervals speak of the text alone, and another seed may turn a difference.")
    jobs = ablation.run.get("jobs")
    if isinstance(jobs, int) and jobs > 1 and not analysis.timed_apart and analysis.measured:
        found.append(f"Times were taken while {jobs} runs shared the machine: they are rough.")
    machines = ablation.run.get("machines")
    if isinstance(machines, Mapping) and len(machines) > 1:
        found.append(
            f"The rows were trained on {len(machines)} machines: seconds of one are not set against those of another. "
            "Ratios of step times are: each is of two models timed in turn by one process."
        )
    tokens, documents, block = analysis.text
    if tokens and tokens // block < 60:
        found.append(f"The text is short ({tokens:,} tokens of {documents} documents): the intervals are rough.")
    return found + [str(note) for note in ablation.run.get("notes") or []]


def method(analysis: AblationAnalysis) -> list[str]:
    """How the figures came about, in paragraphs."""
    tokens, documents, block = analysis.text
    paragraphs = []
    if tokens:
        paragraphs.append(
            f"Intervals: a hierarchical bootstrap of {RESAMPLES:,} replicates over seeds and text. Text: moving blocks "
            f"of {block} consecutive tokens within documents ({tokens:,} tokens of {documents} documents), since "
            "neighbouring losses depend on each other. Seeds: too few to be resampled, so their part is drawn from "
            "Student's t, with the spread of the seeds' differences pooled over the variants that have the same "
            "reference (those that share its checkpoint by themselves). A difference is paired by token and by seed: "
            "both variants' losses of a drawn token stand in the same replicate, and both were trained on the same "
            "tokens in the same order. The text part speaks of these documents, not of others."
        )
    paragraphs.append(
        "Perplexity is the exponential of the mean loss per token, taken for each seed and averaged over seeds. "
        "Accuracy is the share of tokens whose likeliest prediction was right. A difference in per cent is that of the "
        "perplexities against the variant's reference. A seed that diverged has no perplexity: it counts as diverged, "
        "and differences are over the seeds that both have."
    )
    rule = str(analysis.ablation.run.get("spike_rule") or "")
    paragraphs.append(
        "Stability and cost are figures of a run; their intervals are Student's, over seeds"
        + (f". A loss spike is {rule}" if rule else "")
        + ". Hard text makes spikes too, the same in every variant of a seed. Times hold for this machine."
    )
    return paragraphs


def facts(analysis: AblationAnalysis) -> list[tuple[str, str]]:
    """Where the figures come from, in pairs of name and value."""
    run = analysis.ablation.run
    libraries = run.get("libraries")
    listed = ", ".join(f"{k} {v}" for k, v in sorted(libraries.items())) if isinstance(libraries, Mapping) else UNKNOWN
    machine = f"{text(run, 'machine', 'cpu')}, {text(run, 'machine', 'cores')} cores, "
    machine += f"{text(run, 'machine', 'ram_gib')} GiB memory, {text(run, 'machine', 'os')}"
    sections = run.get("sections")
    texts = [
        f"{section.get('name')} ({section.get('corpus')}; digest {str(section.get('corpus_digest'))[:16]})"
        for section in (sections if isinstance(sections, list) else [])
        if isinstance(section, Mapping)
    ]
    commit = text(run, "commit") + (" with changes on top" if run.get("uncommitted_changes") else "")
    return [
        ("Machine", machine),
        *_machines(run),
        *((("GPU", text(run, "machine", "gpu")),) if text(run, "machine", "gpu") != UNKNOWN else ()),
        ("Python", text(run, "machine", "python")),
        ("recollect", f"{text(run, 'recollect_version')}, commit {commit}"),
        ("Libraries", listed),
        ("Threads", text(run, "threads")),
        *((("Mixed", "; ".join(map(str, run["mixed"]))),) if run.get("mixed") else ()),
        ("Date", text(run, "created")),
        ("Scale", text(run, "scale")),
        ("Seeds", ", ".join(map(str, analysis.ablation.seeds))),
        ("Texts", "; ".join(texts) or UNKNOWN),
    ]


def repeat(analysis: AblationAnalysis) -> str:
    """The command that measures this again."""
    run = analysis.ablation.run
    if isinstance(run.get("command"), str):
        return str(run["command"])
    parts = ["recollect", "ablate", analysis.ablation.grid, "--scale", text(run, "scale")]
    for section in run.get("sections") or []:
        if isinstance(section, Mapping):
            name, corpus = section.get("name"), section.get("corpus")
            parts += ["--corpus", str(corpus) if name == corpus else f"{name}={corpus}"]
    return shlex.join([*parts, "--seeds", str(len(analysis.ablation.seeds)), "--output", "out/again"])


def _machines(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machines by name and how many rows were trained on each, where there were several."""
    found = run.get("machines")
    if not isinstance(found, Mapping) or len(found) < 2:
        return []
    return [("Machines", ", ".join(f"{name}: {count} of the rows" for name, count in found.items()))]
