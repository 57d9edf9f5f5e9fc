"""Generation: the tokens that the whole text would have been given, alone or in a batch, drawn as asked."""

from __future__ import annotations

import pytest
import torch
from tiny import SEGMENT, tiny_model

from recollect.model.generation import Generation, GenerationError, generate
from recollect.model.sampling import Sampling
from recollect.model.tokenizer import Tokenizer, train_tokenizer
from recollect.model.transformer import MemorizingTransformer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def answer(): return 42\n"], 270)


@pytest.fixture(scope="module")
def texting(tokenizer: Tokenizer) -> MemorizingTransformer:
    model = tiny_model(vocabulary_size=270)
    model.tokenizer = tokenizer
    return model


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, SEGMENT - 1, SEGMENT, 3 * SEGMENT + 5])
@pytest.mark.parametrize("xl_cache", [0, 8])
def test_each_token_is_the_likeliest_after_the_whole_text_before_it(length: int, xl_cache: int) -> None:
    model = tiny_model(xl_cache=xl_cache)
    generated = model.generate(prompt(length), max_new_tokens=2 * SEGMENT + 3)
    assert isinstance(generated, Generation)
    text = torch.cat([prompt(length), generated.tokens[0]])
    padded = torch.nn.functional.pad(text, (0, -len(text) % SEGMENT))
    likeliest = model(padded[None]).logits[0].argmax(-1)
    assert torch.equal(likeliest[length - 1 : len(text) - 1], generated.tokens[0])
    assert generated.stopped == [False]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}])
def test_prompts_of_any_lengths_continue_as_they_would_alone(options: dict[str, float]) -> None:
    model = tiny_model()
    prompts = [prompt(length, seed=length) for length in (3, 40, SEGMENT, 90, 3)]
    together = generate(model, prompts, max_new_tokens=20, **options)  # type: ignore[arg-type]
    for number, alone in enumerate(prompts):
        own = {**options, "seed": int(options["seed"]) + number} if options else {}
        (expected,) = generate(model, alone, max_new_tokens=20, **own).tokens  # type: ignore[arg-type]
        assert torch.equal(together.tokens[number], expected)


