"""The shipped model: it is small, its card says what its results say, and its memory is worth what they claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recollect.model.checkpoints import load_checkpoint, reference_checkpoint
from recollect.model.evaluation import replay
from recollect.model.evaluation_text import choose_text, load_documents
from recollect.model.training_options import TrainingOptions
from recollect.model.trunk import compute_trunk
from recollect.model.twin import TwinLosses

FOLDER = reference_checkpoint()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "reference_results.json").read_text(encoding="utf-8")))


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 << 20
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md", ".npz"}


def test_it_was_trained_as_the_preset_says(tmp_path: Path) -> None:
    checkpoint, options = load_checkpoint(FOLDER), TrainingOptions.preset("reference", tmp_path)
    trained = checkpoint.metadata["training"]
    expected = options.to_dict()
    # Choices that came after it was trained have the values that keep the model as it was.
    trained = {**trained, "model": {**expected["model"], **trained["model"]}}
    assert {name: expected[name] for name in trained} == trained
    assert checkpoint.config == options.model
    assert checkpoint.metadata["tokens"] == options.tokens


def test_the_results_are_those_of_this_checkpoint_and_hold_what_was_asked(results: dict[str, Any]) -> None:
    assert results["model"]["digest"] == load_checkpoint(FOLDER).digest
    figures = results["figures"]
    assert set(figures) == {"memory off", "memory 512", "memory 2048", "memory 8192", "memory 32768", "twin"}
    at_8192 = figures["memory 8192"]
    assert at_8192["change_against_memory_off_percent"]["high"] <= -30.0
    assert at_8192["change_against_twin_percent"]["high"] <= -25.0
    assert figures["memory 32768"]["perplexity"]["estimate"] <= at_8192["perplexity"]["estimate"]


def test_the_card_shows_the_results(results: dict[str, Any]) -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "recollect train --preset reference --output" in card
    assert f"{results['model']['tokens']:,}".replace(",", " ") in card
    for name, row in results["figures"].items():
        value = row["perplexity"]
        shown = (
            f"| {name} | {value['estimate']:.2f} | {value['low']:.2f} to {value['high']:.2f} | {row['accuracy']:.3f} |"
        )
        assert shown in card
        if name.startswith("memory ") and name != "memory off":
            for key in ("change_against_memory_off_percent", "change_against_twin_percent"):
                change = row[key]
                assert f"{change['estimate']:+.1f} % ({change['low']:+.1f} to {change['high']:+.1f})" in card


def test_the_memory_lowers_perplexity_on_test_text() -> None:
    """On part of the test split, so that it takes seconds; any Python's library will do."""
    checkpoint = load_checkpoint(FOLDER)
    documents = load_documents("stdlib", "test", checkpoint.tokenizer)
    text = choose_text(documents, rows=2, segment_length=checkpoint.config.segment_length, max_tokens=8192)
    trunk = compute_trunk(checkpoint.model, text)
    off, on = (replay(checkpoint.model, trunk, memory_size=size) for size in (0, 8192))
    assert on.perplexity < 0.7 * off.perplexity
    twin = TwinLosses.load(FOLDER)
    assert twin is not None
    perplexity = twin.perplexity(documents.digest, text.document_names, text.document_tokens)
    if perplexity is not None:  # it is None on a Python whose library has another text
        assert on.perplexity < 0.9 * perplexity < off.perplexity
