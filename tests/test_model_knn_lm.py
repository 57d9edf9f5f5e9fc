"""kNN-LM against a brute-force computation over documents: nobody retrieves themselves, the future or a neighbour."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from recollect.memory_backends import Capabilities, InvalidSpec, MemoryBackendError, UnsupportedOperation
from recollect.memory_backends.implementations.exact import Exact
from recollect.model.configuration import ConfigurationError
from recollect.model.datastore import TextReading, read_text, sample_text, split_documents
from recollect.model.documents import CorpusError
from recollect.model.evaluation import replay
from recollect.model.knn_lm import (
    INTERPOLATIONS,
    KnnLanguageModelOptions,
    datastore_maker,
    evaluate_knn_lm,
    tune_knn_lm,
)
from recollect.model.streams import IGNORED
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import compute_trunk

K = 5


@pytest.fixture(scope="module")
def model() -> MemorizingTransformer:
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def reading(model: MemorizingTransformer) -> TextReading:
    return read_text(model, tiny.tiny_text())


def training_documents() -> TokenizedDocuments:
    generator = np.random.default_rng(7)
    arrays = tuple(generator.integers(0, 64, 70).astype(np.uint16) for _ in range(6))
    return TokenizedDocuments(tuple(f"training-{number}" for number in range(6)), arrays, "training", "train")


def by_document(reading: TextReading) -> dict[int, list[tuple[int, int, np.ndarray, np.ndarray, int]]]:
    """For each document its tokens in order: place in it, segment's start, context, logits' source, target."""
    text, documents = reading.text, {}
    for segment in range(text.segments):
        for row in range(text.rows):
            number, start = int(text.document_index[segment, row]), int(text.position[segment, row])
            for token in range(int(text.lengths[segment, row])):
                target = int(text.targets[segment, row, token])
                if number >= 0 and target != IGNORED:
                    entry = (
                        start + token,
                        start,
                        reading.contexts[segment, row, token].double().numpy(),
                        reading.hidden[segment, row, token].double().numpy(),
                        target,
                    )
                    documents.setdefault(number, []).append(entry)
    return documents


def mixed_loss(
    model: MemorizingTransformer,
    context: np.ndarray,
    hidden: np.ndarray,
    target: int,
    stored: list[tuple[np.ndarray, int]],
    interpolation: float,
    temperature: float,
) -> float:
    """Khandelwal et al. 2020, equations 2 and 3, for one token."""
    logits = model.embedding.weight.detach().double().numpy() @ hidden
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    if not stored:
        return -float(np.log(probability[target]))
    distances = np.array([np.square(context - key).sum() for key, _ in stored])
    nearest = np.argsort(distances, kind="stable")[:K]
    weights = np.exp(-(distances[nearest] - distances[nearest].min()) / temperature)
    weights /= weights.sum()
    retrieved = sum(weight for weight, place in zip(weights, nearest, strict=True) if stored[place][1] == target)
    return -float(np.log((1 - interpolation) * probability[target] + interpolation * retrieved))


@pytest.mark.parametrize("size", [37, 500])
def test_the_documents_own_datastore_equals_brute_force(
    model: MemorizingTransformer, reading: TextReading, size: int
) -> None:
    options = KnnLanguageModelOptions(k=K, datastore_size=size, temperature=3.0, interpolation=0.4)
    result = evaluate_knn_lm(model, reading, options)
    losses = result.losses
    for number, tokens in by_document(reading).items():
        expected = []
        for place, start, context, hidden, target in tokens:
            # Only what earlier segments of this document hold, and of that the newest.
            stored = [(other[2], other[4]) for other in tokens if other[0] < start][-size:]
            assert all(other[0] + 1 <= place for other in tokens if other[0] < start)
            expected.append(mixed_loss(model, context, hidden, target, stored, 0.4, 3.0))
        chosen = losses.document == number
        assert losses.position[chosen].tolist() == [token[0] + 1 for token in tokens]
        np.testing.assert_allclose(losses.loss[chosen], expected, atol=2e-4)


def test_a_training_datastore_equals_brute_force(model: MemorizingTransformer, reading: TextReading) -> None:
    options = KnnLanguageModelOptions("training", k=K, datastore_size=300, temperature=3.0, interpolation=0.4)
    training = training_documents()
    result = evaluate_knn_lm(model, reading, options, training=training)
    text = sample_text(training, tokens=300, rows=8, segment_length=tiny.SEGMENT)
    assert sum(text.document_tokens) == 300
    pairs = by_document(read_text(model, text))
    stored = [(token[2], token[4]) for tokens in pairs.values() for token in tokens]
    for number, tokens in by_document(reading).items():
        expected = [mixed_loss(model, token[2], token[3], token[4], stored, 0.4, 3.0) for token in tokens[:40]]
        np.testing.assert_allclose(result.losses.loss[result.losses.document == number][:40], expected, atol=2e-4)
    assert result.datastore == "training"
    assert result.datastore_bytes >= len(stored) * model.config.width * 4


def test_no_share_for_the_neighbours_is_the_model_itself(model: MemorizingTransformer, reading: TextReading) -> None:
    result = evaluate_knn_lm(model, reading.text, KnnLanguageModelOptions(k=K, temperature=1.0, interpolation=0.0))
    plain = replay(model, compute_trunk(model, reading.text), memory_size=0)
    np.testing.assert_allclose(result.losses.loss, plain.losses.loss, atol=1e-5)
    assert np.array_equal(result.losses.correct, plain.losses.correct)
    assert np.array_equal(result.losses.document, plain.losses.document)
    assert np.array_equal(result.losses.position, plain.losses.position)
    assert result.memory.as_json() == {"backend": "exact", "memory_size": 8192, "k": K}


def test_contexts_are_the_input_of_the_last_feed_forward_block(model: MemorizingTransformer) -> None:
    text = tiny.tiny_text()
    reading = read_text(model, text)
    state, starts = model.initial_state(text.rows, memory_size=0), text.document_starts[0]
    with torch.no_grad():
        hidden = model.embedding(text.tokens[0]) * model.config.width**0.5
        for layer in model.layers:
            attended, _ = layer.attention(layer.attention_norm(hidden), state.upper.layers[0].without(starts), None)
            hidden = hidden + attended
            context = layer.feed_forward_norm(hidden)
            hidden = hidden + layer.feed_forward(context)
    torch.testing.assert_close(reading.contexts[0], context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reading.hidden[0], model.final_norm(hidden), atol=1e-5, rtol=1e-5)


def test_later_text_changes_nothing_before_it(model: MemorizingTransformer) -> None:
    text = tiny.tiny_text()
    tokens, targets = text.tokens.clone(), text.targets.clone()
    half = text.segments // 2
    tokens[half:] = (tokens[half:] + 1) % 64
    targets[half:] = torch.where(targets[half:] == IGNORED, IGNORED, (targets[half:] + 1) % 64)
    options = KnnLanguageModelOptions(k=K, temperature=3.0, interpolation=0.4)
    before, after = (
        evaluate_knn_lm(model, changed, options).losses.loss
        for changed in (text, dataclasses.replace(text, tokens=tokens, targets=targets))
    )
    count = int((text.targets[:half] != IGNORED).sum())
    np.testing.assert_array_equal(before[:count], after[:count])
    assert not np.allclose(before[count:], after[count:])


def test_scores_of_an_approximate_index_are_computed_again(
    model: MemorizingTransformer, reading: TextReading, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = KnnLanguageModelOptions(k=K, datastore_size=100, temperature=3.0, interpolation=0.4)
    exact = evaluate_knn_lm(model, reading, options).losses.loss
    monkeypatch.setattr(Exact, "capabilities", Capabilities(exact=False))
    plain_search = Exact._search

    def rounded(self: Any, *arguments: Any) -> Any:
        scores, slots = plain_search(self, *arguments)
        return torch.linspace(-1.0, -2.0, scores.shape[-1]).expand_as(scores).clone(), slots

    monkeypatch.setattr(Exact, "_search", rounded)
    np.testing.assert_allclose(evaluate_knn_lm(model, reading, options).losses.loss, exact, atol=1e-4)


def test_tuning_takes_the_best_of_what_it_tries(model: MemorizingTransformer, reading: TextReading) -> None:
    options = KnnLanguageModelOptions(k=K, datastore_size=500)
    tuned = tune_knn_lm(model, reading, options, datastore_maker(model, options, None))
    assert tuned.is_tuned
    assert tuned.interpolation in INTERPOLATIONS

    def loss(**changes: float) -> float:
        result = evaluate_knn_lm(model, reading, dataclasses.replace(tuned, **changes))
        return float(result.losses.loss.astype(np.float64).mean())

    best = loss()
    assert tuned.interpolation is not None
    assert tuned.temperature is not None
    assert best < loss(interpolation=0.0) - 0.5  # the documents repeat themselves, and the model knows nothing
    for near in (tuned.interpolation - 0.02, tuned.interpolation + 0.02):
        if 0.0 <= near < 1.0:
            assert loss(interpolation=near) >= best - 1e-6
    for factor in (2.0**-0.5, 2.0**0.5):
        assert loss(temperature=tuned.temperature * factor) >= best - 1e-6
    half = tune_knn_lm(
        model,
        reading,
        dataclasses.replace(options, interpolation=0.5),
        datastore_maker(model, options, None),
    )
    assert half.interpolation == 0.5
    result = evaluate_knn_lm(model, reading, options, validation=reading)
    assert (result.interpolation, result.temperature) == (tuned.interpolation, tuned.temperature)
    assert result.as_json()["temperature"] == tuned.temperature


def test_useless_neighbours_are_left_out(model: MemorizingTransformer, reading: TextReading) -> None:
    training = training_documents()
    wrong = TokenizedDocuments(training.names, tuple(np.zeros_like(array) for array in training.arrays), "wrong")
    options = KnnLanguageModelOptions("training", k=K, datastore_size=100)
    result = evaluate_knn_lm(model, reading, options, validation=reading, training=wrong)
    assert result.interpolation <= 0.04


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datastore": "web"}, "datastore='web' is unknown"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": 64, "datastore_size": 32}, "k=64 is above datastore_size=32"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"interpolation": 1.0}, "interpolation=1.0 must be"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        KnnLanguageModelOptions(**changes)


def test_what_cannot_be_had_is_told(
    model: MemorizingTransformer, reading: TextReading, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryBackendError, match="exct"):
        KnnLanguageModelOptions(backend="exct")
    with pytest.raises(InvalidSpec):
        KnnLanguageModelOptions(backend="exact:speed=11")
    with pytest.raises(ConfigurationError, match="tuned on validation text"):
        evaluate_knn_lm(model, reading, KnnLanguageModelOptions(k=K, temperature=1.0))
    tuned = KnnLanguageModelOptions("training", k=K, temperature=1.0, interpolation=0.5)
    with pytest.raises(ConfigurationError, match="needs training documents"):
        evaluate_knn_lm(model, reading, tuned)
    with pytest.raises(CorpusError, match="too few"):
        split_documents(tiny.tiny_documents())
    monkeypatch.setattr(Exact, "capabilities", Capabilities(metrics=("inner_product",)))
    with pytest.raises(UnsupportedOperation, match="'exact' does not search by metric 'l2'"):
        evaluate_knn_lm(model, reading, dataclasses.replace(tuned, datastore="document"))
