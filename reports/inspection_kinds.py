"""Which kinds of token gained from memory, with intervals, and whether the paper's finding holds here.

Wu et al. 2022 found memory to serve rare words: names, definitions, references. Whether a kind gains more than common
words do is told by the difference of the two mean gains, both over the same draws of blocks of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.reports.inspection_results import InspectionResults
from recollect.reports.statistics import Blocks, Interval, make_blocks, mean_interval

CLAIMED = ("rare word", "name", "definition", "defined name", "citation")
"""The kinds that the paper names."""
YARDSTICK = "common word"
OCCURRENCE_WORDS = {
    "first": "first time in its document",
    "near": "seen before, and local attention still sees it",
    "far": "seen before, where only memory reaches",
    "none": "not a word",
}
FEWEST = 30
"""Kinds with fewer tokens get no interval and no verdict."""


@dataclass(frozen=True)
class KindRow:
    """One kind of token. Losses are mean nats a token.

    gain: over the same model without memory. gain_over_twin: over a model trained without; None where there is none.
    beyond_common: the mean gain (over the twin where there is one) minus that of common words.
    beyond_common_far: the same among tokens whose word stood before, but only where memory reaches.
    part_of_gain: its part of the whole text's gain, by the same measure.
    occurrences: name, tokens and mean gain by where the word stood before.
    """

    kind: str
    meaning: str
    tokens: int
    loss_without: float
    loss: float
    gain: Interval | None
    gain_over_twin: Interval | None
    beyond_common: Interval | None
    beyond_common_far: Interval | None
    part_of_gain: float
    occurrences: tuple[tuple[str, int, Interval | None], ...]

    @property
    def main(self) -> Interval | None:
        """The gain that verdicts rest on."""
        return self.gain_over_twin or self.gain


@dataclass(frozen=True)
class KindTable:
    """The rows, and what the intervals were drawn from."""

    rows: tuple[KindRow, ...]
    blocks: Blocks
    against_twin: bool


def kind_table(results: InspectionResults) -> KindTable:
    """Gains by kind of token."""
    blocks = make_blocks(results["document"].astype(np.int64), results["position"].astype(np.int64))
    gain = results.gain
    twin = results.gain_over_twin if results.has_twin else None
    main = gain if twin is None else twin
    whole = float(main.sum())
    common = results["kind"] == results.kinds.index(YARDSTICK)
    far = results["occurrence"] == list(results.run["occurrences"]).index("far")
    rows = []
    for number, (kind, meaning) in enumerate(results.run["kinds"].items()):
        chosen = results["kind"] == number
        if not chosen.any():
            continue
        comparable = kind in CLAIMED and _enough(chosen) and _enough(common)
        comparable_far = kind in CLAIMED and _enough(chosen & far) and _enough(common & far)
        rows.append(
            KindRow(
                kind=kind,
                meaning=meaning,
                tokens=int(chosen.sum()),
                loss_without=float(results["loss_without"][chosen].mean(dtype=np.float64)),
                loss=float(results["loss"][chosen].mean(dtype=np.float64)),
                gain=_interval(gain, chosen, blocks),
                gain_over_twin=None if twin is None else _interval(twin, chosen, blocks),
                beyond_common=mean_interval(main, chosen, blocks, against=common) if comparable else None,
                beyond_common_far=(
                    mean_interval(main, chosen & far, blocks, against=common & far) if comparable_far else None
                ),
                part_of_gain=float(main[chosen].sum()) / whole if whole else 0.0,
                occurrences=tuple(_occurrences(results, main, chosen, blocks)),
            )
        )
    return KindTable(tuple(rows), blocks, twin is not None)


def _occurrences(
    results: InspectionResults, gain: NDArray[np.float64], chosen: NDArray[np.bool_], blocks: Blocks
) -> Sequence[tuple[str, int, Interval | None]]:
    found = []
    for number, name in enumerate(results.run["occurrences"]):
        part = chosen & (results["occurrence"] == number)
        if name != "none" and part.any():
            found.append((name, int(part.sum()), _interval(gain, part, blocks)))
    return found


def _enough(chosen: NDArray[np.bool_]) -> bool:
    return int(chosen.sum()) >= FEWEST


def _interval(values: NDArray[np.float64], chosen: NDArray[np.bool_], blocks: Blocks) -> Interval | None:
    return mean_interval(values, chosen, blocks) if _enough(chosen) else None


def verdict(table: KindTable) -> str:
    """In a sentence or two, which of the kinds that the paper names gained more than common words here."""
    more: list[str] = []
    less: list[str] = []
    unclear: list[str] = []
    for row in table.rows:
        if row.beyond_common is None:
            continue
        place = more if row.beyond_common.low > 0 else less if row.beyond_common.high < 0 else unclear
        place.append(f"{plural(row.kind)} ({signed(row.beyond_common.estimate)})")
    if not more and not less and not unclear:
        return "This text has too few words of the kinds that the paper names to say."
    measure = "over the twin trained without memory" if table.against_twin else "over the same model without memory"
    parts = []
    if more:
        parts.append(f"It holds for {_and(more)}: these gain more than common words do, {measure}")
    if unclear:
        parts.append(f"{'no' if more else 'No'} difference to common words was measured for {_and(unclear)}")
    if less:
        parts.append(f"{'less' if parts else 'Less'} than common words gain {_and(less)}")
    return "; ".join(parts) + ". Differences are in nats a token."


def verdict_on_repeats(table: KindTable) -> str:
    """The same among words that memory alone reaches; empty where there are too few."""
    gains = {
        row.kind: part for row in table.rows for name, _, part in row.occurrences if name == "far" and part is not None
    }
    told = [row for row in table.rows if row.beyond_common_far is not None]
    if YARDSTICK not in gains or not told:
        return ""
    parts = []
    for row in told:
        difference = row.beyond_common_far
        assert difference is not None
        sure = "" if difference.low > 0 or difference.high < 0 else " (no difference measured)"
        parts.append(f"{plural(row.kind)} {signed(gains[row.kind].estimate)}{sure}")
    return (
        f"Among words that stood before, but only where memory reaches, common words gain "
        f"{signed(gains[YARDSTICK].estimate)} nats a token, {_and(parts)}."
    )


def plural(kind: str) -> str:
    """A kind's name for many of them."""
    return kind if kind in ("punctuation", "whitespace") else f"{kind}s"


def signed(value: float, digits: int = 2) -> str:
    """With its sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def head_rows(results: InspectionResults) -> list[dict[str, Any]]:
    """A row for each memory layer and head: its share, and what it retrieved, averaged over the text."""
    layers = results.run["model"]["memory_layers"]
    found = results["retrieved"][..., 0] >= 0  # (N, L, H)
    rows = []
    for place, layer in enumerate(layers):
        for head in range(results["share"].shape[2]):
            some = found[:, place, head]
            distance = results["distance"][some, place, head]
            distance = distance[np.isfinite(distance)]
            rows.append(
                {
                    "layer": int(layer),
                    "head": head,
                    "share": _mean(results["share"][some, place, head]),
                    "top_weight": _mean(results["weight"][some, place, head, 0]),
                    "on_target": _mean(results["on_target"][some, place, head]),
                    "before_target": _mean(results["before_target"][some, place, head]),
                    "distance": float(np.median(distance)) if len(distance) else None,
                    "from_store": _mean(results["origin"][some, place, head, 0] >= 0),
                }
            )
    return rows


def _mean(values: NDArray[Any]) -> float | None:
    values = values.astype(np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
