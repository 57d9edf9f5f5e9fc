"""Memory attached to each family: against dense attention, wherever keys stand, and taken off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import CONTEXT, FAMILIES, ROTARY, VOCABULARY, tiny_model, tokens

from recollect.pretrained.attach import attach_memory
from recollect.pretrained.records import LayerShape, Retrieved, StoredKeys

TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


def dense_logits(model: Any, text: torch.Tensor) -> torch.Tensor:
    """Plain attention over a text longer than the context, of a model without positions."""
    return model(
        text, position_ids=torch.zeros_like(text), attention_mask=torch.ones_like(text), use_cache=False
    ).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_every_key_and_one_softmax_are_attention_over_the_whole_text(family: str, implementation: str) -> None:
    model = tiny_model(family, without_positions=True)
    model.set_attn_implementation(implementation)
    text = tokens(2, 45)
    expected = dense_logits(model, text)
    memory = attach_memory(model, layers="all", memory_size=64, k=64, window=10, overlap=3)
    in_one_call = model(text, use_cache=False).logits
    torch.testing.assert_close(in_one_call, expected, **TOLERANCE)
    memory.reset()
    parts = [model(part).logits for part in text.split(9, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **TOLERANCE)
    assert memory.lengths.tolist() == [36, 36]  # the last part is in sight still


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_memory_changes_what_a_model_with_positions_says(family: str) -> None:
    model = tiny_model(family)
    first, second = tokens(1, 30).split(15, dim=1)
    memory = attach_memory(model, layers=[0], k=4)
    model(first)
    remembered = model(second).logits
    memory.reset()
    assert not torch.allclose(model(second).logits, remembered, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_detaching_gives_back_the_untouched_model(family: str) -> None:
    model = tiny_model(family)
    text = tokens(2, CONTEXT)
    before = model(text).logits
    settings, names, count = dict(model.config.to_dict()), set(vars(model)), len(list(model.modules()))
    memory = attach_memory(model, layers="all", gate="head", k=4)
    model(text)
    assert not torch.equal(model(text).logits, before)
    memory.detach()
    assert torch.equal(model(text).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert (dict(model.config.to_dict()), set(vars(model)), len(list(model.modules()))) == (settings, names, count)
    for module in model.modules():
        assert not hasattr(module, "recollect_layer")
        assert not any(
            "recollect" in str(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
    memory.detach()  # once more does no harm
    attach_memory(model, k=4).detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_paused_or_empty_memory_is_the_plain_model_bit_for_bit(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    text = tokens(2, CONTEXT)
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    plain = model(text).logits, model(text, attention_mask=mask).logits
    memory = attach_memory(model, layers="all", k=4)
    assert torch.equal(model(text).logits, plain[0])
    assert not torch.equal(model(text).logits, plain[0])
    with memory.paused():
        assert torch.equal(model(text).logits, plain[0])
        assert torch.equal(model(text, attention_mask=mask).logits, plain[1])
    held = memory.lengths.tolist()
    assert not torch.equal(model(text).logits, plain[0])
    assert memory.lengths.tolist() == held, "what was read while paused was remembered"


def first_layer_scores(model: Any, query: int, key: int, distance: int) -> torch.Tensor:
    """(heads,) scaled logits of two tokens `distance` apart in the first layer, whose inputs depend on tokens alone."""
    caught: dict[str, Any] = {}

    def catch(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        caught.setdefault("query", query)
        caught.setdefault("key", key.repeat_interleave(query.shape[1] // key.shape[1], 1))
        caught.setdefault("scaling", kwargs["scaling"])
        return query.transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("catching", catch)
    plain = model.config._attn_implementation
    model.config._attn_implementation_internal = "catching"
    try:
        model.base_model(torch.tensor([[key, query]]), position_ids=torch.tensor([[0, distance]]), use_cache=False)
    finally:
        model.config._attn_implementation_internal = plain
    return (caught["query"][0, :, 1] * caught["key"][0, :, 0]).sum(-1) * caught["scaling"]


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("distance", [0, 5])
@torch.no_grad()
def test_scores_depend_on_the_distance_asked_for_and_not_on_where_tokens_stand(family: str, distance: int) -> None:
    model = tiny_model(family)
    expected = first_layer_scores(model, query=11, key=23, distance=distance)
    memory = attach_memory(model, layers=[0], k=15, memory_size=64, distance=distance)
    seen: list[Retrieved] = []
    for key_place, query_place in ((0, 0), (6, 1), (3, 14)):
        memory.reset()
        first, second = torch.full((1, 15), 40), torch.full((1, 15), 50)
        first[0, key_place], second[0, query_place] = 23, 11
        model(first)
        with memory.observing(seen.append):
            model(second)
        record = seen.pop()
        scores = record.logits[0, :, query_place][record.positions[0, :, query_place] == key_place]
        heads = (record.positions[0, :, query_place] == key_place).any(-1)
        assert heads.any(), "the key was found by no head"
        torch.testing.assert_close(scores, expected[heads], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_scaled_rotary_embedding_keeps_its_length_in_the_logits() -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": CONTEXT}
    model = tiny_model("llama", rope_parameters=parameters)
    assert model.base_model.rotary_emb.attention_scaling > 1
    expected = first_layer_scores(model, query=11, key=23, distance=3)
    memory = attach_memory(model, layers=[0], k=15, memory_size=64, distance=3)
    seen: list[Retrieved] = []
    model(torch.tensor([[40, 41, 23, 42]]))
    with memory.observing(seen.append):
        model(torch.tensor([[50, 11]]))
    where = seen[0].positions[0, :, 1] == 2
    torch.testing.assert_close(seen[0].logits[0, :, 1][where], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", ["joint", "joint_bias", "head", "fixed"])
@torch.no_grad()
def test_gates_against_their_formula(gate: str) -> None:
    model = tiny_model("llama", layers=1)
    memory = attach_memory(model, layers=[0], k=64, memory_size=64, gate=gate, gate_share=0.3)
    for parameter in memory.parameters():
        parameter.normal_()
    first, second = tokens(1, 24).split(12, dim=1)
    stored: list[StoredKeys] = []
    seen: list[Retrieved] = []
    caught: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    model(first)
    with memory.paused():
        model(second)
    local = caught.pop().view(12, 4, 8).transpose(0, 1)
    memory.reset()
    model(first)
    with memory.observing(seen.append), memory.observing_stored(stored.append):
        model(second)
    hook.remove()
    joined = caught.pop().view(12, 4, 8).transpose(0, 1)
    record = seen[0]
    order = record.positions[0].clamp(min=0)
    values = stored[0].values[0].repeat_interleave(2, 0)
    weights = record.weights[0, ..., :12]
    remembered = torch.einsum("htk,htkd->htd", weights, values[torch.arange(4)[:, None, None], order[..., :12]])
    share = record.share[0][..., None]
    torch.testing.assert_close(joined, local * (1 - share) + remembered * share, **TOLERANCE)
    if gate == "fixed":
        torch.testing.assert_close(share, torch.full_like(share, 0.3))
    if gate == "head":
        torch.testing.assert_close(share[:, 0, 0], torch.sigmoid(memory.gates["0"].bias))
        torch.testing.assert_close(share, share[:, :1].expand_as(share))
    if gate.startswith("joint"):
        # share / (1 - share) is the retrieved mass against the local one, and offsets multiply it.
        odds = torch.log(share / (1 - share))[..., 0] - torch.logsumexp(record.logits[0], -1)
        first_token = odds[:, 0]  # sees itself alone, so its local mass is one logit
        query_key = first_layer_scores(_plain_copy(model), query=int(second[0, 0]), key=int(second[0, 0]), distance=0)
        bias = memory.gates["0"].bias if gate == "joint_bias" else torch.zeros(4)
        torch.testing.assert_close(first_token, bias - query_key, **TOLERANCE)


def _plain_copy(model: Any) -> Any:
    copy = tiny_model("llama", layers=1)
    copy.load_state_dict({key: value for key, value in model.state_dict().items() if "recollect" not in key})
    return copy


class Store:
    """Keys collected from a text, as `attach_memory(store=...)` takes them."""

    def __init__(self, stored: list[StoredKeys]) -> None:
        self._stored = {record.layer: record for record in stored}
        self.layers = tuple(sorted(self._stored))
        self.checked: tuple[LayerShape, ...] = ()

    def check_fits(self, shapes: tuple[LayerShape, ...], model: Any) -> None:
        self.checked = shapes

    def layer_keys(self, layer: int) -> torch.Tensor:
        return self._stored[layer].keys[0]

    def layer_values(self, layer: int) -> torch.Tensor:
        return self._stored[layer].values[0]


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@torch.no_grad()
def test_a_store_is_searched_by_all_rows_beside_their_own_memory(family: str) -> None:
    model = tiny_model(family, without_positions=True)
    text = tokens(1, 12, seed=1)
    own = tokens(2, 20, seed=2)
    memory = attach_memory(model, layers="all", k=64, memory_size=64, window=12)
    stored: list[StoredKeys] = []
    with memory.observing_stored(stored.append):
        model(text)
        memory.flush()
    memory.detach()
    expected = dense_logits(model, torch.cat((text.expand(2, -1), own), 1))[:, 12:]
    store = Store(stored)
    memory = attach_memory(model, layers="all", k=64, memory_size=64, window=12, store=store)
    assert [shape.layer for shape in store.checked] == [0, 1]
    seen: list[Retrieved] = []
    with memory.observing(seen.append):
        logits = [model(part).logits for part in own.split(10, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, **TOLERANCE)
    last = seen[-1]
    assert ((last.positions >= 0) != (last.store_entries >= 0))[last.logits > -torch.inf].all()
    assert sorted({*last.store_entries.flatten().tolist()}) == list(range(-1, 12))
    assert sorted({*last.positions.flatten().tolist()}) == list(range(-1, 10))
    memory.reset()
    assert memory.lengths.tolist() == [0, 0]
    torch.testing.assert_close(model(own[:, :10]).logits, expected[:, :10], **TOLERANCE)


@torch.no_grad()
def test_a_store_and_a_memory_share_the_k_neighbours() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, layers=[1], k=3)
    stored: list[StoredKeys] = []
    with memory.observing_stored(stored.append):
        model(tokens(1, 16, seed=1))
        memory.flush()
    memory.detach()
    memory = attach_memory(model, layers=[1], k=3, store=Store(stored))
    model(tokens(2, 16, seed=2))
    seen: list[Retrieved] = []
    with memory.observing(seen.append):
        model(tokens(2, 16, seed=3))
    record = seen[0]
    assert record.logits.shape == (2, 4, 16, 3)
    assert (record.logits.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(record.weights.sum(-1), torch.ones(2, 4, 16))
    assert (record.positions >= 0).any()
    assert (record.store_entries >= 0).any()


@pytest.mark.parametrize("backend", ["faiss-flat", "faiss-hnsw", "approx-topk"])
@torch.no_grad()
def test_other_backends_serve_and_their_logits_are_the_layer_s(backend: str) -> None:
    pytest.importorskip("faiss", reason="the faiss backends need faiss")
    model = tiny_model("mistral")
    text = tokens(2, 60)
    memory = attach_memory(model, layers=[1], k=48, memory_size=48)
    expected = model(text).logits
    memory.detach()
    attach_memory(model, layers=[1], k=48, memory_size=48, backend=backend)
    # All keys are asked for, so that an approximate index finds the same ones.
    torch.testing.assert_close(model(text).logits, expected, atol=2e-2, rtol=2e-2)


def test_vocabulary_fits_the_tests() -> None:
    assert int(tokens(3, 99).max()) < VOCABULARY
