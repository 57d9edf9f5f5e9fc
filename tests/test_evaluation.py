"""Evaluation over a stored trunk: the same figures as the model run directly, and one trunk for all backends."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as functional

from recollect.memory_backends import UnknownBackend, make_backend
from recollect.model.configuration import ConfigurationError
from recollect.model.documents import CorpusError
from recollect.model.evaluation import evaluate, replay
from recollect.model.evaluation_text import choose_text, load_documents
from recollect.model.evaluation_types import EvaluationResult, MemorySpecification, TokenLosses
from recollect.model.memory_layer import Retrieved
from recollect.model.recording import ObservedBackend, record
from recollect.model.streams import IGNORED
from recollect.model.tokenizer import train_tokenizer
from recollect.model.trunk import TrunkStore, compute_trunk

SPECS = ("exact", "approx-topk", "approx-topk:recall_target=0.8", *(f"degraded:drop=0.{n}" for n in range(2, 9)))


def run_directly(model: torch.nn.Module, text: object, *, memory_size: int, k: int | None = None) -> np.ndarray:
    """Per-token losses of the whole model, segment by segment."""
    state = model.initial_state(text.rows, memory_size=memory_size, k=k)
    losses = []
    with torch.no_grad():
        for number in range(text.segments):
            output = model(text.tokens[number], state, text.document_starts[number])
            state = output.state
            wanted = text.targets[number] != IGNORED
            losses.append(
                functional.cross_entropy(output.logits[wanted], text.targets[number][wanted], reduction="none")
            )
    return torch.cat(losses).numpy()


@pytest.mark.parametrize("memory_size", [0, 32, 64])
@pytest.mark.parametrize("changes", [{}, {"xl_cache": 16}, {"memory_layers": (1, 2)}, {"memory_layers": (0,)}])
def test_replay_equals_the_model_run_directly(memory_size: int, changes: dict[str, object]) -> None:
    model, text = tiny.tiny_model(**changes), tiny.tiny_text()
    result = replay(model, compute_trunk(model, text), memory_size=memory_size)
    expected = run_directly(model, text, memory_size=memory_size)
    np.testing.assert_allclose(result.losses.loss, expected, rtol=1e-5, atol=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected.mean(dtype=np.float64)))
    assert result.tokens == len(expected) == text.predicted
    assert result.memory.memory_size == memory_size
    assert result.memory.backend == ("exact" if memory_size else "none")


def test_ten_specs_share_one_trunk() -> None:
    model, text, store = tiny.tiny_model(), tiny.tiny_text(), TrunkStore()
    calls = 0
    original = model.trunk

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return original(*arguments)

    model.trunk = counted  # type: ignore[method-assign]
    perplexities = {spec: replay(model, store.get(model, text), backend=spec).perplexity for spec in SPECS}
    assert len(SPECS) == 10
    assert store.computed == 1
    assert calls == text.segments
    assert len(set(perplexities.values())) > 5, "the specs should differ, or nothing was replayed"


def test_the_trunk_is_found_on_disk_by_content(tmp_path: Path) -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    first = TrunkStore(tmp_path)
    hidden = first.get(model, text).hidden
    second = TrunkStore(tmp_path)
    assert torch.equal(second.get(model, text).hidden, hidden)
    assert (first.computed, second.computed) == (1, 0)
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    assert second.find(model, text) is None
    second.get(model, text)
    assert second.computed == 1
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    third = TrunkStore(tmp_path)
    assert torch.isfinite(third.get(model, text).hidden).all()
    assert third.computed == 1, "a truncated file is computed anew"


def test_a_bf16_trunk_is_half_the_size_and_nearly_the_same() -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    exact = replay(model, compute_trunk(model, text)).perplexity
    rounded = compute_trunk(model, text, dtype=torch.bfloat16)
    assert rounded.hidden.element_size() == 2
    assert replay(model, rounded).perplexity == pytest.approx(exact, rel=0.02)


def test_exact_memory_that_returns_everything_is_dense_attention() -> None:
    """With k at least the keys alive, retrieval is attention over all former segments of the document."""
    model, text = tiny.tiny_model(), tiny.tiny_text(rows=1)
    result = replay(model, compute_trunk(model, text), memory_size=256, k=256)
    recording = record(model, compute_trunk(model, text))
    layer = model.layers[model.config.first_upper_layer]
    remembered = []

    class Dense:
        """Attends to every key of the document, without any backend."""

        def __init__(self) -> None:
            self.keys: list[torch.Tensor] = []
            self.values: list[torch.Tensor] = []

        def reset_rows(self, rows: torch.Tensor) -> None:
            if bool(rows.any()):
                self.keys, self.values = [], []

        def attend(self, queries: torch.Tensor, scale: torch.Tensor) -> Retrieved:
            found = torch.ones(queries.shape[:3], dtype=torch.bool)
            if not self.keys:
                nothing = torch.zeros(*queries.shape[:3], 1)
                return Retrieved(torch.zeros_like(queries), ~found, nothing, nothing, nothing.long() - 1)
            keys, values = torch.cat(self.keys, 2), torch.cat(self.values, 2)
            logits = queries @ keys.transpose(2, 3) * scale[:, None, None]
            weights = torch.softmax(logits, -1)
            remembered.append(weights @ values)
            slots = torch.arange(keys.shape[2]).expand_as(logits)
            return Retrieved(remembered[-1], found, logits, weights, slots)

        def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            self.keys.append(keys)
            self.values.append(values)

    state = model.initial_state(1, memory_size=0)
    state.upper.memories = [Dense()]
    losses = []
    with torch.no_grad():
        for number in range(text.segments):
            output = model(text.tokens[number], state, text.document_starts[number])
            state = output.state
            wanted = text.targets[number] != IGNORED
            losses.append(
                functional.cross_entropy(output.logits[wanted], text.targets[number][wanted], reduction="none")
            )
    np.testing.assert_allclose(result.losses.loss, torch.cat(losses).numpy(), rtol=1e-4, atol=1e-4)
    assert remembered
    assert recording.queries.shape == (text.segments, model.config.heads, tiny.SEGMENT, model.config.head_dim)
    assert layer is model.layers[1]


def test_losses_know_their_document_and_position() -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    losses = replay(model, compute_trunk(model, text)).losses
    documents = tiny.tiny_documents()
    for place, name in enumerate(losses.document_names):
        positions = losses.position[losses.document == place]
        length = len(documents.arrays[documents.names.index(name)])
        assert sorted(positions) == list(range(1, length)), "every token but the first is predicted once"


def test_a_memory_is_not_shown_another_document() -> None:
    """A document's losses do not depend on what the row has read before."""
    model, documents = tiny.tiny_model(), tiny.tiny_documents()
    together = choose_text(documents, rows=1, segment_length=tiny.SEGMENT, max_tokens=None)
    losses = replay(model, compute_trunk(model, together)).losses
    place = len(together.document_names) - 1
    name = together.document_names[place]
    alone = dataclasses.replace(documents, names=(name,), arrays=(documents.arrays[documents.names.index(name)],))
    text = choose_text(alone, rows=1, segment_length=tiny.SEGMENT, max_tokens=None)
    expected = replay(model, compute_trunk(model, text)).losses.loss
    np.testing.assert_allclose(losses.loss[losses.document == place], expected, rtol=1e-5, atol=1e-5)


