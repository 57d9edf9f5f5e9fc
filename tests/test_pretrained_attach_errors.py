"""What cannot be given a memory, or not so, is told before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import CONTEXT, FAMILIES, tiny_model, tokens, transformers

from recollect.memory_backends import MemoryBackendError
from recollect.model.checkpoints import CheckpointError
from recollect.model.configuration import ConfigurationError
from recollect.pretrained.attach import attach_memory, load_attached
from recollect.pretrained.errors import MemoryStateError, UnsupportedModel
from recollect.pretrained.families import FAMILIES as SUPPORTED
from recollect.pretrained.families import choose_layers

TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


def test_a_family_that_is_not_supported_is_named_with_the_list() -> None:
    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    with pytest.raises(UnsupportedModel) as error:
        attach_memory(transformers.AutoModelForCausalLM.from_config(config))
    assert "'opt'" in str(error.value)
    for family in SUPPORTED.values():
        assert family.name in str(error.value)


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear"):
        attach_memory(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="no language modelling head"):
        attach_memory(tiny_model("llama").model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [5]}, r"layer 5 does not exist: the model has 2 layers, 0 to 1"),
        ({"layers": -3}, r"layer -3 does not exist"),
        ({"layers": []}, r"layers is empty"),
        ({"layers": [1, -1]}, r"name a layer twice"),
        ({"layers": "upper"}, r"one of bottom, middle, near_top"),
        ({"k": 65, "memory_size": 64}, r"k=65 is above memory_size=64"),
        ({"k": 0}, r"k=0 must be a whole number of at least 1"),
        ({"memory_size": -1}, r"memory_size=-1"),
        ({"memory_size": 0}, r"memory_size=0 leaves nothing to search"),
        ({"gate": "joints"}, r"did you mean 'joint'"),
        ({"gate": "head", "gate_share": 1.0}, r"gate_share=1.0"),
        ({"window": 1}, r"window=1"),
        ({"window": 8, "overlap": 8}, r"overlap=8 must be at least 0 and below window=8"),
        ({"distance": -1}, r"distance=-1"),
    ],
)
def test_values_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigurationError, match=message):
        attach_memory(model, **arguments)
    assert model.config._attn_implementation == "sdpa"
    attach_memory(model)


def test_backends_are_checked_at_once() -> None:
    with pytest.raises(MemoryBackendError, match="did you mean 'exact'"):
        attach_memory(tiny_model("llama"), backend="exakt")


def test_learned_positions_have_an_end_and_no_distance() -> None:
    with pytest.raises(ConfigurationError, match=f"window=17 is longer than the {CONTEXT} positions"):
        attach_memory(tiny_model("gpt2"), window=17)
    with pytest.raises(ConfigurationError, match="GPT-2 are learned"):
        attach_memory(tiny_model("gpt2"), distance=3)


@torch.no_grad()
def test_a_window_must_not_be_longer_than_a_memory_layer_s_own() -> None:
    with pytest.raises(ConfigurationError, match="sliding window of 6 tokens, so window=12 would leave tokens"):
        attach_memory(tiny_model("mistral", sliding_window=6), window=12)
    memory = attach_memory(tiny_model("mistral", sliding_window=6), k=4)
    assert memory.settings.window == 6
    # Qwen2's lower layers see all: a memory there may have the whole context, and slides above it stay as they are.
    model = tiny_model(
        "qwen2", use_sliding_window=True, sliding_window=6, layer_types=["full_attention", "sliding_attention"]
    )
    assert attach_memory(model, layers=[0], k=4).settings.window == CONTEXT
    text = tokens(1, 45)
    whole = model(text, use_cache=False).logits
    model.recollect_memory.reset()
    cache, parts = None, []
    for piece in text.split(4, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)


@torch.no_grad()
def test_a_sliding_window_without_positions_is_filled_up_by_memory() -> None:
    """A layer that slides by itself, with memory of all that its window has left, is full attention again."""
    free = tiny_model("mistral", without_positions=True)
    sliding = tiny_model("mistral", without_positions=True, sliding_window=6)
    text = tokens(1, 30)
    expected = free(text, position_ids=torch.zeros_like(text), attention_mask=torch.ones_like(text)).logits
    attach_memory(sliding, layers="all", k=64, memory_size=64)
    torch.testing.assert_close(sliding(text).logits, expected, **TOLERANCE)


def test_attention_that_memory_cannot_stand_on() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModel, match=r"'flex_attention'.*'sdpa' or 'eager'"):
        attach_memory(model)
    model = tiny_model("gpt2", reorder_and_upcast_attn=True)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModel, match="reorder_and_upcast_attn"):
        attach_memory(model)


def test_a_second_memory_needs_the_first_taken_off() -> None:
    model = tiny_model("llama")
    attach_memory(model)
    with pytest.raises(ConfigurationError, match=r"recollect_memory.detach\(\)"):
        attach_memory(model)


@torch.no_grad()
def test_other_rows_need_a_reset() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, k=4)
    model(tokens(2, 8))
    with pytest.raises(MemoryStateError, match=r"texts of 2 rows and this call has 3: call handle.reset"):
        model(tokens(3, 8))
    memory.reset()
    model(tokens(3, 8))
    with pytest.raises(ConfigurationError, match=r"no rows \[3\]"):
        memory.reset([3])


@torch.no_grad()
def test_caches_that_are_not_the_last_read_are_refused() -> None:
    model = tiny_model("llama")
    old = model(tokens(1, 6)).past_key_values
    memory = attach_memory(model, k=4)
    one = tokens(1, 1)
    with pytest.raises(MemoryStateError, match="start again without past_key_values"):
        model(one, past_key_values=old)
    first = model(tokens(1, 6)).past_key_values
    model(tokens(1, 6))
    with pytest.raises(MemoryStateError, match="another text was read since"):
        model(one, past_key_values=first)
    last = model(tokens(1, 6)).past_key_values
    memory.reset()
    with pytest.raises(MemoryStateError):
        model(one, past_key_values=last)
    static = transformers.StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(UnsupportedModel, match="StaticCache"):
        model(one, past_key_values=static)
    with pytest.raises(UnsupportedModel, match="4-D masks"):
        model(one, attention_mask=torch.ones(1, 1, 1, 1))
    with pytest.raises(UnsupportedModel, match="output_attentions"):
        model(tokens(1, 30), output_attentions=True)


@torch.no_grad()
def test_beams_that_would_have_to_be_remembered_are_refused() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, k=4)
    with pytest.raises(MemoryStateError, match=r"beam search moves its rows about.*longer window"):
        model.generate(tokens(1, 10), max_new_tokens=20, num_beams=2, pad_token_id=0)
    memory.reset()
    model(tokens(1, 10))
    with pytest.raises(MemoryStateError, match="2 rows share 1 memories"):
        model.generate(tokens(1, 30), max_new_tokens=2, num_beams=2, pad_token_id=0)


def test_gradient_checkpointing_must_not_read_a_long_text_twice() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    model.train()
    attach_memory(model, k=4)
    with pytest.raises(MemoryStateError, match="gradient checkpointing"):
        model(tokens(1, 40))


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_named_layers_exist(count: int) -> None:
    for name in (None, "bottom", "middle", "near_top", "top", "every_third", "all"):
        chosen = choose_layers(name, count)
        assert chosen
        assert set(chosen) <= set(range(count))
    assert choose_layers(None, 12) == (8,)  # the ninth, as in the paper
    assert choose_layers([-1, 0], 12) == (0, 11)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_with_its_memory_and_loaded_again(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    text = tokens(1, 40)
    memory = attach_memory(model, layers=[0, 1], gate="head", k=3, memory_size=32, window=12, overlap=2, seed=5)
    for parameter in memory.parameters():
        parameter.normal_()
    expected = model(text).logits
    model.save_pretrained(tmp_path)
    loaded = load_attached(tmp_path)
    assert loaded.recollect_memory.settings == memory.settings
    torch.testing.assert_close(loaded(text).logits, expected)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with memory.paused():
        assert torch.equal(plain(text[:, :12]).logits, model(text[:, :12]).logits)


@torch.no_grad()
def test_saved_in_several_files_and_without_gates(tmp_path: Path) -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, gate="joint_bias")
    memory.gates["1"].bias.normal_()
    model.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    loaded = load_attached(tmp_path / "parts")
    assert torch.equal(loaded.recollect_memory.gates["1"].bias, memory.gates["1"].bias)
    without = {key: value for key, value in model.state_dict().items() if "recollect" not in key}
    model.save_pretrained(tmp_path / "bare", state_dict=without)
    with pytest.raises(CheckpointError, match=r"gate parameters gates.1.bias"):
        load_attached(tmp_path / "bare")
    memory.detach()
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="was saved without a memory"):
        load_attached(tmp_path / "plain")
