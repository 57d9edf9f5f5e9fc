"""A memory of hidden states: retrieval and gradients against a dense reference with the present weights."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from recollect.memory_backends.registry import make_backend
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.hidden_keys import HiddenMemory, KeyValueMap, make_layer_memory
from recollect.model.reading import Reader
from recollect.model.recording import record
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import compute_trunk

B, H, D, W, K, C = 2, 3, 4, 10, 5, 32
SCALE = torch.tensor([1.0, 2.0, 5.0])


def make_memory(spec: str = "exact", *, taps: int = 1, capacity: int = C, **changes: object) -> HiddenMemory:
    backend = make_backend(spec, num_memories=B, capacity=capacity, dim=W * taps)
    return HiddenMemory(backend, width=W, k=K, **changes)


def weights(taps: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Projections of keys and values (H * D, W), and taps (S, H * D)."""
    generator = torch.Generator().manual_seed(taps)
    key, value = (0.3 * torch.randn(H * D, W, generator=generator) for _ in range(2))
    return key, value, torch.randn(taps, H * D, generator=generator) if taps > 1 else None


def all_keys(hidden: Tensor, key: Tensor, taps: Tensor | None) -> Tensor:
    """Keys (B, H, N, D) of a whole document's inputs (B, N, W), convolved from its first token on."""
    keys = hidden @ key.T
    if taps is not None:
        padded = functional.pad(keys, (0, 0, len(taps) - 1, 0))
        keys = sum(padded[:, number : number + hidden.shape[1]] * tap for number, tap in enumerate(taps))
    return keys.unflatten(-1, (H, D)).transpose(1, 2)


