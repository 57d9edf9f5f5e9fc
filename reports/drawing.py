"""What the figures share: panels put together, marks, axes and tooltips, and drawing to SVG and PNG.

A figure is defined once, in Vega-Lite through altair: interactive in the page, and drawn to files by vl-convert.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import altair as alt

from recollect.reports.results import Cell
from recollect.reports.rows import Row
from recollect.reports.style import marks

Record = dict[str, Any]
PANEL = 400  # width of one panel in the files, in pixels; the page fits panels to its own width
HEIGHT = 270


@dataclass(frozen=True)
class Figure:
    """A figure before drawing.

    name: file name without suffix. title: heading. caption: how to read it. alternative: text for who cannot see it.
    panels: altair charts without width. columns: panels side by side where there is room.
    """

    name: str
    title: str
    caption: str
    alternative: str
    panels: tuple[Any, ...]
    backends: tuple[str, ...]
    columns: int = 2
    short: str = ""  # for the list of sections; by default the title
    legend: bool = True  # False where the axis names the backends

    @cached_property
    def _converted(self) -> tuple[list[Record], dict[str, list[Record]]]:
        """The panels as Vega-Lite JSON, and their data by name. Converting takes time, so it is done once."""
        made = [panel.to_dict() for panel in self.panels]
        datasets: dict[str, list[Record]] = {}
        for panel in made:
            packed = panel.pop("datasets", {})  # the names are digests: equal data of two panels are kept once
            datasets |= {name: json.loads(text) for name, text in packed.items()}
            for name in ("$schema", "config"):  # the schema is an address, which the page must not appear to load
                panel.pop(name, None)
        return made, datasets

    def specification(self, *, standalone: bool) -> Record:
        """Vega-Lite JSON. Standalone figures carry their title and a legend; the page has its own of both."""
        converted, datasets = self._converted
        panels = copy.deepcopy(converted)
        for panel in panels:
            panel["width"] = PANEL if len(panels) > 1 else 2 * PANEL
        _set_legends(panels, {"values": list(self.backends)} if standalone and self.legend else None)
        specification: Record = {
            "config": CONFIGURATION,
            "description": self.alternative,
            "params": [{"name": "chosen", "value": []}],
            "concat": panels,
            "columns": self.columns,
            "spacing": 28,
            "datasets": datasets,
        }
        if standalone:
            specification["title"] = {"text": self.title, "anchor": "start", "fontSize": 17, "offset": 14}
        return specification


CONFIGURATION: Record = {
    "background": "white",
    "font": "DejaVu Sans, Verdana, sans-serif",
    "padding": 8,
    "view": {"stroke": "#cccccc"},
    "axis": {
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "#e6e6e6",
        "titlePadding": 8,
    },
    "title": {"fontSize": 13, "fontWeight": "bold", "anchor": "start"},
    "legend": {
        "orient": "bottom",
        "direction": "horizontal",
        "columns": 6,
        "labelFontSize": 12,
        "symbolSize": 110,
        "symbolOpacity": 1,
        "offset": 18,
    },
}


def data(records: Iterable[Record]) -> Any:
    """Records as a chart's data, packed into one text: altair copies and checks a list item by item, many times."""
    return alt.InlineData(values=json.dumps(list(records), allow_nan=False), format=alt.DataFormat(type="json"))


