"""The page of a crossing: the answer in words, panels, tables and where it was measured. One HTML file, no script."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from recollect.reports.contents import Heading, Table
from recollect.reports.crossing import OUTCOMES
from recollect.reports.crossing_figure import Line, legend, panel
from recollect.reports.crossing_results import (
    COLUMNS,
    Case,
    CrossoverResults,
    IndexCrossing,
    answers,
    load_crossover,
    plural,
    rounded,
    row_of,
    sized_ratio,
)
from recollect.reports.files import write_text
from recollect.reports.page import TEMPLATES, asset, code

PAGE, TABLE = "crossover.html", "crossover.csv"

METHOD = (
    "Each index holds the same keys as exact search beside it, in full memories that were appended to for another "
    "three eighths of their capacity: indexes that are made of parts are then met with their newest keys not sealed "
    "yet and the oldest part half overwritten, as they nearly always are. Recall is the share of the true k nearest "
    "keys that were found, judged by score, on queries that come after every key and that had no part in choosing the "
    "search options.",
    "Times are taken in rounds: in each, exact search, the candidate options and a fixed matrix product are timed "
    "once, in another order each time. A ratio is the median over rounds of the index's time over exact search's in "
    "the same round, with the 95 % bootstrap interval of that median. Where several options were timed, other rounds "
    "decide which is the quickest than those that give its ratio.",
    "'Appends counted' adds to both sides what appending a step's keys takes, one key for each query, as measured "
    "over filling the memory, with all building done.",
    "Between measured sizes a crossing is interpolated on logarithmic axes; beyond the largest nothing is claimed. "
    "Its interval is where the ends of the ratios' intervals cross.",
)


def write_crossing_page(folder: str | Path) -> Path:
    """Writes crossover.html and crossover.csv beside crossover.json; returns the page.

    Raises:
        ReportError: there is no crossover.json, it is damaged, or the folder cannot be written.
    """
    folder = Path(folder)
    results = load_crossover(folder)
    write_text(folder / TABLE, csv_text(results))
    return write_text(folder / PAGE, render(results))


def csv_text(results: CrossoverResults) -> str:
    """Every row as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results.rows())
    return stream.getvalue()


def render(results: CrossoverResults) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = code
    run = results.run
    every = [one for case in results.cases for one in results.crossings(case)]
    groups = []
    for queries in run["queries"]:
        for recall in run["recalls"]:
            cases = [Case(queries, recall, appends) for appends in (False, True)]
            title = f"{plural(queries, 'query', 'queries')} a step, recall at least {recall:g}"
            groups.append({"title": title, "panels": [_panel(results, case) for case in cases]})
    return environment.get_template("crossing.html.j2").render(
        version=run["recollect_version"],
        subtitle=subtitle(run),
        answers=answers(results),
        notes=notes(results),
        legend=legend(_lines(results, None)),
        groups=groups,
        crossings=crossings_table(every),
        whole=whole_table(results),
        method=METHOD,
        facts=facts(run),
        repeat=repeat(run),
        css=Markup(asset("report.css") + asset("crossing.css")),
    )


def _lines(results: CrossoverResults, case: Case | None) -> list[Line]:
    """A line for each index; without ratios where no case is given."""
    lines, seen = [], dict[str, int]()
    for index in results.indexes:
        points = results.points_of(index)
        backend = str(points[0]["backend"])
        rows = [] if case is None else [(int(point["size"]), row_of(point, case)) for point in points]
        counted = case is not None and case.appends
        found = [sized_ratio(size, row, appends=counted) for size, row in rows if row is not None]
        ratios = [ratio for ratio in found if ratio is not None]
        lines.append(Line(index, backend, tuple(ratios), seen.get(backend, 0)))
        seen[backend] = seen.get(backend, 0) + 1
    return lines


def _panel(results: CrossoverResults, case: Case) -> dict[str, Any]:
    sizes = sorted({int(point["size"]) for point in results.points})
    title = "Searches and appends" if case.appends else "Searches alone"
    told = f"{title}: time over exact search's against memory size, {case.queries} queries, recall {case.recall:g}"
    return {"title": title, "svg": panel(_lines(results, case), sizes, title=told)}


def subtitle(run: Mapping[str, Any]) -> str:
    """What was asked."""
    memories = plural(run["memories"], "memory", "memories")
    return f"{memories}, k {run['k']}, dimension {run['dim']}; {run['keys']}. {run['machine']['cpu']}, {_threads(run)}."


def _threads(run: Mapping[str, Any]) -> str:
    return plural(run["threads"], "thread", "threads") + ("" if run["device"] == "cpu" else f", {run['device']}")


