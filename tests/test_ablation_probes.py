"""Staleness and index recall on models whose right answers are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_text

from recollect.model.checkpoints import save_checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.evaluation import replay
from recollect.model.tokenizer import Tokenizer, train_tokenizer
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import compute_trunk
from recollect.suites.ablation import probes_index_recall, probes_staleness


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["alpha beta gamma delta " * 20], 280)


def _model(**changes: object) -> MemorizingTransformer:
    return tiny_model(vocabulary_size=280, **changes)


def _save(path: Path, model: MemorizingTransformer, tokenizer: Tokenizer, steps: int = 40) -> Path:
    save_checkpoint(path, model, tokenizer, metadata={"training": {"steps": steps}})
    return path


def _change_keys(model: MemorizingTransformer, change: torch.Tensor) -> None:
    """Multiplies the key projection of the memory layer."""
    with torch.no_grad():
        model.layers[1].attention.key.weight.mul_(change)


def test_unchanged_weights_are_not_stale(tmp_path: Path, tokenizer: Tokenizer) -> None:
    old = _save(tmp_path / "snapshots" / "30", _model(), tokenizer)
    final = _save(tmp_path / "final", _model(), tokenizer)
    result = probes_staleness.probe([old, final], tiny_text(), {})
    (row,) = result.rows
    assert (row["step"], row["updates_before_the_end"]) == (30, 10)
    assert row["key_distance"] == pytest.approx(0, abs=1e-6)
    assert row["key_cosine"] == pytest.approx(1)
    assert row["overlap"] == pytest.approx(1)
    assert row["mass_kept"] == pytest.approx(1, abs=1e-5)
    assert row["perplexity_stale"] == pytest.approx(row["perplexity_fresh"], rel=1e-5)
    assert result.numbers["overlap_after_10_updates"] == row["overlap"]
    text = tiny_text()
    model = _model()
    assert row["perplexity_fresh"] == pytest.approx(replay(model, compute_trunk(model, text)).perplexity, rel=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_longer_keys_matter_only_where_they_are_not_normalised(
    tmp_path: Path, tokenizer: Tokenizer, normalise: bool
) -> None:
    """All old keys three times as long: the same neighbours, and a normalised model does not see it at all."""
    model = _model(normalise_queries_and_keys=normalise)
    final = _save(tmp_path / "final", model, tokenizer)
    _change_keys(model, torch.tensor(3.0))
    old = _save(tmp_path / "30", model, tokenizer)
    (row,) = probes_staleness.probe([old, final], tiny_text(), {}).rows
    assert row["overlap"] == pytest.approx(1, abs=1e-3)
    assert row["key_cosine"] == pytest.approx(1, abs=1e-5)
    assert row["key_length"] == pytest.approx(1 if normalise else 3, rel=1e-4)
    assert row["key_distance"] == pytest.approx(0 if normalise else 2, abs=1e-4)
    same = row["perplexity_stale"] == pytest.approx(row["perplexity_fresh"], rel=1e-5)
    assert same == normalise


def test_foreign_keys_are_as_good_as_chance(tmp_path: Path, tokenizer: Tokenizer) -> None:
    final = _save(tmp_path / "final", _model(), tokenizer)
    other = _model()
    with torch.no_grad():
        torch.manual_seed(9)
        other.layers[1].attention.key.weight.normal_(std=0.2)
    strange = _save(tmp_path / "10", other, tokenizer)
    slightly = _model()
    with torch.no_grad():
        slightly.layers[1].attention.key.weight.add_(0.02 * torch.randn(32, 32))
    near = _save(tmp_path / "30", slightly, tokenizer)
    text = tiny_text()
    far, close = probes_staleness.probe([strange, near, final], text, {}).rows
    assert far["overlap"] < 0.5 < close["overlap"] < 1
    assert far["mass_kept"] < close["mass_kept"] < 1
    assert far["key_distance"] > 3 * close["key_distance"] > 0
    assert far["key_cosine"] == pytest.approx(0, abs=0.3)


def test_what_staleness_cannot_measure_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    final = _save(tmp_path / "final", _model(), tokenizer)
    with pytest.raises(ConfigurationError, match="2 checkpoints"):
        probes_staleness.probe([final], tiny_text(), {})
    plain = _save(tmp_path / "plain", _model(memory_layers=()), tokenizer)
    for measure in (probes_staleness.probe, probes_index_recall.probe):
        with pytest.raises(ConfigurationError, match="no memory layer"):
            measure([plain, plain], tiny_text(), {})
        with pytest.raises(ConfigurationError, match="read more text"):
            measure([final, final], tiny_text(), {"k": 64})


def test_recall_of_exact_and_of_a_known_share(tmp_path: Path, tokenizer: Tokenizer) -> None:
    final = _save(tmp_path / "final", _model(), tokenizer)
    options = {"specs": ["exact", "degraded:drop=0.5", "degraded:drop=0.9"]}
    result = probes_index_recall.probe([final], tiny_text(), options)
    assert result.numbers["recall_exact"] == 1
    assert result.numbers["mass_share_exact"] == pytest.approx(1, abs=1e-6)
    assert result.numbers["recall_degraded_drop_0.5"] == pytest.approx(0.5, abs=0.08)
    assert result.numbers["recall_degraded_drop_0.9"] == pytest.approx(0.1, abs=0.08)
    assert result.numbers["key_length_variation"] == pytest.approx(0, abs=1e-5)
    assert [row["status"] for row in result.rows] == ["ok"] * 3


def test_rows_are_judged_by_themselves(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Recall over all rows is between those of the first and the others, and is not the first's."""
    final = _save(tmp_path / "final", _model(), tokenizer)
    options = {"specs": ["degraded:drop=0.5"]}
    found = [probes_index_recall.probe([final], tiny_text(), {**options, "rows": rows}) for rows in (1, 2, 0)]
    recalls = [result.numbers["recall_degraded_drop_0.5"] for result in found]
    assert recalls[1] == recalls[2] != recalls[0]


def test_keys_of_unequal_length_are_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    final = _save(tmp_path / "final", _model(normalise_queries_and_keys=False), tokenizer)
    result = probes_index_recall.probe([final], tiny_text(), {"specs": ["exact"]})
    assert result.numbers["key_length_variation"] > 0.05


def test_every_index_is_judged_by_default() -> None:
    specs = probes_index_recall.default_specs()
    assert {"hnswlib", "faiss-hnsw", "faiss-ivf", "scann", "pynndescent"} <= set(specs)
    assert not {"exact", "degraded"} & set(specs)