def _set_legends(value: Any, legend: Record | None) -> None:
    """Gives every colour and shape channel of a specification this legend, or none, in place."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name in ("color", "shape") and isinstance(part, dict) and "field" in part:
                part["legend"] = legend
            _set_legends(part, legend)
    elif isinstance(value, list):
        for part in value:
            _set_legends(part, legend)


class Style:
    """The encodings that every figure shares."""

    def __init__(self, backends: Sequence[str]) -> None:
        known = marks(backends)
        domain, colours = list(known), [m.colour for m in known.values()]
        self.colour = alt.Color("backend:N", scale=alt.Scale(domain=domain, range=colours), title=None)
        shapes = alt.Scale(domain=domain, range=[m.shape for m in known.values()])
        self.shape = alt.Shape("backend:N", scale=shapes, title=None)

    def opacity(self, full: float = 1.0) -> Any:
        """Fades every backend but the chosen ones."""
        chosen = "chosen.length == 0 || indexof(chosen, datum.backend) >= 0"
        return alt.condition(chosen, alt.value(full), alt.value(0.06))


def record(row: Row) -> Record:
    """What figures and tooltips need of a row."""
    cell = row.cell
    return {
        "spec": cell.spec,
        "backend": cell.backend,
        "size": cell.memory_size,
        "recall": cell.recall_at_k,
        "mass": cell.softmax_mass,
        "share": _share_of_exact(cell),
        "perplexity": cell.perplexity,
        "perplexity_low": row.perplexity.low if row.perplexity else cell.perplexity,
        "perplexity_high": row.perplexity.high if row.perplexity else cell.perplexity,
        "difference": row.difference_point,
        "low": row.difference.low if row.difference else row.difference_point,
        "high": row.difference.high if row.difference else row.difference_point,
        "percent": row.percent,
        "ms": cell.search_ms,
        "ms_low": cell.search_ms_low if cell.search_ms_low is not None else cell.search_ms,
        "ms_high": cell.search_ms_high if cell.search_ms_high is not None else cell.search_ms,
    }


def _share_of_exact(cell: Cell) -> float | None:
    """Softmax mass as a share of what the true k best keys hold, which is the most that can be found."""
    if cell.softmax_mass is None:
        return None
    return min(1.0, cell.softmax_mass / (cell.softmax_mass_exact or 1.0))


_TIPS = {
    "spec": ("Spec", "N", None),
    "size": ("Memory size, keys", "Q", ",d"),
    "recall": ("Recall at k", "Q", ".3f"),
    "mass": ("Softmax mass", "Q", ".3f"),
    "share": ("Share of exact's mass", "Q", ".3f"),
    "perplexity": ("Perplexity", "Q", ".3f"),
    "difference": ("Difference to exact", "Q", "+.3f"),
    "low": ("95 % from", "Q", "+.3f"),
    "high": ("95 % to", "Q", "+.3f"),
    "ms": ("Search, ms per segment", "Q", ".3~f"),
    "ratio": ("Time, exact = 1", "Q", ".2f"),
    "bytes": ("Bytes per key", "Q", ",.0f"),
    "turnover": ("Times refilled", "Q", ".2f"),
    "append": ("Append, µs per key", "Q", ".3~f"),
}


def tips(*names: str) -> list[Any]:
    made = []
    for name in names:
        title, kind, form = _TIPS[name]
        made.append(alt.Tooltip(f"{name}:{kind}", title=title, format=form or alt.Undefined))
    return made


def domain_of(values: Iterable[float | None], *, log: bool = False, margin: float = 0.06) -> list[float]:
    """An axis range around the values, never of zero width."""
    known = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return [0.1, 1.0] if log else [0.0, 1.0]
    low, high = min(known), max(known)
    if log:
        room = max((high / low) ** margin, 1.08)
        return [low / room, high * room]
    room = (high - low) * margin or max(abs(high) * margin, 0.01)
    return [low - room, high + room]


def log_ticks(domain: Sequence[float]) -> list[float]:
    """1, 2, 5 within the range, or powers of ten where it spans more than three decades."""
    steps = (1, 2, 5) if domain[1] / domain[0] < 1000 else (1,)
    decades = range(math.floor(math.log10(domain[0])) - 1, math.ceil(math.log10(domain[1])) + 1)
    return [float(f"{s}e{d}") for d in decades for s in steps if domain[0] <= s * 10.0**d <= domain[1]]


def log_axis(channel: Callable[..., Any], field: str, title: str, domain: list[float]) -> Any:
    axis = alt.Axis(values=log_ticks(domain), format="~g", labelOverlap=True)
    return channel(f"{field}:Q", title=title, scale=alt.Scale(type="log", domain=domain, nice=False), axis=axis)


# Squares of even steps on a square-root scale: most indexes lie close to exact, where a linear scale heaps them up.
_MISSES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)


def found_axis(field: str, title: str, values: Sequence[float], *, channel: Callable[..., Any] = alt.X) -> Any:
    """A share found (0 to 1), drawn as the share missed (`field`) on a square-root scale, most found last."""
    largest = max([*values, 0.02]) * 1.06
    ticks = [m for m in _MISSES if m <= largest]
    axis = alt.Axis(values=ticks, labelExpr="format(1 - datum.value, '~g')", labelOverlap=True)
    scale = alt.Scale(type="sqrt", domain=[largest, -0.0015 * largest], nice=False)
    return channel(f"{field}:Q", title=title, scale=scale, axis=axis)


# Differences within this much are of no interest to anyone, and must not be blown up to fill a panel.
NOTHING = (-0.01, 0.01)


def above_exact(values: Iterable[float]) -> tuple[Any, Any]:
    """Channel and scale of the perplexity above exact, on a square-root scale with both signs."""
    low, high = domain_of([*values, *NOTHING], margin=0.08)
    ticks = [sign * s * 10.0**d for sign in (-1, 1) for d in range(-3, 4) for s in (1, 2, 5)]
    step = max(high, -low) / 30
    ticks = [0.0, *(t for t in sorted(ticks) if low <= t <= high and abs(t) >= step)]
    scale = alt.Scale(type="sqrt", domain=[low, high], nice=False)
    label = "datum.value == 0 ? '0' : format(datum.value, '+~g')"
    axis = alt.Axis(values=ticks, labelExpr=label, labelOverlap=True)
    return alt.Y("difference:Q", title="Perplexity above exact", scale=scale, axis=axis), scale


def size_axis(sizes: Sequence[int]) -> Any:
    axis = alt.Axis(values=list(sizes), format=",d", labelOverlap=True)
    scale = alt.Scale(type="log", domain=domain_of(sizes, log=True, margin=0.05), nice=False)
    return alt.X("size:Q", title="Memory size (keys)", scale=scale, axis=axis)


def memory_title(size: int) -> str:
    return f"Memory of {size:,} keys"


def draw(figure: Figure) -> tuple[str, bytes]:
    """A figure as SVG text and PNG bytes (twice the pixels, for sharp screens), drawn without a browser."""
    import vl_convert

    specification = json.dumps(figure.specification(standalone=True))
    svg = vl_convert.vegalite_to_svg(specification)
    return svg, vl_convert.svg_to_png(svg, scale=2)
