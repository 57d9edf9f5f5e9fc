"""The figures of one grid: differences with their intervals, perplexity along an axis, stability and cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from recollect.reports.ablation_analysis import MEASURES, AblationAnalysis, Measure, Row
from recollect.reports.ablation_statistics import SeedInterval
from recollect.reports.drawing import HEIGHT, Figure, Record, Style, data, domain_of, log_ticks
from recollect.reports.rows import shown

INK, SOFT, ZERO = "#0072b2", "#9db8cc", "#888888"
_LABELS = 140  # pixels for a variant's name
_FULL = ("spikes", "gradient_norm_max", "step_ratio", "step_ms", "evaluation_us_per_token", "memory_bytes")
# Axes that a grid may run along: name, title, what a heading calls it, whether sizes grow by factors.
AXES = (
    ("memory_size", "Memory at evaluation (keys)", "memory size", True),
    ("k", "Neighbours k", "the number of neighbours", True),
    ("layer", "Layer of the memory, counted from 0", "the memory's layer", False),
    ("segment_length", "Segment length (tokens)", "segment length", True),
    ("xl_cache", "XL cache (tokens)", "the XL cache", True),
)


def ablation_figures(analysis: AblationAnalysis) -> tuple[Figure, ...]:
    """Every figure that these results have data for, in the order of the page."""
    made = (differences(analysis), along_axis(analysis), costs(analysis))
    return tuple(figure for figure in made if figure is not None)


def differences(analysis: AblationAnalysis) -> Figure | None:
    """Each variant's difference to its reference in per cent, a panel a text."""
    panels, count = [], 0
    everything = [v for row in analysis.measured if row.percent for v in _extent(row.percent)]
    if not everything:
        return None
    scale, axis = _signed_axis(everything)
    x = alt.X("estimate:Q", title="Perplexity against the reference (%)", scale=scale, axis=axis)
    for section in analysis.ablation.sections:
        rows = analysis.of(section)
        records, seeds = [], []
        for row in rows:
            value = row.percent if row.percent is not None else SeedInterval(0.0, None, None, None, None, ())
            if row.reference is not None and row.percent is None:
                continue
            record = _record(row, value)
            record["what"] = "reference" if row.reference is None else f"against {row.reference}"
            record["clear"] = row.reference is not None and value.sign != 0
            records.append(record)
            seeds += [{"variant": row.name, "estimate": v, "seed": i} for i, v in enumerate(value.by_seed)]
        if not any(r["low"] is not None for r in records) and len(records) < 2:
            continue
        count += len(records)
        y = alt.Y("variant:N", sort=[r["variant"] for r in records], title=None, axis=alt.Axis(labelLimit=_LABELS))
        base = alt.Chart(data(records)).encode(y=y)
        ends = {"x": alt.X("low:Q", scale=scale), "x2": "high:Q"}
        known = base.transform_filter("datum.low != null")
        outer = known.mark_rule(strokeWidth=1.5, color=INK).encode(**ends)
        inner = base.transform_filter("datum.text_low != null").mark_rule(strokeWidth=5, color=INK, opacity=0.35)
        inner = inner.encode(x=alt.X("text_low:Q", scale=scale), x2="text_high:Q")
        marks = base.mark_point(size=80, filled=True, opacity=1).encode(
            x=x, color=alt.condition("datum.clear", alt.value(INK), alt.value(SOFT)), tooltip=_tips()
        )
        ticks = (
            alt.Chart(data(seeds))
            .mark_tick(thickness=1, size=9, color="#333333")
            .encode(y=y, x=alt.X("estimate:Q", scale=scale))
        )
        zero = alt.Chart(data([{"zero": 0.0}])).mark_rule(color=ZERO, strokeDash=[4, 3])
        layers = [zero.encode(x=alt.X("zero:Q", scale=scale)), inner, outer, *([ticks] if seeds else []), marks]
        title = section if len(analysis.ablation.sections) > 1 else ""
        panel = alt.layer(*layers).properties(height=alt.Step(24))
        panels.append(panel.properties(title=title) if title else panel)
    if not panels:
        return None
    return Figure(
        _name(analysis, "difference"),
        "Perplexity against the reference",
        "Left of the dashed line is lower, that is better. The thin bar is the 95 % interval over seeds and text, the "
        "broad one over the text alone, for these very weights; small strokes are single seeds. A pale mark's interval "
        "contains 0: it is not told apart from its reference." + _stretched(everything),
        f"Differences in perplexity of {count} variants to their references, with intervals; the table has the same.",
        tuple(panels),
        (),
        columns=2 if len(panels) > 1 else 1,
        short="Differences",
        legend=False,
    )


