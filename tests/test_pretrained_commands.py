"""The verbs memorize, evaluate, generate and inspect, called in this process: starting one for each takes too long."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from tiny import write_tiny_checkpoint, write_tiny_corpus
from tiny_pretrained import write_tiny_llama, write_words

from recollect.pretrained.store import MemoryStore


def call(*arguments: str, cwd: Path, code: int = 0, given: str = "") -> tuple[str, str]:
    """What a command writes to standard output and to standard error."""
    from recollect.cli import main

    output, errors = io.StringIO(), io.StringIO()
    found = 0
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        mock.patch.object(sys, "argv", ["recollect", *arguments]),
        mock.patch.object(sys, "stdin", io.StringIO(given)),
        mock.patch.dict(os.environ, environment),
    ):
        try:
            main()
        except SystemExit as ended:
            found = int(ended.code or 0)
    assert found == code, output.getvalue() + errors.getvalue()
    return output.getvalue(), errors.getvalue()


def recollect(*arguments: str, cwd: Path) -> str:
    return call(*arguments, cwd=cwd)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, documents and a store of them."""
    folder = tmp_path_factory.mktemp("verbs")
    write_tiny_checkpoint(folder / "checkpoint", write_tiny_corpus(folder / "corpus"))
    write_words(folder / "src")
    (folder / "src" / ".hidden").write_text("x")
    (folder / "src" / "b.bin").write_bytes(b"\0\1")
    recollect("memorize", "src", "--model", "checkpoint", "--output", "store", cwd=folder)
    return folder


def test_memorize_tells_what_it_did(folder: Path) -> None:
    shown = recollect("memorize", "src", "--model", "checkpoint", "--output", "store", cwd=folder)
    assert "1 binary, 1 hidden" in shown
    answer = json.loads(
        recollect("memorize", "src", "--model", "checkpoint", "--output", "store", "--update", "--json", cwd=folder)
    )
    assert (answer["documents"], answer["unchanged"], answer["skipped"]) == (3, 3, {"binary": 1, "hidden": 1})


def test_evaluate_and_generate_with_a_store(folder: Path) -> None:
    arguments = ("--model", "checkpoint", "--store", "store")
    answer = json.loads(recollect("evaluate", *arguments, "--corpus", "src", "--split", "all", "--json", cwd=folder))
    assert answer["perplexity"] != answer["without_memory"]["perplexity"]
    (folder / "prompt.txt").write_text("alpha beta " * 30)
    text = recollect("generate", *arguments, "--file", "prompt.txt", "--max-new-tokens", "5", cwd=folder)
    made = json.loads(
        recollect("generate", *arguments, "--file", "prompt.txt", "--max-new-tokens", "5", "--json", cwd=folder)
    )
    assert text.rstrip("\n") == made["text"].rstrip("\n")
    assert len(made["tokens"]) == 5


def test_a_prompt_from_standard_input(folder: Path) -> None:
    output, _ = call(
        *("generate", "-", "--model", "checkpoint", "--max-new-tokens", "3", "--json"), cwd=folder, given="alpha beta"
    )
    assert len(json.loads(output)["tokens"]) == 3


def test_inspect_writes_its_page(folder: Path) -> None:
    shown = recollect("inspect", "src", "--model", "checkpoint", "--output", "out", cwd=folder)
    assert "nats a token" in shown
    assert {"inspection.html", "inspection.json", "tokens.parquet"} <= {
        file.name for file in (folder / "out").iterdir()
    }


def test_a_hugging_face_folder(folder: Path) -> None:
    pytest.importorskip("transformers")
    write_tiny_llama(folder / "llama")
    recollect("memorize", "src", "--model", "llama", "--layers", "1,-2", "--output", "papers", cwd=folder)
    assert MemoryStore.open(folder / "papers").layers == (1, 2)
    arguments = ("--model", "llama", "--store", "papers", "--memory-size", "64", "--k", "4")
    answer = json.loads(
        recollect(
            *("evaluate", *arguments, "--corpus", "src", "--split", "all", "--output", "losses.npz", "--json"),
            cwd=folder,
        )
    )
    assert answer["memory"]["gate"] == "joint"
    assert (folder / "losses.npz").is_file()
    assert recollect("generate", "alpha", *arguments, "--max-new-tokens", "3", cwd=folder)


def test_user_errors_are_messages(folder: Path) -> None:
    def told(*arguments: str) -> str:
        return call(*arguments, cwd=folder, code=2)[1]

    assert "nowhere" in told("memorize", "nowhere", "--output", "other")
    assert "another model" in told("evaluate", "--store", "store")
    assert "no memory store" in told("generate", "a", "--store", "src")
    assert "--layers 3 is for Hugging Face models" in told("inspect", "--layers", "3")
    assert "only one of them" in told("generate", "a", "--file", "prompt.txt")
    assert "only one of them" in told("generate")
    assert "both name a model" in told("evaluate", "--model", "checkpoint", "--checkpoint", "checkpoint")
    assert "no backend 'exat'" in told("inspect", "--backend", "exat")
    victim = max((folder / "store" / "data").iterdir(), key=lambda file: file.stat().st_size)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-8])
    try:
        assert "cut short" in told("generate", "a", "--model", "checkpoint", "--store", "store")
    finally:
        victim.write_bytes(whole)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_killed_run_leaves_a_store_that_goes_on(folder: Path) -> None:
    write_words(folder / "many", documents=40, words=40)
    arguments = ["memorize", "many", "--model", "checkpoint", "--output", "killed"]
    process = subprocess.Popen(
        [sys.executable, "-m", "recollect", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    documents = folder / "killed" / "data"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not documents.is_dir() or len(list(documents.iterdir())) < 5):
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = len(MemoryStore.open(folder / "killed"))
    answer = json.loads(recollect(*arguments, "--json", cwd=folder))
    assert answer["documents"] == 40
    assert answer["unchanged"] == before < 40
