"""`compare` from end to end on a tiny model: figures, crashes, missing libraries, interruptions, other settings."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import third_party
import tiny

from recollect.memory_backends import InvalidSpec, UnknownBackend
from recollect.suites.comparison import compare
from recollect.suites.environment import commit_of
from recollect.suites.options import CompareError, CompareOptions, CompareResult
from recollect.suites.plan import PlannedCell, find_measured, start_afresh

BACKENDS = ("degraded:drop=0.5", "crashing", "raising", "missing")
SIZES = (32, 64)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompareOptions]:
    folder = tmp_path_factory.mktemp("comparison")
    corpus = tiny.write_tiny_corpus(folder / "corpus")
    others = str(third_party.write_third_party(folder / "third-party"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(others)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [others, os.environ.get("PYTHONPATH")])))
        yield CompareOptions(
            checkpoint=tiny.write_tiny_checkpoint(folder / "checkpoint", corpus),
            corpus=str(corpus),
            split="all",
            backends=BACKENDS,
            memory_sizes=SIZES,
            max_tokens=640,
            curve_seconds=0.0,
            crossover_sizes=(128, 100_000),
            output=folder / "out",
            threads=1,
            report=False,
            progress=False,
            cache_directory=folder / "cache",
        )


@pytest.fixture(scope="module")
def result(options: CompareOptions) -> CompareResult:
    return compare(options, curve_seconds=0.05)


def cells_in(folder: Path) -> dict[tuple[str, int], dict[str, object]]:
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "cells").glob("*.json")]
    return {(cell["spec"], cell["memory_size"]): cell for cell in cells}


def copied(result: CompareResult, target: Path) -> Path:
    shutil.copytree(result.output, target)
    return target


def as_argument(options: CompareOptions) -> str:
    values = dataclasses.asdict(options)
    return json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in values.items()})


def run_in_process(code: str, options: CompareOptions) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, as_argument(options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_every_cell_is_there_and_says_how_it_went(result: CompareResult) -> None:
    cells = cells_in(result.output)
    assert set(cells) == {("none", 0), *((spec, size) for spec in ("exact", *BACKENDS) for size in SIZES)}
    status = {key: cell["status"] for key, cell in cells.items()}
    assert status["none", 0] == status["exact", 32] == status["exact", 64] == "ok"
    assert status["degraded:drop=0.5", 32] == status["degraded:drop=0.5", 64] == "ok"
    assert status["crashing", 32] == "ok", "a crash at one size leaves the other sizes alone"
    assert status["crashing", 64] == "failed"
    assert "SIGSEGV" in str(cells["crashing", 64]["reason"])
    assert {status["raising", size] for size in SIZES} == {"failed"}
    assert "bad mood" in str(cells["raising", 32]["reason"])
    assert {status["missing", size] for size in SIZES} == {"skipped"}
    assert "pip install 'no-such-library>=3'" in str(cells["missing", 32]["reason"])
    assert result.measured == 6
    assert result.reused == 0
    assert dict(result.skipped).keys() == {"missing"}
    assert {(spec, size) for spec, size, _ in result.failed} == {("crashing", 64), ("raising", 32), ("raising", 64)}


def test_figures_are_those_of_the_words(result: CompareResult) -> None:
    cells = cells_in(result.output)
    for size in SIZES:
        exact, degraded = cells["exact", size], cells["degraded:drop=0.5", size]
        assert exact["recall_at_k"] == 1.0
        assert exact["softmax_mass"] == pytest.approx(exact["softmax_mass_exact"], abs=1e-5)
        assert 0 < degraded["softmax_mass"] < exact["softmax_mass"] <= 1
        assert degraded["recall_at_k"] == pytest.approx(0.5, abs=0.15)
        assert exact["bytes_per_key"] == 64
        assert exact["search_ms_low"] <= exact["search_ms"] <= exact["search_ms_high"]
        assert exact["search_ms"] == exact["search_ms_p50"] <= exact["search_ms_p95"] <= exact["search_ms_p99"]
        assert exact["append_ms_p50"] <= exact["append_ms_p95"] <= exact["append_ms_p99"]
        assert min(exact["search_ms_cold"], exact["search_first_ms"], exact["reference_ms"]) > 0
        assert exact["searches"] >= 1
        assert exact["noisy"] in (True, False)
        assert exact["tokens"] == cells["none", 0]["tokens"]
        turnover = exact["streaming"]["turnover"]
        assert turnover == sorted(turnover)
        assert turnover[-1] > 1, "the memory turns over"
    assert cells["none", 0]["recall_at_k"] is None
    assert cells["none", 0]["memory_size"] == 0


def test_losses_are_those_of_the_perplexity(result: CompareResult) -> None:
    order = None
    for cell in cells_in(result.output).values():
        if cell["status"] != "ok":
            assert cell["losses"] is None
            continue
        with np.load(result.output / str(cell["losses"]), allow_pickle=False) as arrays:
            assert np.exp(arrays["loss"].mean(dtype=np.float64)) == pytest.approx(cell["perplexity"])
            assert len(arrays["loss"]) == cell["tokens"]
            here = (arrays["document"].tolist(), arrays["position"].tolist())
        order = order or here
        assert here == order, "the same tokens in the same order in every file"


def test_run_json_says_what_was_run(result: CompareResult) -> None:
    run = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert run["schema"] == 1
    assert run["finished"] is True
    assert run["rows"] == 2
    assert run["memory_sizes"] == list(SIZES)
    assert run["threads"] == 1
    assert run["checkpoint"]["config"]["heads"] == 2
    assert run["twin"] is None, "the tiny checkpoint has no twin"
    assert run["corpus"]["documents"] == len(run["corpus"]["document_names"]) == 2
    assert set(run["machine"]) == {"cpu", "cores", "ram_gib", "os", "python"}
    assert "torch" in run["libraries"]
    assert {cell["settings"] for cell in cells_in(result.output).values()} == {run["settings"]}


def test_curves_of_every_build_at_every_size(result: CompareResult) -> None:
    content = json.loads((result.output / "curves.json").read_text(encoding="utf-8"))
    curves = {(curve["build"], curve["memory_size"]): curve for curve in content["curves"]}
    run = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert content["provenance"]["code"] == run["code"]
    assert set(curves) == {("exact", 32), ("exact", 64), ("crashing", 32)}, "none for an instrument or a failure"
    (point,) = curves["exact", 64]["points"]
    assert point["recall_at_k"] == 1.0
    assert point["softmax_mass"] == pytest.approx(cells_in(result.output)["exact", 64]["softmax_mass_exact"], abs=0.1)
    assert point["samples"] >= 3


def test_larger_memories(result: CompareResult) -> None:
    rows = json.loads((result.output / "crossover.json").read_text(encoding="utf-8"))["rows"]
    exact = {row["memory_size"]: row for row in rows if row["spec"] == "exact"}
    assert set(exact) == {32, 64, 128}
    assert all(row["search_ms"] > 0 and row["recall_at_k"] == 1.0 for row in exact.values())
    assert any("100000" in note for note in result.notes), "a size beyond the text is left out, and said to be"


def test_asv_reads_the_results(result: CompareResult, tmp_path: Path) -> None:
    if commit_of() is None:
        assert any("git" in note for note in result.notes)
        return
    folder = copied(result, tmp_path / "out") / "asv"
    from asv.benchmarks import Benchmarks
    from asv.config import Config
    from asv.results import iter_results

    conf = Config.load(str(folder / "asv.conf.json"))
    conf.results_dir = str(folder / "results")
    benchmarks = Benchmarks.load(conf)
    (results,) = iter_results(conf.results_dir)
    assert results.commit_hash == commit_of()
    assert results.get_result_keys(benchmarks) == set(benchmarks)
    name = "recall.Recall.track_missed_neighbours"
    values = results.get_result_value(name, benchmarks[name]["params"])
    by_key = dict(zip([(s, n) for s in ("exact", *BACKENDS) for n in SIZES], values, strict=True))
    assert by_key["exact", 32] == 0.0
    assert by_key["degraded:drop=0.5", 64] == pytest.approx(0.5, abs=0.15)
    assert by_key["crashing", 64] is None, "asv's failed"
    assert by_key["missing", 32] != by_key["missing", 32], "NaN, asv's skipped"


def test_nothing_is_measured_twice(result: CompareResult, options: CompareOptions, tmp_path: Path) -> None:
    folder = copied(result, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (folder / "losses").iterdir()}
    again = compare(options, output=folder, backends=("degraded:drop=0.5",), crossover_sizes=())
    assert (again.measured, again.reused) == (0, 5)
    assert before.items() >= {path: path.stat().st_mtime_ns for path in (folder / "losses").iterdir()}.items()
    assert not again.failed
    assert not (folder / ".workload").exists(), "what the processes shared is gone once all is measured"
    assert len(list((folder / "earlier" / "cells").iterdir())) == 6, "cells that were not asked for are put aside"
    back = compare(options, output=folder, backends=("degraded:drop=0.5", "missing"), crossover_sizes=())
    assert {cell["spec"] for cell in cells_in(folder).values()} == {"none", "exact", "degraded:drop=0.5", "missing"}
    assert back.measured == 0


def test_other_settings_never_mix(result: CompareResult, options: CompareOptions, tmp_path: Path) -> None:
    folder = copied(result, tmp_path / "out")
    small = dataclasses.replace(options, output=folder, backends=("exact",), memory_sizes=(32,), crossover_sizes=())
    other = compare(small, k=2)
    assert (other.measured, other.reused) == (2, 0)
    assert any("other settings (k 4 against 2)" in note for note in other.notes), other.notes
    assert {cell["k"] for cell in cells_in(folder).values()} == {2}
    first = compare(small)
    assert (first.measured, first.reused) == (0, 2), "the former measurements come back"
    assert {cell["k"] for cell in cells_in(folder).values()} == {4}


def test_other_threads_are_told_and_measured_anew(
    result: CompareResult, options: CompareOptions, tmp_path: Path
) -> None:
    folder = copied(result, tmp_path / "out")
    small = dataclasses.replace(options, output=folder, backends=("exact",), memory_sizes=(32,), crossover_sizes=(128,))
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    cells = list(cells_in(folder).values())
    assert all(cell["provenance"]["code"] == run["code"] for cell in cells), "each cell says where it comes from"
    again = compare(small, threads=2)
    told = " ".join(again.notes)
    assert "earlier measurements had other settings (threads 1 against 2)" in told
    assert "search times at larger memories had other settings (threads 1 against 2)" in told
    assert "another output folder" in told
    assert again.measured == 2
    rows = json.loads((folder / "crossover.json").read_text(encoding="utf-8"))
    assert rows["provenance"]["threads"] == 2
    assert {cell["provenance"]["threads"] for cell in cells_in(folder).values()} == {2}


def test_fresh_takes_nothing_that_is_there(result: CompareResult, options: CompareOptions, tmp_path: Path) -> None:
    folder = copied(result, tmp_path / "out")
    cell = next(cell for cell in cells_in(folder).values() if cell["spec"] == "exact" and cell["memory_size"] == 32)
    planned = PlannedCell("exact", "exact", 32, str(cell["fingerprint"]), str(cell["settings"]))
    assert set(find_measured(folder, [planned])) == {planned.identity}
    start_afresh(folder, [planned])
    assert not find_measured(folder, [planned])
    assert not (folder / "crossover.json").exists()
    assert len(cells_in(folder)) == len(cells_in(result.output)) - 1, "what was not asked for stays"


def test_a_killed_comparison_goes_on_where_it_stopped(options: CompareOptions, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    wanted = dataclasses.replace(
        options, output=folder, backends=("exact", "hanging"), memory_sizes=(32,), crossover_sizes=()
    )
    code = "import json, sys; from recollect.suites.comparison import compare; compare(**json.loads(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, as_argument(wanted)])
    log = folder / ".workload" / "logs" / "hanging.log"
    deadline = time.monotonic() + 200
    while not log.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None, "it should hang by now"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {key for key, cell in cells_in(folder).items() if cell["status"] == "ok"} == {("none", 0), ("exact", 32)}
    assert not json.loads((folder / "run.json").read_text(encoding="utf-8"))["finished"]
    # A file that was being written bears a name of its own.
    for path in folder.rglob("*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text(encoding="utf-8"))
    again = compare(wanted, backends=("exact",))
    assert (again.measured, again.reused) == (0, 2)


def test_a_measurement_that_never_ends_is_given_up(
    result: CompareResult, options: CompareOptions, tmp_path: Path
) -> None:
    folder = copied(result, tmp_path / "out")
    wanted = dataclasses.replace(
        options, output=folder, backends=("hanging",), memory_sizes=(32,), crossover_sizes=(), cell_timeout=12.0
    )
    given_up = compare(wanted)
    assert given_up.reused == 2
    ((spec, size, reason),) = given_up.failed
    assert (spec, size) == ("hanging", 32)
    assert "not finished after 12 s" in reason


def test_two_comparisons_do_not_write_to_one_folder(options: CompareOptions, tmp_path: Path) -> None:
    import filelock

    folder = tmp_path / "out"
    folder.mkdir()
    with filelock.FileLock(folder / ".lock"), pytest.raises(CompareError, match="another comparison"):
        compare(options, output=folder)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"backends": ("hnswlip",)}, UnknownBackend, "hnswlib"),
        ({"backends": ("degraded:dorp=0.5",)}, InvalidSpec, "drop"),
        ({"memory_sizes": (-5,)}, CompareError, "-5"),
        ({"k": 0}, CompareError, "k is 0"),
        ({"rows": 0}, CompareError, "rows is 0"),
        ({"max_tokens": 0}, CompareError, "max_tokens is 0"),
        ({"cell_timeout": 0.0}, CompareError, "cell_timeout"),
    ],
)
def test_bad_options_are_told_before_anything_is_written(
    options: CompareOptions, tmp_path: Path, changes: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        compare(options, output=tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_and_leaves_nothing_half(options: CompareOptions, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    folder = tmp_path / "out"
    code = (
        "import json, resource, sys\n"
        "from recollect.suites.comparison import compare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "compare(**json.loads(sys.argv[1]))\n"
    )
    done = run_in_process(code, dataclasses.replace(options, output=folder, backends=("exact",), crossover_sizes=()))
    assert done.returncode == 1
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert "make room" in done.stderr.splitlines()[-1]
    assert not list(folder.rglob("*.partial"))
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))


def test_an_output_that_is_a_file_is_refused(options: CompareOptions, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(CompareError, match="is a file"):
        compare(options, output=tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_a_model_without_memory_cannot_be_compared(options: CompareOptions, tmp_path: Path) -> None:
    from recollect.model.checkpoints import load_checkpoint, save_checkpoint

    assert options.checkpoint is not None
    loaded = load_checkpoint(options.checkpoint)
    model = tiny.tiny_model(vocabulary_size=loaded.tokenizer.vocabulary_size, memory_layers=())
    save_checkpoint(tmp_path / "plain", model, loaded.tokenizer)
    with pytest.raises(CompareError, match="no memory layer"):
        compare(options, checkpoint=tmp_path / "plain", output=tmp_path / "out")
