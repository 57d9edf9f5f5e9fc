"""Evaluating and continuing with a Hugging Face model: against the plain model, window by window."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from tiny_pretrained import WINDOW, tiny_tokenizer, write_tiny_llama, write_words

from recollect.model.checkpoints import CheckpointError
from recollect.model.configuration import ConfigurationError
from recollect.model.evaluation_types import EvaluationOptions
from recollect.model.sampling import GenerationError
from recollect.pretrained.evaluation import MemoryChoice, evaluate_with_store
from recollect.pretrained.generation import GenerationOptions, continue_text
from recollect.pretrained.loading import is_pretrained_folder, load_pretrained
from recollect.pretrained.memorizing import memorize
from recollect.pretrained.store import StoreError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text"), documents=2, words=70)


def options_for(model: Path, text: Path, **changes: object) -> EvaluationOptions:
    given = {"checkpoint": model, "corpus": str(text), "split": "all", "memory_size": 256, "k": 4, **changes}
    return EvaluationOptions(**given)  # type: ignore[arg-type]


def plain_losses(folder: Path, tokens: list[int], window: int, overlap: int) -> list[float]:
    """Losses of tokens 1 to N - 1 by the untouched model, in windows cut as the memory's are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    losses: dict[int, float] = {}
    for begin in range(0, len(tokens), window - overlap):
        piece = torch.tensor([tokens[begin : begin + window]])
        with torch.no_grad():
            logits = model(piece).logits[0]
        for row in range(piece.shape[1]):
            target = begin + row + 1
            # A token counts in the window where its predecessor is new.
            if target < len(tokens) and target not in losses:
                losses[target] = float(functional.cross_entropy(logits[row], torch.tensor(tokens[target])))
        if begin + window >= len(tokens):
            break
    return [losses[target] for target in range(1, len(tokens))]


def test_without_memory_it_is_the_plain_model(llama: Path, text: Path) -> None:
    compared = evaluate_with_store(options_for(llama, text))
    assert (compared.window, compared.overlap) == (WINDOW, WINDOW // 4)
    tokenizer = tiny_tokenizer()
    for number, name in enumerate(compared.without.losses.document_names):
        tokens = tokenizer.encode((text / name).read_text()).tolist()
        chosen = compared.without.losses.document == number
        expected = plain_losses(llama, tokens, WINDOW, WINDOW // 4)
        np.testing.assert_allclose(compared.without.losses.loss[chosen], expected, rtol=1e-3, atol=1e-3)
        assert compared.without.losses.position[chosen].tolist() == list(range(1, len(tokens)))


def test_memory_acts_where_the_window_has_passed(llama: Path, text: Path) -> None:
    compared = evaluate_with_store(options_for(llama, text))
    change = np.abs(compared.result.losses.loss - compared.without.losses.loss)
    within = compared.result.losses.position < WINDOW
    assert change[within].max() < 1e-4
    assert change[~within].max() > 1e-2
    answer = json.loads(json.dumps(compared.as_json()))
    assert answer["memory"] == {
        "backend": "exact",
        "memory_size": 256,
        "k": 4,
        "gate": "joint",
        "window": WINDOW,
        "overlap": WINDOW // 4,
    }


def test_a_store_acts_from_the_first_token_on(llama: Path, text: Path, tmp_path: Path) -> None:
    memorize(write_words(tmp_path / "src"), model=llama, output=tmp_path / "store", layers=[1, 2])
    compared = evaluate_with_store(options_for(llama, text, memory_size=0), store=tmp_path / "store")
    change = np.abs(compared.result.losses.loss - compared.without.losses.loss)
    assert change[compared.result.losses.position < WINDOW].max() > 1e-2


def test_a_longest_document_takes_its_share(llama: Path, text: Path) -> None:
    compared = evaluate_with_store(options_for(llama, text, max_tokens=100, rows=2))
    assert compared.result.tokens == 2 * (50 - 1)


def test_a_foreign_store_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    memorize(write_words(tmp_path / "src"), model=llama, output=tmp_path / "store", layers=[1])
    other = write_tiny_llama(tmp_path / "other", seed=5)
    with pytest.raises(StoreError, match="another model"):
        evaluate_with_store(options_for(other, text), store=tmp_path / "store")
    with pytest.raises((StoreError, ConfigurationError), match="layers"):
        evaluate_with_store(options_for(llama, text), store=tmp_path / "store", choice=MemoryChoice(layers=[2]))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in llama.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    tiny_tokenizer(290).save(mixed)
    with pytest.raises(StoreError, match="another tokenizer"):
        evaluate_with_store(options_for(mixed, text), store=tmp_path / "store")


def test_folders_that_hold_no_model_are_told(llama: Path, tmp_path: Path) -> None:
    assert is_pretrained_folder(llama)
    assert not is_pretrained_folder("reference")
    with pytest.raises(CheckpointError, match="no model folder"):
        is_pretrained_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        is_pretrained_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cut short or not JSON"):
        is_pretrained_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither"):
        is_pretrained_folder(tmp_path)
    small = write_tiny_llama(tmp_path / "small", vocabulary=200)
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_pretrained(small)
    weights = small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pretrained(small)


def test_generation_goes_past_the_window_and_streams(llama: Path) -> None:
    memory = MemoryChoice(memory_size=256, k=4)
    options = GenerationOptions(model=llama, max_new_tokens=3 * WINDOW, temperature=1.0, memory=memory)
    told: list[str] = []
    found = continue_text("alpha beta gamma " * 12, options, on_text=told.append)
    assert len(found.tokens) == 3 * WINDOW
    assert found.prompt_tokens > WINDOW
    assert "".join(told) == found.text
    assert continue_text("alpha beta gamma " * 12, options).tokens == found.tokens


def test_generation_is_greedy_as_the_plain_model_is(llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    prompt = torch.from_numpy(tiny_tokenizer().encode("alpha").astype("int64"))[None]
    with torch.no_grad():
        expected = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    found = continue_text("alpha", GenerationOptions(model=llama, max_new_tokens=10))
    assert list(found.tokens) == expected.tolist()


def test_a_stop_ends_the_text(llama: Path) -> None:
    options = GenerationOptions(model=llama, max_new_tokens=40)
    whole = continue_text("alpha", options)
    stop = next(character for character in whole.text if character.isprintable() and character != "\ufffd")
    found = continue_text("alpha", GenerationOptions(model=llama, max_new_tokens=40, stop=(stop,)))
    assert found.stopped
    assert len(found.tokens) < 40
    assert stop in found.text


@pytest.mark.parametrize(
    ("prompt", "changes", "reason"),
    [
        ("", {}, "prompt is empty"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"stop": ("",)}, "empty text"),
    ],
)
def test_impossible_generations_are_told(prompt: str, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(GenerationError, match=reason):
        continue_text(prompt, GenerationOptions(**changes))  # type: ignore[arg-type]