def along_axis(analysis: AblationAnalysis) -> Figure | None:
    """Perplexity along the size that most variants differ in, where there is one."""
    best = max(AXES, key=lambda axis: len({_place(r, axis[0]) for r in analysis.measured} - {None, 0}))
    name, title, called, growing = best
    records: list[Record] = []
    levels: list[Record] = []
    for row in analysis.measured:
        place = _place(row, name)
        if place is None or row.perplexity is None:
            continue
        record = _record(row, row.perplexity) | {"place": place, "backend": _series(analysis, row, name)}
        (levels if growing and place <= 0 else records).append(record)
    if len({r["place"] for r in records}) < 3:
        return None
    several = tuple(dict.fromkeys(r["backend"] for r in records))
    style = Style(several)
    places = sorted({float(r["place"]) for r in records})
    if growing:
        x_scale = alt.Scale(type="log", domain=domain_of(places, log=True, margin=0.05), nice=False)
        x_axis = alt.Axis(values=places, format=",d", labelOverlap=True)
    else:
        x_scale = alt.Scale(domain=domain_of(places), nice=False)
        x_axis = alt.Axis(values=places, format="d")
    x = alt.X("place:Q", title=title, scale=x_scale, axis=x_axis)
    reach = [v for r in [*records, *levels] for v in (r["estimate"], r["text_low"], r["text_high"])]
    y_scale = alt.Scale(domain=domain_of(reach), nice=False)
    y = alt.Y("estimate:Q", title="Perplexity", scale=y_scale)
    base = alt.Chart(data(records)).encode(x=x, color=style.colour)
    bars = base.transform_filter("datum.text_low != null").mark_rule(strokeWidth=1.5)
    layers = [
        base.mark_line(strokeWidth=1.5).encode(y=y, opacity=style.opacity(0.7)),
        bars.encode(y=alt.Y("text_low:Q", scale=y_scale), y2="text_high:Q", opacity=style.opacity(0.6)),
        base.mark_point(filled=True, size=75).encode(
            y=y, shape=style.shape, opacity=style.opacity(), tooltip=_tips(percent=False)
        ),
    ]
    if levels:
        dashed = alt.Chart(data(levels)).mark_rule(strokeDash=[5, 3], color="#555555").encode(y=y)
        layers.append(dashed.encode(tooltip=_tips(percent=False)))
    return Figure(
        _name(analysis, "axis"),
        f"Perplexity against {called}",
        "Each mark is a variant's mean over seeds; bars are 95 % intervals over the text alone, of the perplexity "
        "itself: differences between two marks are known better than the bars suggest, since both read the same text."
        + (" Dashed: without memory." if levels else ""),
        f"Perplexity of {len(records)} variants along {title}.",
        (alt.layer(*layers).properties(height=HEIGHT),),
        several,
        columns=1,
        short="Along the axis",
        legend=len(several) > 1,
    )


def costs(analysis: AblationAnalysis) -> Figure | None:
    """Stability and cost, a panel a figure, a line a variant."""
    sections = tuple(dict.fromkeys(row.section for row in analysis.measured))
    several = len(sections) > 1
    style = Style(sections)
    panels = []
    for measured in (f for name in _FULL for f in MEASURES if f.name == name):
        records = [
            _record(row, _not_below_zero(row.figures[measured.name])) | {"backend": row.section}
            for row in analysis.measured
            if measured.name in row.figures
        ]
        if len({r["estimate"] for r in records}) < 2:
            continue
        panels.append(_cost_panel(measured, records, style if several else None))
    if not panels:
        return None
    return Figure(
        _name(analysis, "cost"),
        "Stability and cost",
        "Means over seeds, with 95 % intervals over seeds where there are several. Times hold for this machine.",
        f"Stability and cost of {len({r.name for r in analysis.measured})} variants in {len(panels)} panels; the table "
        "below has the same.",
        tuple(panels),
        sections if several else (),
        columns=2,
        short="Stability and cost",
        legend=several,
    )


def _cost_panel(measured: Measure, records: Sequence[Record], style: Style | None) -> Any:
    values = [v for r in records for v in (r["estimate"], r["low"], r["high"])]
    known = [v for v in values if v is not None and v > 0]
    wide = measured.name == "memory_bytes" and min(r["estimate"] for r in records) > 0 and max(known) / min(known) > 20
    title = f"{measured.title} ({measured.unit})" if measured.unit else measured.title
    if wide:
        domain = domain_of(known, log=True)
        scale = alt.Scale(type="log", domain=domain, nice=False)
        axis = alt.Axis(values=log_ticks(domain), format="~s", labelOverlap=True)
    else:
        low, high = domain_of([*values, *([0.0] if measured.name in ("spikes", "memory_bytes") else [])])
        if all(v is None or v >= 0 for v in values):
            low = max(low, 0.0)
        scale, axis = alt.Scale(domain=[low, high], nice=False), alt.Axis(format="~s", tickCount=5)
    order = list(dict.fromkeys(r["variant"] for r in records))
    y = alt.Y("variant:N", sort=order, title=None, axis=alt.Axis(labelLimit=_LABELS))
    base = alt.Chart(data(records)).encode(y=y)
    x = alt.X("estimate:Q", title=title, scale=scale, axis=axis)
    bars = base.transform_filter("datum.low != null").mark_rule(strokeWidth=1.5, color=INK, clip=True)
    bars = bars.encode(x=alt.X("low:Q", scale=scale), x2="high:Q")
    marks = base.mark_point(filled=True, size=70, color=INK, opacity=1).encode(x=x, tooltip=_tips(percent=False))
    if style is not None:
        bars = bars.encode(color=style.colour, opacity=style.opacity(0.6))
        marks = marks.encode(color=style.colour, shape=style.shape, opacity=style.opacity())
    return alt.layer(bars, marks).properties(height=alt.Step(22))


