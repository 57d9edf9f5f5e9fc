"""Figures of search time against what was found: the whole curve of each build, and the Pareto fronts of all points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import altair as alt

from recollect.reports.curves import front_of, time_points
from recollect.reports.drawing import (
    HEIGHT,
    Figure,
    Record,
    Style,
    data,
    domain_of,
    found_axis,
    log_axis,
    memory_title,
    tips,
)
from recollect.reports.pareto import pareto_front

if TYPE_CHECKING:
    from recollect.reports.analysis import Analysis

NAMES = {"recall": "Recall at k", "share": "Share of exact's softmax mass"}
TIPS = ("spec", "size", "recall", "mass", "share", "ms", "ratio")


def curves(analysis: Analysis, backends: Sequence[str]) -> Figure | None:
    """Recall against search time, a line for each build and a panel for each memory size."""
    if not analysis.results.curves:
        return None
    records = _records(analysis, "recall")
    style = Style(backends)
    x, y = _axes(records, "recall")
    panels = []
    for size in analysis.results.memory_sizes:
        here = [r for r in records if r["size"] == size]
        base = alt.Chart(data(here)).encode(x=x, y=y, color=style.colour)
        best = [r for build in dict.fromkeys(r["build"] for r in here) for r in _own_front(here, build)]
        for entry in here:
            entry["best"] = entry in best
        lines = base.transform_filter("datum.best").mark_line(strokeWidth=1.6)
        lines = lines.encode(detail="build:N", order="ms:Q", opacity=style.opacity(0.75))
        marks = base.encode(shape=style.shape, tooltip=tips(*TIPS))
        beaten = marks.transform_filter("!datum.best").mark_point(size=30).encode(opacity=style.opacity(0.45))
        points = marks.transform_filter("datum.best").mark_point(filled=True, size=50).encode(opacity=style.opacity())
        panels.append(alt.layer(lines, beaten, points).properties(height=HEIGHT + 30, title=memory_title(size)))
    builds = {(r["build"], r["size"]) for r in records}
    return Figure(
        "curves",
        "Recall against search time",
        "Each line is one built index, searched with one search option after another: nothing was built anew. It joins "
        "the settings that no other of the same index beats; hollow marks are those that one does. Upper left is best: "
        "quick and complete. The axis of recall is stretched towards 1, that of time is "
        "logarithmic. All settings of an index were timed in turns beside exact search.",
        f"{len(records)} points on {len(builds)} curves in {len(panels)} panels, one per memory size; the table of "
        "quickest specs for a wanted recall follows, and curves.csv holds every point.",
        tuple(panels),
        tuple(b for b in backends if any(r["backend"] == b for r in records)),
        short="Curves",
    )


def _own_front(records: Sequence[Record], build: str) -> list[Record]:
    return pareto_front((r for r in records if r["build"] == build), lambda r: r["ms"], lambda r: r["missed"])


def front(analysis: Analysis, backends: Sequence[str], field: str) -> Figure | None:
    """Search time against 'recall' or 'share' of all points, the Pareto front marked, a panel for each memory size.

    'share' is that of the softmax mass which exact search's neighbours hold.
    """
    records = _records(analysis, field)
    if not records:
        return None
    style = Style(backends)
    x, y = _axes(records, field)
    points = time_points(analysis)
    panels = []
    for size in analysis.results.memory_sizes:
        here = [r for r in records if r["size"] == size]
        best = {p.spec for p in front_of(tuple(p for p in points if p.memory_size == size), field)}
        for entry in here:
            entry["front"] = entry["spec"] in best
        joined = sorted((r for r in here if r["front"]), key=lambda r: float(r["ms"]))
        base = alt.Chart(data(here)).encode(x=x, y=y, color=style.colour, shape=style.shape, tooltip=tips(*TIPS))
        line = (
            alt.Chart(data(joined))
            .mark_line(color="#555555", interpolate="step-after", strokeDash=[5, 3], strokeWidth=1.5)
            .encode(x=x, y=y)
        )
        hollow = base.transform_filter("!datum.front").mark_point(size=45).encode(opacity=style.opacity(0.7))
        full = base.transform_filter("datum.front").mark_point(filled=True, size=110).encode(opacity=style.opacity())
        panels.append(alt.layer(line, hollow, full).properties(height=HEIGHT, title=memory_title(size)))
    against, name = ("recall", "recall") if field == "recall" else ("softmax mass", "mass")
    curved = "every setting of every curve" if analysis.results.curves else "every spec"
    return Figure(
        f"pareto-{name}",
        f"Pareto front: search time against {against}",
        f"Of {curved}. Filled marks joined by the dashed line form the front: nothing else is both quicker and finds "
        "more. Hollow marks are beaten by one on the front. The axis is stretched towards 1."
        + (" All of it is what the true k best neighbours hold." if name == "mass" else ""),
        f"Search time against {against} of {len(records)} points, a panel per memory size, the Pareto front marked.",
        tuple(panels),
        tuple(b for b in backends if any(r["backend"] == b for r in records)),
        short=f"Pareto: {against}",
    )


def _records(analysis: Analysis, field: str) -> list[Record]:
    records = []
    for point in time_points(analysis):
        found = getattr(point, field)
        if found is not None:
            records.append({**asdict(point), "size": point.memory_size, "missed": 1 - min(1.0, found)})
    return records


def _axes(records: Sequence[Record], field: str) -> tuple[Any, Any]:
    domain = domain_of([r["ms"] for r in records], log=True)
    x = log_axis(alt.X, "ms", "Search (ms per segment)", domain)
    return x, found_axis("missed", NAMES[field], [r["missed"] for r in records], channel=alt.Y)
