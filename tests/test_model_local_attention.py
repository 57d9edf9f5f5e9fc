"""Sliding windows and compressed memories against dense references over the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.model import training
from recollect.model.attention import Attention, LayerState
from recollect.model.checkpoints import load_checkpoint
from recollect.model.compressive import Compression, take_compression_loss
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.training_options import TrainingOptions
from recollect.model.transformer import MemorizingTransformer

TINY = ModelConfig.preset("tiny", memory_layers=())
SEGMENT = 8


def make_attention(config: ModelConfig) -> Attention:
    attention = Attention(config, has_memory=False)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention.eval()


def read_in_segments(attention: Attention, hidden: Tensor, starts: frozenset[int] = frozenset()) -> Tensor:
    """(2, N, W): the first of two rows starts a document at the places in `starts`."""
    state = LayerState.empty(attention.config, hidden.shape[0], hidden.device)
    outputs = []
    for begin in range(0, hidden.shape[1], SEGMENT):
        rows = torch.tensor([begin in starts, False])
        output, state = attention(hidden[:, begin : begin + SEGMENT], state.without(rows), None)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def project(attention: Attention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, D) of the whole text in one pass."""
    empty = LayerState.empty(attention.config, len(hidden), hidden.device)
    queries, keys, values, _ = attention._project(hidden, empty)
    return queries * attention.log_scale.exp()[:, None, None], keys, values


