"""Runbooks: what is read, which a memory can follow, how they are replayed and judged, and their files."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from recollect.cli import app
from recollect.memory_backends import make_backend
from recollect.model.ann_benchmarks import write_ann_benchmarks
from recollect.model.documents import CorpusError
from recollect.suites import row_process, runbook_run
from recollect.suites.runbook import as_fifo, load_runbook, sliding_window, write_runbook
from recollect.suites.runbook_data import open_data, read_ground_truth, write_ground_truth
from recollect.suites.runbook_replay import compute_ground_truth, follow
from recollect.suites.runbook_run import RunbookOptions, run_runbook

RANDOM = np.random.default_rng(0)
KEYS = RANDOM.normal(size=(120, 6)).astype(np.float32)
QUERIES = RANDOM.normal(size=(9, 6)).astype(np.float32)
SMALL = "data:\n  1:\n    end: 40\n    operation: insert\n    start: 0\n  2:\n    operation: search\n"


def quiet(what: str, done: int, total: int) -> None:
    """Shows nothing."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.hdf5"
    write_ann_benchmarks(path, KEYS, QUERIES, k=5, metric="l2")
    return path


def written(folder: Path, *steps: tuple[Any, ...], max_pts: int = 0) -> Path:
    """A runbook of (operation, start, end) and ('search',)."""
    entries: dict[Any, Any] = {
        number: {"operation": step[0]} | ({"start": step[1], "end": step[2]} if len(step) == 3 else {})
        for number, step in enumerate(steps, start=1)
    }
    (folder / "book.yaml").write_text(yaml.safe_dump({"data": entries | {"max_pts": max_pts or 1000}}))
    return folder / "book.yaml"


