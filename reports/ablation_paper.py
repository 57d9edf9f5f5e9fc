"""The paper's figures beside those of a grid (Wu et al. 2022, arXiv 2203.08913), and whether they agree in direction.

Perplexities of different texts, tokenizers and models cannot be compared; what a change does to them can. So a change
is taken in per cent of what it is compared with, in the paper and here. The paper gives no intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from recollect.reports.ablation_analysis import AblationAnalysis, Row
from recollect.reports.ablation_rows import ends, signed
from recollect.reports.ablation_statistics import SeedInterval
from recollect.reports.contents import Heading, Table
from recollect.reports.rows import shown

# Table 4, context 512 with an XL cache of 512: no memory, 8192 keys, 65K keys.
TABLE_4 = {
    "arXiv": (2.67, 2.37, 2.31),
    "PG-19": (12.34, 11.93, 11.62),
    "C4": (15.38, 14.04, 14.04),
    "GitHub": (2.26, 2.03, 1.87),
    "Isabelle": (2.46, 2.08, 2.06),
}
LAYERS = {3: 2.40, 6: 2.36, 9: 2.37, 12: 2.43}  # of 12, on arXiv; counted from 1
NEIGHBOURS = {32: 2.38, 128: 2.37, 256: 2.37}  # on arXiv
HARDLY = 1.0
"""A change of less than so many per cent counts as hardly any."""

_KINDS = (
    ("arxiv", "arXiv"),
    ("math", "arXiv"),
    ("book", "PG-19"),
    ("web", "C4"),
    ("code", "GitHub"),
    ("stdlib", "GitHub"),
    ("proof", "Isabelle"),
    ("isabelle", "Isabelle"),
)


@dataclass(frozen=True)
class Comparison:
    """One change, in the paper and here.

    paper_figures, figures: perplexities from and to. verdict: 'agrees', 'opposite', 'open', 'flat', 'differs'.
    """

    what: str
    paper_figures: tuple[float, float]
    figures: tuple[float, float]
    here: SeedInterval
    remark: str = ""

    @property
    def paper(self) -> float:
        """In per cent."""
        before, after = self.paper_figures
        return 100 * (after / before - 1)

    @property
    def verdict(self) -> str:
        low, high = self.here.low, self.here.high
        if low is None or high is None:
            return "open"
        if abs(self.paper) < HARDLY:
            if low > -HARDLY and high < HARDLY:
                return "flat"
            return "differs" if low > HARDLY or high < -HARDLY else "open"
        if not self.here.sign:
            return "open"
        return "agrees" if (self.here.sign > 0) == (self.paper > 0) else "opposite"

    @property
    def sentence(self) -> str:
        told = {
            "agrees": "Agrees in direction.",
            "flat": f"Agrees: less than {HARDLY:g} % here too.",
            "opposite": "Does not agree: it goes the other way here.",
            "differs": f"Does not agree: hardly any change in the paper, more than {HARDLY:g} % here.",
            "open": "Not settled here: the interval leaves it open."
            if self.here.low is not None
            else "Not settled here: no interval.",
        }[self.verdict]
        return f"{told} {self.remark}".strip()


def comparisons(analysis: AblationAnalysis) -> tuple[Comparison, ...]:
    """What the paper and this grid both measured; empty for a grid that the paper has no figures for."""
    name = str(analysis.ablation.run.get("paper") or analysis.ablation.grid)
    make: Callable[[AblationAnalysis], Iterable[Comparison]] | None = {
        "memory": _memory,
        "domains": _memory,
        "layers": _layers,
        "neighbours": _neighbours,
    }.get(name)
    return tuple(make(analysis)) if make is not None else ()


def kind_of_text(section: str, run_corpus: str = "") -> str | None:
    """The paper's data set that a text resembles, by its name."""
    name = f"{section} {run_corpus}".lower()
    return next((data for word, data in _KINDS if word in name), None)


