"""Tables of times: the quickest spec for a wanted recall, and latency as a distribution with the machine's noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recollect.reports.advice import plain
from recollect.reports.crossover import INSTRUMENTS
from recollect.reports.curves import quickest_reaching, time_points
from recollect.reports.rows import Row, shown
from recollect.reports.tables import Heading, Table

if TYPE_CHECKING:
    from recollect.reports.analysis import Analysis


def reaching(analysis: Analysis) -> Table:
    """At each memory size, the quickest point that reaches a recall: of curves alone, since those were timed alike."""
    lines = []
    if analysis.results.curves:
        for reached in quickest_reaching(time_points(analysis), analysis.results.memory_sizes):
            point = reached.point
            if point is None:
                lines.append(
                    (f"{reached.memory_size:,}", f"{reached.recall:g}", "nothing reaches it", "", "", "", "", "")
                )
                continue
            interval = ""
            if point.ratio_low is not None and point.ratio_high is not None:
                interval = f"{shown(point.ratio_low, 2)} to {shown(point.ratio_high, 2)}"
            lines.append(
                (
                    f"{reached.memory_size:,}",
                    f"{reached.recall:g}",
                    f"`{plain(point.spec)}`",
                    shown(point.recall, 4),
                    shown(point.mass, 4),
                    shown(point.ms, 2),
                    shown(point.ratio, 2),
                    interval + (" (noisy)" if point.noisy else ""),
                )
            )
    headings = (
        Heading("Memory size", "keys", True),
        Heading("Wanted recall", "at least", True),
        Heading("Quickest"),
        Heading("Recall", "", True),
        Heading("Softmax mass", "", True),
        Heading("Search", "ms per segment", True),
        Heading("Time", "exact = 1", True),
        Heading("of it", "95 % interval", True),
    )
    return Table("The quickest search that reaches a recall, appends not counted", headings, tuple(lines))


def latency(analysis: Analysis) -> Table:
    """Search and append as distributions, quickest search first at each size, with the reference beside them."""
    rows = [r for r in analysis.measured if r.cell.search_ms_p99 is not None and r.cell.backend not in INSTRUMENTS]
    rows.sort(key=lambda r: (r.cell.memory_size, r.cell.search_ms_p50 or 0.0))
    headings = (
        Heading("Memory size", "keys", True),
        Heading("Machine"),
        Heading("Spec"),
        Heading("Search p50", "ms", True),
        Heading("p95", "ms", True),
        Heading("p99", "ms", True),
        Heading("Cold", "ms", True),
        Heading("First", "ms", True),
        Heading("Append p50", "ms", True),
        Heading("p95", "ms", True),
        Heading("p99", "ms", True),
        Heading("Reference", "ms", True),
        Heading("Searches", "", True),
    )
    return Table("Search and append of one segment over all memories", headings, tuple(_latency_line(r) for r in rows))


def _latency_line(row: Row) -> tuple[str, ...]:
    cell = row.cell
    times = (cell.search_ms_p50, cell.search_ms_p95, cell.search_ms_p99, cell.search_ms_cold, cell.search_first_ms)
    appends = (cell.append_ms_p50, cell.append_ms_p95, cell.append_ms_p99, cell.reference_ms)
    return (
        f"{cell.memory_size:,}",
        "" if cell.noisy is None else "noisy" if cell.noisy else "quiet",
        f"`{plain(cell.spec)}`",
        *(shown(value, 2) for value in (*times, *appends)),
        shown(cell.searches, 0),
    )


def noise_note(analysis: Analysis) -> str:
    """What a reader must know where the machine was not quiet; empty where it was, or where nobody looked."""
    cells = [row.cell for row in analysis.measured if row.cell.noisy is not None]
    noisy = [cell for cell in cells if cell.noisy]
    points = [point for point in analysis.results.curves if point.noisy is not None]
    noisy_points = sum(bool(point.noisy) for point in points)
    if not noisy and not noisy_points:
        return ""
    return (
        f"The machine was noisy: a fixed reference operation timed beside the searches varied in {len(noisy)} of "
        f"{len(cells)} measurements"
        + (f" and {noisy_points} of {len(points)} points of curves" if points else "")
        + ". Recall and perplexity stand; small differences of times do not. For times to go by, compare again on an "
        "idle machine, into a new folder."
    )
