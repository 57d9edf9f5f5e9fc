"""The page of an inspection: one HTML file with its data, style and script inside, which loads nothing.

Every text from the results goes through Jinja's autoescape; JSON inside the page has <, > and & written as escapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from recollect.reports.inspection_kinds import (
    CLAIMED,
    OCCURRENCE_WORDS,
    KindRow,
    KindTable,
    head_rows,
    plural,
    signed,
    verdict,
    verdict_on_repeats,
)
from recollect.reports.inspection_results import InspectionResults, Text
from recollect.reports.page import TEMPLATES, code, json_for_html
from recollect.reports.rows import shown
from recollect.reports.statistics import Interval

PAGE_TOKENS = 9000
"""Tokens that can be looked at one by one in the page; `tokens.parquet` has all of them."""
PASSAGE_TOKENS = 1500
PAGE_RETRIEVED = 3
STRONGEST = 15


def render_inspection(results: InspectionResults, table: KindTable) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = code
    template = environment.get_template("inspection.html.j2")
    passages = _passages(results)
    run = results.run
    return template.render(
        run=run,
        title=f"What the memory did: {run['corpus']['name']}",
        summary=_summary(results),
        verdict=verdict(table),
        repeats=verdict_on_repeats(table),
        against_twin=table.against_twin,
        kinds=[_kind_line(row, table) for row in table.rows],
        scale=_scale(table),
        blocks=table.blocks.description,
        heads=_head_lines(results),
        has_share=bool(np.isfinite(results["share"].astype(np.float32)).any()),
        has_store=bool(results.stored),
        helped=_strongest(results, passages, best=True),
        hurt=_strongest(results, passages, best=False),
        passages=[{"name": p["name"], "first": p["first"], "tokens": len(p["kind"])} for p in passages],
        fewest=len(passages),
        css=Markup(
            (TEMPLATES / "report.css").read_text(encoding="utf-8")
            + (TEMPLATES / "inspection.css").read_text(encoding="utf-8")
        ),
        script=Markup((TEMPLATES / "inspection.js").read_text(encoding="utf-8")),
        data=json_for_html(_data(results, passages)),
    )


def _summary(results: InspectionResults) -> dict[str, Any]:
    perplexity = {name: math.exp(float(results[name].mean(dtype=np.float64))) for name in ("loss", "loss_without")}
    gain = results.gain
    return {
        "tokens": f"{results.tokens:,}",
        "documents": len(results.documents),
        "with": shown(perplexity["loss"], 2),
        "without": shown(perplexity["loss_without"], 2),
        "twin": shown(math.exp(float(results["loss_twin"].mean(dtype=np.float64))), 2) if results.has_twin else "",
        "better": shown(100 * float((gain > 0.1).mean()), 0),
        "worse": shown(100 * float((gain < -0.1).mean()), 0),
    }


def _scale(table: KindTable) -> dict[str, Any]:
    """The axis of the kinds' figure: from below the lowest interval to above the highest, with round marks."""
    ends = [0.0]
    for row in table.rows:
        ends += [end for part in (row.gain, row.gain_over_twin) if part for end in (part.low, part.high)]
        ends += [part.estimate for _, _, part in row.occurrences if part]
    low, high = min(ends), max(ends)
    step = next(size for size in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0) if (high - low) / size <= 7)
    first, last = math.floor(low / step), math.ceil(high / step)
    marks = [number * step for number in range(first, last + 1)]
    return {
        "low": marks[0],
        "high": marks[-1],
        "marks": [{"at": _percent(mark, marks[0], marks[-1]), "text": shown(mark, 1)} for mark in marks],
        "zero": _percent(0.0, marks[0], marks[-1]),
    }


def _percent(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / (high - low), 2) if high > low else 0.0


def _kind_line(row: KindRow, table: KindTable) -> dict[str, Any]:
    scale = _scale(table)
    ends = scale["low"], scale["high"]

    def place(part: Interval | None) -> dict[str, float] | None:
        if part is None:
            return None
        low, high = _percent(part.low, *ends), _percent(part.high, *ends)
        return {"at": _percent(part.estimate, *ends), "low": low, "width": round(max(0.3, high - low), 2)}

    return {
        "kind": plural(row.kind),
        "meaning": row.meaning,
        "claimed": row.kind in CLAIMED,
        "tokens": f"{row.tokens:,}",
        "without": shown(row.loss_without, 2),
        "with": shown(row.loss, 2),
        "gain": _words(row.gain),
        "twin": _words(row.gain_over_twin),
        "beyond": _words(row.beyond_common),
        "part": shown(100 * row.part_of_gain, 0),
        "bar": place(row.main),
        "dots": [
            {"name": name, "words": OCCURRENCE_WORDS[name], "tokens": f"{count:,}", "gain": signed(part.estimate)}
            | {"at": _percent(part.estimate, *ends)}
            for name, count, part in row.occurrences
            if part is not None
        ],
    }


