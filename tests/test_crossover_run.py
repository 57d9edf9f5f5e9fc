"""`recollect crossover` from end to end on random keys: measured in processes, resumed, told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recollect.memory_backends import UnknownBackend, describe_backend
from recollect.suites.crossover_keys import SyntheticKeys
from recollect.suites.crossover_measure import filled, measure_size
from recollect.suites.crossover_options import CrossoverError, CrossoverOptions, checked
from recollect.suites.crossover_run import chosen_indexes, crossover, weighty_queries

OPTIONS: dict[str, Any] = {
    "memories": 2,
    "queries": (8,),
    "recalls": (0.5, 0.95),
    "k": 8,
    "dim": 16,
    "keys": "synthetic",
    "backends": ("degraded:drop=0.3",),
    "min_keys": 64,
    "max_keys": 128,
    "minutes": 5,
    "threads": 1,
    "progress": False,
}


def test_an_index_at_one_size() -> None:
    if not describe_backend("faiss-ivf").available:
        pytest.skip(describe_backend("faiss-ivf").reason)
    point = measure_size(
        SyntheticKeys(16),
        "faiss-ivf:nlist=32",
        1024,
        memories=2,
        queries=(1, 64),
        recalls=(0.8, 0.999),
        k=8,
        timing_seconds=0.05,
    )
    assert [(row["queries"], row["recall_wanted"]) for row in point["rows"]] == [
        (1, 0.8),
        (1, 0.999),
        (64, 0.8),
        (64, 0.999),
    ]
    for row in point["rows"]:
        assert row["recall"] >= row["recall_wanted"]
        assert row["spec"].startswith("faiss-ivf:nlist=32")
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["append_ms"] == pytest.approx(point["append_us_per_key"] * row["queries"] * 2 / 1000)
        expected = (row["ratio"] * row["exact_ms"] + row["append_ms"]) / (row["exact_ms"] + row["exact_append_ms"])
        assert row["step_ratio"] == pytest.approx(expected)
    found = {entry["spec"]: entry["recall"] for entry in point["curve"]}
    assert all(row["recall"] == found[row["spec"]] for row in point["rows"])
    assert min(found.values()) >= 0.7, "what finds far too little is not looked at"
    assert any(recall < 0.999 for recall in found.values()), "options are refined around the lower recall too"
    assert filled(1024) == 1408


def test_a_run_is_measured_told_and_resumed(tmp_path: Path) -> None:
    result = crossover(CrossoverOptions(**OPTIONS, output=tmp_path))
    assert result.failed == ()
    assert result.measured >= 2
    assert result.reused == 0
    assert len(result.answers) == 4
    content = json.loads((tmp_path / "crossover.json").read_text())
    assert {"machine", "libraries", "threads", "commit", "seed"} <= set(content["run"])
    for row in (row for point in content["points"] for row in point["rows"]):
        assert (row["spec"] is None) == (row["recall_wanted"] == 0.95), "what drops 30 % finds 70 %"
        assert row["exact_ms"] > 0
    outcomes = {(one["recall_wanted"], one["outcome"]) for one in result.crossings}
    assert (0.95, "recall not reached") in outcomes
    assert (0.5, "recall not reached") not in outcomes
    assert result.page.is_file()
    again = crossover(CrossoverOptions(**OPTIONS, output=tmp_path))
    assert (again.measured, again.reused) == (0, result.measured)
    assert json.loads((tmp_path / "crossover.json").read_text())["points"] == content["points"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": ()}, "queries are"),
        ({"recalls": (1.2,)}, "recalls are"),
        ({"memories": 0}, "memories is 0"),
        ({"min_keys": 512, "max_keys": 256}, "below min_keys"),
        ({"k": 600, "max_keys": 512}, "below k 600"),
        ({"minutes": 0}, "minutes is 0"),
        ({"dim": 0}, "dim is 0"),
    ],
)
def test_numbers_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CrossoverError, match=message):
        checked(CrossoverOptions(**changes))


def test_few_queries_are_not_measured_with_fewer_memories() -> None:
    rows = [{"queries": 1, "exact_ms": 0.4}, {"queries": 512, "exact_ms": 40.0}]
    points = [{"size": 512, "memories": 8, "rows": rows}, {"size": 1024, "memories": 4, "rows": rows[1:]}]
    assert weighty_queries(points, 2048, (1, 512)) == (512,)
    assert weighty_queries(points, 512 * 20, (1, 512)) == (1, 512), "0.05 ms a memory at 512 keys is 1 ms at 10240"
    assert weighty_queries([], 512, (1, 512)) == ()


def test_indexes_are_those_that_are_here() -> None:
    found, missing = chosen_indexes(())
    assert "exact" not in found
    assert "faiss-flat" not in found
    assert "degraded" not in found
    assert not set(found) & set(missing)
    with pytest.raises(UnknownBackend):
        chosen_indexes(("hnsvlib",))
    with pytest.raises(CrossoverError, match="name an index"):
        chosen_indexes(("exact",))
