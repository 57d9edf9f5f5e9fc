"""Every gate inside a whole model: its loss and all its gradients are those of attention written out densely."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recollect.model.attention import Attention
from recollect.model.configuration import ModelConfig
from recollect.model.gates import GATES
from recollect.model.optimizers import make_optimizers
from recollect.model.transformer import MemorizingTransformer

B, SEGMENTS = 2, 4
PERIOD = 23  # no multiple of the segment length, so that what repeats lies in the memory at another place


def made(**changes: object) -> MemorizingTransformer:
    """A model whose every weight matters, its gates far from where they start."""
    torch.manual_seed(2)
    model = MemorizingTransformer(ModelConfig.preset("tiny", k=64, **changes))
    for name, parameter in model.named_parameters():
        if "gate" in name or name.endswith(("output.weight", "outer.weight", "log_memory_scale")):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def dense_join(
    attention: Attention, hidden: Tensor, near: Tensor, values: Tensor, far: Tensor, old_values: Tensor
) -> Tensor:
    """Both attentions joined, from local logits `near` and the logits `far` of all that is remembered."""
    gate, kind, share = attention.gate, attention.config.gate, attention.config.gate_share
    if kind == "joint":
        return torch.softmax(torch.cat([near, far], dim=-1), dim=-1) @ torch.cat([values, old_values], dim=2)
    near_weights, far_weights = torch.softmax(near, dim=-1), torch.softmax(far, dim=-1)
    local, remembered = near_weights @ values, far_weights @ old_values
    if kind == "concatenation":
        both = torch.cat([local.transpose(1, 2).flatten(2), remembered.transpose(1, 2).flatten(2)], dim=-1)
        projected = both @ gate.output.weight.T
        return projected.unflatten(-1, (attention.config.heads, -1)).transpose(1, 2)
    if kind == "sum":
        return local + remembered
    if kind == "mean":
        return (local + remembered) / 2
    if kind == "weighted_sum":
        return local * gate.weight[0][:, None, None] + remembered * gate.weight[1][:, None, None]
    if kind == "fixed":
        memory_share = torch.tensor(share)
    elif kind == "head":
        memory_share = torch.sigmoid(gate.bias)[:, None, None]
    elif kind == "layer":
        memory_share = torch.sigmoid(gate.bias)
    elif kind == "token":
        log_odds = hidden @ gate.projection.weight.T + gate.projection.bias
        memory_share = torch.sigmoid(log_odds).transpose(1, 2)[..., None]
    else:
        assert kind == "confidence"
        odds = far.exp().sum(-1).log() - near.exp().sum(-1).log()
        peaks = [odds, far_weights.max(-1).values.log(), near_weights.max(-1).values.log()]
        log_odds = sum(weight[:, None] * peak for weight, peak in zip(gate.weight, peaks, strict=True))
        memory_share = torch.sigmoid(log_odds + gate.bias[:, None])[..., None]
    return (1 - memory_share) * local + memory_share * remembered


def read_densely(model: MemorizingTransformer, tokens: Tensor) -> Tensor:
    """Logits of all tokens; the memory layer sees all former segments, whose keys and values are constants."""
    config, past, outputs = model.config, [], []
    for segment in tokens.split(config.segment_length, dim=1):
        hidden = model.embedding(segment) * math.sqrt(config.width)
        for layer in model.layers:
            attention, inputs = layer.attention, layer.attention_norm(hidden)
            queries, keys, values = (
                projection(inputs).unflatten(-1, (config.heads, config.head_dim)).transpose(1, 2)
                for projection in (attention.query, attention.key, attention.value)
            )
            if config.normalise_queries_and_keys:
                queries = queries / queries.norm(dim=-1, keepdim=True)
                keys = keys / keys.norm(dim=-1, keepdim=True)
            near = queries @ keys.transpose(2, 3) * attention.log_scale.exp()[:, None, None]
            near = near + attention.position_bias(segment.shape[1], 0)
            if attention.has_memory and past:
                scale = attention.log_memory_scale if config.separate_memory_scale else attention.log_scale
                old_keys, old_values = (torch.cat(parts, dim=2) for parts in zip(*past, strict=True))
                far = queries @ old_keys.transpose(2, 3) * scale.exp()[:, None, None]
                joined = dense_join(attention, inputs, near, values, far, old_values)
            else:
                joined = torch.softmax(near, dim=-1) @ values
            if attention.has_memory:
                past.append((keys.detach(), values.detach()))
            hidden = hidden + attention.output(joined.transpose(1, 2).flatten(2))
            hidden = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
        outputs.append(model.final_norm(hidden) @ model.embedding.weight.T)
    return torch.cat(outputs, dim=1)


def read_in_segments(model: MemorizingTransformer, tokens: Tensor) -> Tensor:
    state, outputs = model.initial_state(len(tokens)), []
    for number, segment in enumerate(tokens.split(model.config.segment_length, dim=1)):
        output = model(segment, state, torch.full((len(tokens),), number == 0))
        state = output.state
        outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("normalise", "own_scale"), [(True, True), (False, False)])
@pytest.mark.parametrize("kind", sorted(GATES))
def test_loss_and_gradients_equal_dense_attention(kind: str, normalise: bool, own_scale: bool) -> None:
    changes = {"gate": kind, "normalise_queries_and_keys": normalise, "separate_memory_scale": own_scale}
    ours, theirs = made(**changes), made(**changes)
    tokens = torch.randint(0, 64, (B, SEGMENTS * ours.config.segment_length + 1))
    losses = []
    for model, read in ((ours, read_in_segments), (theirs, read_densely)):
        logits = read(model, tokens[:, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=2e-6, msg=name)
        assert bool(parameter.grad.any()) or "query" not in name


@pytest.mark.parametrize("changes", [{"gate": kind} for kind in sorted(GATES)], ids=str)
def test_every_kind_trains(changes: dict[str, object]) -> None:
    """The loss falls on a text of a period longer than a segment, and every parameter of the model has moved."""
    torch.manual_seed(0)
    config = ModelConfig.preset("tiny", qk_convolution_width=2, token_shift=True, separate_memory_scale=True, **changes)
    model = MemorizingTransformer(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = make_optimizers(model, "muon", matrix_learning_rate=5e-3, other_learning_rate=5e-3, weight_decay=0.0)
    text, length = torch.randint(0, 64, (B, PERIOD)).repeat(1, 20), config.segment_length
    state, losses = model.initial_state(B), []
    for step in range(24):
        segment = text[:, step * length : (step + 1) * length + 1]
        output = model(segment[:, :-1], state, torch.full((B,), step == 0))
        state = output.state
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), segment[:, 1:].flatten())
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0], losses
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged, f"never learned: {unchanged}"