def dense(
    queries: Tensor, hidden: Tensor, key: Tensor, value: Tensor, taps: Tensor | None, scale: Tensor, normalise: bool
) -> Tensor:
    """The best K by q.k, weighed by the keys' directions where `normalise`."""
    keys = all_keys(hidden, key, taps)
    values = (hidden @ value.T).unflatten(-1, (H, D)).transpose(1, 2)
    products = queries @ keys.transpose(2, 3)
    best = products.topk(min(K, products.shape[-1]), dim=-1).values[..., -1:]
    logits = queries @ (functional.normalize(keys, dim=-1) if normalise else keys).transpose(2, 3)
    logits = logits * scale[:, None, None]
    return torch.softmax(logits.masked_fill(products.detach() < best.detach(), -torch.inf), dim=-1) @ values


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("taps", [1, 3])
def test_values_and_gradients_equal_a_dense_reference(taps: int, normalise: bool) -> None:
    memory, hidden = make_memory(taps=taps), torch.randn(B, 21, W)
    for part in hidden.split([8, 1, 1, 11], dim=1):  # segments shorter than the convolution among them
        memory.append(part)
    inputs = [torch.randn(B, H, 6, D), *weights(taps), SCALE.clone()]
    ours, theirs = ([None if each is None else each.clone().requires_grad_() for each in inputs] for _ in range(2))
    queries, key, value, convolution, scale = ours
    made = KeyValueMap.of(key, value, convolution, normalise=normalise)
    answer = memory.attend(queries, scale, made)
    memory.append(torch.randn(B, 30, W))  # overwrites what was read before the gradient is taken
    queries, key, value, convolution, scale = theirs
    expected = dense(queries, hidden, key, value, convolution, scale, normalise)
    torch.testing.assert_close(answer.remembered, expected)
    direction = torch.randn_like(expected)
    (answer.remembered * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_keys_are_made_with_the_present_weights() -> None:
    memory, hidden = make_memory(), torch.randn(B, 12, W)
    memory.append(hidden)
    queries, (key, value, _) = torch.randn(B, H, 4, D), weights(1)
    for change in (0.0, 1.0):
        made = KeyValueMap.of(key + change * torch.randn_like(key), 2 * value, None, normalise=False)
        expected = dense(queries, hidden, made.keys, made.values, None, SCALE, False)
        torch.testing.assert_close(memory.attend(queries, SCALE, made).remembered, expected)


def test_rows_reset_on_their_own_and_their_convolution_begins_anew() -> None:
    memory, (key, value, taps) = make_memory(taps=3), weights(3)
    made = KeyValueMap.of(key, value, taps, normalise=True)
    before, after, queries = torch.randn(B, 9, W), torch.randn(B, 7, W), torch.randn(B, H, 4, D)
    memory.append(before)
    memory.reset_rows(torch.tensor([True, False]))
    answer = memory.attend(queries, SCALE, made)
    assert not bool(answer.found[0].any())
    assert not bool(answer.remembered[0].any())
    assert bool(answer.found[1].all())
    memory.append(after)
    remembered = memory.attend(queries, SCALE, made).remembered
    fresh = dense(queries[:1], after[:1], key, value, taps, SCALE, True)
    longer = dense(queries[1:], torch.cat([before, after], dim=1)[1:], key, value, taps, SCALE, True)
    torch.testing.assert_close(remembered, torch.cat([fresh, longer]))


def test_a_full_memory_keeps_the_newest_or_the_most_used() -> None:
    hidden, (key, value, _) = torch.randn(B, 60, W), weights(1)
    made = KeyValueMap.of(key, value, None, normalise=False)
    queries = torch.randn(B, H, 4, D)
    memory, used = make_memory(), make_memory(eviction="most_used", kept_share=1.0)
    for begin in range(0, 60, 6):
        memory.append(hidden[:, begin : begin + 6])
        used.attend(queries, SCALE, made)
        used.append(hidden[:, begin : begin + 6])
    newest = dense(queries, hidden[:, -C:], key, value, None, SCALE, False)
    torch.testing.assert_close(memory.attend(queries, SCALE, made).remembered, newest)
    everything = dense(queries, hidden, key, value, None, SCALE, False)
    kept = used.attend(queries, SCALE, made).remembered
    assert bool(((kept - everything).abs() < (newest - everything).abs() + 1e-6).float().mean() > 0.8)
    assert used.backend.lengths.tolist() == [C, C]


@pytest.mark.parametrize("spec", ["faiss-flat", "hnswlib", "degraded:drop=0.5"])
def test_any_backend_serves(spec: str) -> None:
    try:
        memory = make_memory(spec, taps=2)
    except ImportError as error:
        pytest.skip(str(error))
    key, value, taps = weights(2)
    for _ in range(4):
        answer = memory.attend(torch.randn(B, H, 5, D), SCALE, KeyValueMap.of(key, value, taps, normalise=True))
        assert bool(torch.isfinite(answer.remembered).all())
        memory.append(torch.randn(B, 12, W))
    assert bool(answer.found.all())


def made(**changes: object) -> MemorizingTransformer:
    torch.manual_seed(4)
    model = MemorizingTransformer(ModelConfig.preset("tiny", k=64, memory_key="hidden", **changes))
    for name, parameter in model.named_parameters():
        if name.endswith(("output.weight", "outer.weight", "convolution.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def read_densely(model: MemorizingTransformer, tokens: Tensor) -> Tensor:
    """Logits with a memory of every former segment's inputs, constants from which keys and values are made anew."""
    config, past, outputs, before = model.config, [], [], {}
    heads = (config.heads, config.head_dim)
    for segment in tokens.split(config.segment_length, dim=1):
        hidden = model.embedding(segment) * math.sqrt(config.width)
        for layer in model.layers:
            attention, inputs = layer.attention, layer.attention_norm(hidden)
            both = torch.cat([inputs @ attention.query.weight.T, inputs @ attention.key.weight.T], dim=-1)
            taps = attention.convolution.weight
            padded = torch.cat([before.get(layer, torch.zeros_like(both[:, : len(taps) - 1])), both], dim=1)
            before[layer] = padded[:, -len(taps) + 1 :].detach()
            both = sum(padded[:, number : number + both.shape[1]] * tap for number, tap in enumerate(taps))
            queries, keys = (part.unflatten(-1, heads).transpose(1, 2) for part in both.chunk(2, dim=-1))
            if config.normalise_queries_and_keys:
                queries, keys = functional.normalize(queries, dim=-1), functional.normalize(keys, dim=-1)
            values = (inputs @ attention.value.weight.T).unflatten(-1, heads).transpose(1, 2)
            scale = attention.log_scale.exp()[:, None, None]
            near = queries @ keys.transpose(2, 3) * scale + attention.position_bias(segment.shape[1], 0)
            joined = torch.softmax(near, dim=-1) @ values
            if attention.has_memory:
                if past:
                    old, inner = torch.cat(past, dim=1), config.heads * config.head_dim
                    padded = functional.pad(old @ attention.key.weight.T, (0, 0, len(taps) - 1, 0))
                    old_keys = sum(
                        padded[:, number : number + old.shape[1]] * tap[inner:] for number, tap in enumerate(taps)
                    )
                    old_keys = old_keys.unflatten(-1, heads).transpose(1, 2)
                    if config.normalise_queries_and_keys:
                        old_keys = functional.normalize(old_keys, dim=-1)
                    old_values = (old @ attention.value.weight.T).unflatten(-1, heads).transpose(1, 2)
                    far = torch.softmax(queries @ old_keys.transpose(2, 3) * scale, dim=-1) @ old_values
                    share = torch.sigmoid(attention.gate.bias)[:, None, None]
                    joined = (1 - share) * joined + share * far
                past.append(inputs.detach())
            hidden = hidden + attention.output(joined.transpose(1, 2).flatten(2))
            hidden = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
        outputs.append(model.final_norm(hidden) @ model.embedding.weight.T)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_whole_model_equals_a_dense_one_and_trains(normalise: bool) -> None:
    changes = {"normalise_queries_and_keys": normalise, "qk_convolution_width": 3}
    ours, theirs = made(**changes), made(**changes)
    tokens = torch.randint(0, 64, (B, 4 * ours.config.segment_length + 1))
    logits = [ours(tokens[:, :-1]).logits, read_densely(theirs, tokens[:, :-1])]
    for each in logits:
        functional.cross_entropy(each.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=2e-3, atol=5e-6, msg=name)
    optimizer, losses = torch.optim.AdamW(ours.parameters(), lr=3e-3), []
    for _ in range(6):
        loss = functional.cross_entropy(ours(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_reading_in_pieces_equals_reading_at_once() -> None:
    """A reader holds back what it appends until a segment is full; the states' convolution must not notice."""
    model = made(qk_convolution_width=3).eval()
    tokens = torch.randint(0, 64, (B, 70))
    with torch.no_grad():
        whole = model(tokens).logits
    reader = Reader(model, batch_size=B)
    pieces = torch.cat([reader.read(part) for part in tokens.split([5, 1, 20, 40, 4], dim=1)], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_what_it_stores_is_what_the_configuration_says() -> None:
    for changes in ({"memory_key": "hidden"}, {}):
        model = tiny.tiny_model(**changes)
        memory = model(torch.randint(0, 64, (B, 64))).state.memories[0]
        assert memory.nbytes == 4 * B * 64 * model.config.memory_numbers_per_token


def test_a_backend_of_the_wrong_shape_is_refused() -> None:
    backend = make_backend("exact", num_memories=B, capacity=8, dim=W + 1)
    with pytest.raises(ValueError, match="width 10"):
        HiddenMemory(backend, width=W, k=2)
    with pytest.raises(ValueError, match="dimension 11"):
        make_layer_memory(ModelConfig.preset("tiny"), backend, k=2, device=torch.device("cpu"))


def test_a_recording_says_that_it_is_of_stored_keys() -> None:
    model = tiny.tiny_model(memory_key="hidden")
    with pytest.raises(ConfigurationError, match="memory_key='key'"):
        record(model, compute_trunk(model, tiny.tiny_text()))
