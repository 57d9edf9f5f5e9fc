"""Draws the figures of the documentation: `python docs/figures/draw.py` writes them beside this file.

`docs/hooks.py` puts them into the pages as they are (not as images), so that their text and colours follow the page's:
light or dark, with the reader's own font; those colours stand in `docs/assets/site.css`. Seen by themselves, as GitHub
shows them, they have the colours below.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
LIGHT = {
    "text": "#24292f",
    "soft": "#5c6670",
    "plain": "#f3f4f5",
    "near": "#d5e8ee",
    "near-line": "#2f6b80",
    "far": "#f6e3d3",
    "far-line": "#b3541e",
    "found": "#e08e55",
}
DARK = {
    "text": "#e6edf3",
    "soft": "#a9b4bd",
    "plain": "#2b333a",
    "near": "#1f4552",
    "near-line": "#7fc4dc",
    "far": "#4a3222",
    "far-line": "#eb9a63",
    "found": "#c4692f",
}
STYLE = """
text { fill: TEXT; font-size: 14.5px; font-family: var(--md-text-font-family, system-ui), sans-serif; }
text.soft { fill: SOFT; }
rect { fill: PLAIN; stroke: SOFT; stroke-width: 1.2; }
rect.near { fill: NEAR; stroke: NEAR-LINE; }
rect.now { fill: NEAR-LINE; stroke: NEAR-LINE; }
rect.far { fill: FAR; stroke: FAR-LINE; }
rect.found { fill: FOUND; stroke: FAR-LINE; }
rect.waiting { fill: NEAR; stroke: NEAR-LINE; stroke-dasharray: 3 2; }
rect.gone { fill: none; stroke: SOFT; stroke-dasharray: 3 2; }
rect.empty { fill: none; stroke: SOFT; opacity: 0.5; }
path.line { fill: none; stroke: SOFT; stroke-width: 1.4; }
path.far-line { fill: none; stroke: FAR-LINE; stroke-width: 1.4; }
path.tip { fill: SOFT; }
path.far-line-tip { fill: FAR-LINE; }
"""
WIDTH = 480  # Narrow, so that the text is still legible on a telephone.


class Figure:
    """An SVG that grows by boxes, cells, lines and words.

    Kinds of boxes and cells are CSS classes: plain, near (local attention), far (memory), now (the present token),
    found (retrieved), waiting (not yet in the memory), gone (evicted).
    """

    def __init__(self, name: str, title: str, height: int) -> None:
        self.name = name
        self.height = height
        self.parts = [f"<title>{escape(title)}</title>"]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str = "",
        kind: str = "plain",
    ) -> None:
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>'
        )
        lines = words.split("\n") if words else []
        for number, line in enumerate(lines):
            self.words(
                x + width / 2,
                y + height / 2 + (number - (len(lines) - 1) / 2) * 17 + 5,
                line,
                "middle",
            )

    def cells(
        self,
        x: float,
        y: float,
        kinds: list[str],
        size: float = 14,
        step: float = 17,
    ) -> list[float]:
        """A row of tokens; the middle of each."""
        for number, kind in enumerate(kinds):
            self.parts.append(
                f'<rect class="{kind}" x="{x + number * step:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="2"/>'
            )
        return [x + number * step + size / 2 for number in range(len(kinds))]

    def words(
        self,
        x: float,
        y: float,
        words: str,
        anchor: str = "start",
        kind: str = "",
    ) -> None:
        chosen = f' class="{kind}"' if kind else ""
        self.parts.append(
            f'<text{chosen} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def line(
        self, path: str, kind: str = "line", *, arrow: bool = True
    ) -> None:
        end = f' marker-end="url(#{self.name}-{kind})"' if arrow else ""
        self.parts.append(f'<path class="{kind}" d="{path}"{end}/>')

    def brace(
        self,
        x: float,
        y: float,
        width: float,
        words: str,
        *,
        above: bool = True,
    ) -> None:
        """A bracket over (or under) `width`, with words."""
        sign = -1 if above else 1
        self.line(
            f"M{x:g} {y:g} v{6 * sign} h{width:g} v{-6 * sign}", arrow=False
        )
        self.words(x + width / 2, y + (-13 if above else 23), words, "middle")

    @staticmethod
    def style() -> str:
        """The figure's own colours, which a page's variables override."""
        rules = STYLE.strip()
        for name in sorted(LIGHT, key=len, reverse=True):
            rules = rules.replace(
                name.upper(), f"var(--figure-{name}, var(--own-{name}))"
            )
        rules = "\n".join(f"svg.figure {rule}" for rule in rules.splitlines())
        light, dark = (
            "".join(
                f" --own-{name}: {colour};" for name, colour in colours.items()
            )
            for colours in (LIGHT, DARK)
        )
        return (
            f"<style>\nsvg.figure {{{light} }}\n"
            f"@media (prefers-color-scheme: dark) {{ svg.figure {{{dark} }} }}\n{rules}\n</style>"
        )

    def svg(self) -> str:
        markers = "".join(
            f'<marker id="{self.name}-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path class="tip {kind}-tip" d="M0 0 L8 4 L0 8 z"/></marker>'
            for kind in ("line", "far-line")
        )
        body = "\n".join(self.parts)
        return (
            f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">\n'
            f"{self.style()}\n<defs>{markers}</defs>\n{body}\n</svg>\n"
        )


def sight() -> Figure:
    figure = Figure(
        "sight",
        "What a token sees: its segment, and the best matches in the memory",
        142,
    )
    old = ["far"] * 16
    for place in (2, 3, 8, 13):
        old[place] = "found"
    middles = figure.cells(8, 46, old)
    near = figure.cells(300, 46, ["near"] * 7 + ["now"])
    figure.words(287, 58, "…", "middle")
    figure.brace(8, 38, 269, "memory: keys of what was read before")
    figure.brace(300, 38, 133, "segment")
    for place in (2, 3, 8, 13):
        figure.line(
            f"M{near[-1]:g} 64 C{near[-1]:g} 120 {middles[place]:g} 120 {middles[place]:g} 64",
            "far-line",
        )
    figure.words(210, 134, "the k keys that match best, however old", "middle")
    figure.words(441, 58, "now")
    return figure


def layer() -> Figure:
    figure = Figure(
        "layer",
        "A memory layer: local attention and retrieved memory, joined by a gate",
        330,
    )
    figure.box(140, 8, 200, 34, "hidden state of a token")
    figure.line("M240 42 V66")
    figure.box(170, 68, 140, 30, "its query")
    figure.line("M200 98 C200 120 110 110 110 132")
    figure.line("M280 98 C280 120 370 110 370 132", "far-line")
    figure.box(
        10,
        134,
        200,
        64,
        "local attention over\nthe segment (and cache)",
        "near",
    )
    figure.box(
        270,
        134,
        200,
        64,
        "search: the k best keys;\nattention over those k",
        "far",
    )
    figure.line("M110 198 C110 228 200 222 200 244")
    figure.line("M370 198 C370 228 280 222 280 244", "far-line")
    figure.words(146, 240, "local", "end")
    figure.words(334, 240, "remembered")
    figure.box(60, 246, 360, 34, "gate: g · remembered + (1 − g) · local")
    figure.line("M240 280 V304")
    figure.words(240, 322, "to the rest of the layer", "middle")
    return figure


def step() -> Figure:
    figure = Figure(
        "step", "One step: search, then append, then forget the oldest", 300
    )
    figure.words(8, 20, "1  The segment's queries search the memory as it is.")
    first = figure.cells(28, 34, ["far"] * 16)
    for number, place in enumerate((1, 6, 12)):
        start = 348 + number * 34
        figure.line(
            f"M{start} 60 C{start} 88 {first[place]:g} 88 {first[place]:g} 52",
            "far-line",
        )
    figure.cells(340, 34, ["near"] * 6)
    figure.words(8, 122, "2  The segment's keys and values are appended …")
    figure.cells(28, 136, ["far"] * 16)
    figure.cells(28 + 16 * 17, 136, ["near"] * 6)
    figure.line("M395 168 H330", arrow=True)
    figure.words(402, 173, "new", kind="soft")
    figure.words(8, 216, "3  … and the oldest leave: first in, first out.")
    figure.cells(28, 230, ["gone"] * 6 + ["far"] * 16)
    figure.brace(
        28 + 6 * 17,
        254,
        16 * 17 - 3,
        "memory_size keys for each row and head",
        above=False,
    )
    figure.words(28 + 2.5 * 17, 277, "gone", "middle", "soft")
    return figure


def open_segment() -> Figure:
    figure = Figure(
        "open-segment",
        "Generation: the open segment waits and enters the memory when it is full",
        250,
    )
    figure.brace(8, 52, 201, "memory")
    figure.cells(8, 60, ["far"] * 12)
    figure.brace(228, 52, 133, "open segment")
    middles = figure.cells(228, 60, ["waiting"] * 4 + ["now"] + ["empty"] * 3)
    figure.line(
        f"M{middles[4]:g} 80 C{middles[4]:g} 112 {middles[1]:g} 112 {middles[1]:g} 80"
    )
    figure.line(
        f"M{middles[4]:g} 80 C{middles[4]:g} 140 60 140 60 80", "far-line"
    )
    figure.words(
        8, 150, "A token sees the open segment and searches the memory."
    )
    figure.brace(8, 200, 337, "memory: the segment entered whole")
    figure.cells(8, 208, ["far"] * 12 + ["found"] * 8)
    figure.cells(364, 208, ["now"] + ["empty"] * 5)
    figure.words(414, 243, "next segment", "middle", "soft")
    return figure


def one_trunk() -> Figure:
    figure = Figure(
        "one-trunk",
        "One trunk serves every backend; losses are compared token by token",
        300,
    )
    figure.box(150, 8, 180, 30, "text")
    figure.line("M240 38 V60")
    figure.box(
        90,
        62,
        300,
        46,
        "trunk: layers below the first memory\ncomputed once, kept",
        "near",
    )
    ends = (62, 181, 299, 418)
    for x, name in zip(
        ends, ("exact", "faiss-ivf", "hnswlib", "no memory"), strict=True
    ):
        figure.line(f"M240 108 C240 136 {x} 124 {x} 150")
        figure.box(
            x - 54,
            152,
            108,
            32,
            name,
            "plain" if name == "no memory" else "far",
        )
        figure.line(f"M{x} 184 V206")
        figure.box(x - 54, 208, 108, 32, "upper layers")
        figure.line(f"M{x} 240 C{x} 262 240 252 240 268")
    figure.words(
        240, 290, "losses of the same tokens, compared pair by pair", "middle"
    )
    return figure


def sealed() -> Figure:
    figure = Figure(
        "sealed",
        "An index that is built once: sealed parts and an exact tail",
        210,
    )
    for number, words in enumerate(
        ("sealed\npart 1", "sealed\npart 2", "sealed\npart 3")
    ):
        figure.box(
            8 + number * 112,
            54,
            104,
            52,
            words,
            "gone" if number == 0 else "far",
        )
    figure.box(344, 54, 128, 52, "tail: exact", "near")
    figure.brace(8, 46, 328, "indexes built once, never changed")
    figure.line("M60 130 V112")
    figure.words(8, 148, "the oldest is dropped whole", kind="soft")
    figure.line("M408 130 V112")
    figure.words(472, 148, "new keys; sealed when full", "end", "soft")
    figure.words(
        240,
        190,
        "A search asks every part and merges what they found.",
        "middle",
    )
    return figure


def attached() -> Figure:
    figure = Figure("attached", "Memory attached to a pretrained model", 330)
    for number in range(6):
        memory = number == 2
        words, kind = (
            ("layer with memory", "far") if memory else ("layer", "plain")
        )
        figure.box(150, 268 - number * 44, 150, 34, words, kind)
        if number:
            figure.line(
                f"M225 {268 - number * 44 + 44} V{268 - number * 44 + 36}"
            )
    figure.box(
        326,
        163,
        148,
        68,
        "memory: one for\neach row and\nkey-value head",
        "far",
    )
    figure.line("M300 190 H324", "far-line")
    figure.line("M326 206 H302", "far-line")
    figure.words(8, 66, "a pretrained")
    figure.words(8, 84, "model, its weights")
    figure.words(8, 102, "untouched")
    figure.words(225, 322, "tokens in sight", "middle")
    figure.words(400, 256, "tokens enter when", "middle", "soft")
    figure.words(400, 273, "they leave its sight", "middle", "soft")
    figure.words(225, 34, "next token", "middle")
    return figure


FIGURES = (sight, layer, step, open_segment, one_trunk, sealed, attached)


def main() -> None:
    for make in FIGURES:
        figure = make()
        (FOLDER / f"{figure.name}.svg").write_text(
            figure.svg(), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
