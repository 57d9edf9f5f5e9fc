"""What a result folder holds beside its cells: curves.json and crossover.json, checked and typed."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.reports.errors import ReportError
from recollect.reports.reading import check_schema, read_json, refuse_mixing, rerun

CURVES, CROSSOVER = "curves.json", "crossover.json"


@dataclass(frozen=True)
class CrossoverRow:
    """A search time at a memory size beyond what the model was evaluated with."""

    spec: str
    backend: str
    memory_size: int
    num_memories: int
    queries: int
    k: int
    search_ms: float
    search_ms_low: float | None
    search_ms_high: float | None
    recall_at_k: float | None
    build_seconds: float | None


@dataclass(frozen=True)
class CurvePoint:
    """One setting of search options over one build. Times in milliseconds of one segment's queries.

    build: the spec without what the curve varies. exact_ratio: time over exact search's in the same rounds, with its
    95 % interval. noisy: the machine varied so much meanwhile that small differences mean nothing.
    """

    build: str
    spec: str
    backend: str
    memory_size: int
    k: int
    recall_at_k: float
    softmax_mass: float | None
    search_ms: float
    search_ms_low: float | None
    search_ms_high: float | None
    search_ms_p95: float | None
    search_ms_p99: float | None
    samples: int | None
    exact_ratio: float | None
    exact_ratio_low: float | None
    exact_ratio_high: float | None
    reference_ms: float | None
    noisy: bool | None


CSV_COLUMNS = [
    "spec",
    "build",
    "backend",
    "memory_size",
    "k",
    "recall_at_k",
    "softmax_mass",
    "search_ms",
    "search_ms_low",
    "search_ms_high",
    "search_ms_p95",
    "search_ms_p99",
    "samples",
    "exact_ratio",
    "exact_ratio_low",
    "exact_ratio_high",
    "reference_ms",
    "noisy",
]


def curves_csv(points: tuple[CurvePoint, ...]) -> str:
    """The points as CSV, seven digits each."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for point in points:
        writer.writerow([_csv(getattr(point, name)) for name in CSV_COLUMNS])
    return stream.getvalue()


def _csv(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return yes_or_no(value) or ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def yes_or_no(value: bool | None) -> str | None:
    """A truth value as tables have it."""
    return None if value is None else "yes" if value else "no"


def read_curves(folder: Path, run: Mapping[str, Any], apart: Collection[str] = ()) -> tuple[CurvePoint, ...]:
    """The points of curves.json by size, backend, build and time; empty where there is no such file.

    apart: machines whose times stand beside no others: curves measured there are left out.
    """
    path = folder / CURVES
    if not path.is_file():
        return ()
    content = read_json(path, folder)
    check_schema(content, path)
    refuse_mixing(content, run, path, folder)
    points = []
    try:
        for curve in content["curves"]:
            if curve.get("machine") in apart:
                continue
            build = str(curve["build"])
            for point in curve["points"]:
                points.append(_point(build, point))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{path} is not as recollect writes it ({error!r}); delete it and {rerun(folder)}") from error
    points.sort(key=lambda p: (p.memory_size, p.backend != "exact", p.backend, p.build, p.search_ms))
    return tuple(points)


def _point(build: str, point: Mapping[str, Any]) -> CurvePoint:
    optional = (
        "softmax_mass",
        "search_ms_low",
        "search_ms_high",
        "search_ms_p95",
        "search_ms_p99",
        "exact_ratio",
        "exact_ratio_low",
        "exact_ratio_high",
        "reference_ms",
    )
    samples, noisy = point.get("samples"), point.get("noisy")
    return CurvePoint(
        build=build,
        spec=str(point["spec"]),
        backend=str(point["backend"]),
        memory_size=int(point["memory_size"]),
        k=int(point["k"]),
        recall_at_k=float(point["recall_at_k"]),
        search_ms=float(point["search_ms"]),
        samples=None if samples is None else int(samples),
        noisy=None if noisy is None else bool(noisy),
        **{name: _optional(point, name) for name in optional},
    )


def read_crossover(folder: Path, run: Mapping[str, Any], apart: Collection[str] = ()) -> tuple[CrossoverRow, ...]:
    """The rows of crossover.json that have a time; empty where there is no such file.

    apart: as of `read_curves`.
    """
    path = folder / CROSSOVER
    if not path.is_file():
        return ()
    content = read_json(path, folder)
    refuse_mixing(content, run, path, folder)
    rows = []
    try:
        for row in content["rows"]:
            if row.get("search_ms") is None or row.get("machine") in apart:
                continue  # skipped or failed there; the cells carry the reason
            rows.append(
                CrossoverRow(
                    spec=str(row["spec"]),
                    backend=str(row["backend"]),
                    memory_size=int(row["memory_size"]),
                    num_memories=int(row["num_memories"]),
                    queries=int(row["queries"]),
                    k=int(row["k"]),
                    search_ms=float(row["search_ms"]),
                    search_ms_low=_optional(row, "search_ms_low"),
                    search_ms_high=_optional(row, "search_ms_high"),
                    recall_at_k=_optional(row, "recall_at_k"),
                    build_seconds=_optional(row, "build_seconds"),
                )
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{path} is not as recollect writes it ({error!r}); delete it and {rerun(folder)}") from error
    return tuple(rows)


def _optional(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return None if value is None else float(value)