def test_degraded_recall_moves_perplexity_between_exact_and_nothing_found() -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    trunk = compute_trunk(model, text)
    exact = replay(model, trunk, backend="exact").losses.loss
    same = replay(model, trunk, backend="degraded:drop=0").losses.loss
    np.testing.assert_allclose(same, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(replay(model, trunk, backend="degraded:drop=0.5").losses.loss - exact).max() > 1e-3


def test_an_observed_backend_changes_nothing_and_counts_everything() -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    trunk = compute_trunk(model, text)
    config = model.config
    seen: list[tuple[int, ...]] = []
    backend = make_backend(
        "exact", num_memories=text.rows * config.heads, capacity=config.memory_size, dim=config.head_dim
    )
    observed = ObservedBackend(backend, on_search=lambda *arguments: seen.append(tuple(arguments[1].shape)))
    result = replay(model, trunk, backend=[observed])
    np.testing.assert_allclose(result.losses.loss, replay(model, trunk).losses.loss, rtol=1e-6)
    assert len(observed.search_seconds) == len(observed.append_seconds) == len(seen) == text.segments
    assert sum(observed.appended) == text.segments * text.rows * config.heads * tiny.SEGMENT
    assert min(observed.search_seconds) > 0
    assert result.memory == MemorySpecification("exact", config.memory_size, config.k)


def test_the_recording_is_what_the_layer_asks() -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    trunk = compute_trunk(model, text)
    asked: list[torch.Tensor] = []
    appended: list[torch.Tensor] = []
    backend = make_backend("exact", num_memories=text.rows * 2, capacity=64, dim=16)
    observed = ObservedBackend(
        backend,
        on_search=lambda found, queries, k, result: asked.append(queries.clone()),
        on_append=lambda keys: appended.append(keys.clone()),
    )
    replay(model, trunk, backend=[observed])
    recording = record(model, trunk)
    torch.testing.assert_close(recording.queries, torch.stack(asked))
    torch.testing.assert_close(recording.keys, torch.stack(appended))
    assert torch.equal(recording.document_starts, text.document_starts)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"memory_size": -1}, ConfigurationError, "-1"),
        ({"k": 0}, ConfigurationError, "k is 0"),
        ({"k": 9, "memory_size": 8}, ConfigurationError, "k is 9, above memory_size 8"),
        ({"backend": "exakt"}, UnknownBackend, "exact"),
    ],
)
def test_wrong_memories_are_refused(changes: dict[str, object], error: type[Exception], says: str) -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    with pytest.raises(error, match=says):
        replay(model, compute_trunk(model, text), **changes)