def _not_below_zero(value: SeedInterval) -> SeedInterval:
    """Counts, times and bytes are never negative, whatever Student's interval says."""
    return value if value.low is None else dataclasses.replace(value, low=max(value.low, 0.0))


def _record(row: Row, value: SeedInterval) -> Record:
    return {
        "variant": row.name,
        "section": row.section,
        "summary": row.variant.summary,
        "estimate": value.estimate,
        "low": value.low,
        "high": value.high,
        "text_low": value.text_low,
        "text_high": value.text_high,
        "seeds": value.seeds or row.ok,
        "perplexity": shown(row.perplexity.estimate if row.perplexity else None, 2),
    }


def _tips(*, percent: bool = True) -> list[Any]:
    form = "+.2f" if percent else ",.4~g"
    return [
        alt.Tooltip("variant:N", title="Variant"),
        alt.Tooltip("section:N", title="Text"),
        alt.Tooltip("summary:N", title="What it is"),
        alt.Tooltip("perplexity:N", title="Perplexity"),
        alt.Tooltip("estimate:Q", title="Difference, %" if percent else "Value", format=form),
        alt.Tooltip("low:Q", title="95 % from", format=form),
        alt.Tooltip("high:Q", title="95 % to", format=form),
        alt.Tooltip("seeds:Q", title="Seeds", format="d"),
    ]


def _name(analysis: AblationAnalysis, what: str) -> str:
    safe = "".join(c if c.isalnum() or c == "-" else "-" for c in analysis.ablation.grid)
    return f"{safe}-{what}"


def _extent(value: SeedInterval) -> list[float]:
    return [v for v in (value.estimate, value.low, value.high, *value.by_seed) if v is not None]


def _is_stretched(values: Sequence[float]) -> bool:
    """Whether a few large differences would press all others against 0."""
    sizes = sorted(abs(v) for v in values)
    return sizes[-1] > 12 * max(sizes[len(sizes) // 2], 0.5)


def _stretched(values: Sequence[float]) -> str:
    return " The axis is stretched towards 0." if _is_stretched(values) else ""


def _signed_axis(values: Sequence[float]) -> tuple[Any, Any]:
    """Scale and axis of differences in per cent, stretched towards 0 where a few of them are far larger."""
    low, high = domain_of([*values, -0.2, 0.2])
    label = "datum.value == 0 ? '0' : format(datum.value, '+~g')"
    if not _is_stretched(values):
        return alt.Scale(domain=[low, high], nice=False), alt.Axis(labelExpr=label, tickCount=7, labelOverlap=True)
    step = 1.0
    ticks = [sign * s * 10.0**d for sign in (-1, 1) for d in range(-1, 4) for s in (1, 2, 5)]
    shown_ticks = [0.0, *(t for t in sorted(ticks) if low <= t <= high and abs(t) >= step)]
    scale = alt.Scale(type="symlog", constant=step, domain=[low, high], nice=False)
    return scale, alt.Axis(values=shown_ticks, labelExpr=label, labelOverlap=True)


def _place(row: Row, axis: str) -> float | None:
    if axis in ("memory_size", "k"):
        value = row.evaluation.get(axis)
        if axis == "k" and not row.evaluation.get("memory_size"):
            return None  # without a memory nothing is retrieved
    elif axis == "layer":
        layers = row.variant.value("model", "memory_layers")
        value = layers[0] if isinstance(layers, list) and len(layers) == 1 else None
    else:
        value = row.variant.value("model", axis)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _series(analysis: AblationAnalysis, row: Row, axis: str) -> str:
    """Which line a variant belongs to: its text, and what its weights were trained with where that differs."""
    parts = [row.section] if len(analysis.ablation.sections) > 1 else []
    ways = {_way(other, axis) for other in analysis.measured if _place(other, axis)}
    if len(ways) > 1:
        parts.append(_way(row, axis))
    return ", ".join(parts) or row.section or "perplexity"


def _way(row: Row, axis: str) -> str:
    """What a line has in common besides the text: how its weights came about, or the other of two lengths."""
    if axis == "segment_length":
        return f"XL cache {row.variant.value('model', 'xl_cache') or 0:,}"
    if axis == "xl_cache":
        return f"segments of {row.variant.value('model', 'segment_length') or 0:,}"
    trained = row.variant.trained_memory if axis == "memory_size" else row.variant.value("model", axis)
    if row.variant.kind == "fine-tune":
        return "fine-tuned to it"
    if axis == "layer" or not trained or trained == _place(row, axis):
        return "trained with it" if trained != 0 else "trained without memory"
    return f"trained with {trained:,}"
