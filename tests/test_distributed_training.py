"""Training by several processes: real torchrun, gloo, and what goes wrong with processes.

Starting processes takes most of the time, so that each start makes several runs and the tests look at what they left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_worker import tiny_options
from tiny import write_tiny_checkpoint

from recollect.model.checkpoints import load_checkpoint
from recollect.model.evaluation import evaluate
from recollect.model.training import LOG, train

WORKER = Path(__file__).parent / "distributed_worker.py"
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")

MODELS: dict[str, dict[str, Any]] = {
    "muon": {"validate_every": 5},
    "adamw": {"optimizer": "adamw"},
    "compressive": {"model": {"compressed_memory": 8, "compression_rate": 2}},
    "hidden": {"model": {"memory_key": "hidden", "eviction": "most_used", "memory_size": 64}},
    "forgetful": {"memory_size": 0},
    "hnswlib": {"backend": "hnswlib:M=4"},
    "fsdp": {"optimizer": "adamw", "validate_every": 5},
    "fsdp-muon": {},
}
"""Options by name of a run; those of one process leave `parallel` out."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        # Some documents are shorter than a segment: their rows then have few targets, or none, in a step.
        lines = [f"name_{number}_{(number * line) % 7} = value({line % 5})\n" for line in range(1 + 2 * (number % 30))]
        (folder / f"document{number}.txt").write_text("".join(lines))
    return folder


def environment(**extra: str) -> dict[str, str]:
    """The test's own, with the repository importable and gloo on the loopback device."""
    root = str(WORKER.parents[1])
    path = os.pathsep.join([root, *(part for part in (os.environ.get("PYTHONPATH"),) if part)])
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **extra}


def torchrun(
    *arguments: str, processes: int, restarts: int = 0, check: bool = True
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, f"--max-restarts={restarts}", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def start(runs: list[dict[str, Any]], folder: Path, processes: int, restarts: int = 0) -> str:
    file = folder / f"runs{processes}-{restarts}.json"
    file.write_text(json.dumps(runs, default=str))
    return torchrun(str(WORKER), str(file), processes=processes, restarts=restarts).stderr


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def outcome(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"outcome{rank}.json").read_text())


