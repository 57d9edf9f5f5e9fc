"""A store under a checkpoint's memory: against attention over the concatenation, written out in full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import write_tiny_checkpoint, write_tiny_corpus
from tiny_pretrained import write_words

from recollect.memory_backends.registry import make_backend
from recollect.model.checkpoints import Checkpoint, load_checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.evaluation import replay
from recollect.model.evaluation_text import choose_text, load_documents
from recollect.model.evaluation_types import EvaluationOptions
from recollect.model.trunk import compute_trunk
from recollect.pretrained.evaluation import evaluate_with_store
from recollect.pretrained.generation import GenerationOptions, continue_text
from recollect.pretrained.memorizing import memorize
from recollect.pretrained.store import MemoryStore, StoreError
from recollect.pretrained.stored_memory import LayerMemoryOverStore, ReplayOverStore

ROWS, HEADS, TOKENS, DIM, CAPACITY, STORED = 2, 3, 5, 8, 12, 20


def memory_over_store(k: int, stored: int = STORED) -> tuple[LayerMemoryOverStore, torch.Tensor, torch.Tensor]:
    """The memory, and the store's keys and values (H, N, D)."""
    keys, values = torch.randn(2, HEADS, stored, DIM)
    backend = make_backend("exact", num_memories=ROWS * HEADS, capacity=CAPACITY, dim=DIM)
    under = make_backend("exact", num_memories=HEADS, capacity=max(1, stored), dim=DIM)
    under.add(keys)
    return LayerMemoryOverStore(backend, under, values, heads=HEADS, k=k), keys, values


@pytest.mark.parametrize("appended", [0, 7, 30])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_attention_is_over_memory_and_store_together(appended: int, k: int) -> None:
    memory, keys, values = memory_over_store(k)
    own_keys, own_values = torch.randn(2, ROWS, HEADS, appended, DIM)
    for piece_keys, piece_values in zip(own_keys.split(5, dim=2), own_values.split(5, dim=2), strict=True):
        if piece_keys.shape[2]:
            memory.append(piece_keys, piece_values)
    queries, scale = torch.randn(ROWS, HEADS, TOKENS, DIM), torch.tensor([1.0, 2.0, 0.5])
    found = memory.attend(queries, scale)

    alive_keys, alive_values = own_keys[:, :, -CAPACITY:], own_values[:, :, -CAPACITY:]
    all_keys = torch.cat([alive_keys, keys.expand(ROWS, -1, -1, -1)], dim=2)
    all_values = torch.cat([alive_values, values.expand(ROWS, -1, -1, -1)], dim=2)
    inner = queries @ all_keys.transpose(2, 3)
    best = inner.topk(min(k, inner.shape[-1]), dim=-1)
    weights = torch.softmax(best.values * scale[:, None, None], dim=-1)
    chosen = all_values[torch.arange(ROWS)[:, None, None, None], torch.arange(HEADS)[:, None, None], best.indices]
    expected = (weights[..., None] * chosen).sum(-2)
    torch.testing.assert_close(found.remembered, expected, rtol=1e-4, atol=1e-5)
    assert bool(found.found.all())
    count = min(k, inner.shape[-1])
    torch.testing.assert_close(found.weights[..., :count], weights, rtol=1e-4, atol=1e-5)
    of_store = best.indices - alive_keys.shape[2]
    assert torch.equal(found.slots[..., :count] >= CAPACITY, of_store >= 0)
    assert torch.equal((found.slots[..., :count] - CAPACITY)[of_store >= 0], of_store[of_store >= 0])


def test_a_new_document_forgets_its_row_and_not_the_store() -> None:
    memory, *_ = memory_over_store(4)
    queries, scale = torch.randn(ROWS, HEADS, TOKENS, DIM), torch.ones(HEADS)
    before = memory.attend(queries, scale).remembered
    memory.append(torch.randn(ROWS, HEADS, 6, DIM) * 5, torch.randn(ROWS, HEADS, 6, DIM))
    changed = memory.attend(queries, scale).remembered
    memory.reset_rows(torch.tensor([True, False]))
    after = memory.attend(queries, scale).remembered
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], changed[1])
    assert not torch.allclose(changed, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, documents, and a store of them."""
    folder = tmp_path_factory.mktemp("stored")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", write_tiny_corpus(folder / "corpus"))
    source = write_words(folder / "src", documents=2, words=80)
    memorize(source, model=checkpoint, output=folder / "store")
    return checkpoint, source, folder / "store"


def text_of(checkpoint: Checkpoint, source: Path, cache: Path) -> object:
    documents = load_documents(source, "all", checkpoint.tokenizer, cache)
    return choose_text(documents, rows=2, segment_length=checkpoint.config.segment_length, max_tokens=None)


def test_an_empty_store_of_keys_changes_nothing(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """With keys that no query likes, the answer is that of the memory alone."""
    checkpoint = load_checkpoint(made[0])
    store = MemoryStore.open(made[2])
    text = text_of(checkpoint, made[1], tmp_path)
    trunk = compute_trunk(checkpoint.model, text)  # type: ignore[arg-type]
    run = ReplayOverStore(checkpoint, trunk, store)
    for memory in run.memories:
        assert isinstance(memory, LayerMemoryOverStore)
        memory.stored.reset()
    while run.step():
        pass
    plain = replay(checkpoint.model, trunk)
    torch.testing.assert_close(
        torch.from_numpy(run.result().losses.loss), torch.from_numpy(plain.losses.loss), rtol=1e-4, atol=1e-4
    )
    assert run.result().memory == plain.memory


def test_a_store_changes_the_losses_from_the_first_segment_on(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    options = EvaluationOptions(checkpoint=made[0], corpus=str(made[1]), split="all", cache_directory=tmp_path)
    compared = evaluate_with_store(options, store=made[2])
    first = compared.result.losses.position < 16
    assert abs(compared.result.losses.loss[first] - compared.without.losses.loss[first]).max() > 1e-3
    answer = compared.as_json()
    assert answer["store"] == str(made[2])
    assert answer["without_memory"]["perplexity"] == compared.without.perplexity


def test_what_a_store_cannot_serve_is_told(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, source, store = made
    with pytest.raises(ConfigurationError, match="at least a segment"):
        continue_text("alpha", GenerationOptions(model=checkpoint, store=store, memory=_memory(memory_size=8)))
    other = write_tiny_checkpoint(tmp_path / "other", write_tiny_corpus(tmp_path / "corpus"))
    loaded = load_checkpoint(other)
    with torch.no_grad():
        loaded.model.embedding.weight[0, 0] += 1
    loaded.model.tokenizer = loaded.tokenizer
    loaded.model.save_pretrained(other)
    with pytest.raises(StoreError, match="another model"):
        evaluate_with_store(EvaluationOptions(checkpoint=other, corpus=str(source), split="all"), store=store)


def test_generation_reads_the_store(made: tuple[Path, Path, Path]) -> None:
    checkpoint, _, store = made
    told: list[str] = []
    options = GenerationOptions(model=checkpoint, store=store, max_new_tokens=12)
    found = continue_text("alpha beta", options, on_text=told.append)
    plain = continue_text("alpha beta", GenerationOptions(model=checkpoint, max_new_tokens=12))
    assert "".join(told) == found.text
    assert len(found.tokens) == len(plain.tokens) == 12
    assert found.tokens != plain.tokens
    assert continue_text("alpha beta", options).tokens == found.tokens


def _memory(**changes: int) -> object:
    from recollect.pretrained.evaluation import MemoryChoice

    return MemoryChoice(**changes)  # type: ignore[arg-type]