def finish(attention: Attention, logits: Tensor, values: Tensor) -> Tensor:
    return attention.output((torch.softmax(logits, dim=-1) @ values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("window", [1, 3, 8, 13])
@pytest.mark.parametrize("width", [0, 3])
def test_a_sliding_window_equals_full_attention_under_a_band(window: int, width: int) -> None:
    config = TINY.replace(xl_cache=max(window - 1, 5), attention_window=window, qk_convolution_width=width)
    attention = make_attention(config)
    hidden = torch.randn(2, 40, config.width)
    queries, keys, values = project(attention, hidden)
    logits = queries @ keys.transpose(2, 3) + attention.position_bias(40, 0)
    places = torch.arange(40)
    band = places[:, None] - places < window
    expected = finish(attention, logits.masked_fill(~band, -torch.inf), values)
    torch.testing.assert_close(read_in_segments(attention, hidden), expected, atol=2e-6, rtol=1e-5)


def test_a_window_forgets_at_a_document_start() -> None:
    attention = make_attention(TINY.replace(xl_cache=11, attention_window=12))
    hidden = torch.randn(2, 32, TINY.width)
    output = read_in_segments(attention, hidden, frozenset({16}))
    torch.testing.assert_close(output[0, 16:], read_in_segments(attention, hidden[:, 16:])[0])
    torch.testing.assert_close(output[1], read_in_segments(attention, hidden)[1])


def test_a_window_beyond_the_cache_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="attention_window=16 needs an xl_cache of at least 15"):
        TINY.replace(attention_window=16, xl_cache=14)


@pytest.mark.parametrize("normalise", [True, False])
def test_compression_of_one_token_by_one_is_a_longer_cache(normalise: bool) -> None:
    changes: dict[str, Any] = {"normalise_queries_and_keys": normalise, "qk_convolution_width": 3}
    compressive = TINY.replace(
        xl_cache=8, compressed_memory=16, compression_rate=1, compression_function="mean", **changes
    )
    attention = make_attention(compressive)
    longer = Attention(TINY.replace(xl_cache=24, **changes), has_memory=False)
    longer.load_state_dict(attention.state_dict())
    hidden = torch.randn(2, 56, TINY.width)
    starts = frozenset({24})
    expected = read_in_segments(longer, hidden, starts)
    torch.testing.assert_close(read_in_segments(attention, hidden, starts), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("function", ["mean", "convolution"])
@pytest.mark.parametrize(("rate", "cache"), [(4, 8), (2, 12), (8, 8)])
def test_a_compressed_memory_equals_a_dense_reference(function: str, rate: int, cache: int) -> None:
    slots = 5
    config = TINY.replace(xl_cache=cache, compressed_memory=slots, compression_rate=rate, compression_function=function)
    attention = make_attention(config)
    hidden = torch.randn(2, 48, config.width)
    queries, keys, values = project(attention, hidden)
    compression = attention.compression
    assert compression is not None

    def compressed(vectors: Tensor, weight: Tensor | None) -> Tensor:
        groups = vectors[:, :, : vectors.shape[2] // rate * rate].unflatten(2, (-1, rate))  # (B, H, G, c, D)
        if weight is None:
            return groups.mean(3)
        per_head = weight.view(config.heads, config.head_dim, config.head_dim, rate)
        return torch.einsum("bhgcd,hedc->bhge", groups, per_head)

    new_keys = functional.normalize(compressed(keys, compression.keys), dim=-1)
    new_values = compressed(values, compression.values)
    expected = []
    for begin in range(0, 48, SEGMENT):
        whole_groups = max(0, begin - cache) // rate
        first = max(0, whole_groups - slots)
        rest = whole_groups * rate
        seen_keys = torch.cat([new_keys[:, :, first:whole_groups], keys[:, :, rest : begin + SEGMENT]], dim=2)
        seen_values = torch.cat([new_values[:, :, first:whole_groups], values[:, :, rest : begin + SEGMENT]], dim=2)
        bias = attention.position_bias(SEGMENT, seen_keys.shape[2] - SEGMENT)
        logits = queries[:, :, begin : begin + SEGMENT] @ seen_keys.transpose(2, 3) + bias
        expected.append(finish(attention, logits, seen_values))
    torch.testing.assert_close(read_in_segments(attention, hidden), torch.cat(expected, 1), atol=5e-6, rtol=1e-5)


def test_compressed_slots_are_forgotten_at_a_document_start_of_their_row_alone() -> None:
    attention = make_attention(TINY.replace(xl_cache=8, compressed_memory=6, compression_rate=4))
    hidden = torch.randn(2, 64, TINY.width)
    output = read_in_segments(attention, hidden, frozenset({32}))
    unbroken = read_in_segments(attention, hidden)
    torch.testing.assert_close(output[0, 32:], read_in_segments(attention, hidden[:, 32:])[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(output[1], unbroken[1])
    assert not torch.allclose(output[0, 32:], unbroken[0, 32:])


@pytest.mark.parametrize("changes", [{"xl_cache": 10}, {"xl_cache": 0}, {"segment_length": 6, "xl_cache": 8}], ids=str)
def test_a_cache_that_cannot_be_compressed_evenly_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="xl_cache"):
        TINY.replace(**{"compressed_memory": 8, "compression_rate": 4, **changes})


def compressive_model() -> MemorizingTransformer:
    config = ModelConfig.preset("tiny", memory_layers=(), xl_cache=16, compressed_memory=8, compression_rate=4)
    model = MemorizingTransformer(config).train()
    for layer in model.layers:
        torch.nn.init.normal_(layer.attention.output.weight, std=0.2)
    return model


def names_with_gradient(model: MemorizingTransformer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_of_the_two_losses_never_meet() -> None:
    model = compressive_model()
    state, starts = model.initial_state(2), torch.zeros(2, dtype=torch.bool)
    for _ in range(3):
        output = model(torch.randint(0, 64, (2, 16)), state, starts)
        state = output.state
    loss = take_compression_loss(model)
    assert loss is not None
    assert float(loss.detach()) > 0
    loss.backward()
    assert names_with_gradient(model) == {name for name, _ in model.named_parameters() if ".compression." in name}
    assert take_compression_loss(model) is None
    model.zero_grad(set_to_none=True)
    output.logits.square().mean().backward()
    assert not any(".compression." in name for name in names_with_gradient(model))


def test_the_reconstruction_loss_is_that_of_attention_without_positions() -> None:
    config = TINY.replace(xl_cache=8, compressed_memory=8, compression_rate=2)
    compression = Compression(config).train()
    keys, values, queries = (torch.randn(2, config.heads, 8, config.head_dim) for _ in range(3))
    scale = torch.rand(config.heads) + 0.5
    # The second row has 5 real tokens, and so 2 whole groups of 2.
    new_keys, new_values, slots = compression.evict(keys, values, torch.tensor([8, 5]), queries, scale)
    assert slots.tolist() == [4, 2]

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        return torch.softmax((queries * scale[:, None, None]) @ keys.transpose(2, 3), dim=-1) @ values

    first = (attend(keys, values) - attend(new_keys, new_values))[0].square().mean()
    second = (
        (attend(keys[:, :, -4:], values[:, :, -4:]) - attend(new_keys[:, :, -2:], new_values[:, :, -2:]))[1]
        .square()
        .mean()
    )
    assert compression.loss is not None
    torch.testing.assert_close(compression.loss, (first + second) / 2)


def test_the_reconstruction_loss_can_be_lowered_and_is_nothing_without_compression() -> None:
    config = TINY.replace(xl_cache=8, compressed_memory=8, compression_rate=4)
    compression = Compression(config).train()
    keys, values, queries = (torch.randn(4, config.heads, 16, config.head_dim) for _ in range(3))
    real, scale = torch.full((4,), 16), torch.full((config.heads,), 2.0)
    optimizer = torch.optim.Adam(compression.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        compression.evict(keys, values, real, queries, scale)
        assert compression.loss is not None
        optimizer.zero_grad()
        compression.loss.backward()
        optimizer.step()
        losses.append(float(compression.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        compression.evict(keys, values, real, queries, scale)
    assert compression.loss is None
    one = Compression(config.replace(compression_rate=1, normalise_queries_and_keys=False)).train()
    one.evict(keys, values, real, queries, scale)
    assert one.loss is not None
    assert float(one.loss) < 1e-10


def test_training_a_compressive_model_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(30):
        lines = [f"name_{number}_{(number * line) % 7} = value({line % 5})\n" for line in range(60)]
        (folder / f"document{number}.txt").write_text("".join(lines))

    def options(output: str) -> TrainingOptions:
        model = ModelConfig.preset(
            "tiny", vocabulary_size=300, xl_cache=16, compressed_memory=8, compression_rate=4, memory_size=32
        )
        values: dict[str, Any] = {"corpus": str(folder), "model": model, "steps": 9, "batch_size": 2, "save_every": 5}
        values |= {"validate_every": 0, "cache_directory": tmp_path / "cache", "progress": False, "warmup_steps": 2}
        return TrainingOptions.preset("tiny", tmp_path / output, **values)

    training.train(options("whole"))
    plain_step, calls = training._step, iter(range(100))

    def killed(*arguments: Any) -> None:
        if next(calls) == 7:
            raise SystemExit("killed")
        plain_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", killed)
        with pytest.raises(SystemExit):
            training.train(options("killed"))
    training.train(options("killed"))
    expected, found = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    learned = expected["layers.0.attention.compression.keys"]
    assert not torch.equal(learned, Compression(options("whole").model).state_dict()["keys"])