def _memory(analysis: AblationAnalysis) -> Iterable[Comparison]:
    """Table 4, a section at a time: from no memory to 8192 keys, and from there to more."""
    for section in analysis.ablation.sections:
        data = kind_of_text(section)
        if data is None:
            continue
        rows = analysis.of(section)
        none = _at(rows, lambda n: n == 0)
        first = _at(rows, lambda n: n == 8192) or _nearest(rows, 8192)
        more = _at(rows, lambda n: n == 65_536) or _at(rows, lambda n: n >= 32_768)
        figures = TABLE_4[data]
        # From 8192 keys to more with the same training, where there is such a pair.
        trained = more.variant.trained_memory if more is not None else None
        alike = [row for row in rows if row.variant.trained_memory == trained]
        before = _at(alike, lambda n: n == 8192) or first
        for one, other, place in ((none, first, 0), (before, more, 1)):
            if one is None or other is None or one is other:
                continue
            sizes = f"from {_keys(one)} to {_keys(other)}"
            paper = "from no memory to 8,192 keys" if place == 0 else "from 8,192 to 65K keys"
            made = _compare(
                analysis,
                section,
                f"{data} (here {section}): {paper} in the paper, {sizes} here",
                (figures[place], figures[place + 1]),
                one,
                other,
            )
            if made is not None:
                yield made


def _at(rows: Sequence[Row], fits: Callable[[int], bool]) -> Row | None:
    """A row whose memory has such a size and exact search; trained with it rather than only evaluated."""
    found = [
        row
        for row in rows
        if isinstance(size := row.evaluation.get("memory_size"), int)
        and fits(size)
        and row.evaluation.get("backend") in ("exact", "none", None)
        and row.variant.kind in ("train", "evaluate")
    ]

    def order(row: Row) -> tuple[bool, int]:
        trained = row.variant.trained_memory == row.evaluation.get("memory_size")
        return not trained, int(row.evaluation["memory_size"])

    return min(found, key=order, default=None)


def _nearest(rows: Sequence[Row], size: int) -> Row | None:
    """The row with a memory that comes next to this size, by its ratio."""
    sizes = {n for row in rows if isinstance(n := row.evaluation.get("memory_size"), int) and n > 0}
    best = min(sizes, key=lambda n: max(n, size) / min(n, size), default=None)
    return None if best is None else _at(rows, lambda n: n == best)


def _keys(row: Row) -> str:
    size = int(row.evaluation["memory_size"])
    return f"{size:,} keys" if size else "no memory"


def _layers(analysis: AblationAnalysis) -> Iterable[Comparison]:
    """Layers by their depth: 3, 6, 9 and 12 of 12 and the layers here that lie nearest."""
    for section in analysis.ablation.sections:
        at: dict[int, Row] = {}
        for row in analysis.of(section):
            layers, single = row.variant.value("model", "layers"), row.variant.value("model", "memory_layers")
            if not isinstance(layers, int) or not isinstance(single, list) or len(single) != 1:
                continue
            depth = (single[0] + 1) / layers
            for layer in LAYERS:
                known = at.get(layer)
                # Of two layers as near, the one higher up.
                if abs(depth - layer / 12) <= 1 / 12 + 1e-9 and (
                    known is None or abs(depth - layer / 12) <= abs(_depth(known) - layer / 12) + 1e-9
                ):
                    at[layer] = row
        for other, one in ((12, 6), (3, 6), (12, 9), (3, 9), (6, 9)):
            before, after = at.get(other), at.get(one)
            if before is None or after is None or before is after:
                continue
            made = _compare(
                analysis,
                section,
                f"Memory in layer {one} rather than {other} of 12 (here `{after.name}` rather than `{before.name}`)",
                (LAYERS[other], LAYERS[one]),
                before,
                after,
            )
            if made is not None:
                yield made


def _depth(row: Row) -> float:
    return float((row.variant.value("model", "memory_layers")[0] + 1) / row.variant.value("model", "layers"))


