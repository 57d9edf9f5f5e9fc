"""The model as a library: made from a preset, saved, loaded, called without a state of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import SEGMENT, tiny_model

from recollect import CheckpointError, ConfigurationError, MemorizingTransformer, load_checkpoint
from recollect.model.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def answer(): return 42\n"], 270)


def test_a_preset_with_changes() -> None:
    model = MemorizingTransformer.from_preset("tiny", layers=4, memory_layers=(1, 3))
    assert (model.config.layers, model.config.memory_layers, model.config.width) == (4, (1, 3), 32)
    assert model.tokenizer is None


def test_a_preset_takes_its_vocabulary_from_the_tokenizer(tokenizer: Tokenizer) -> None:
    model = MemorizingTransformer.from_preset("tiny", tokenizer=tokenizer)
    assert model.config.vocabulary_size == tokenizer.vocabulary_size
    assert MemorizingTransformer.from_preset("tiny", tokenizer=tokenizer, vocabulary_size=512).tokenizer is tokenizer
    with pytest.raises(ConfigurationError, match="vocabulary_size=100 is too small"):
        MemorizingTransformer.from_preset("tiny", tokenizer=tokenizer, vocabulary_size=100)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [("huge", {}, "preset 'huge'"), ("tiny", {"wdth": 3}, "wdth"), ("tiny", {"memory_layers": (7,)}, "layers 0 to 2")],
)
def test_an_impossible_preset_is_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MemorizingTransformer.from_preset(name, **changes)


def test_what_is_saved_comes_back_with_its_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = MemorizingTransformer.from_preset("tiny", tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "mine", metadata={"note": "kept"})
    loaded = MemorizingTransformer.from_pretrained(tmp_path / "mine")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.digest == tokenizer.digest
    assert load_checkpoint(tmp_path / "mine").metadata == {"note": "kept"}
    tokens = loaded.tokenizer.tensor("def answer")
    assert tokens.dtype == torch.int64
    assert tokens.shape[0] == 1
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


def test_a_model_without_tokenizer_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"set model\.tokenizer"):
        MemorizingTransformer.from_preset("tiny").save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_the_shipped_model_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    monkeypatch.chdir(tmp_path)
    model = MemorizingTransformer.from_pretrained("reference")
    assert model.config.memory_size == 8192
    assert model.tokenizer is not None
    assert model.tokenizer.vocabulary_size == model.config.vocabulary_size
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        MemorizingTransformer.from_pretrained("./reference")


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint folder.*'reference' for the shipped model"):
        MemorizingTransformer.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="given a memory by attach_memory"):
        MemorizingTransformer.from_pretrained(tmp_path)


def test_a_call_without_a_state_reads_any_length() -> None:
    model = tiny_model(xl_cache=8)
    tokens = torch.randint(64, (2, 3 * SEGMENT + 5))
    output = model(tokens)
    assert output.logits.shape == (2, 3 * SEGMENT + 5, 64)
    state, parts = model.initial_state(2), []
    for number, segment in enumerate(tokens.split(SEGMENT, dim=1)):
        step = model(segment, state, torch.full((2,), number == 0))
        state = step.state
        parts.append(step.logits)
    torch.testing.assert_close(output.logits, torch.cat(parts, dim=1))


def test_the_state_goes_from_call_to_call() -> None:
    model = tiny_model()
    tokens = torch.randint(64, (2, 4 * SEGMENT))
    first = model(tokens[:, : 2 * SEGMENT])
    second = model(tokens[:, 2 * SEGMENT :], first.state)
    whole = model(tokens).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole)


def test_reset_begins_a_document_in_every_row() -> None:
    model = tiny_model(xl_cache=8)
    tokens = torch.randint(64, (2, 2 * SEGMENT))
    used = model(torch.randint(64, (2, 3 * SEGMENT))).state
    torch.testing.assert_close(model(tokens, used, reset=True).logits, model(tokens).logits)
    used = model(torch.randint(64, (2, 3 * SEGMENT))).state
    one_row = model(tokens, used, torch.tensor([True, False])).logits
    torch.testing.assert_close(one_row[0], model(tokens).logits[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(one_row[1], model(tokens).logits[1], atol=1e-3)


def test_long_text_trains() -> None:
    model = tiny_model().train()
    model(torch.randint(64, (2, 3 * SEGMENT))).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(5,), (2, 0), (1, 2, 3)])
def test_what_is_no_text_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="want \\(rows, tokens\\)"):
        tiny_model()(torch.zeros(shape, dtype=torch.int64))


def test_text_and_the_state_of_another_batch_are_refused_with_the_reason() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"str cannot be read: give model\.tokenizer\.tensor"):
        model("text")
    with pytest.raises(ValueError, match="state is of 2 rows and the tokens are of 3"):
        model(torch.zeros(3, 5, dtype=torch.int64), model.initial_state(2))
