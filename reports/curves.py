"""Every measured point of search time against what was found: the curves of each build, and specs that have none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from recollect.reports.beside import CurvePoint
from recollect.reports.crossover import INSTRUMENTS
from recollect.reports.pareto import pareto_front

if TYPE_CHECKING:
    from recollect.reports.analysis import Analysis

WANTED_RECALLS = (0.8, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class Point:
    """One spec at one memory size. Times in milliseconds of one segment's queries over all memories.

    build: what it shares with the other points of its curve; its own spec where it has no curve.
    share: softmax mass as a share of what exact search's neighbours hold of it, which is the most that can be found.
    ratio, ratio_low, ratio_high: time over exact search's in the same rounds; None where it was not timed in turns.
    """

    spec: str
    build: str
    backend: str
    memory_size: int
    recall: float
    mass: float | None
    share: float | None
    ms: float
    low: float | None
    high: float | None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    noisy: bool | None = None


def time_points(analysis: Analysis) -> tuple[Point, ...]:
    """The points of every curve, and the measured specs of builds that have none, without instruments.

    A spec's time in the evaluation pass and on its curve are two measurements: where there is a curve its own counts,
    since all of its points were timed in turns.
    """
    curves = analysis.results.curves
    whole = {point.memory_size: point.softmax_mass for point in curves if point.spec == "exact"}
    points = [_of_curve(point, whole.get(point.memory_size)) for point in curves if point.backend not in INSTRUMENTS]
    have = {(point.spec, point.memory_size) for point in points}
    for row in analysis.measured:
        cell = row.cell
        if cell.backend in INSTRUMENTS or (cell.spec, cell.memory_size) in have:
            continue
        if cell.recall_at_k is not None and cell.search_ms is not None:
            points.append(
                Point(
                    cell.spec,
                    cell.spec,
                    cell.backend,
                    cell.memory_size,
                    cell.recall_at_k,
                    cell.softmax_mass,
                    _share(cell.softmax_mass, cell.softmax_mass_exact),
                    cell.search_ms,
                    cell.search_ms_low,
                    cell.search_ms_high,
                    noisy=cell.noisy,
                )
            )
    return tuple(sorted(points, key=lambda p: (p.memory_size, p.backend != "exact", p.backend, p.build, p.ms)))


def _share(mass: float | None, whole: float | None) -> float | None:
    return None if mass is None else min(1.0, mass / (whole or 1.0))


def _of_curve(point: CurvePoint, whole: float | None) -> Point:
    return Point(
        point.spec,
        point.build,
        point.backend,
        point.memory_size,
        point.recall_at_k,
        point.softmax_mass,
        _share(point.softmax_mass, whole),
        point.search_ms,
        point.search_ms_low,
        point.search_ms_high,
        point.exact_ratio,
        point.exact_ratio_low,
        point.exact_ratio_high,
        point.noisy,
    )


def front_of(points: tuple[Point, ...], field: str) -> list[Point]:
    """The Pareto front of search time against 'recall' or 'share' (of the softmax mass), at one memory size."""
    return pareto_front(points, lambda p: p.ms, lambda p: None if getattr(p, field) is None else -getattr(p, field))


@dataclass(frozen=True)
class Reached:
    """The quickest point that finds at least `recall` at a memory size; None where none does."""

    memory_size: int
    recall: float
    point: Point | None


def quickest_reaching(points: tuple[Point, ...], sizes: tuple[int, ...]) -> tuple[Reached, ...]:
    """For each memory size and wanted recall the quickest point."""
    found = []
    for size in sizes:
        here = [p for p in points if p.memory_size == size]
        for recall in WANTED_RECALLS:
            reaching = [p for p in here if p.recall >= recall]
            found.append(Reached(size, recall, min(reaching, key=lambda p: p.ms, default=None)))
    return tuple(found)