def test_steps_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SMALL + "  gt_url: https://example.org\n")
    book = load_runbook(tmp_path / "a.yaml")
    assert (book.dataset, book.max_pts, book.last_key) == ("data", 40, 40)
    assert [(step.number, step.operation, step.start, step.end) for step in book.steps] == [
        (1, "insert", 0, 40),
        (2, "search", 0, 0),
    ]
    (tmp_path / "b.yaml").write_text(SMALL + SMALL.replace("data:", "other:"))
    with pytest.raises(CorpusError, match="has steps for data, other: name one"):
        load_runbook(tmp_path / "b.yaml")
    assert load_runbook(tmp_path / "b.yaml", "other").dataset == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "is no runbook"),
        ("a: [", "is not YAML"),
        (SMALL.replace("  2:", "  3:"), "step 2 is missing"),
        (SMALL.replace("search", "find"), "step 2: operation 'find' is none of"),
        (SMALL.replace("end: 40", "end: 0"), "step 1: insert needs start and end"),
        ("data:\n  max_pts: 4\n", "step 1 is missing"),
    ],
)
def test_bad_runbooks(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(CorpusError, match=message):
        load_runbook(tmp_path / "a.yaml")
    with pytest.raises(CorpusError, match="no such runbook"):
        load_runbook(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("insert", 0, 20), ("delete", 5, 10), ("search",)], "step 2 deletes keys 5 to 9, and the oldest alive is 0"),
        ([("insert", 0, 20), ("delete", 0, 30), ("search",)], "step 2 deletes keys 0 to 29, and none is alive"),
        ([("insert", 0, 20), ("replace",), ("search",)], "step 2 replaces keys"),
        ([("insert", 0, 20), ("insert", 10, 30), ("search",)], "step 2 inserts keys 10 and on, which are alive"),
        ([("insert", 0, 20)], "never searches"),
        ([("search",), ("insert", 0, 20)], "step 1 searches when no key is alive"),
        (
            [("insert", 0, 20), ("delete", 0, 5), ("search",), ("insert", 20, 30), ("search",)],
            "step 5 searches 25 keys after deletes, and step 3 15",
        ),
        (
            [("insert", 0, 20), ("search",), ("delete", 0, 5), ("search",)],
            "step 2 searches 20 keys, and step 4 15 after deletes",
        ),
    ],
)
def test_what_no_memory_follows_is_refused_by_its_step(
    tmp_path: Path, steps: list[tuple[Any, ...]], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        as_fifo(load_runbook(written(tmp_path, *steps)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_window_is_followed(seed: int) -> None:
    """What a FIFO of the capacity holds at every search is what the runbook says is alive."""
    random = np.random.default_rng(seed)
    step = int(random.integers(1, 9))
    window = step * int(random.integers(1, 9))
    book = sliding_window("data", keys=window + int(random.integers(0, 90)), window=window, step=step)
    capacity, steps = as_fifo(book)
    alive: list[int] = []
    fifo: list[int] = []
    for one, followed in zip(book.steps, steps, strict=True):
        keys = list(range(one.start, one.end))
        if one.operation == "insert":
            alive, fifo = alive + keys, (fifo + keys)[-capacity:]
        elif one.operation == "delete":
            assert alive[: len(keys)] == keys
            alive = alive[len(keys) :]
            fifo = fifo if alive else []
        else:
            assert fifo == alive
            assert len(alive) == window
        assert [key for start, end in followed.alive for key in range(start, end)] == alive
        assert len(alive) <= book.max_pts == window


def test_a_window_s_numbers_are_checked() -> None:
    assert sliding_window("d", keys=10_000).max_pts == 5000
    assert sliding_window("d", keys=10_000, window=2500).steps[0].end == 25
    assert sliding_window("d", keys=100, step=7).max_pts == 49
    with pytest.raises(CorpusError, match="does not fit"):
        sliding_window("d", keys=100, window=30, step=7)
    with pytest.raises(CorpusError, match="does not fit"):
        sliding_window("d", keys=100, window=200)


def test_a_window_moves_as_the_track_s_own_does() -> None:
    """Its generator, written out: 200 steps, deletes from the hundredth on, each behind a search; we end with one."""
    expected: list[tuple[str, int, int]] = []
    for number in range(200):
        if number >= 100:
            expected += [("search", 0, 0), ("delete", (number - 100) * 50, (number - 99) * 50)]
        expected.append(("insert", number * 50, (number + 1) * 50))
    made = sliding_window("msturing-10M", keys=10_000)
    assert [(step.operation, step.start, step.end) for step in made.steps] == [*expected, ("search", 0, 0)]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    book = sliding_window("data", keys=50, window=20, step=5)
    write_runbook(tmp_path / "w.yaml", book)
    assert load_runbook(tmp_path / "w.yaml") == book
    content = yaml.safe_load((tmp_path / "w.yaml").read_text())["data"]
    assert content["max_pts"] == 20
    assert content[1] == {"operation": "insert", "start": 0, "end": 5}
    assert content[5] == {"operation": "search"}
    assert content[6] == {"operation": "delete", "start": 0, "end": 5}


@pytest.mark.parametrize("append_size", [0, 3])
def test_every_search_finds_the_keys_alive_then(tmp_path: Path, data: Path, append_size: int) -> None:
    """A window, then everything deleted, then the same keys again in another order."""
    window = [("insert", 0, 30), ("search",), ("delete", 0, 10), ("insert", 30, 40), ("search",)]
    again = [("delete", 10, 40), ("insert", 60, 80), ("insert", 0, 10), ("search",)]
    capacity, steps = as_fifo(load_runbook(written(tmp_path, *window, *again)))
    assert capacity == 30
    with open_data(data) as opened:
        compute_ground_truth(steps, capacity, opened, tmp_path / "truth", device="cpu", tell=quiet)
        backend = make_backend("exact", num_memories=1, capacity=capacity, dim=6, metric="l2")
        searched = [
            done
            for done in follow(steps, opened, backend, 4, batch_size=2, append_size=append_size, tell=quiet)
            if done.found is not None
        ]
    alive = [list(range(30)), list(range(10, 40)), [*range(60, 80), *range(10)]]
    for done, keys in zip(searched, alive, strict=True):
        distances = ((QUERIES[:, None] - KEYS[keys][None]) ** 2).sum(-1)
        order = np.argsort(distances, axis=1)
        np.testing.assert_array_equal(done.found, np.array(keys)[order[:, :4]])
        assert len(done.call_seconds) == 5
        numbers, known = read_ground_truth(tmp_path / "truth" / f"step{done.step.number}.gt100", len(QUERIES))
        np.testing.assert_array_equal(numbers, np.array(keys)[order])
        np.testing.assert_allclose(known, np.take_along_axis(distances, order, axis=1), rtol=1e-4, atol=1e-5)


def test_truth_that_is_there_is_kept(tmp_path: Path, data: Path) -> None:
    capacity, steps = as_fifo(load_runbook(written(tmp_path, ("insert", 0, 30), ("search",), ("search",))))
    write_ground_truth(tmp_path / "truth" / "step2.gt100", np.zeros((9, 1)), np.zeros((9, 1)))
    with open_data(data) as opened:
        compute_ground_truth(steps, capacity, opened, tmp_path / "truth", device="cpu", tell=quiet)
    assert read_ground_truth(tmp_path / "truth" / "step2.gt100", 9)[0].shape == (9, 1)
    assert read_ground_truth(tmp_path / "truth" / "step3.gt100", 9)[0].shape == (9, 30)


def test_raw_files(tmp_path: Path) -> None:
    """The layout of big-ann-benchmarks: two uint32, then the vectors; a cropped file's name ends in its length."""
    keys = RANDOM.integers(0, 255, size=(20, 4)).astype(np.uint8)
    for name, vectors in (("base1b.u8bin.crop_nb_20", keys), ("q.fbin", QUERIES[:, :4]), ("other.fbin", QUERIES)):
        with (tmp_path / name).open("wb") as stream:
            np.array(vectors.shape, dtype=np.uint32).tofile(stream)
            vectors.tofile(stream)
    base = tmp_path / "base1b.u8bin.crop_nb_20"
    with open_data(base, tmp_path / "q.fbin", "euclidean") as opened:
        assert (opened.name, opened.keys, opened.queries, opened.dimension) == ("base1b", 20, 9, 4)
        assert opened.metric == "l2"
        np.testing.assert_array_equal(opened.train(3, 7), keys[3:7].astype(np.float32))
        np.testing.assert_array_equal(opened.test(), QUERIES[:, :4])
    with pytest.raises(CorpusError, match="give --queries and --distance"):
        open_data(base)
    with pytest.raises(CorpusError, match=r"dimension 4 and .* of 6"):
        open_data(base, tmp_path / "other.fbin", "ip")
    with pytest.raises(CorpusError, match="distance 'hamming' is none of"):
        open_data(base, tmp_path / "q.fbin", "hamming")
    base.write_bytes(base.read_bytes()[:-1])
    with pytest.raises(CorpusError, match="is it cut short"):
        open_data(base, tmp_path / "q.fbin", "ip")
    with pytest.raises(CorpusError, match="its header tells of"):
        read_ground_truth(tmp_path / "q.fbin", 9)
    with pytest.raises(CorpusError, match="no ground truth"):
        read_ground_truth(tmp_path / "none", 9)


def here(task: dict[str, Any], *, on_event: Any, **_: object) -> dict[str, str]:
    """Stands in for a process of its own: the same work in this one."""
    runbook_run.work(task, lambda event, **content: on_event(json.loads(json.dumps({"event": event, **content}))))
    return {"event": "end"}


def test_a_run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_process, "run_task", here)
    write_runbook(tmp_path / "w.yaml", sliding_window("data", keys=120, window=40, step=10))
    options = RunbookOptions(
        runbook=tmp_path / "w.yaml",
        data=data,
        backends=["exact", "degraded:drop=0.5"],
        k=4,
        output=tmp_path / "out",
        threads=1,
    )
    first = run_runbook(dataclasses.replace(options, backends=["exact"]))
    assert (first.measured, first.reused) == (1, 0)
    assert first.rows[0].least_recall == 1.0
    result = run_runbook(options)
    assert (result.measured, result.reused) == (1, 1)
    exact, worse = result.rows
    assert exact == first.rows[0]
    assert worse.mean_recall is not None
    assert 0.2 < worse.mean_recall < 0.8
    assert (worse.capacity, worse.searches, worse.keys_inserted, worse.queries) == (40, 9, 120, 9)
    with (tmp_path / "out" / "steps.csv").open() as stream:
        steps = list(csv.DictReader(stream))
    assert len(steps) == 2 * (12 + 9)
    recall = [float(step["recall"]) for step in steps if step["spec"] == worse.spec and step["operation"] == "search"]
    assert np.mean(recall) == pytest.approx(worse.mean_recall)
    with (tmp_path / "out" / "results.csv").open() as stream:
        assert [row["spec"] for row in csv.DictReader(stream)] == [worse.spec, "exact"]
    truth = next((tmp_path / "out" / "ground_truth").iterdir())
    given = run_runbook(dataclasses.replace(options, backends=["exact"], ground_truth=truth))
    assert given.rows[0].mean_recall == 1.0
    next(truth.glob("step*")).unlink()
    with pytest.raises(CorpusError, match="no ground truth"):
        run_runbook(dataclasses.replace(options, ground_truth=truth))


def test_what_does_not_fit_the_data(tmp_path: Path, data: Path) -> None:
    book = written(tmp_path, ("insert", 0, 130), ("search",))
    with pytest.raises(CorpusError, match=r"step 1 names key 129 .* 120 keys"):
        run_runbook(RunbookOptions(runbook=book, data=data, backends=["exact"], output=tmp_path / "out"))
    book = written(tmp_path, ("insert", 0, 8), ("search",))
    with pytest.raises(CorpusError, match="step 2 searches 8 keys for k 10"):
        run_runbook(RunbookOptions(runbook=book, data=data, backends=["exact"], output=tmp_path / "out"))


def test_on_the_command_line(tmp_path: Path, data: Path) -> None:
    """In processes of their own, as a user runs it."""
    book = str(tmp_path / "w.yaml")
    making = ["runbook", book, "--data", str(data), "--make", "--window", "40", "--step", "40"]
    answer = CliRunner().invoke(app, making)
    assert answer.exit_code == 0, answer.output
    assert as_fifo(load_runbook(book))[0] == 40
    running = ["runbook", book, "--data", str(data), "--backend", "exact", "--threads", "1", "--output"]
    answer = CliRunner().invoke(app, [*running, str(tmp_path / "out"), "--json"])
    assert answer.exit_code == 0, answer.output
    row = json.loads(answer.stdout)["rows"][0]
    assert (row["mean_recall"], row["searches"]) == (1.0, 3)
    answer = CliRunner().invoke(app, [*running, str(tmp_path / "out")])
    assert "w over data: 40 keys alive, k 10" in answer.output
    assert CliRunner().invoke(app, [*running, str(tmp_path / "out"), "--window", "3"]).exit_code == 2