def test_a_model_without_memory_layers_has_no_memory() -> None:
    model, text = tiny.tiny_model(memory_layers=()), tiny.tiny_text()
    trunk = compute_trunk(model, text)
    assert replay(model, trunk).memory.backend == "none"
    with pytest.raises(ConfigurationError, match="no memory layer"):
        replay(model, trunk, memory_size=64)
    with pytest.raises(ValueError, match="no memory layer"):
        record(model, trunk)


def test_a_loss_that_is_not_finite_raises() -> None:
    model, text = tiny.tiny_model(), tiny.tiny_text()
    trunk = compute_trunk(model, text)
    hidden = trunk.hidden.clone()
    hidden[3, 0, 5] = torch.nan
    trunk = dataclasses.replace(trunk, hidden=hidden)
    with pytest.raises(ValueError, match=r"nan|NaN|finite"):
        replay(model, trunk, backend="none")
    blank = TokenLosses(*(np.zeros(0) for _ in range(4)), ())
    with pytest.raises(ValueError, match="no token"):
        EvaluationResult.from_losses(blank, MemorySpecification("none", 0, 1), 0.0)


def test_text_is_cut_into_equal_shares() -> None:
    text = choose_text(tiny.tiny_documents((500, 400, 300)), rows=2, segment_length=tiny.SEGMENT, max_tokens=200)
    assert text.document_tokens == (96, 96)
    assert text.segments == 6
    assert text.rows == 2
    again = choose_text(tiny.tiny_documents((500, 400, 300)), rows=2, segment_length=tiny.SEGMENT, max_tokens=207)
    assert again.digest == text.digest
    other = choose_text(tiny.tiny_documents((500, 400, 300)), rows=2, segment_length=tiny.SEGMENT, max_tokens=240)
    assert other.digest != text.digest
    with pytest.raises(CorpusError, match="max_tokens=20"):
        choose_text(tiny.tiny_documents(), rows=2, segment_length=tiny.SEGMENT, max_tokens=20)
    with pytest.raises(CorpusError, match="rows is 0"):
        choose_text(tiny.tiny_documents(), rows=0, segment_length=tiny.SEGMENT, max_tokens=20)


def test_rows_are_no_more_than_documents() -> None:
    assert tiny.tiny_text(rows=8).rows == 3


def test_evaluate_from_files(tmp_path: Path) -> None:
    corpus = tiny.write_tiny_corpus(tmp_path / "corpus")
    checkpoint = tiny.write_tiny_checkpoint(tmp_path / "checkpoint", corpus)
    store = TrunkStore()
    common = {
        "checkpoint": checkpoint,
        "corpus": str(corpus),
        "split": "all",
        "max_tokens": 1000,
        "cache_directory": tmp_path / "cache",
        "trunks": store,
    }
    with_memory = evaluate(backend="exact", memory_size=64, **common)
    without = evaluate(memory_size=0, **common)
    assert store.computed == 1
    assert with_memory.tokens == without.tokens
    assert with_memory.perplexity != without.perplexity
    assert without.memory == MemorySpecification("none", 0, 4)
    answer = with_memory.as_json()
    assert answer["memory"] == {"backend": "exact", "memory_size": 64, "k": 4}
    with_memory.losses.save(tmp_path / "losses.npz")
    with np.load(tmp_path / "losses.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["loss"], with_memory.losses.loss)
        assert tuple(arrays["document_names"]) == with_memory.losses.document_names
    assert set(answer) >= {"perplexity", "accuracy", "tokens", "memory"}
    with pytest.raises(UnknownBackend, match="hnswlib"):
        evaluate(backend="hnswlip", **common)


def test_a_corpus_without_test_documents_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("words and more words " * 50, encoding="utf-8")
    tokenizer = train_tokenizer([file.read_text(encoding="utf-8")], 260)
    found = 0
    for split in ("train", "validation", "test"):
        try:
            found += len(load_documents(file, split, tokenizer, tmp_path / "cache"))
        except CorpusError as error:
            assert "'all'" in str(error)  # noqa: PT017 -- two of the three splits raise, whichever they are
    assert found == 1
    assert len(load_documents(file, "all", tokenizer, tmp_path / "cache")) == 1
