"""`recollect tune` from end to end with a tiny model: what it chooses, verifies, keeps and refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_checkpoint, write_tiny_corpus
from typer.testing import CliRunner

from recollect.memory_backends import describe_backend
from recollect.model.corpus import load_corpus
from recollect.suites.tuning_options import TuneError
from recollect.suites.tuning_run import tune


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run that takes a second or two."""
    folder = tmp_path_factory.mktemp("tuning")
    corpus = write_tiny_corpus(folder / "corpus")
    checkpoint = write_tiny_checkpoint(folder / "model", corpus)
    loaded = load_corpus(corpus)
    splits = [split for split in ("train", "validation", "test") if loaded.document_names(split)]
    assert len(splits) >= 2, "the tiny corpus has documents in two splits"
    return {
        "checkpoint": checkpoint,
        "corpus": str(corpus),
        "split": splits[0],
        "verify_split": splits[1],
        "memory_size": 128,
        "k": 4,
        "rows": 1,
        "max_tokens": 600,
        "threads": 1,
        "progress": False,
        "cache_directory": folder / "cache",
    }


def test_a_mass_is_reached_as_cheaply_as_can_be(given: dict[str, Any], tmp_path: Path) -> None:
    if not describe_backend("faiss-ivf").available:
        pytest.skip(describe_backend("faiss-ivf").reason)
    options = {**given, "backends": ("faiss-ivf:nlist=16",), "kind": "mass", "target": 0.8, "output": tmp_path}
    result = tune(**options)
    assert result.spec.startswith("faiss-ivf:nlist=16")
    assert result.tuning["mass"]["low"] >= 0.8
    cheaper = [one for one in result.points if one["cost"] < result.tuning["cost"]]
    assert all(one["mass"]["low"] < 0.8 for one in cheaper)
    assert result.verified is not None
    assert result.verified["spec"] == result.spec
    assert result.verified["mass"] != result.tuning["mass"], "measured on other documents"
    assert result.verified["loss"]["low"] <= result.verified["loss"]["value"] <= result.verified["loss"]["high"]
    best = max(result.points, key=lambda one: one["recall"]["value"])
    assert best["mass"]["value"] == pytest.approx(best["recall"]["value"], abs=0.02), "all found is all the mass"
    content = json.loads((tmp_path / "tuning.json").read_text())
    assert content["spec"] == result.spec
    assert not set(content["texts"]["tuning"]["documents"]) & set(content["texts"]["verification"]["documents"])
    assert {"machine", "libraries", "threads", "commit", "seed"} <= set(content["provenance"])
    again = tune(**options)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(result, seconds=0), "everything was kept"


def test_a_loss_is_measured_against_exact_search(given: dict[str, Any], tmp_path: Path) -> None:
    specs = tuple(f"degraded:drop={drop}" for drop in (0.0, 0.5))
    result = tune(**given, backends=specs, kind="loss", target=0.0001, output=tmp_path)
    losses = {one["spec"]: one["loss"] for one in result.points if one["loss"]}
    assert losses["degraded:drop=0.0"] == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-6), "misses nothing"
    assert result.spec == "degraded:drop=0.0" or losses[result.spec]["high"] <= 0.0001
    assert result.verified is not None
    for one in result.points:
        assert one["recall"]["value"] == pytest.approx(1.0 if one["spec"].endswith("0.0") else 0.5, abs=0.05)


def test_what_nothing_reaches_is_told_with_what_came_nearest(given: dict[str, Any], tmp_path: Path) -> None:
    result = tune(**given, backends=("degraded:drop=0.5",), kind="recall", target=0.9, output=tmp_path)
    assert result.outcome == "not reached"
    assert result.verified is None
    assert "Nearest comes `degraded:drop=0.5`" in result.message


def test_texts_that_share_a_document_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TuneError, match="share no document"):
        tune(**{**given, "verify_split": given["split"]}, backends=("degraded",), target=0.5, output=tmp_path)
    with pytest.raises(TuneError, match="above memory_size"):
        tune(**{**given, "memory_size": 2}, backends=("degraded",), target=0.5, output=tmp_path)


def test_the_command_ends_with_1_where_the_target_is_not_reached(given: dict[str, Any], tmp_path: Path) -> None:
    from recollect.cli import app

    arguments = ["tune", "--backend", "degraded:drop=0.5", "--target-recall", "0.9", "--output", str(tmp_path)]
    for name in ("checkpoint", "corpus", "split", "verify_split", "memory_size", "k", "rows", "max_tokens", "threads"):
        arguments += [f"--{name.replace('_', '-')}", str(given[name])]
    answer = CliRunner().invoke(app, [*arguments, "--json"])
    assert answer.exit_code == 1, answer.output
    assert json.loads(answer.stdout)["outcome"] == "not reached"
    two = CliRunner().invoke(app, [*arguments, "--target-mass", "0.9"])
    assert isinstance(two.exception, TuneError)
    assert "give one target" in str(two.exception)