def notes(results: CrossoverResults) -> list[str]:
    """What a reader should know first."""
    run = results.run
    found = [f"`{index}` gave no answer or only a part: {reason}" for index, reason in run.get("failed", [])]
    noisy = sum(bool(row["noisy"]) for row in results.rows())
    if noisy:
        found.append(
            f"The machine was busy: in {noisy} of {len(results.rows())} measurements the fixed reference operation "
            "varied so much that small differences mean nothing. Ratios taken in turns bear this better than times; "
            "for exact sizes measure again on an idle machine."
        )
    fewer = sorted({int(p["size"]) for p in results.points if p["memories"] < run["memories"]})
    if fewer:
        found.append(
            f"Not all {run['memories']} memories were filled at some sizes (from {fewer[0]:,} keys on), to save time: "
            "exact search and an index both take as many times longer as there are more memories, so the ratio is "
            "theirs. Where a step's queries are so few that the cost of a call decides, that is not so, and those "
            "sizes were left out."
        )
    short = [index for index, reason in run.get("stopped", {}).items() if "into the time" in reason]
    if short:
        found.append(
            f"Larger memories were not tried for lack of time or of memory: {', '.join(f'`{one}`' for one in short)}. "
            "With more `--minutes` the same command goes on from here."
        )
    missing = run.get("not_installed") or {}
    if missing:
        found.append("Not measured: " + "; ".join(str(reason) for reason in missing.values()))
    return found


def crossings_table(every: list[IndexCrossing]) -> dict[str, Any]:
    """A line for each case and index."""
    headings = (
        Heading("Queries", number=True),
        Heading("Recall wanted", number=True),
        Heading("Counted"),
        Heading("Index"),
        Heading("Overtakes at", "keys", number=True),
        Heading("Interval", "keys"),
        Heading("Time over exact's", "at the largest size", number=True),
        Heading("Recall", number=True),
        Heading("Measured up to", "keys", number=True),
        Heading("In words", prose=True),
    )
    lines = []
    for one in every:
        found = one.crossing
        ratio = f"{found.ratio.value:.2f} ({found.ratio.low:.2f} to {found.ratio.high:.2f})" if found.ratio else "–"
        words = OUTCOMES[found.outcome] + (f"; ended since {one.stopped}" if one.stopped else "")
        lines.append(
            (
                f"{one.case.queries:,}",
                f"{one.case.recall:g}",
                "searches and appends" if one.case.appends else "searches",
                f"`{one.index}`",
                rounded(found.size) if found.size is not None else "–",
                " to ".join(rounded(end) if end is not None else "?" for end in (found.low, found.high))
                if found.overtakes
                else "–",
                ratio,
                f"{one.recall:.3f}",
                f"{one.largest:,}",
                words,
            )
        )
    return _as_table(
        Table("From which memory size on each index stays quicker than exact search", headings, tuple(lines))
    )


def whole_table(results: CrossoverResults) -> dict[str, Any]:
    """Every row."""
    headings = (
        Heading("Index"),
        Heading("Memory", "keys", number=True),
        Heading("Memories", number=True),
        Heading("Queries", number=True),
        Heading("Recall wanted", number=True),
        Heading("Quickest options"),
        Heading("Recall", number=True),
        Heading("Search", "ms a step", number=True),
        Heading("Exact", "ms a step", number=True),
        Heading("Ratio", number=True),
        Heading("Append", "ms a step", number=True),
        Heading("Exact's append", "ms a step", number=True),
        Heading("Ratio of both", number=True),
        Heading("Machine"),
    )
    lines = []
    for row in results.rows():
        reached = row["spec"] is not None
        lines.append(
            (
                f"`{row['index']}`",
                f"{row['memory_size']:,}",
                str(row["memories"]),
                f"{row['queries']:,}",
                f"{row['recall_wanted']:g}",
                f"`{row['spec']}`" if reached else "not reached",
                f"{row['recall']:.3f}",
                f"{row['search_ms']:.2f}" if reached else "–",
                f"{row['exact_ms']:.2f}",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})" if reached else "–",
                f"{row['append_ms']:.2f}",
                f"{row['exact_append_ms']:.2f}",
                f"{row['step_ratio']:.2f}" if reached else "–",
                "busy" if row["noisy"] else "quiet",
            )
        )
    caption = "Every measurement; a time is that of one step over all memories that were filled"
    return _as_table(Table(caption, headings, tuple(lines)), tall=True)


def _as_table(table: Table, *, tall: bool = False) -> dict[str, Any]:
    return {"caption": table.caption, "headings": table.headings, "lines": table.lines, "tall": tall}


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the figures come from."""
    machine = run["machine"]
    changed = " with changes on top" if run.get("uncommitted_changes") else ""
    return [
        ("Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB memory, {machine['os']}"),
        ("Threads", _threads(run)),
        ("Python", str(machine["python"])),
        ("recollect", f"{run['recollect_version']}, commit {run['commit'] or 'not stated'}{changed}"),
        ("Libraries", ", ".join(f"{name} {version}" for name, version in sorted(run["libraries"].items()))),
        ("Date", str(run["created"])),
        ("Seed", str(run["seed"])),
        ("Keys", str(run["keys"])),
        ("Time", f"{run['minutes']:g} minutes at most"),
    ]


def repeat(run: Mapping[str, Any]) -> str:
    """The command that measures this again."""
    parts = ["recollect", "crossover"]
    for name in ("memories", "k", "dim"):
        parts += [f"--{name}", str(run[name])]
    for name, option in (("queries", "--queries"), ("recalls", "--recall"), ("backends", "--backend")):
        for value in run.get(name) or ():
            parts += [option, str(value)]
    for name in ("keys_option", "min_keys", "max_keys", "minutes", "threads", "seed"):
        if run.get(name) is not None:
            value = run[name]
            parts += [
                f"--{name.removesuffix('_option').replace('_', '-')}",
                f"{value:g}" if name == "minutes" else str(value),
            ]
    return shlex.join([*parts, "--output", "out/again"])
