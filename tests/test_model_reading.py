"""Text read in pieces gives what text read in whole segments gives, however it is cut, whatever the model carries."""

from __future__ import annotations

import pytest
import torch
from tiny import SEGMENT, tiny_model

from recollect.model.reading import Reader

CONFIGURATIONS = {
    "no cache": {},
    "cache": {"xl_cache": 8},
    "cache longer than a segment": {"xl_cache": 40},
    "window": {"xl_cache": 16, "attention_window": 12},
    "compressed memory": {"xl_cache": 16, "compressed_memory": 6, "compression_rate": 4},
    "no memory layer": {"memory_layers": (), "xl_cache": 8},
    "memory at the bottom and the top": {"memory_layers": (0, 2)},
    "joint softmax": {"gate": "joint", "xl_cache": 8},
    "gate per token": {"gate": "token"},
    "hidden states": {"memory_key": "hidden"},
    "most used": {"eviction": "most_used", "memory_size": 32, "k": 4},
    "small memory": {"memory_size": 20, "k": 4},
}


def whole(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of `tokens` read as training and evaluation read them: whole segments by `forward`, padded at the end."""
    padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % SEGMENT))
    state = model.initial_state(len(tokens))
    outputs = []
    with torch.no_grad():
        for segment in padded.split(SEGMENT, dim=1):
            output = model(segment, state, torch.zeros(len(tokens), dtype=torch.bool))
            state = output.state
            outputs.append(output.logits)
    return torch.cat(outputs, dim=1)[:, : tokens.shape[1]]


def in_pieces(reader: Reader, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.cat([reader.read(piece) for piece in tokens.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_token_by_token_is_the_same_as_whole_segments(name: str) -> None:
    model = tiny_model(**CONFIGURATIONS[name])
    tokens = torch.randint(64, (2, 5 * SEGMENT + 7))
    expected = whole(model, tokens)
    read = in_pieces(model.reader(2), tokens, [1] * tokens.shape[1])
    torch.testing.assert_close(read, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "sizes", [[87], [16, 16, 16, 16, 16, 7], [5, 11, 16, 33, 22], [40, 1, 1, 1, 1, 43], [15, 2, 15, 55]]
)
def test_any_cut_is_the_same(sizes: list[int]) -> None:
    model = tiny_model(xl_cache=8)
    tokens = torch.randint(64, (2, 87))
    reader = model.reader(2)
    torch.testing.assert_close(in_pieces(reader, tokens, sizes), whole(model, tokens), atol=2e-4, rtol=1e-3)
    assert reader.position == 87


def test_the_memory_takes_a_segment_up_when_it_is_full() -> None:
    model = tiny_model()
    state = model.initial_state(2)
    reader = Reader(model, state)
    reader.read(torch.randint(64, (2, SEGMENT + 9)))
    assert set(state.memories[0].backend.lengths.tolist()) == {SEGMENT}
    reader.read(torch.randint(64, (2, 6)))
    assert set(state.memories[0].backend.lengths.tolist()) == {SEGMENT}
    reader.read(torch.randint(64, (2, 1)))
    assert set(state.memories[0].backend.lengths.tolist()) == {2 * SEGMENT}


def test_cutting_a_segment_short_would_not_be_the_same() -> None:
    """What the reader is for: `forward` takes the end of what it is given for the end of a segment."""
    model = tiny_model()
    tokens = torch.randint(64, (1, 2 * SEGMENT))
    first = model(tokens[:, :10])
    second = model(tokens[:, 10:], first.state)
    cut = torch.cat([first.logits, second.logits], dim=1)
    assert not torch.allclose(cut, whole(model, tokens), atol=1e-2)


def test_only_the_last_logits_are_kept_where_they_suffice() -> None:
    model = tiny_model()
    tokens = torch.randint(64, (2, 3 * SEGMENT + 4))
    last = model.reader(2).read(tokens, last_only=True)
    assert last.shape == (2, 1, 64)
    torch.testing.assert_close(last[:, 0], whole(model, tokens)[:, -1], atol=2e-4, rtol=1e-3)


def test_the_memory_of_a_reader_can_be_chosen() -> None:
    model = tiny_model()
    tokens = torch.randint(64, (1, 4 * SEGMENT))
    off = model.reader(memory_size=0).read(tokens)
    assert not torch.allclose(off[:, SEGMENT:], whole(model, tokens)[:, SEGMENT:], atol=1e-3)
    assert torch.allclose(off[:, :SEGMENT], whole(model, tokens)[:, :SEGMENT], atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_what_is_no_text_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="want \\(rows, tokens\\)"):
        tiny_model().reader().read(torch.zeros(shape, dtype=torch.int64))
