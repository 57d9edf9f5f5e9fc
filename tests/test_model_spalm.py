"""SPALM's output layer: its formula, what its gate may learn from, and that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from recollect.model import spalm
from recollect.model.configuration import ConfigurationError
from recollect.model.datastore import Neighbours, split_documents
from recollect.model.evaluation import replay
from recollect.model.spalm import (
    EmbeddingsOutput,
    PredictionsOutput,
    SpalmOptions,
    evaluate_spalm,
    train_spalm,
)
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.trunk import compute_trunk


def training_documents(count: int = 10) -> TokenizedDocuments:
    """Documents that repeat themselves as those of `tiny` do, and share no phrase with them."""
    generator = np.random.default_rng(3)
    phrases = [generator.integers(0, 64, 33) for _ in range(count)]
    arrays = tuple(np.resize(phrase, 150).astype(np.uint16) for phrase in phrases)
    return TokenizedDocuments(tuple(f"training-{number}" for number in range(count)), arrays, "training", "train")


HIDDEN = torch.linspace(-1.0, 1.5, 18).view(3, 6)
DISTANCES = torch.tensor([[0.5, 1.0, 4.0], [2.0, torch.inf, torch.inf], [torch.inf] * 3])
TOKENS = torch.tensor([[4, 4, 9], [7, 0, 0], [0, 0, 0]])


def test_mixed_embeddings_follow_their_formula() -> None:
    embedding = torch.randn(11, 6)
    output = EmbeddingsOutput(embedding, typical_hidden=1.0, typical_distance=2.0)
    for parameter in output.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    carry = output.ratio * output.carry.weight
    with torch.no_grad():
        logits, gate = output(HIDDEN, Neighbours(DISTANCES, TOKENS))
        shares = torch.sigmoid(HIDDEN @ output.gate.weight[0] + output.gate.bias[0])
        scores = torch.stack([HIDDEN[0] @ embedding[token] for token in (4, 4, 9)])
        weights = torch.softmax(scores - 10.0 * output.distance_weight * DISTANCES[0] / 2.0, dim=0)
        retrieved = carry @ ((weights[0] + weights[1]) * embedding[4] + weights[2] * embedding[9])
        first = shares[0] * HIDDEN[0] + (1 - shares[0]) * retrieved
        second = shares[1] * HIDDEN[1] + (1 - shares[1]) * (carry @ embedding[7])
    torch.testing.assert_close(logits, torch.stack([first, second, HIDDEN[2]]) @ embedding.T)
    torch.testing.assert_close(gate, torch.stack([shares[0], shares[1], torch.tensor(1.0)]))


def test_mixed_predictions_follow_their_formula() -> None:
    embedding = torch.randn(11, 6)
    output = PredictionsOutput(embedding, typical_distance=2.0)
    for parameter in output.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        logarithms, gate = output(HIDDEN, Neighbours(DISTANCES, TOKENS))
        shares = torch.sigmoid(HIDDEN @ output.gate.weight[0] + output.gate.bias[0])
        expected = torch.softmax(HIDDEN @ embedding.T, dim=1)
        expected[:2] *= shares[:2, None]
        weights = torch.softmax(-DISTANCES[0] * output.log_sharpness.exp() / 2.0, dim=0)
        expected[0, 4] += (1 - shares[0]) * (weights[0] + weights[1])
        expected[0, 9] += (1 - shares[0]) * weights[2]
        expected[1, 7] += 1 - shares[1]
    torch.testing.assert_close(logarithms.exp(), expected)
    torch.testing.assert_close(gate, torch.stack([shares[0], shares[1], torch.tensor(1.0)]))


@pytest.mark.parametrize("form", ["predictions", "embeddings"])
@pytest.mark.parametrize("datastore", ["document", "training"])
def test_it_learns_from_training_documents_alone(datastore: str, form: str) -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = replay(model, compute_trunk(model, text), memory_size=0)
    options = SpalmOptions(
        datastore, k=8, datastore_size=900, form=form, training_tokens=1500, epochs=60, learning_rate=0.1
    )
    result = evaluate_spalm(model, text, options, training=training_documents())
    assert np.array_equal(result.losses.document, plain.losses.document)
    assert np.array_equal(result.losses.position, plain.losses.position)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert 0.0 < result.mean_gate < 1.0
    assert (result.form, result.as_json()["mean_gate"]) == (form, result.mean_gate)
    if datastore == "document":  # what training text cannot teach about this text, the document's own past can
        assert result.losses.loss.mean() < plain.losses.loss.mean() - 0.3


def test_the_gate_never_meets_its_own_tokens_in_the_datastore(monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_documents()
    stored, learned = split_documents(training)
    assert set(stored.names).isdisjoint(learned.names)
    assert {*stored.names, *learned.names} == set(training.names)
    seen: dict[str, tuple[str, ...]] = {}
    plain_maker, plain_choose = spalm.datastore_maker, spalm.choose_text

    def maker(model: Any, options: Any, documents: TokenizedDocuments) -> Any:
        seen["stored"] = documents.names
        return plain_maker(model, options, documents)

    def choose(documents: TokenizedDocuments, **arguments: Any) -> Any:
        seen["learned"] = documents.names
        return plain_choose(documents, **arguments)

    monkeypatch.setattr(spalm, "datastore_maker", maker)
    monkeypatch.setattr(spalm, "choose_text", choose)
    train_spalm(tiny.tiny_model(), SpalmOptions("training", k=4, datastore_size=500, epochs=1), training)
    assert seen == {"stored": stored.names, "learned": learned.names}


def test_equal_seeds_give_equal_gates() -> None:
    options = SpalmOptions(k=4, datastore_size=100, training_tokens=600, epochs=2)
    first, second = (train_spalm(tiny.tiny_model(), options, training_documents())[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"form": "sum"}, {"training_tokens": 0}, {"learning_rate": 0.0}, {"k": 0}], ids=str
)
def test_impossible_options_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        SpalmOptions(**changes)