def assert_same_run(found: Path, expected: Path, *, muon: bool = True) -> None:
    """Losses, norms and perplexities of every step, and the weights at the end, to float32's rounding.

    Muon orthogonalises in bfloat16, and so makes a thousandth of what was a ten-millionth.
    """
    mine, theirs = log_of(found), log_of(expected)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"step_ms"}:
            tolerance = (2e-2 if name == "gradient_norm" else 1e-3) if muon else 1e-5
            assert one[name] == pytest.approx(other[name], rel=tolerance), (name, one, other)
    weights, wanted = load_checkpoint(found).model.state_dict(), load_checkpoint(expected).model.state_dict()
    for name, tensor in wanted.items():
        tolerance = 2e-2 if muon else 1e-4
        torch.testing.assert_close(weights[name], tensor, rtol=5 * tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def single(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `MODELS` by this one process."""
    folder = tmp_path_factory.mktemp("single")
    for name, changes in MODELS.items():
        if not name.startswith("fsdp") or name == "fsdp":
            train(tiny_options(corpus, folder / name, **changes))
    return folder


@pytest.fixture(scope="module")
def four(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four processes."""
    folder = tmp_path_factory.mktemp("four")
    runs = [
        {"name": "muon", "options": MODELS["muon"]},
        {"name": "stopped", "options": MODELS["muon"], "stop": [2, 6]},
        {"name": "stopped-hnswlib", "options": MODELS["hnswlib"], "stop": [0, 6]},
    ]
    start([{**run, "corpus": corpus, "output": folder / str(run["name"])} for run in runs], folder, 4)
    return folder


@pytest.fixture(scope="module")
def two(corpus: Path, four: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, some of which go on with what four left."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("stopped", "stopped-hnswlib"):
        shutil.copytree(four / name, folder / name)
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", corpus)
    runs: list[dict[str, Any]] = []
    for name, changes in MODELS.items():
        kind = "fsdp" if name.startswith("fsdp") else "ddp"
        runs.append({"name": name, "options": {**changes, "parallel": kind}})
    runs += [
        {"name": "stopped", "options": MODELS["muon"]},
        {"name": "stopped-hnswlib", "options": MODELS["hnswlib"]},
        {"name": "stopped-fsdp", "options": {**MODELS["fsdp"], "parallel": "fsdp"}, "stop": [1, 6]},
        {"name": "uneven", "options": {"batch_size": 5}},
        {"name": "poisoned", "options": {}, "poison": [1, 3]},
    ]
    evaluation = {"checkpoint": checkpoint, "corpus": corpus, "split": "all", "memory_size": 64, "max_tokens": 1500}
    runs.append({"name": "evaluated", "evaluate": {**evaluation, "rows": 3, "cache_directory": folder / "cache"}})
    start([{**run, "corpus": corpus, "output": folder / str(run["name"])} for run in runs], folder, 2)
    return folder


def test_four_processes_train_as_one_does(single: Path, four: Path) -> None:
    assert_same_run(four / "muon", single / "muon")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "fsdp-muon"])
def test_two_processes_train_as_one_does(single: Path, two: Path, name: str) -> None:
    assert_same_run(two / name, single / name, muon=MODELS[name].get("optimizer") != "adamw")


def test_sharded_matrices_are_trained_by_muon_as_whole_ones_are(single: Path, two: Path) -> None:
    plain = [line["loss"] for line in log_of(two / "fsdp-muon")]
    wanted = [line["loss"] for line in log_of(single / "muon") if "loss" in line]
    assert plain == pytest.approx(wanted, rel=2e-2)


def test_a_run_stopped_on_four_processes_goes_on_with_two_and_with_one(
    corpus: Path, single: Path, four: Path, two: Path, tmp_path: Path
) -> None:
    for rank in range(4):
        assert outcome(four / "stopped", rank)["error"] == "KeyboardInterrupt"
    # The signal came after step 6, so that the ranks agreed on it in the next.
    assert [line["step"] for line in log_of(four / "stopped") if "loss" in line] == list(range(1, 8))
    assert sorted(path.name for path in (four / "stopped" / "training").glob("rows*")) == [
        "rows0-1",
        "rows1-2",
        "rows2-3",
        "rows3-4",
    ]
    assert_same_run(two / "stopped", single / "muon")
    shutil.copytree(four / "stopped", tmp_path / "stopped")
    train(tiny_options(corpus, tmp_path / "stopped", **MODELS["muon"]))
    assert_same_run(tmp_path / "stopped", single / "muon")


def test_an_index_made_anew_for_other_processes_is_nearly_what_it_was(single: Path, two: Path) -> None:
    found, wanted = (
        [line["loss"] for line in log_of(folder / name)]
        for folder, name in (
            (two, "stopped-hnswlib"),
            (single, "hnswlib"),
        )
    )
    assert found[:7] == pytest.approx(wanted[:7], rel=2e-3)
    assert found[7:] == pytest.approx(wanted[7:], rel=5e-2)


def test_a_sharded_run_goes_on_with_one_process(corpus: Path, single: Path, two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "stopped-fsdp", tmp_path / "stopped")
    train(tiny_options(corpus, tmp_path / "stopped", **MODELS["fsdp"]))
    assert_same_run(tmp_path / "stopped", single / "fsdp", muon=False)


def test_rows_that_cannot_be_dealt_evenly_are_refused(two: Path) -> None:
    for rank in range(2):
        found = outcome(two / "uneven", rank)
        assert found["error"] == "ConfigurationError"
        assert "batch_size=5 rows cannot be dealt evenly to 2 processes" in found["text"]
        assert "4 or 6" in found["text"]


def test_one_rank_that_diverges_ends_all_with_its_reason(two: Path) -> None:
    assert outcome(two / "poisoned", 1)["error"] == "TrainingDiverged"
    found = outcome(two / "poisoned", 0)
    assert found["error"] == "RankError"
    assert "rank 1 of 2 failed: step 3" in found["text"]
    assert "lower the learning rates" in found["text"]


def test_an_evaluation_of_two_processes_is_that_of_one(corpus: Path, two: Path, tmp_path: Path) -> None:
    expected = evaluate(
        checkpoint=two / "checkpoint",
        corpus=str(corpus),
        split="all",
        memory_size=64,
        max_tokens=1500,
        rows=3,
        cache_directory=tmp_path,
    )
    for rank in range(2):
        found = outcome(two / "evaluated", rank)
        assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        np.testing.assert_allclose(found["losses"], expected.losses.loss, rtol=1e-4, atol=1e-5)


def test_a_killed_rank_is_started_again_and_nothing_is_lost(corpus: Path, single: Path, tmp_path: Path) -> None:
    options = {**MODELS["muon"], "save_every": 4}
    run = {"name": "killed", "options": options, "kill": [1, 7], "last": True}
    said = start([{**run, "corpus": corpus, "output": tmp_path / "killed"}], tmp_path, 2, restarts=1)
    assert "rank 1 of 2 is lost" in said
    assert_same_run(tmp_path / "killed", single / "muon")


def test_a_frozen_rank_is_noticed_by_the_deadline(corpus: Path, tmp_path: Path) -> None:
    """Without torchrun, whose agent would wait half a minute for a frozen process before it kills it."""
    run = {
        "output": tmp_path / "frozen",
        "corpus": corpus,
        "options": {"deadline": 2.0},
        "freeze": [1, 4],
        "last": True,
    }
    (tmp_path / "runs.json").write_text(json.dumps([run], default=str))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path / "runs.json")],
            env=environment(
                RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = ranks[0].communicate(timeout=90)
        assert ranks[0].returncode == 1
        assert "rank 1 of 2 is lost" in said
        assert "2 seconds of the deadline" in said
        assert ranks[1].poll() is None
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()


def test_the_command_line_speaks_with_one_voice(corpus: Path, tmp_path: Path) -> None:
    arguments = ["-m", "recollect", "train", "--preset", "tiny", "--corpus", str(corpus), "--steps", "2", "--json"]
    done = torchrun(*arguments, "--output", str(tmp_path / "run"), "--save-every", "0", processes=2)
    assert json.loads(done.stdout)["steps"] == 2
    assert load_checkpoint(tmp_path / "run").metadata["processes"] == 2
