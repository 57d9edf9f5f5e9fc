"""Backends run on files of ann-benchmarks: what is measured, kept, resumed, written and told on the command line."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from recollect.cli import app
from recollect.memory_backends import make_backend
from recollect.model.ann_benchmarks import AnnBenchmarkFile, write_ann_benchmarks
from recollect.model.documents import CorpusError
from recollect.suites import ann_run, row_process
from recollect.suites.ann_measure import AnnRow, AnnSettings, expand, measure_specs
from recollect.suites.ann_results import result_path, write_result
from recollect.suites.ann_run import AnnRunOptions, on_front, run_ann_benchmarks
from recollect.suites.published_recall import ann_benchmarks_recall

SETTINGS = AnnSettings(k=5, batch_size=16, single_queries=7, runs=2)
SPECS = ["degraded:drop=0.3", "exact"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "small-8-euclidean.hdf5"
    write_ann_benchmarks(file, random.normal(size=(400, 8)), random.normal(size=(40, 8)), k=10, metric="l2")
    return file


def here(task: dict, *, on_event, **_: object) -> dict:  # type: ignore[no-untyped-def, type-arg]
    """Stands in for a process of its own: the same work in this one."""
    ann_run.work(task, lambda event, **content: on_event(json.loads(json.dumps({"event": event, **content}))))
    return {"event": "end"}


def test_a_curve_is_what_a_spec_leaves_open() -> None:
    assert expand(["exact", "approx-topk:recall_target=0.9", "exact"]) == ["exact", "approx-topk:recall_target=0.9"]
    curve = expand(["approx-topk", "exact"])
    assert len(curve) > 4
    assert curve[-1] == "exact"
    assert all(spec.startswith("approx-topk") for spec in curve[:-1])
    assert expand(["approx-topk"], sweep=False) == ["approx-topk"]


@pytest.mark.parametrize("distance", ["euclidean", "angular", "ip", "dot", "normalized"])
def test_rows_and_answers(tmp_path: Path, distance: str) -> None:
    random = np.random.default_rng(1)
    keys, queries = random.normal(size=(300, 8)), random.normal(size=(30, 8))
    if distance == "normalized":
        keys, queries = (array / np.linalg.norm(array, axis=1, keepdims=True) for array in (keys, queries))
    metric = {"euclidean": "l2", "angular": "cosine"}.get(distance, "inner_product")
    written = write_ann_benchmarks(tmp_path / "d.hdf5", keys, queries, k=10, metric=metric, augment=False)
    with h5py.File(tmp_path / "d.hdf5", "a") as content:
        content.attrs["distance"] = distance
        if distance == "normalized":
            content["distances"][...] = 1 + content["distances"][...]
    told: list[str] = []
    with AnnBenchmarkFile(tmp_path / "d.hdf5") as file:
        measured = list(measure_specs(file, ["exact"], SETTINGS, lambda what, done, total: told.append(what)))
    ((row, answers),) = measured
    assert answers is not None
    np.testing.assert_array_equal(answers.found, written.neighbors[:, :5])
    assert (row.recall_ann_benchmarks, row.recall_strict, row.status) == (1.0, 1.0, "ok")
    assert (row.keys, row.queries, row.dimension, row.batch_size) == (300, 30, 8, 16)
    assert len(answers.batch_seconds) == 2
    assert len(answers.single_seconds) == 7
    assert told[0] == "building exact"
    assert told[-1] == "searching exact"
    assert AnnRow.from_json({**row.as_json(), "unknown": 1}) == row


def test_the_table_shows_what_no_other_beats() -> None:
    def row(backend: str, recall: float, speed: float) -> AnnRow:
        given = {"recall_ann_benchmarks": recall, "batch_queries_per_second": speed}
        return AnnRow("d", "ip", 1, 1, 1, f"{backend}:{recall}:{speed}", backend, 1, **given)  # type: ignore[arg-type]

    rows = [row("a", 0.9, 10), row("a", 0.8, 20), row("a", 0.8, 30), row("a", 0.9, 5), row("b", 0.1, 1)]
    rows.append(dataclasses.replace(rows[0], status="failed"))
    assert on_front(rows) == [rows[2], rows[0], rows[4]]


def test_an_index_is_built_once_for_its_curve(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = make_backend
    monkeypatch.setattr("recollect.suites.ann_measure.make_backend", lambda *a, **b: made.append(a) or real(*a, **b))
    specs = ["approx-topk:recall_target=0.5", "approx-topk:recall_target=0.999"]
    with AnnBenchmarkFile(path) as file:
        low, high = [row for row, _ in measure_specs(file, specs, SETTINGS)]
    assert len(made) == 1
    assert [low.spec, high.spec] == specs
    assert low.recall_strict is not None
    assert high.recall_strict is not None
    assert low.recall_strict <= high.recall_strict
    assert low.build_seconds == high.build_seconds


def test_the_plot_of_ann_benchmarks_reads_what_is_written(path: Path, tmp_path: Path) -> None:
    with AnnBenchmarkFile(path) as file:
        row, answers = next(iter(measure_specs(file, ["degraded:drop=0.3"], SETTINGS)))
        assert answers is not None
        known = file.truth()[1]
    (written,) = write_result(tmp_path, row, answers)
    assert written.relative_to(tmp_path).parts[:3] == ("results", "small-8-euclidean", "5")
    assert written.parent.name == "recollect-degraded-batch"
    with h5py.File(written) as result:
        attributes = dict(result.attrs)
        assert attributes["batch_mode"]
        assert attributes["count"] == 5
        assert attributes["dataset"] == "small-8-euclidean"
        assert 1 / attributes["best_search_time"] == pytest.approx(row.batch_queries_per_second)
        assert result["times"].shape == (40,)
        assert float(np.sum(result["times"])) == pytest.approx(answers.batch_seconds.sum(), rel=1e-4)
        assert ann_benchmarks_recall(known, result["distances"][...], 5) == row.recall_ann_benchmarks
        assert {"algo", "name", "build_time", "candidates", "index_size", "distance", "run_count"} <= set(attributes)


def test_queries_alone_have_a_file_where_all_were_searched_so(path: Path, tmp_path: Path) -> None:
    with AnnBenchmarkFile(path) as file:
        row, answers = next(iter(measure_specs(file, ["exact"], dataclasses.replace(SETTINGS, single_queries=100))))
    assert answers is not None
    _, alone = write_result(tmp_path, row, answers)
    assert alone.parent.name == "recollect-exact"
    with h5py.File(alone) as result:
        assert not result.attrs["batch_mode"]
        assert 1 / result.attrs["best_search_time"] == pytest.approx(row.single_queries_per_second)
        np.testing.assert_array_equal(result["neighbors"], answers.found)
        np.testing.assert_allclose(result["distances"], answers.distances, rtol=1e-6)


def test_distances_of_another_kind_are_told(path: Path, tmp_path: Path) -> None:
    """Some write squared distances: then the margin of 0.001 compares two measures."""
    squared = tmp_path / "squared.hdf5"
    squared.write_bytes(path.read_bytes())
    with h5py.File(squared, "a") as content:
        content["distances"][...] = content["distances"][...] ** 2
    for file_path, told in ((path, False), (squared, True)):
        with AnnBenchmarkFile(file_path) as file:
            row, _ = next(iter(measure_specs(file, ["exact"], SETTINGS)))
        assert row.truth_error is not None
        assert (row.truth_error > 5e-4) == told
        assert row.recall_strict == 1.0


def options(path: Path, output: Path, **changes: object) -> AnnRunOptions:
    return dataclasses.replace(
        AnnRunOptions(files=(path,), backends=SPECS, output=output, settings=SETTINGS, threads=1), **changes
    )


def test_a_run_goes_on_where_it_stopped(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_process, "run_task", here)
    first = run_ann_benchmarks(options(path, tmp_path, backends=SPECS[:1]))
    assert (first.measured, first.reused, first.others) == (1, 0, 0)
    both = run_ann_benchmarks(options(path, tmp_path))
    assert (both.measured, both.reused) == (1, 1)
    assert [row.spec for row in both.rows] == SPECS
    assert both.rows[0] == first.rows[0]
    assert both.rows[1].recall_strict == 1.0
    result_path(tmp_path, both.rows[0]).unlink()
    again = run_ann_benchmarks(options(path, tmp_path, backends=SPECS[:1]))
    assert (again.measured, again.reused, again.others) == (1, 0, 1)
    about = json.loads((tmp_path / "results.json").read_text())
    assert [row["spec"] for row in about["rows"]] == SPECS
    assert {"machine", "threads", "libraries", "commit", "date", "settings"} <= set(about)
    with (tmp_path / "results.csv").open() as stream:
        assert [row["spec"] for row in csv.DictReader(stream)] == SPECS
    other = run_ann_benchmarks(options(path, tmp_path, settings=dataclasses.replace(SETTINGS, k=3)))
    assert (other.measured, other.left_out) == (2, 2)
    assert {row["k"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]} == {3}


def test_what_cannot_be_measured_is_told(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(task: dict[str, object], **_: object) -> dict[str, str]:
        return {"event": "died", "reason": "the measuring process was ended by SIGSEGV"}

    monkeypatch.setattr(row_process, "run_task", dies)
    result = run_ann_benchmarks(options(path, tmp_path))
    assert [row.status for row in result.rows] == ["failed", "failed"]
    assert "SIGSEGV" in result.rows[0].reason
    monkeypatch.setattr(row_process, "run_task", here)
    assert run_ann_benchmarks(options(path, tmp_path)).measured == 2
    with pytest.raises(CorpusError, match="k is 11: the file holds 10"):
        run_ann_benchmarks(options(path, tmp_path, settings=AnnSettings(k=11)))
    (tmp_path / "other").mkdir()
    with pytest.raises(CorpusError, match="two files are called 'small-8-euclidean'"):
        run_ann_benchmarks(options(path, tmp_path, files=(path, tmp_path / "other" / path.name)))


def test_a_failure_in_the_process_is_the_row_s_reason(path: Path, tmp_path: Path) -> None:
    task = {"file": str(path), "output": str(tmp_path), "settings": {"k": 5, "device": "meta"}, "specs": ["exact"]}
    events: list[tuple[str, dict[str, object]]] = []
    ann_run.work(task, lambda event, **content: events.append((event, content)))
    assert events[-1][0] == "failed"
    assert "meta" in str(events[-1][1]["reason"])


def test_on_the_command_line(path: Path, tmp_path: Path) -> None:
    """In processes of their own, as a user runs it."""
    arguments = ["ann-benchmarks", str(path), "--backend", "exact", "--k", "5", "--runs", "1", "--threads", "1"]
    answer = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    assert "small-8-euclidean: 400 keys, 40 queries, euclidean, k 5" in answer.output.replace("\n", " ")
    answer = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path), "--json"])
    told = json.loads(answer.stdout)
    assert (told["measured"], told["reused"]) == (0, 1)
    assert told["rows"][0]["recall_ann_benchmarks"] == 1.0
    assert (tmp_path / "logs" / "small-8-euclidean-exact.log").is_file()