def _neighbours(analysis: AblationAnalysis) -> Iterable[Comparison]:
    for section in analysis.ablation.sections:
        by_k = {}
        for row in analysis.of(section):
            trained, k = row.variant.value("model", "k"), row.evaluation.get("k")
            if isinstance(k, int) and row.evaluation.get("memory_size") and (k not in by_k or trained == k):
                by_k[k] = row
        for k in (128, 256):
            if 32 in by_k and k in by_k:
                made = _compare(
                    analysis,
                    section,
                    f"{k} neighbours rather than 32",
                    (NEIGHBOURS[32], NEIGHBOURS[k]),
                    by_k[32],
                    by_k[k],
                )
                if made is not None:
                    yield made


def _compare(
    analysis: AblationAnalysis, section: str, what: str, paper: tuple[float, float], before: Row, after: Row
) -> Comparison | None:
    here = analysis.compare(section, after.name, before.name)
    if here is None or before.perplexity is None or after.perplexity is None:
        return None
    remark = ""
    if here.low == here.high == 0.0:
        remark = "Both gave the very same losses: no document here is longer than the smaller of the two."
    return Comparison(what, paper, (before.perplexity.estimate, after.perplexity.estimate), here, remark)


def paper_table(made: Sequence[Comparison]) -> Table:
    """The comparisons as a table."""
    lines = tuple(
        (
            one.what,
            f"{one.paper_figures[0]:.2f} → {one.paper_figures[1]:.2f}",
            signed(one.paper, 1),
            f"{shown(one.figures[0], 2)} → {shown(one.figures[1], 2)}",
            f"{signed(one.here.estimate, 1)}" + (f" ({ends(one.here, 1)})" if ends(one.here, 1) else ""),
            one.sentence,
        )
        for one in made
    )
    headings = (
        Heading("Change", prose=True),
        Heading("Paper", "perplexity", True),
        Heading("Paper", "%", True),
        Heading("Here", "perplexity", True),
        Heading("Here", "% (95 % interval)", True),
        Heading("Does it agree?", prose=True),
    )
    return Table("The paper's figures beside these", headings, lines)


def paper_summary(made: Sequence[Comparison]) -> str:
    """How many comparisons agree, in one sentence; empty for none."""
    if not made:
        return ""
    counts = {
        name: sum(one.verdict == name for one in made) for name in ("agrees", "flat", "opposite", "differs", "open")
    }
    agree, not_agree = counts["agrees"] + counts["flat"], counts["opposite"] + counts["differs"]
    total = len(made)
    return (
        f"Of {total} {'change' if total == 1 else 'changes'} that the paper has figures for, {agree or 'none'} "
        f"{'agree' if agree > 1 else 'agrees'} in direction here, {not_agree or 'none'} "
        f"{'go' if not_agree > 1 else 'goes'} another way, and {counts['open'] or 'none'} "
        f"{'are' if counts['open'] > 1 else 'is'} not settled at this scale."
    )


def domain_order(analysis: AblationAnalysis, made: Sequence[Comparison]) -> str:
    """Which kinds of text gain most from a memory, in the paper and here; empty for fewer than three kinds."""
    if str(analysis.ablation.run.get("paper") or analysis.ablation.grid) not in ("memory", "domains"):
        return ""
    gains = {one.what.split(" (")[0]: one for one in made if "from no memory" in one.what.split(" in the paper")[0]}
    if len(gains) < 3:
        return ""
    paper = sorted(gains, key=lambda name: gains[name].paper)
    here = sorted(gains, key=lambda name: gains[name].here.estimate)
    pairs = [(a, b) for i, a in enumerate(paper) for b in paper[i + 1 :]]
    same = sum(here.index(a) < here.index(b) for a, b in pairs)
    return (
        f"From most to least gained, the paper has {', '.join(paper)}; here it is {', '.join(here)} "
        f"({same} of {len(pairs)} pairs in the same order)."
    )
