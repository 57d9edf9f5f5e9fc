"""The figures of the report. Data go in as plain records; nothing here reads files or computes statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import altair as alt

from recollect.reports.crossover import INSTRUMENTS, RECALL_FLOOR, Workload, find_crossovers, quickest_by_backend
from recollect.reports.curve_figures import curves, front
from recollect.reports.drawing import (
    HEIGHT,
    Figure,
    Record,
    Style,
    above_exact,
    data,
    domain_of,
    found_axis,
    log_axis,
    memory_title,
    record,
    size_axis,
    tips,
)
from recollect.reports.findings import describe
from recollect.reports.pareto import pareto_front
from recollect.reports.rows import Row

if TYPE_CHECKING:
    from recollect.reports.analysis import Analysis


def figures(analysis: Analysis) -> tuple[Figure, ...]:
    """Every figure that these results have data for, in the order of the page."""
    backends = analysis.results.backends
    made = [
        against_perplexity(analysis, backends, "recall"),
        perplexity_by_size(analysis, backends),
        *(latency(analysis, backends, workload, i) for i, workload in enumerate(analysis.workloads)),
        curves(analysis, backends),
        pareto(analysis, backends),
        front(analysis, backends, "recall"),
        front(analysis, backends, "share"),
        footprint(analysis, backends),
        streaming(analysis, backends),
        against_perplexity(analysis, backends, "share"),
    ]
    return tuple(figure for figure in made if figure is not None)


def against_perplexity(analysis: Analysis, backends: Sequence[str], field: str) -> Figure | None:
    """Recall (or the share of the softmax mass) against the perplexity above exact, a panel per memory size."""
    style = Style(backends)
    records = [r for r in map(record, analysis.measured) if r[field] is not None and r["difference"] is not None]
    if not records:
        return None
    for entry in records:
        entry["missed"] = 1 - min(1.0, entry[field])
    name = "Recall at k" if field == "recall" else "Share of exact's softmax mass"
    x = found_axis("missed", name, [r["missed"] for r in records])
    y, scale = above_exact([v for r in records for v in (r["low"], r["high"])])
    panels = []
    for size in analysis.results.memory_sizes:
        here = [r for r in records if r["size"] == size]
        base = alt.Chart(data(here)).encode(x=x, color=style.colour)
        zero = (
            alt.Chart(data([{"zero": 0}]))
            .mark_rule(color="#888888", strokeDash=[4, 3])
            .encode(y=alt.Y("zero:Q", scale=scale))
        )
        lines = base.mark_line(strokeWidth=1.2).encode(y=y, opacity=style.opacity(0.5), order="missed:Q")
        bars = base.mark_rule(strokeWidth=1.5).encode(
            y=alt.Y("low:Q", scale=scale), y2="high:Q", opacity=style.opacity(0.7)
        )
        tooltip = tips("spec", "size", "recall", "mass", "share", "perplexity", "difference", "low", "high", "ms")
        points = base.mark_point(filled=True, size=75).encode(
            y=y, shape=style.shape, opacity=style.opacity(), tooltip=tooltip
        )
        panels.append(alt.layer(zero, lines, bars, points).properties(height=HEIGHT, title=memory_title(size)))
    what = "Recall against perplexity" if field == "recall" else "Softmax mass against perplexity"
    share = (
        "true neighbours was found" if field == "recall" else "attention weight that exact's neighbours hold was found"
    )
    return Figure(
        "recall-perplexity" if field == "recall" else "mass-perplexity",
        what,
        f"Each mark is one spec. To the right: a larger share of the {share}. Upwards: more perplexity than exact "
        "search at the same memory size, with its 95 % interval. Both axes are stretched towards exact (square-root "
        "scales). Lines join the specs of one backend; degraded drops neighbours at random and shows what missing them "
        "costs by itself.",
        f"{what}: {len(records)} specs in {len(panels)} panels, one per memory size. The table holds the figures.",
        tuple(panels),
        tuple(b for b in backends if any(r["backend"] == b for r in records)),
        short="Recall" if field == "recall" else "Softmax mass",
    )


def _representatives(analysis: Analysis, *, sizes: Sequence[int]) -> dict[str, str]:
    """For each backend its default options (the bare name), or else the spec with the highest mean recall."""
    by_spec: dict[tuple[str, str], list[Row]] = {}
    for row in analysis.measured:
        if row.cell.memory_size in sizes:
            by_spec.setdefault((row.cell.backend, row.cell.spec), []).append(row)
    best: dict[str, tuple[tuple[float, ...], str]] = {}
    for (backend, spec), rows in by_spec.items():
        recall = sum(r.cell.recall_at_k or 0.0 for r in rows) / len(rows)
        rank = (len(rows), spec == backend, round(recall, 3), -sum(r.cell.search_ms or 0.0 for r in rows))
        if backend not in best or rank > best[backend][0]:
            best[backend] = (rank, spec)
    return {backend: spec for backend, (_, spec) in best.items()}


def perplexity_by_size(analysis: Analysis, backends: Sequence[str]) -> Figure | None:
    """Perplexity against memory size, with the level without memory; and the same as a difference to exact."""
    style = Style(backends)
    sizes = analysis.results.memory_sizes
    chosen = _representatives(analysis, sizes=sizes)
    rows = [r for r in analysis.measured if chosen.get(r.cell.backend) == r.cell.spec]
    records = [record(r) for r in rows if r.cell.backend not in INSTRUMENTS]
    records.sort(key=lambda r: (r["backend"] == "exact", r["backend"]))  # exact is drawn last, on top
    if not records:
        return None
    levels = _levels(analysis)
    exact = [r for r in records if r["backend"] == "exact"]
    heights = [*(r["perplexity"] for r in records), *(r["perplexity_low"] for r in exact)]
    heights += [v["level"] for v in levels]
    scale = alt.Scale(domain=domain_of(heights, margin=0.08), nice=False)
    x, y = size_axis(sizes), alt.Y("perplexity:Q", title="Perplexity (lower is better)", scale=scale)
    tooltip = tips("spec", "size", "recall", "perplexity", "difference", "low", "high")
    low, high = alt.Y("perplexity_low:Q", scale=scale), "perplexity_high:Q"
    band = alt.Chart(data(exact)).mark_area(color="#000000", opacity=0.08, clip=True).encode(x=x, y=low, y2=high)
    level = alt.Chart(data(levels)).encode(y=alt.Y("level:Q", scale=scale))
    rules = level.mark_rule(color="#444444", strokeDash=[6, 4])
    names = level.mark_text(align="right", dy=-7, dx=-6, fontSize=11, color="#333333")
    base = alt.Chart(data(records)).encode(x=x, color=style.colour)
    absolute = alt.layer(
        band,
        rules,
        names.encode(x=alt.value("width"), text="text:N"),
        base.mark_line(strokeWidth=1.8).encode(y=y, opacity=style.opacity(0.8)),
        base.mark_point(filled=True, size=75).encode(y=y, shape=style.shape, opacity=style.opacity(), tooltip=tooltip),
    )
    panels = [absolute.properties(height=HEIGHT + 40, title="Perplexity")]
    compared = [r for r in records if r["difference"] is not None]
    if compared:
        y, scale = above_exact([v for r in compared for v in (r["low"], r["high"])])
        base = alt.Chart(data(compared)).encode(x=x, color=style.colour)
        difference = alt.layer(
            base.mark_line(strokeWidth=1.5).encode(y=y, opacity=style.opacity(0.7)),
            base.mark_rule(strokeWidth=1.5).encode(
                y=alt.Y("low:Q", scale=scale), y2="high:Q", opacity=style.opacity(0.7)
            ),
            base.mark_point(filled=True, size=75).encode(
                y=y, shape=style.shape, opacity=style.opacity(), tooltip=tooltip
            ),
        )
        panels.append(difference.properties(height=HEIGHT + 40, title="Difference to exact at the same size"))
    return Figure(
        "perplexity-memory",
        "Perplexity against memory size",
        "Each backend with its default options. First panel: the grey band is the 95 % interval of exact's own "
        "perplexity, wide because texts differ; dashed is the model with its memory off. Second panel: the same as a "
        "difference to exact, far better known because both read the same text; the axis is stretched towards 0.",
        f"Perplexity of {len(records)} measurements at memory sizes {', '.join(map(str, sizes))}, with the level "
        "without memory, and their differences to exact.",
        tuple(panels),
        tuple(b for b in backends if b not in INSTRUMENTS),
        short="Memory size",
    )


def _levels(analysis: Analysis) -> list[Record]:
    """The model with its memory off, and its twin trained without one, where measured."""
    levels: list[Record] = []
    none = analysis.baseline
    if none is not None and none.cell.perplexity is not None:
        levels.append({"level": none.cell.perplexity, "text": f"no memory: {none.cell.perplexity:,.2f}"})
    twin = analysis.results.run.get("twin")
    if isinstance(twin, dict) and isinstance(twin.get("perplexity"), (int, float)):
        levels.append({"level": twin["perplexity"], "text": f"twin trained without memory: {twin['perplexity']:,.2f}"})
    return levels


def latency(analysis: Analysis, backends: Sequence[str], workload: Workload, number: int) -> Figure | None:
    """Search time against memory size on log-log axes: with the recall floor, and without."""
    style = Style(backends)
    sizes = workload.memory_sizes
    if len(sizes) < 2:
        return None
    panels: list[Any] = []
    shown_backends: set[str] = set()
    whole = analysis.with_appends if number == 0 else None
    timings = [*workload.timings, *(whole.timings if whole else ())]
    everything = [t for t in timings if t.backend not in INSTRUMENTS]
    domain = domain_of([v for t in everything for v in (t.low or t.search_ms, t.high or t.search_ms)], log=True)
    x, scale = size_axis(sizes), alt.Scale(type="log", domain=domain, nice=False)
    y = log_axis(alt.Y, "ms", "Time (ms per segment)", domain)
    reaching = f"recall {RECALL_FLOOR} or more"
    wanted = [(workload, RECALL_FLOOR, f"Search, {reaching}"), (workload, None, "Search, any recall")]
    if whole is not None:
        wanted.append((whole, RECALL_FLOOR, f"Search and append, {reaching}"))
    for shown, floor, title in wanted:
        series = quickest_by_backend(shown.timings, floor)
        records = [
            {"spec": t.spec, "backend": b, "size": t.memory_size, "ms": t.search_ms, "recall": t.recall}
            | {"low": t.low or t.search_ms, "high": t.high or t.search_ms}
            for b, rows in series.items()
            for t in rows
        ]
        shown_backends |= set(series)
        base = alt.Chart(data(records)).encode(x=x, color=style.colour)
        lines = base.mark_line(strokeWidth=1.5).encode(y=y, opacity=style.opacity(0.7))
        bars = base.mark_rule(strokeWidth=1.5).encode(
            y=alt.Y("low:Q", scale=scale), y2="high:Q", opacity=style.opacity(0.7)
        )
        points = base.mark_point(filled=True, size=75).encode(
            y=y, shape=style.shape, opacity=style.opacity(), tooltip=tips("spec", "size", "recall", "ms")
        )
        crossing = [
            {"backend": c.backend, "size": c.size, "spec": c.spec}
            for c in find_crossovers(shown, floor)
            if c.outcome == "at"
        ]
        rules = (
            alt.Chart(data(crossing))
            .mark_rule(strokeDash=[2, 3], strokeWidth=1.5)
            .encode(x=x, color=style.colour, opacity=style.opacity(0.8), tooltip=tips("spec", "size"))
        )
        layers = [rules, lines, bars, points] if crossing else [lines, bars, points]
        panels.append(alt.layer(*layers).properties(height=HEIGHT, title=title))
    where = f"{workload.title}: {describe(workload)}"
    return Figure(
        "latency-memory" if number == 0 else f"latency-larger-{number}",
        "Latency against memory size" if number == 0 else f"Latency at larger memories ({describe(workload)})",
        f"{where}. Both axes are logarithmic. Each line is one backend with its quickest spec at each size: with "
        f"a floor, only specs that find at least {RECALL_FLOOR} of the true neighbours. A dotted line marks where "
        "a backend overtakes exact, interpolated."
        + (" The last panel counts what taking in a segment's keys costs as well." if whole else ""),
        f"{len(everything)} times, with and without a floor of recall. A table follows.",
        tuple(panels),
        tuple(b for b in backends if b in shown_backends),
        short="Latency" if number == 0 else "Larger memories",
    )


def pareto(analysis: Analysis, backends: Sequence[str]) -> Figure | None:
    """Search time against the difference of perplexity, a panel per memory size."""
    style = Style(backends)
    rows = [r for r in analysis.measured if r.cell.backend not in INSTRUMENTS and r.cell.search_ms]
    records = [r for r in map(record, rows) if r["difference"] is not None]
    if not records:
        return None
    domain = domain_of([v for r in records for v in (r["ms_low"], r["ms_high"])], log=True)
    x = log_axis(alt.X, "ms", "Search (ms per segment)", domain)
    y, scale = above_exact([v for r in records for v in (r["low"], r["high"])])
    panels = []
    for size in analysis.results.memory_sizes:
        here = [r for r in records if r["size"] == size]
        best = pareto_front(here, lambda r: r["ms"], _loss_beyond_noise)
        for entry in here:
            entry["front"] = entry in best
        base = alt.Chart(data(here)).encode(x=x, color=style.colour)
        line = alt.Chart(data(best)).mark_line(
            color="#555555", interpolate="step-after", strokeDash=[5, 3], strokeWidth=1.5
        )
        tooltip = tips("spec", "size", "recall", "perplexity", "difference", "low", "high", "ms")
        full = base.transform_filter("datum.front").mark_point(filled=True, size=110)
        hollow = base.transform_filter("!datum.front").mark_point(size=60)
        bars = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q")
        layers = [line.encode(x=x, y=y), bars.encode(opacity=style.opacity(0.5))]
        layers += [m.encode(y=y, shape=style.shape, opacity=style.opacity(), tooltip=tooltip) for m in (hollow, full)]
        panels.append(alt.layer(*layers).properties(height=HEIGHT, title=memory_title(size)))
    return Figure(
        "pareto-perplexity",
        "Pareto front: search time against perplexity",
        "Best is the lower left: quick and close to exact. Filled marks joined by the dashed line form the front: no "
        "other spec is both quicker and better. Hollow marks are beaten by one on the front. Differences whose "
        "interval contains 0 count as 0.",
        f"Search time against perplexity of {len(records)} specs, a panel per memory size, the Pareto front marked.",
        tuple(panels),
        tuple(b for b in backends if any(r["backend"] == b for r in records)),
        short="Pareto: perplexity",
    )


def _loss_beyond_noise(entry: Record) -> float:
    """The difference to exact, 0 where its interval contains 0: noise must not put anything on the front."""
    return 0.0 if entry["low"] <= 0 <= entry["high"] else float(entry["difference"])


def footprint(analysis: Analysis, backends: Sequence[str]) -> Figure | None:
    """Bytes per key at the largest memory size, the raw keys and the index apart."""
    style = Style(backends)
    for size in reversed(analysis.results.memory_sizes):
        rows = [r for r in analysis.at(size) if r.cell.bytes_per_key and r.cell.backend not in INSTRUMENTS]
        if rows:
            break
    else:
        return None
    seen: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda r: (len(r.cell.spec), r.cell.spec)):
        seen.setdefault((row.cell.backend, round(row.cell.bytes_per_key or 0.0)), row)
    several = [backend for backend, _ in seen]
    records: list[Record] = []
    for (backend, _), row in sorted(seen.items(), key=lambda item: (item[1].cell.bytes_per_key or 0.0, item[0])):
        cell = row.cell
        label = backend if several.count(backend) == 1 else cell.spec
        total, raw, index = cell.bytes_per_key or 0.0, cell.key_bytes or 0.0, cell.index_bytes or 0.0
        share = raw / (raw + index) if raw + index else 1.0
        common = {"label": label, "spec": cell.spec, "backend": backend, "size": size, "bytes": total}
        records.append(common | {"from": 0.0, "to": total * share, "part": "raw keys"})
        records.append(common | {"from": total * share, "to": total, "part": "index"})
    order = list(dict.fromkeys(r["label"] for r in records))
    largest = max(r["bytes"] for r in records)
    scale = alt.Scale(domain=[0, largest * 1.14], nice=False)
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=150))
    x = alt.X("from:Q", title="Bytes per key", scale=scale, axis=alt.Axis(tickCount=6))
    base = alt.Chart(data(records)).encode(y=y, color=style.colour)
    tooltip = [*tips("spec", "size", "bytes"), alt.Tooltip("part:N", title="Part")]
    raw_bars = (
        base.transform_filter("datum.part == 'raw keys'")
        .mark_bar()
        .encode(x=x, x2="to:Q", opacity=style.opacity(0.4), tooltip=tooltip)
    )
    index_bars = (
        base.transform_filter("datum.part == 'index'")
        .mark_bar()
        .encode(x=x, x2="to:Q", opacity=style.opacity(), tooltip=tooltip)
    )
    numbers = base.transform_filter("datum.part == 'index'").mark_text(align="left", dx=4, fontSize=11, color="#222222")
    numbers = numbers.encode(
        x=alt.X("bytes:Q", scale=scale), text=alt.Text("bytes:Q", format=",.0f"), color=alt.value("#222222")
    )
    panel = alt.layer(raw_bars, index_bars, numbers).properties(height=alt.Step(24))
    return Figure(
        "footprint",
        "Footprint",
        f"Bytes that one key takes at {size:,} keys a memory. Pale: the keys themselves, kept by every backend so that "
        "attention can be recomputed from them. Full: what the index adds. Values come on top, the same for all.",
        f"Bytes per key of {len(order)} indexes at a memory size of {size}.",
        (panel,),
        tuple(b for b in backends if b in several),
        columns=1,
        legend=False,
    )


def streaming(analysis: Analysis, backends: Sequence[str]) -> Figure | None:
    """Recall and append cost while the memory turns over, at the largest size where most backends were streamed."""
    style = Style(backends)
    streamed = [r for r in analysis.measured if r.cell.streaming and r.cell.backend not in INSTRUMENTS]
    if not streamed:
        return None
    sizes = sorted({r.cell.memory_size for r in streamed})
    size = max(sizes, key=lambda s: (len({r.cell.backend for r in streamed if r.cell.memory_size == s}), s))
    chosen = _representatives(analysis, sizes=[size])
    records: list[Record] = []
    for row in streamed:
        cell = row.cell
        if cell.memory_size != size or chosen.get(cell.backend) != cell.spec or cell.streaming is None:
            continue
        nothing = (None,) * len(cell.streaming.turnover)
        for t, recall, append in zip(
            cell.streaming.turnover, cell.streaming.recall or nothing, cell.streaming.append_us or nothing, strict=True
        ):
            records.append(
                {
                    "spec": cell.spec,
                    "backend": cell.backend,
                    "size": size,
                    "turnover": t,
                    "recall": recall,
                    "append": append,
                }
            )
    records = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in records]
    longest = max(r["turnover"] for r in records) * 1.02
    horizontal = alt.Scale(domain=[0, longest], nice=False)
    x = alt.X("turnover:Q", title="Keys appended (multiples of the memory size)", scale=horizontal)
    full = (
        alt.Chart(data([{"turnover": 1.0}] if longest >= 1 else []))
        .mark_rule(color="#888888", strokeDash=[4, 3])
        .encode(x=x)
    )
    panels = []
    for field, title in (("recall", "Recall at k"), ("append", "Append (µs per key)")):
        here = [r for r in records if r[field] is not None]
        if not here:
            continue
        if field == "recall":
            scale = alt.Scale(domain=domain_of([*(r[field] for r in here), 1.0]), nice=False)
            y = alt.Y(f"{field}:Q", title=title, scale=scale)
        else:
            here = [r for r in here if r[field] > 0]
            y = log_axis(alt.Y, field, title, domain_of([r[field] for r in here], log=True))
        base = alt.Chart(data(here)).encode(x=x, y=y, color=style.colour)
        lines = base.mark_line(strokeWidth=1.5).encode(detail="spec:N", opacity=style.opacity(0.7))
        points = base.mark_point(filled=True, size=60).encode(
            shape=style.shape, opacity=style.opacity(), tooltip=tips("spec", "turnover", field)
        )
        panels.append(alt.layer(full, lines, points).properties(height=HEIGHT, title=title))
    if not panels:
        return None
    return Figure(
        "streaming",
        "Streaming: as the memory turns over",
        f"Memory of {size:,} keys. Left of the dashed line the memory fills; right of it each key evicts the oldest. "
        "A line that falls (recall) or rises (append) after it shows an index that ages. Each backend with its "
        "default options.",
        f"Recall and append cost of {len({r['backend'] for r in records})} backends while {size} keys are replaced.",
        tuple(panels),
        tuple(b for b in backends if any(r["backend"] == b for r in records)),
        short="Streaming",
    )