def _words(part: Interval | None) -> dict[str, str]:
    if part is None:
        return {"mean": "", "ends": ""}
    return {"mean": signed(part.estimate), "ends": f"{signed(part.low)} to {signed(part.high)}"}


def _on_one_line(text: str) -> str:
    """White space made visible, so that a line of code stays one line of a table."""
    return re.sub(r" {2,}", " ", text.replace("\t", " ").replace("\n", "⏎"))


def _head_lines(results: InspectionResults) -> list[dict[str, str]]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{shown(100 * value, 0)} %"

    return [
        {
            "layer": str(row["layer"]),
            "head": str(row["head"]),
            "distance": shown(row["distance"], 0),
            **{name: percent(row[name]) for name in ("share", "top_weight", "on_target", "before_target")},
            "from_store": percent(row["from_store"]),
        }
        for row in head_rows(results)
    ]


def _passages(results: InspectionResults) -> list[dict[str, Any]]:
    """Of each of the longest documents the run of tokens where memory gained most, with all that the page shows."""
    found: list[dict[str, Any]] = []
    order = sorted(range(len(results.documents)), key=lambda number: -len(results.documents[number].offsets))
    for number in order[: PAGE_TOKENS // PASSAGE_TOKENS]:
        rows = np.flatnonzero(results["document"] == number)
        rows = rows[np.argsort(results["position"][rows], kind="stable")]
        if not len(rows):
            continue
        if len(rows) > PASSAGE_TOKENS:
            sums = np.concatenate([[0.0], np.cumsum(results.gain[rows])])
            start = int(np.argmax(sums[PASSAGE_TOKENS:] - sums[:-PASSAGE_TOKENS]))
            rows = rows[start : start + PASSAGE_TOKENS]
        found.append(_passage(results, number, rows))
    return found


def _passage(results: InspectionResults, document: int, rows: NDArray[np.integer]) -> dict[str, Any]:
    keep = min(PAGE_RETRIEVED, results["retrieved"].shape[3])
    share = results["share"][rows].astype(np.float32).reshape(len(rows), -1)
    return {
        "document": document,
        "name": results.documents[document].name,
        "first": int(results["position"][rows[0]]),
        "kind": results["kind"][rows].tolist(),
        "occurrence": results["occurrence"][rows].tolist(),
        "loss": _rounded(results["loss"][rows]),
        "without": _rounded(results["loss_without"][rows]),
        "twin": _rounded(results["loss_twin"][rows]) if results.has_twin else None,
        "share": np.where(np.isfinite(share), np.round(100 * share), -1).astype(int).tolist(),
        "retrieved": results["retrieved"][rows][..., :keep].reshape(len(rows), -1).tolist(),
        "origin": results["origin"][rows][..., :keep].reshape(len(rows), -1).tolist() if results.stored else None,
        "weight": np.round(100 * results["weight"][rows][..., :keep].astype(np.float32))
        .astype(int)
        .reshape(len(rows), -1)
        .tolist(),
    }


def _rounded(values: NDArray[np.floating]) -> list[float]:
    return [round(float(value), 2) for value in values]


def _data(results: InspectionResults, passages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shape = results["share"].shape
    return {
        "layers": list(results.run["model"]["memory_layers"]),
        "heads": int(shape[2]),
        "keep": min(PAGE_RETRIEVED, results["retrieved"].shape[3]),
        "kinds": results.kinds,
        "occurrences": [OCCURRENCE_WORDS[name] for name in results.run["occurrences"]],
        "passages": passages,
        "documents": {str(p["document"]): _text(results.documents[p["document"]]) for p in passages},
        "stored": [_text(text) for text in results.stored],
    }


def _text(text: Text) -> dict[str, Any]:
    """A text with the first character of each token, as steps from one to the next."""
    starts = np.asarray(text.offsets[:, 0], dtype=np.int64)
    return {"name": text.name, "text": text.text, "steps": np.diff(starts, prepend=0).tolist()}


def _strongest(results: InspectionResults, passages: Sequence[dict[str, Any]], *, best: bool) -> list[dict[str, Any]]:
    """The tokens of the passages on which memory helped or hurt most."""
    found = []
    for number, passage in enumerate(passages):
        gains = np.asarray(passage["without"]) - np.asarray(passage["loss"])
        for place in np.argsort(-gains if best else gains)[:STRONGEST]:
            found.append((float(gains[place]), number, int(place)))
    found.sort(key=lambda item: -item[0] if best else item[0])
    lines = []
    for gain, number, place in found[:STRONGEST]:
        passage = passages[number]
        text = results.documents[passage["document"]]
        position = passage["first"] + place
        start, end = (int(value) for value in text.offsets[position])
        lines.append(
            {
                "passage": number,
                "place": place,
                "before": _on_one_line(text.text[max(0, start - 50) : start]),
                "token": _on_one_line(text.text[start:end]),
                "name": passage["name"],
                "kind": results.kinds[passage["kind"][place]],
                "without": shown(passage["without"][place], 2),
                "with": shown(passage["loss"][place], 2),
                "gain": signed(gain),
            }
        )
    return lines
