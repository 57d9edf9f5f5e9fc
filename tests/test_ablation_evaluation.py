"""Evaluating for an ablation: filled memories, sorted losses, spikes, starts of fine-tuning, and costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SEGMENT, tiny_documents, tiny_model

from recollect.model.checkpoints import load_checkpoint, save_checkpoint
from recollect.model.evaluation_text import choose_text
from recollect.model.tokenizer import train_tokenizer
from recollect.model.training_options import TrainingOptions
from recollect.suites.ablation.evaluating import Trunks, evaluate_model, with_config
from recollect.suites.ablation.matching import sequence_bytes
from recollect.suites.ablation.process import text_digest
from recollect.suites.ablation.sections import evaluation_text
from recollect.suites.ablation.settings import EvaluationSettings
from recollect.suites.ablation.stability import find_spikes, summarise_log
from recollect.suites.ablation.starting import adapted_start

LENGTHS = (360, 350, 60)


def settings(**changes: Any) -> EvaluationSettings:
    plain = EvaluationSettings(backend="exact", memory_size=64, k=4, rows=2, max_tokens=128, fill_tokens=256)
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("cache", "layer", "size", "key"),
    [
        (0, 0, 64, "key"),
        (24, 0, 64, "key"),
        (24, 1, 0, "key"),
        (0, 1, 200, "key"),
        (24, 2, 64, "key"),
        (0, 1, 64, "hidden"),
    ],
)
def test_a_filled_memory_gives_the_losses_of_reading_everything(cache: int, layer: int, size: int, key: str) -> None:
    model = tiny_model(memory_layers=[layer], xl_cache=cache, memory_key=key)
    documents = tiny_documents(LENGTHS)
    wanted = settings(memory_size=size)
    text = evaluation_text(documents, wanted, SEGMENT, "tiny")
    filled = evaluate_model(model, text, wanted, Trunks(), seed=0).result.losses
    whole = evaluate_model(model, text, dataclasses.replace(wanted, fill_tokens=0), Trunks(), seed=0).result.losses
    late = whole.position > 256
    np.testing.assert_array_equal(filled.position, whole.position[late])
    np.testing.assert_array_equal(filled.document, whole.document[late])
    np.testing.assert_allclose(filled.loss, whole.loss[late], rtol=0, atol=2e-5)
    assert set(filled.document_names) == {"document-0", "document-1"}


def test_filling_searches_only_what_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    from recollect.memory_backends.base import MemoryBackend

    searched = []
    search = MemoryBackend.search
    monkeypatch.setattr(
        MemoryBackend, "search", lambda self, *args, **kwargs: searched.append(1) or search(self, *args, **kwargs)
    )
    wanted = settings()
    text = evaluation_text(tiny_documents(LENGTHS), wanted, SEGMENT, "tiny")
    evaluate_model(tiny_model(), text, wanted, Trunks(), seed=0)
    scored = text.segments - 256 // SEGMENT
    assert len(searched) == scored + 2  # two segments before them fill what the two upper layers carry


def test_sizes_and_neighbours_share_one_trunk() -> None:
    model, trunks = tiny_model(), Trunks()
    text = choose_text(tiny_documents(), rows=2, segment_length=SEGMENT, max_tokens=None)
    for size, k in ((0, 0), (16, 2), (64, 4)):
        config = model.config.replace(memory_size=size or 64, k=k or 4)
        wanted = settings(memory_size=size, k=k, fill_tokens=0)
        evaluate_model(with_config(model, config), text, wanted, trunks, seed=0)
    assert trunks.computed == 1


def test_losses_pair_up_whatever_the_length_of_segments() -> None:
    documents = tiny_documents()
    results, digests = [], []
    for length in (8, 16, 32):
        model = tiny_model(segment_length=length)
        text = choose_text(documents, rows=2, segment_length=length, max_tokens=192)
        wanted = settings(memory_size=0, fill_tokens=0)
        results.append(evaluate_model(model, text, wanted, Trunks(), seed=0).result.losses)
        digests.append(text_digest(text, wanted))
    assert len(set(digests)) == 1
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].document, other.document)
        np.testing.assert_array_equal(results[0].position, other.position)
    shorter = choose_text(documents, rows=2, segment_length=8, max_tokens=176)
    assert text_digest(shorter, settings(fill_tokens=0)) != digests[0]


def test_sampled_documents_are_not_the_longest() -> None:
    documents = tiny_documents(tuple(range(40, 400, 12)))
    wanted = settings(fill_tokens=0, max_tokens=1600)
    longest = evaluation_text(documents, wanted, SEGMENT, "tiny")
    sampled = evaluation_text(documents, dataclasses.replace(wanted, documents="sampled"), SEGMENT, "tiny")
    lengths = [int(name.partition("-")[2]) for name in sampled.document_names]
    assert min(int(name.partition("-")[2]) for name in longest.document_names) >= 25
    assert min(lengths) < 15  # thirty documents, the longest last
    again = evaluation_text(documents, dataclasses.replace(wanted, documents="sampled"), SEGMENT, "tiny")
    assert again.digest == sampled.digest


def test_bytes_are_those_of_one_sequence() -> None:
    model = tiny_model(xl_cache=16)
    text = choose_text(tiny_documents(), rows=2, segment_length=SEGMENT, max_tokens=None)
    found = evaluate_model(model, text, settings(fill_tokens=0), Trunks(), seed=0)
    config = model.config
    one_pair = 2 * 4 * config.heads * config.head_dim
    assert found.memory_bytes == 64 * one_pair
    assert found.cache_bytes >= config.layers * 16 * one_pair
    assert sequence_bytes(config.replace(memory_size=64)) == (64 + 3 * 16) * one_pair


def test_spikes_are_found_and_neighbours_count_once() -> None:
    losses = 3.0 + 0.05 * np.sin(np.arange(200.0))
    assert find_spikes(losses) == []
    losses[[120, 121, 160]] += 1.0
    assert find_spikes(losses) == [120, 160]
    losses[10] += 5.0  # before there is anything to judge by
    assert find_spikes(losses) == [120, 160]


def test_a_log_that_was_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    line = '{"step": %d, "loss": 2.0, "gradient_norm": %g, "learning_rate_share": 1.0, "step_ms": %g}\n'
    text = (
        "".join(line % (step, step, 10.0 * step) for step in range(1, 5)) + '{"step": 4, "validation_perplexity": 3}\n'
    )
    (tmp_path / "log").write_text(text + '{"step": 5, "lo', encoding="utf-8")
    found = summarise_log(tmp_path / "log")
    assert found["steps_logged"] == 4
    assert found["gradient_norm_max"] == 4
    assert found["gradient_norm_median"] == 2.5
    assert found["step_ms"] == 35.0


def test_fine_tuning_starts_from_the_weights_that_are_there(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text"], 256)
    plain = tiny_model(memory_layers=(), vocabulary_size=300)
    save_checkpoint(tmp_path / "plain", plain, tokenizer)
    wanted = plain.config.replace(memory_layers=(1,), memory_size=32)
    options = TrainingOptions(output=tmp_path / "tuned", model=wanted, checkpoint=tmp_path / "plain")
    start = load_checkpoint(adapted_start(options, tmp_path).checkpoint or "")
    assert start.config == wanted
    weights, before = start.model.state_dict(), plain.state_dict()
    assert set(weights) > set(before)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    same = dataclasses.replace(options, model=plain.config.replace(memory_size=16))
    assert adapted_start(same, tmp_path).checkpoint == tmp_path / "plain"
    assert adapted_start(same, tmp_path).memory_size == 16
