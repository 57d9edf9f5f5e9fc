"""The table: one row per spec and memory size, as CSV, Parquet and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recollect.reports.beside import yes_or_no
from recollect.reports.files import write_bytes, write_text
from recollect.reports.results import Cell
from recollect.reports.statistics import Interval

Value = str | int | float | None

# The first sixteen are a contract with whoever reads results.csv; what is useful besides comes after them.
COLUMNS = [
    "spec",
    "backend",
    "memory_size",
    "k",
    "recall_at_k",
    "softmax_mass",
    "perplexity",
    "perplexity_difference",
    "difference_low",
    "difference_high",
    "search_ms",
    "append_us_per_key",
    "build_seconds",
    "bytes_per_key",
    "status",
    "reason",
    "perplexity_low",
    "perplexity_high",
    "difference_percent",
    "accuracy",
    "softmax_mass_exact",
    "tokens",
    "search_ms_low",
    "search_ms_high",
    "segment_ms",
    "index_bytes",
    "key_bytes",
    "seed",
    "search_ms_p50",
    "search_ms_p95",
    "search_ms_p99",
    "search_ms_cold",
    "search_first_ms",
    "searches",
    "append_ms_p50",
    "append_ms_p95",
    "append_ms_p99",
    "reference_ms",
    "noisy",
    "stalled_seconds",
    "machine",
]
_WHOLE = ("memory_size", "k", "tokens", "seed", "searches", "index_bytes", "key_bytes")


@dataclass(frozen=True)
class Row:
    """A cell with what the report adds to it.

    perplexity, difference: intervals, None where no losses were stored. difference_point: the difference to exact at
    the same size even then. percent: that difference in per cent of exact's perplexity. segment_ms: search plus append.
    """

    cell: Cell
    perplexity: Interval | None
    difference: Interval | None
    difference_point: float | None
    percent: float | None
    segment_ms: float | None

    def values(self) -> dict[str, Value]:
        """Column name to value; a row that was not measured has no figures."""
        cell = self.cell
        values: dict[str, Value] = {name: getattr(cell, name, None) for name in COLUMNS}
        values["perplexity_difference"] = self.difference_point
        values["difference_low"] = self.difference.low if self.difference else None
        values["difference_high"] = self.difference.high if self.difference else None
        values["perplexity_low"] = self.perplexity.low if self.perplexity else None
        values["perplexity_high"] = self.perplexity.high if self.perplexity else None
        values["difference_percent"] = self.percent
        values["noisy"] = yes_or_no(cell.noisy)
        values["segment_ms"] = self.segment_ms if cell.ok else None
        for name in _WHOLE:
            value = values[name]
            values[name] = int(value) if isinstance(value, float) and value.is_integer() else value
        return values


def csv_text(rows: Iterable[Row]) -> str:
    """The table as CSV; figures carry seven digits, missing ones are empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _csv_value(value) for name, value in row.values().items()})
    return stream.getvalue()


def _csv_value(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.7g}"
    return str(value)


def write_csv(path: Path, rows: Iterable[Row]) -> Path:
    return write_text(path, csv_text(rows))


def write_parquet(path: Path, rows: Sequence[Row]) -> Path | None:
    """The table as Parquet, or None where pyarrow is not installed: the CSV holds the same."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    whole, text = pyarrow.int64(), pyarrow.string()
    kinds = {name: pyarrow.float64() for name in COLUMNS}
    kinds |= dict.fromkeys(("memory_size", "k", "tokens", "seed", "searches"), whole)
    kinds |= dict.fromkeys(("spec", "backend", "status", "reason", "noisy", "machine"), text)
    schema = pyarrow.schema(list(kinds.items()))
    table = pyarrow.Table.from_pylist([_floats(row.values(), kinds, pyarrow) for row in rows], schema=schema)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return write_bytes(path, sink.getvalue().to_pybytes())


def _floats(values: dict[str, Value], kinds: dict[str, object], pyarrow: object) -> dict[str, Value]:
    names = {name for name, kind in kinds.items() if kind == pyarrow.float64()}  # type: ignore[attr-defined]
    return {n: float(v) if n in names and isinstance(v, int) else v for n, v in values.items()}


# Column, heading and unit, and digits after the point (None: as it stands) for readers of the page and the Markdown.
SHOWN: tuple[tuple[str, str, str, int | None], ...] = (
    ("spec", "Spec", "", None),
    ("memory_size", "Memory size", "keys", 0),
    ("recall_at_k", "Recall at k", "", 3),
    ("softmax_mass", "Softmax mass", "", 3),
    ("perplexity", "Perplexity", "", 3),
    ("perplexity_difference", "Difference to exact", "", 3),
    ("difference_low", "from", "95 %", 3),
    ("difference_high", "to", "95 %", 3),
    ("search_ms", "Search", "ms per segment", 2),
    ("search_ms_p99", "its p99", "ms per segment", 2),
    ("append_us_per_key", "Append", "µs per key", 2),
    ("segment_ms", "Search and append", "ms per segment", 2),
    ("build_seconds", "Build", "s", 2),
    ("bytes_per_key", "Footprint", "bytes per key", 0),
    ("status", "Status", "", None),
    ("reason", "Reason", "", None),
)


def shown(value: Value, digits: int | None) -> str:
    """A value as a reader wants it: thousands apart, a true minus sign, nothing where nothing was measured."""
    if value is None:
        return ""
    if digits is None or isinstance(value, str):
        return str(value)
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def escape_markdown(text: str) -> str:
    """Text that stays text in a Markdown table: no markup, no HTML, no column break, no new line."""
    for mark, entity in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("`", "'"),
        ("\n", " "),
        ("\r", ""),
    ):
        text = text.replace(mark, entity)
    for mark in "*_[]":
        text = text.replace(mark, "\\" + mark)
    return text


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]], *, right: Sequence[bool]) -> str:
    """A Markdown table of cells that are already escaped."""
    text = ["| " + " | ".join(headings) + " |", "|" + "|".join("---:" if r else "---" for r in right) + "|"]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(text) + "\n"
