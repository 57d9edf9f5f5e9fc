"""What is said of a crossover: sentences, CSV, and the page at desktop and phone width."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from browsing import WIDTHS, browser, visited
from crossover_results import made_results

from recollect.reports.crossing_figure import ratio_ticks, short, size_ticks
from recollect.reports.crossing_page import write_crossing_page
from recollect.reports.crossing_results import Case, answers, load_crossover, rounded
from recollect.reports.errors import ReportError

__all__ = ["browser"]  # the fixture

QUICK = {"hnswlib": lambda size, recall: 3000 / size, "faiss-ivf": lambda size, recall: 1500 / size}


def test_the_earliest_index_is_named_with_size_and_interval(tmp_path: Path) -> None:
    results = load_crossover(made_results(tmp_path, QUICK))
    alone, counted = answers(results)
    assert "512 queries a step, recall at least 0.95, searches alone: up to about 1,500 keys" in alone
    assert "(interval 1,400 to 1,600); from there on `faiss-ivf` is quicker" in alone
    assert "At 8,192 keys it takes 0.18 times (0.17 to 0.19)" in alone
    assert "appends counted: up to about 3,100" in counted, "half of exact's time comes on top of 1500 / n"
    assert "from there on `faiss-ivf`" in counted


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (
            lambda size, recall: 2.0,
            "no index overtakes exact search as far as it was measured (8,192 keys); `scann`",
        ),
        (lambda size, recall: 0.5, "already at 512 keys, the smallest memory measured, `scann` is quicker than exact"),
        (
            lambda size, recall: None,
            "no index measured reaches this recall at its largest memory",
        ),
        (lambda size, recall: 0.5 if size == 1024 else 2.0, "quicker at some smaller memories, which did not last"),
        (lambda size, recall: 0.5 if size < 8192 else None, "no index measured reaches this recall"),
        (lambda size, recall: 1.01 if size < 8192 else 0.99, "which is within the noise"),
    ],
)
def test_every_outcome_has_its_words(tmp_path: Path, ratio: Any, said: str) -> None:
    results = load_crossover(made_results(tmp_path, {"scann": ratio}))
    assert said in answers(results, [Case(512, 0.95, False)])[0]


def test_what_is_certain_is_named_before_what_may_be(tmp_path: Path) -> None:
    maybe = {"approx-topk": lambda size, recall: 0.99, "scann": lambda size, recall: 1500 / size}
    results = load_crossover(made_results(tmp_path, maybe))
    said = answers(results, [Case(512, 0.95, False)])[0]
    assert "from about 1,500 keys on (interval 1,400 to 1,600) `scann` is quicker than exact search; below" in said
    assert "beyond the noise" in said


def test_every_figure_is_in_the_table(tmp_path: Path) -> None:
    made_results(tmp_path, QUICK, recalls=(0.9, 0.99))
    write_crossing_page(tmp_path)
    with (tmp_path / "crossover.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 5 * 2
    assert {row["index"] for row in rows} == set(QUICK)
    first = next(row for row in rows if row["index"] == "hnswlib" and row["memory_size"] == "8192")
    assert float(first["ratio"]) == pytest.approx(3000 / 8192)
    assert float(first["step_ratio"]) == pytest.approx(3000 / 8192 + 0.5)


def test_a_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    page = write_crossing_page(made_results(tmp_path, QUICK)).read_text(encoding="utf-8")
    assert "one:&lt;b&gt;=0.95" in page
    assert "<b>" not in page
    assert "<script" not in page


def test_what_is_missing_or_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="recollect crossover"):
        load_crossover(tmp_path)
    path = made_results(tmp_path, QUICK) / "crossover.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(ReportError, match="schema 99"):
        load_crossover(tmp_path)
    path.write_text("{")
    with pytest.raises(ReportError, match="damaged"):
        load_crossover(tmp_path)


def test_numbers_as_people_write_them() -> None:
    assert [rounded(value) for value in (512.3, 1449, 23_456, 104_857)] == ["510", "1,400", "23,000", "100,000"]
    assert [short(size) for size in (512, 2048, 3456, 131_072, 2**21)] == ["512", "2k", "3,456", "128k", "2M"]
    assert size_ticks(512, 131_072) == [512, 2048, 8192, 32_768, 131_072]
    assert size_ticks(600, 900) == [600]
    assert ratio_ticks(0.3, 6) == [0.5, 1.0, 2.0, 5.0]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_loads_nothing(tmp_path: Path, browser: Any, width: int) -> None:
    page = write_crossing_page(made_results(tmp_path, QUICK, recalls=(0.9, 0.99)))
    with visited(browser, width) as visit:
        visit.page.goto(page.as_uri())
        visit.assert_it_fits()
        assert visit.complaints == []
        assert visit.outside() == []
        drawn = visit.page.evaluate(
            "Array.from(document.querySelectorAll('svg.crossing')).map(s => [s.getBoundingClientRect().width,"
            " s.querySelectorAll('polyline').length, s.querySelectorAll('g').length])"
        )
        assert len(drawn) == 4
        for room, lines, points in drawn:
            assert room >= 300, "wide enough to read"
            assert (lines, points) == (2, 10)
