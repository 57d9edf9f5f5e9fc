"""Memory populated before training: its keys are those that reading the documents would have left, and training may not
touch them where they are frozen."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from recollect.model.configuration import ConfigurationError  # noqa: E402
from recollect.pretrained.attach import attach_memory  # noqa: E402
from recollect.pretrained.population import collect_keys, populate  # noqa: E402

FAMILIES = ("gpt2", "llama")


def tiny(family: str, layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    common = {"vocab_size": 40, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=32, n_layer=layers, n_head=2, **common)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    config = LlamaConfig(max_position_embeddings=16, num_attention_heads=4, num_key_value_heads=2, **sizes, **common)
    return LlamaForCausalLM(config).eval()


def document(length: int, seed: int) -> list[int]:
    return torch.randint(1, 40, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [12, 16, 37, 100])
def test_a_populated_memory_is_what_the_row_would_have_read_itself(family: str, length: int) -> None:
    text, question = document(length, 1), torch.tensor([document(10, 2)])
    model = tiny(family)
    memory = attach_memory(model, layers=[0, 1], memory_size=512, k=6)
    with torch.no_grad():
        model(torch.tensor([text]))
        expected = model(question).logits
    memory.detach()
    keys = collect_keys(model, [text], layers=[0, 1], k=6)
    assert (keys.documents, keys.tokens, keys.layers) == (1, length, (0, 1))
    assert not hasattr(model, "recollect_memory")
    attach_memory(model, layers=[0, 1], memory_size=0, k=6, store=keys)
    with torch.no_grad():
        torch.testing.assert_close(model(question).logits, expected, rtol=1e-4, atol=1e-5)


def test_documents_are_read_each_by_itself() -> None:
    model = tiny("llama")
    first, second = document(20, 1), document(30, 2)
    together = collect_keys(model, [first, second], layers=1)
    parts = [collect_keys(model, [one], layers=1) for one in (first, second)]
    assert together.documents == 2
    assert torch.equal(together.layer_keys(1), torch.cat([part.layer_keys(1) for part in parts], 1))
    assert torch.equal(together.layer_values(1), torch.cat([part.layer_values(1) for part in parts], 1))


@pytest.mark.parametrize("memory_size", [0, 64])
def test_a_frozen_population_outlives_resets_and_reading(memory_size: int) -> None:
    model = tiny("llama")
    memory = attach_memory(
        model, layers=[1], memory_size=memory_size, k=4, store=collect_keys(model, [document(50, 1)], layers=[1])
    )
    question = torch.tensor([document(10, 2)])
    with torch.no_grad():
        before = model(question).logits
        model(torch.tensor([document(40, 3)]))
        memory.flush()
        after_reading = model(question).logits
        memory.reset()
        after_reset = model(question).logits
    assert torch.equal(after_reading, before) == (memory_size == 0)
    assert torch.equal(after_reset, before)


def test_populate_reads_with_the_weights_of_today_and_keeps_what_the_rows_have_read() -> None:
    model = tiny("llama")
    text, mine = document(40, 1), torch.tensor([document(12, 3), document(12, 4)])
    memory = attach_memory(model, layers=[1], memory_size=64, k=4)
    first = populate(model, [text])
    with torch.no_grad():
        model(mine)
        memory.flush()
        model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        model.train()
        second = populate(model, [text])
    assert model.training
    assert memory.lengths.tolist() == [12, 12]
    assert not torch.equal(first.layer_keys(1), second.layer_keys(1))
    source = memory._reading.layers[0].store
    assert source is not None
    assert torch.equal(source.backend.gather_keys(torch.arange(40).expand(2, 1, -1))[:, 0], second.layer_keys(1))


def test_what_cannot_be_populated_is_told() -> None:
    model = tiny("gpt2")
    with pytest.raises(ConfigurationError, match="no memory"):
        populate(model, [[1, 2]])
    with pytest.raises(ConfigurationError, match="no text"):
        collect_keys(model, [[]])
    with pytest.raises(ConfigurationError, match="tokenizer"):
        collect_keys(model, ["text"])
    keys = collect_keys(model, [[1, 2, 3]], layers=1)
    with pytest.raises(ConfigurationError, match="collected from"):
        attach_memory(tiny("llama"), layers=1, memory_size=0, store=keys)
    attach_memory(model, layers=1)
    with pytest.raises(ConfigurationError, match="layers=0 was given"):
        collect_keys(model, [[1, 2, 3]], layers=0)