def test_a_seed_decides_what_is_drawn() -> None:
    model = tiny_model()
    first, again, other = (
        model.generate(prompt(9), max_new_tokens=30, temperature=1.0, seed=seed).tokens[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_long_prompt_is_remembered() -> None:
    model = tiny_model()
    text = prompt(6 * SEGMENT)
    continuations = {
        size: model.generate(text, max_new_tokens=40, memory_size=size).tokens[0].tolist() for size in (0, 16, 96)
    }
    assert continuations[0] != continuations[96]
    assert continuations[16] != continuations[96]


def test_the_backend_can_be_chosen() -> None:
    model = tiny_model()
    exact, approximate = (
        model.generate(prompt(80), max_new_tokens=20, backend=backend).tokens[0]
        for backend in ("exact", "degraded:drop=0.0")
    )
    assert torch.equal(exact, approximate)


def test_text_comes_back_as_text(texting: MemorizingTransformer, tokenizer: Tokenizer) -> None:
    generated = texting.generate(["def answer", "return 4"], max_new_tokens=12)
    assert [len(tokens) for tokens in generated.tokens] == [12, 12]
    assert generated.texts == [tokenizer.decode(tokens.tolist()) for tokens in generated.tokens]
    assert generated.text == generated.texts[0]


def test_the_callback_tells_every_token_and_the_whole_text(texting: MemorizingTransformer) -> None:
    told: dict[int, list[int]] = {0: [], 1: []}
    pieces = {0: "", 1: ""}

    def on_token(row: int, token: int, text: str) -> None:
        told[row].append(token)
        pieces[row] += text

    generated = texting.generate(["def", "x = 42\n" * 9], max_new_tokens=40, temperature=3.0, seed=3, on_token=on_token)
    assert [told[0], told[1]] == [tokens.tolist() for tokens in generated.tokens]
    assert [pieces[0], pieces[1]] == generated.texts
    # Drawn nearly evenly from bytes, so that characters are cut within: the test is worth something.
    assert any("\ufffd" in text for text in generated.texts)


def test_a_character_cut_within_waits_for_its_end(texting: MemorizingTransformer, tokenizer: Tokenizer) -> None:
    from recollect.model.generation import _Row

    tokens = tokenizer.encode("aé…b").tolist()
    row = _Row([1], 99, 0, set(), [], tokenizer)
    pieces = [row.add(token) for token in tokens]
    assert "".join(pieces) == "aé…b"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "" in pieces


def test_a_stop_ends_its_row_alone(texting: MemorizingTransformer, tokenizer: Tokenizer) -> None:
    free = texting.generate(["def", "return"], max_new_tokens=30, temperature=1.0)
    token = int(free.tokens[0][7])
    first = free.tokens[0].tolist().index(token)
    stopped = texting.generate(["def", "return"], max_new_tokens=30, temperature=1.0, stop=token)
    assert stopped.tokens[0].tolist() == free.tokens[0].tolist()[: first + 1]
    assert stopped.stopped[0]
    other = free.tokens[1].tolist()
    expected = other[: other.index(token) + 1] if token in other else other
    assert stopped.tokens[1].tolist() == expected


def test_a_text_stops_too(texting: MemorizingTransformer) -> None:
    free = texting.generate("def", max_new_tokens=30, temperature=1.0)
    wanted = next(character for character in free.text if character != "\ufffd")
    stopped = texting.generate("def", max_new_tokens=30, temperature=1.0, stop=["no such text", wanted])
    assert stopped.stopped == [True]
    assert stopped.text == free.text[: free.text.index(wanted) + 1]


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = tiny_model().train()
    model.generate(prompt(4), max_new_tokens=2)
    assert model.training


LOGITS = torch.tensor([1.0, 4.0, 2.0, 3.0, -1.0])


def test_temperature_zero_is_the_likeliest() -> None:
    assert Sampling().choose(LOGITS, torch.Generator()) == 1


def test_top_k_keeps_the_k_likeliest() -> None:
    probabilities = Sampling(temperature=1.0, top_k=2).probabilities(LOGITS)
    torch.testing.assert_close(probabilities[[1, 3]], torch.softmax(LOGITS[[1, 3]], 0))
    assert probabilities[[0, 2, 4]].tolist() == [0.0, 0.0, 0.0]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    shares = torch.softmax(LOGITS, 0)
    both = float(shares[1] + shares[3])
    just_one = Sampling(temperature=1.0, top_p=float(shares[1]) - 0.01).probabilities(LOGITS)
    two = Sampling(temperature=1.0, top_p=both - 0.01).probabilities(LOGITS)
    assert torch.nonzero(just_one).flatten().tolist() == [1]
    assert torch.nonzero(two).flatten().tolist() == [1, 3]
    torch.testing.assert_close(two.sum(), torch.tensor(1.0))


def test_drawn_tokens_have_their_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=2.0, top_k=4)
    drawn = torch.tensor([sampling.choose(LOGITS, generator) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=5) / 4000
    torch.testing.assert_close(shares, sampling.probabilities(LOGITS), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "text"}, "no tokenizer"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [torch.zeros(0)]}, "prompt 0 is empty"),
        ({"prompts": [[1, 64]]}, "prompt 0 has token 64: this model's tokens are 0 to 63"),
        ({"prompts": torch.zeros(1, 2, 3)}, "shape \\(1, 2, 3\\)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop": "end"}, "token ids and not at texts"),
        ({"stop": ""}, "empty text"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options: dict[str, object], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        generate(tiny_model(), **{"prompts": prompt(3), **options})  # type: ignore[arg-type]


def test_tokens_without_a_tokenizer_have_no_text() -> None:
    generated = tiny_model().generate(prompt(3), max_new_tokens=2)
    assert generated.texts == []
    with pytest.raises(GenerationError, match="no tokenizer"):
        _ = generated.text
