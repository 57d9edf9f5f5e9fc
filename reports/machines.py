"""Results that come from several machines: which of their times may stand in one ratio, and what is said of the others.

Machines of one kind still differ. A fixed reference operation is timed beside every cell's searches: where it takes
another time on one machine than on the machine that measured most, that machine's times are left out, since a ratio
over them would compare machines, not indexes. What does not depend on speed (recall, perplexity, bytes) stays.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.reports.results import Cell

ALIKE = 1.15
"""Reference operations whose times differ by no more than this factor are taken for those of equally fast machines."""

TIMES = (
    "search_ms",
    "search_ms_low",
    "search_ms_high",
    "search_ms_p50",
    "search_ms_p95",
    "search_ms_p99",
    "search_ms_cold",
    "search_first_ms",
    "append_us_per_key",
    "append_ms_p50",
    "append_ms_p95",
    "append_ms_p99",
    "build_seconds",
    "stalled_seconds",
)
"""Figures of a cell that depend on how fast its machine is."""


@dataclass(frozen=True)
class Machines:
    """Where the cells of a run were measured.

    cells: how many cells each machine measured, the one with most first. reference_ms: median time of the reference
    operation on it, where it was taken. apart: machines whose times are left out, and why.
    """

    cells: Mapping[str, int]
    reference_ms: Mapping[str, float]
    apart: Mapping[str, str]

    @property
    def home(self) -> str | None:
        """The machine whose times the others' are held against."""
        return next(iter(self.cells), None)


NO_MACHINES = Machines({}, {}, {})
"""Of results that do not say where they were measured."""


def machine_of(content: Mapping[str, Any]) -> str | None:
    """The machine that a cell's file names."""
    provenance = content.get("provenance")
    found = provenance.get("host") if isinstance(provenance, Mapping) else None
    return found if isinstance(found, str) and found else None


def judge_machines(cells: Sequence[Cell]) -> Machines:
    """Compares the machines of the measured cells by their reference operation."""
    measured = [cell for cell in cells if cell.ok and cell.machine]
    counts = Counter(str(cell.machine) for cell in measured)
    order = sorted(counts, key=lambda name: (-counts[name], name))
    times = {
        name: statistics.median(found)
        for name in order
        if (found := [cell.reference_ms for cell in measured if cell.machine == name and cell.reference_ms])
    }
    apart = {}
    home = next((name for name in order if name in times), None)
    for name in times:
        assert home is not None
        ratio = times[name] / times[home]
        if not 1 / ALIKE <= ratio <= ALIKE:
            apart[name] = (
                f"times left out: measured on {name}, where the reference operation takes {ratio:.2f} times as long as "
                f"on {home}"
            )
    return Machines({name: counts[name] for name in order}, times, apart)


def without_times(cell: Cell, machines: Machines) -> Cell:
    """The cell as it may stand beside the others: without times, with the reason, where its machine stands apart."""
    reason = machines.apart.get(cell.machine or "")
    if reason is None:
        return cell
    streaming = cell.streaming
    if streaming is not None:
        streaming = dataclasses.replace(streaming, append_us=None, search_ms=None)
    blank: dict[str, Any] = dict.fromkeys(TIMES)
    return dataclasses.replace(cell, reason=reason, streaming=streaming, **blank)


def machine_notes(machines: Machines) -> list[str]:
    """What a reader must know where cells come from several machines; empty where they come from one."""
    if len(machines.cells) < 2:
        return []
    counts = ", ".join(f"{name} ({count} cells)" for name, count in machines.cells.items())
    text = f"The cells were measured on {len(machines.cells)} machines: {counts}. "
    together = [name for name in machines.cells if name not in machines.apart]
    spread = [machines.reference_ms[name] for name in together if name in machines.reference_ms]
    if len(together) > 1 and spread:
        text += (
            f"Times of {', '.join(together)} are set against each other: they are of one kind, and a fixed reference "
            f"operation timed on each differs by {100 * (max(spread) / min(spread) - 1):.0f} %, so read differences "
            "below that as none. "
        )
    if machines.apart:
        text += (
            f"Times of {', '.join(machines.apart)} are compared with none, since the reference operation takes another "
            f"time there than on {machines.home}; recall and perplexity stand."
        )
    return [text.strip()]
