"""Small tables as plain data, which the page and the Markdown both show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A column's heading with its unit. number: right-aligned; prose: long text that may wrap anywhere."""

    text: str
    unit: str = ""
    number: bool = False
    prose: bool = False


@dataclass(frozen=True)
class Table:
    """A small table; cells are text in which code stands between backticks."""

    caption: str
    headings: tuple[Heading, ...]
    lines: tuple[tuple[str, ...], ...]
