"""Running ablations: processes, results, resuming after a kill, diverging seeds, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from ablation_grids import TINY, VARIANTS, write_corpus, write_grid
from typer.testing import CliRunner

from recollect.cli import app
from recollect.model.checkpoints import load_checkpoint
from recollect.suites.ablation.options import AblateError, AblateOptions
from recollect.suites.ablation.provenance import mixed_in, settle
from recollect.suites.ablation.runner import ablate

MORE = """
[[variants]]
name = "tuned"
start_from = "memory"
model.memory_size = 128
training.steps = 3

[[variants]]
name = "full"
from = "memory"
evaluation.fill_tokens = 128

[[variants]]
name = "knn"
from = "none"
system = "knn-lm"
options = { k = 4, datastore_size = 64 }

[[variants]]
name = "spalm"
from = "none"
system = "spalm"
options = { k = 4, datastore_size = 64, training_tokens = 512, epochs = 1 }

[[variants]]
name = "training-free"
from = "none"
system = "training-free"
options = { memory_layers = [1], gate = "joint" }
evaluation = { memory_size = 64, k = 4 }

[[variants]]
name = "window"
model.memory_size = 0
match_cost = { to = "memory", vary = "model.xl_cache", of = "bytes", values = [16, 21, 32, 64] }

[[variants]]
name = "wild"
training.matrix_learning_rate = 1e18
training.other_learning_rate = 1e18
training.gradient_clip = 0.0
training.optimizer = "adamw"
"""


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["variant"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AblateOptions]:
    """A grid with every kind of variant, run once."""
    folder = tmp_path_factory.mktemp("ablation")
    options = AblateOptions(
        grids=(write_grid(folder, VARIANTS + MORE),),
        corpora=(f"words={write_corpus(folder / 'corpus')}",),
        output=folder / "out",
        jobs=2,
        progress=False,
        report=False,
        cache_directory=folder / "cache",
    )
    result = ablate(options)
    assert result.failed == ()
    assert result.trained == 4
    assert [item[2] for item in result.diverged] == ["wild"]
    return folder, options


def test_every_kind_of_variant_has_its_row(finished: tuple[Path, AblateOptions]) -> None:
    folder, _ = finished
    rows = rows_of(folder / "out" / "tiny")
    assert list(rows) == [
        "none",
        "memory",
        "memory k 2",
        "tuned",
        "full",
        "knn",
        "spalm",
        "training-free",
        "window",
        "wild",
    ]
    assert {name: row["kind"] for name, row in rows.items() if row["kind"] != "train"} == {
        "tuned": "fine-tune",
        "knn": "knn-lm",
        "spalm": "spalm",
        "training-free": "training-free",
    }
    wild = rows.pop("wild")
    assert wild["status"] == "diverged"
    assert wild["evaluation"] is None
    assert wild["training"]["diverged_at"] >= 1
    assert "learning rates" in wild["reason"]
    assert all(row["status"] == "ok" for row in rows.values())
    assert rows["memory"]["training"]["digest"] == rows["memory k 2"]["training"]["digest"]
    assert rows["none"]["training"]["digest"] == rows["knn"]["training"]["digest"]
    assert rows["memory"]["evaluation"]["digest"] != rows["memory k 2"]["evaluation"]["digest"]
    assert rows["memory k 2"]["evaluation"]["k"] == 2
    assert rows["none"]["costs"]["memory_bytes"] == 0 < rows["memory"]["costs"]["memory_bytes"]
    assert 0 <= rows["knn"]["system"]["interpolation"] < 1
    assert 0 < rows["spalm"]["system"]["mean_gate"] <= 1
    assert rows["tuned"]["training"]["steps"] == 3


def test_losses_of_all_variants_pair_up(finished: tuple[Path, AblateOptions]) -> None:
    folder, _ = finished
    rows = rows_of(folder / "out" / "tiny")
    read = {}
    for name, row in rows.items():
        if row["evaluation"] is not None:
            with np.load(folder / "out" / "tiny" / row["evaluation"]["losses"]) as file:
                read[name] = {key: file[key] for key in ("loss", "document", "position", "correct")}
            perplexity = np.exp(read[name]["loss"].astype(np.float64).mean())
            assert perplexity == pytest.approx(row["evaluation"]["perplexity"])
    texts = {row["evaluation"]["text"]["digest"] for name, row in rows.items() if row["evaluation"] and name != "full"}
    assert len(texts) == 1
    for name, losses in read.items():
        if name != "full":
            np.testing.assert_array_equal(losses["document"], read["none"]["document"])
            np.testing.assert_array_equal(losses["position"], read["none"]["position"])
    assert read["full"]["position"].min() == 129


def test_the_window_costs_what_the_memory_does(finished: tuple[Path, AblateOptions]) -> None:
    folder, _ = finished
    row = rows_of(folder / "out" / "tiny")["window"]
    config = load_checkpoint(folder / "out" / "checkpoints" / row["training"]["digest"]).config
    assert config.xl_cache == 21  # 64 keys in one layer are as many bytes as 21 in each of three


def test_run_tells_where_with_what_and_every_value(finished: tuple[Path, AblateOptions]) -> None:
    folder, _ = finished
    run = json.loads((folder / "out" / "tiny" / "run.json").read_text(encoding="utf-8"))
    assert run["finished"] is True
    assert run["machine"]["cores"] >= 1
    assert run["sections"][0]["name"] == "words"
    variants = {variant["name"]: variant for variant in run["variants"]}
    assert variants["memory k 2"]["changes"] == {"evaluation.k": 2}
    assert variants["memory k 2"]["settings"]["evaluation"]["k"] == 2
    assert variants["memory"]["settings"]["model"]["memory_layers"] == [1]
    assert str(folder) not in json.dumps(run)


def test_a_second_call_does_nothing_again(finished: tuple[Path, AblateOptions]) -> None:
    folder, options = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "evaluations").iterdir()}
    result = ablate(options)
    assert (result.trained, result.evaluated) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "evaluations").iterdir()} == before


def test_other_settings_are_refused_by_name_or_told(finished: tuple[Path, AblateOptions]) -> None:
    folder, options = finished[0] / "out", finished[1]
    known = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert known["provenance"]["threads"] == options.threads
    assert known["mixed"] == []
    with pytest.raises(AblateError, match=rf"threads {options.threads} against 3.*another --output, or go on .* --mix"):
        settle(folder, threads=3, device="cpu", mix=False)
    settle(folder, threads=3, device="cpu", mix=True)
    assert [f"threads {options.threads} against 3" in text for text in mixed_in(folder)] == [True]
    (folder / "provenance.json").write_text(json.dumps(known), encoding="utf-8")


def test_a_folder_of_an_earlier_version_is_compared_by_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "grid").mkdir()
    run = {"machine": {"cpu": "Some Other Processor"}, "libraries": {"torch": "1.0"}, "threads": 1}
    (tmp_path / "grid" / "run.json").write_text(json.dumps(run), encoding="utf-8")
    with pytest.raises(AblateError, match=r"Some Other Processor against .*torch 1\.0 against"):
        settle(tmp_path, threads=1, device="cpu", mix=False)
    settle(tmp_path / "new", threads=1, device="cpu", mix=False)
    assert mixed_in(tmp_path / "new") == []


def test_another_grid_finds_what_is_there_and_snapshots_are_taken_later(finished: tuple[Path, AblateOptions]) -> None:
    folder, options = finished
    head = TINY.replace("save_every = 4", "save_every = 4\nsnapshots = [3]")
    grid = write_grid(folder, VARIANTS, head=head, name="other")
    result = ablate(AblateOptions(**{**vars(options), "grids": (grid,)}))
    assert result.evaluated == 0
    assert result.trained == 2  # the weights were there, the snapshots were not
    rows = rows_of(folder / "out" / "other")
    trained = folder / "out" / "checkpoints" / rows["memory"]["training"]["digest"]
    assert (trained / "snapshots" / "3" / "config.json").is_file()
    assert rows["memory"]["evaluation"] == rows_of(folder / "out" / "tiny")["memory"]["evaluation"]


def test_another_corpus_is_another_section_of_the_same_grid(finished: tuple[Path, AblateOptions]) -> None:
    folder, options = finished
    corpus = write_corpus(folder / "second", words=300)
    grid = write_grid(folder, VARIANTS.split('name = "memory"')[0].rpartition("[[variants]]")[0], name="sections")
    for name, path in (("words", options.corpora[0].partition("=")[2]), ("second", corpus)):
        ablate(AblateOptions(**{**vars(options), "grids": (grid,), "corpora": (f"{name}={path}",)}))
    lines = (folder / "out" / "sections" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["section"] for line in lines] == ["words", "second"]
    run = json.loads((folder / "out" / "sections" / "run.json").read_text(encoding="utf-8"))
    assert [section["name"] for section in run["sections"]] == ["words", "second"]


def test_two_runs_do_not_share_a_folder_at_one_time(finished: tuple[Path, AblateOptions]) -> None:
    folder, options = finished
    with filelock.FileLock(folder / "out" / ".lock"), pytest.raises(AblateError, match="another ablation"):
        ablate(options)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    head = TINY.replace("steps = 8", "steps = 120").replace("save_every = 4", "save_every = 20")
    grid, corpus = write_grid(tmp_path, head=head), write_corpus(tmp_path / "corpus")
    command = [sys.executable, "-m", "recollect", "ablate", grid, "--corpus", f"words={corpus}"]
    environment = {**os.environ, "RECOLLECT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("checkpoints/*/training/state.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2.5)  # its worker sees within a second that nobody waits for it
    options = AblateOptions(
        grids=(grid,),
        corpora=(f"words={corpus}",),
        output=tmp_path / "out",
        progress=False,
        report=False,
        cache_directory=tmp_path / "cache",
        variants=("none",),
    )
    logs = {path.parent.name: path for path in (tmp_path / "out" / "checkpoints").glob("*/training_log.jsonl")}
    saved = {name: json.loads((path.parent / "training" / "state.json").read_text()) for name, path in logs.items()}
    result = ablate(options)
    assert result.failed == ()
    (name,) = saved
    assert saved[name]["progress"]["step"] >= 20
    steps = [json.loads(line)["step"] for line in logs[name].read_text().splitlines()]
    assert steps == list(range(1, 121))
    assert not (logs[name].parent / "training").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test wants absent")
def test_a_device_that_is_not_there_is_told_before_text_is_tokenized(tmp_path: Path) -> None:
    corpus, output = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    options = AblateOptions(
        grids=(write_grid(tmp_path),), corpora=(corpus,), output=output, device="cuda", progress=False
    )
    with pytest.raises(AblateError, match="device 'cuda' cannot be used here"):
        ablate(options)
    assert not (output / "tokenizers").exists()


def test_the_command_shows_a_plan_and_refuses_nonsense(tmp_path: Path) -> None:
    runner = CliRunner()
    corpus = write_corpus(tmp_path / "corpus")
    arguments = ["ablate", write_grid(tmp_path), "--corpus", corpus, "--output", str(tmp_path / "out"), "--dry-run"]
    shown = runner.invoke(app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    plan = json.loads(shown.stdout)["plan"]
    assert (plan["rows"], plan["trainings"], plan["evaluations"]) == (3, 2, 3)
    assert not (tmp_path / "out").exists()
    listed = runner.invoke(app, ["ablate", "--json"])
    assert {"memory", "gate", "layers"} <= set(json.loads(listed.stdout))
    wrong = runner.invoke(app, ["ablate", "memry"])
    assert isinstance(wrong.exception, AblateError)
    assert "memory" in str(wrong.exception)


def test_steps_are_timed_beside_the_reference(finished: tuple[Path, AblateOptions]) -> None:
    folder, _ = finished
    rows = rows_of(folder / "out" / "tiny")
    for name, row in rows.items():
        if name != "wild":
            assert row["costs"]["step_ms"] > 0, name
            assert 0.2 < row["costs"]["step_ratio"] < 20, name
    # The reference's own ratio is noise about 1, and a variant that differs at evaluation costs what its parent does.
    assert 0.5 < rows["none"]["costs"]["step_ratio"] < 2
    assert rows["memory"]["costs"]["step_ratio"] == rows["memory k 2"]["costs"]["step_ratio"]
