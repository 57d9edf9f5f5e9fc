"""Cells of several machines: whose times are compared, and what is said of the others."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from recollect.reports.ablation_analysis import MEASURES, _one_machine
from recollect.reports.ablation_results import SeedRow
from recollect.reports.analysis import analyse
from recollect.reports.contents import facts, notes
from recollect.reports.machines import TIMES, judge_machines
from recollect.reports.results import load_results
from recollect.reports.rows import csv_text
from recollect.reports.synthetic import write_synthetic_results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_synthetic_results(tmp_path / "run")
    return tmp_path / "run"


def put_on_machines(folder: Path, reference_ms: dict[str, float]) -> None:
    """Deals the measured cells to machines, so that the first has most of them."""
    names = list(reference_ms)
    counts = dict.fromkeys(names, 0)
    for place, path in enumerate(sorted((folder / "cells").glob("*.json"))):
        cell = json.loads(path.read_text(encoding="utf-8"))
        name = names[0] if place % 3 or len(names) == 1 else names[1]
        cell["provenance"] = {**(cell.get("provenance") or {}), "host": name}
        if cell.get("search_ms") is not None:
            cell["reference_ms"] = reference_ms[name]
        counts[name] += cell["status"] == "ok"
        path.write_text(json.dumps(cell), encoding="utf-8")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps({**run, "machines": counts}), encoding="utf-8")


def test_one_machine_is_no_news(folder: Path) -> None:
    put_on_machines(folder, {"one": 1.0})
    results = load_results(folder)
    assert list(results.machines.cells) == ["one"]
    analysis = analyse(results)
    assert not [note for note in notes(analysis) if "machines" in note]
    assert "Machines" not in dict(facts(results.run))
    rows = list(csv.DictReader(io.StringIO(csv_text(analysis.rows))))
    assert {row["machine"] for row in rows} == {"one"}


def test_machines_that_are_equally_fast_are_compared_and_named(folder: Path) -> None:
    put_on_machines(folder, {"one": 1.0, "two": 1.04})
    results = load_results(folder)
    assert results.machines.home == "one"
    assert not results.machines.apart
    (note,) = (note for note in notes(analyse(results)) if "machines" in note)
    assert "measured on 2 machines: one (" in note
    assert "differs by 4 %" in note
    assert dict(facts(results.run))["Machines"].startswith("one (")


def test_times_of_a_slower_machine_stand_beside_no_others(folder: Path) -> None:
    plain = load_results(folder)
    put_on_machines(folder, {"one": 1.0, "two": 1.4})
    results = load_results(folder)
    assert set(results.machines.apart) == {"two"}
    before = {(cell.spec, cell.memory_size): cell for cell in plain.cells}
    there = [cell for cell in results.cells if cell.machine == "two" and cell.ok]
    assert there
    for cell in there:
        former = before[cell.spec, cell.memory_size]
        assert all(getattr(cell, name) is None for name in TIMES)
        assert (cell.perplexity, cell.recall_at_k) == (former.perplexity, former.recall_at_k)
        assert "1.40 times as long as on one" in cell.reason
    for cell in results.cells:
        if cell.machine == "one":
            assert cell.search_ms == before[cell.spec, cell.memory_size].search_ms
    (note,) = (note for note in notes(analyse(results)) if "machines" in note)
    assert "Times of two are compared with none" in note
    assert judge_machines([]).home is None


@pytest.mark.parametrize(
    ("figure", "table", "name"),
    [
        ("step_ms", "costs", "timed_on"),
        ("step_ms", "training", "machine"),
        ("evaluation_us_per_token", "evaluation", "machine"),
    ],
)
def test_seconds_of_two_machines_make_no_difference(figure: str, table: str, name: str) -> None:
    measure = next(measure for measure in MEASURES if measure.name == figure)

    def row(machine: str) -> SeedRow:
        tables: dict[str, Any] = {table: {name: machine}}
        return SeedRow("words", "memory", 0, "ok", "", **tables)

    assert _one_machine(measure, row("one"), row("one"))
    assert not _one_machine(measure, row("one"), row("two"))
    assert _one_machine(measure, row("one"), row("")), "earlier files do not say"
    bytes_held = next(measure for measure in MEASURES if measure.name == "memory_bytes")
    assert _one_machine(bytes_held, row("one"), row("two"))
