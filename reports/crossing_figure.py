"""A panel of a crossing: an index's time over exact search's against the size of the memory, as an SVG of its own.

Drawn as text, without a plotting library: the page stays small, loads nothing and needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from recollect.reports.crossing import SizedRatio
from recollect.reports.style import marks, svg_path

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 42
SPARE = ("", "7 3", "2 3", "9 3 2 3")
"""Dashes that tell apart several indexes of one backend."""


@dataclass(frozen=True)
class Line:
    """The ratios of one index, by size. label: its registry string; backend: whose mark it gets; number: of the
    indexes of that backend."""

    label: str
    backend: str
    ratios: tuple[SizedRatio, ...]
    number: int = 0


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis: data from `low` to `high` on pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start), 1)


def legend(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Label, colour, shape and dashes of each line."""
    known = marks([line.backend for line in lines])
    return [
        {
            "label": line.label,
            "colour": known[line.backend].colour,
            "path": svg_path(known[line.backend]),
            "dashes": SPARE[line.number % len(SPARE)],
        }
        for line in lines
    ]


def panel(lines: Sequence[Line], sizes: Sequence[int], *, title: str) -> Markup:
    """The SVG.

    Args:
        lines: what is drawn; one without ratios is left out.
        sizes: every size of the figure, so that panels side by side have one axis.
        title: for who cannot see it.
    """
    values = [value for line in lines for ratio in line.ratios for value in (ratio.low, ratio.high)]
    low, high = min([*values, 0.8]) / 1.1, max([*values, 1.25]) * 1.1
    across = _Axis(min(sizes) / 1.1, max(sizes) * 1.1, LEFT, WIDTH - RIGHT)
    upward = _Axis(low, high, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg class="crossing" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_grid(across, upward, sizes),
    ]
    known = marks([line.backend for line in lines])
    for line in lines:
        mark = known[line.backend]
        parts += _line(line, across, upward, mark.colour, svg_path(mark))
    parts.append("</svg>")
    return Markup("\n".join(parts))


def _grid(across: _Axis, upward: _Axis, sizes: Sequence[int]) -> list[str]:
    parts = []
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in ratio_ticks(upward.low, upward.high):
        y = upward.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for size in size_ticks(min(sizes), max(sizes)):
        x = across.at(size)
        parts.append(f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{short(size)}</text>')
    one = upward.at(1.0)
    parts.append(f'<line class="exact" x1="{LEFT}" y1="{one}" x2="{right}" y2="{one}"/>')
    parts.append(f'<text class="name" x="{right - 2}" y="{one - 4}" text-anchor="end">exact search</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">keys in a memory</text>')
    return parts


def _line(line: Line, across: _Axis, upward: _Axis, colour: str, shape: str) -> list[str]:
    if not line.ratios:
        return []
    points = [(across.at(ratio.size), upward.at(ratio.value)) for ratio in line.ratios]
    dashes = SPARE[line.number % len(SPARE)]
    stroke = f' stroke-dasharray="{dashes}"' if dashes else ""
    path = " ".join(f"{x},{y}" for x, y in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{stroke}/>']
    for (x, y), ratio in zip(points, line.ratios, strict=True):
        low, high = upward.at(ratio.low), upward.at(ratio.high)
        told = f"{ratio.spec}: {ratio.value:.2f} times exact search at {ratio.size:,} keys"
        parts.append(
            f"<g><title>{escape(told)} ({ratio.low:.2f} to {ratio.high:.2f})</title>"
            f'<line x1="{x}" y1="{low}" x2="{x}" y2="{high}" stroke="{colour}" stroke-width="3" opacity="0.35"/>'
            f'<path d="{shape}" transform="translate({x} {y}) scale(4.5)" fill="{colour}"/></g>'
        )
    return parts


def ratio_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 and their decades within the range, or powers of ten where it is wide."""
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [float(f"{step}e{decade}") for decade in decades for step in steps if low <= step * 10.0**decade <= high]


def size_ticks(low: int, high: int) -> list[int]:
    """Powers of two that enclose no more than six marks."""
    powers = [2**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    step = math.ceil(len(powers) / 6) or 1
    return powers[::-1][::step][::-1] or [low]


def short(size: int) -> str:
    """A size as people write it on an axis: 64k for 65536."""
    if size >= 1024 * 1024 and size % (1024 * 1024) == 0:
        return f"{size // (1024 * 1024)}M"
    return f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else f"{size:,}"
