"""The page of targets says what the result files hold."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import targets  # noqa: E402 (a script beside the package, found by the line above)


def test_the_worst_row_is_judged() -> None:
    most, least = targets.Target("a", 1.15, (0.4, 1.2)), targets.Target("b", 2.2, (2.3, 4.0), above=True)
    assert (most.worst, most.held, least.worst, least.held) == (1.2, False, 2.3, True)
    assert most.cells() == ("a", "1.2 (all: 0.4 to 1.2)", "at most 1.15", "missed")


def test_streams_are_judged_by_backend() -> None:
    rows = [
        {"capacity": 8192, "median_over_smallest": [1.0, 1.0, 1.0], "p99_over_median": 2.0},
        {"capacity": 131072, "median_over_smallest": [1.7, 1.6, 1.8], "p99_over_median": 2.5},
    ]
    turnovers = {"interval": [-0.04, -0.01]}
    found = list(targets.streams({"results": [{"spec": "hnswlib", "rows": rows, "turnovers": turnovers}]}))
    assert [target.held for target in found] == [False, True, False]


def test_the_page_is_as_the_files_are() -> None:
    found = targets.collect()
    assert {"exact_search", "streams", "large_memory"} <= set(found)
    page = targets.PAGE.read_text(encoding="utf-8")
    assert targets.with_tables(page, targets.as_markdown(found)) == page, "run: python benchmarks/targets.py --write"
    for name, (content, judged) in found.items():
        assert judged, name
        assert targets.machine_of(content) != "a machine that is not named", name
