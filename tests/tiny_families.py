"""A tiny model of every family that can be given a memory, with random weights that make attention sharp."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="memory for pretrained models needs transformers")
transformers.logging.set_verbosity_error()

VOCABULARY = 61
CONTEXT = 16
ROTARY = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")
FAMILIES = ("gpt2", *ROTARY)


def tiny_model(family: str, *, layers: int = 2, without_positions: bool = False, **changes: Any) -> Any:
    """A causal language model in evaluation mode, context 16, 4 heads and 2 key heads where the family groups them.

    `without_positions` takes positions out of it, so that attention over remembered keys can equal dense attention.
    """
    torch.manual_seed(7)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    grouped = {**common, "num_key_value_heads": 2}
    configs: dict[str, Any] = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_inner=40,
            n_positions=CONTEXT,
            bos_token_id=1,
            eos_token_id=2,
            **changes,
        ),
        # A quarter of the head's dimensions are turned, as in Pythia.
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            **common,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
            **changes,
        ),
        "llama": lambda: transformers.LlamaConfig(**grouped, **changes),
        "mistral": lambda: transformers.MistralConfig(**{**grouped, "sliding_window": None, **changes}),
        "qwen2": lambda: transformers.Qwen2Config(**grouped, **changes),
        "qwen3": lambda: transformers.Qwen3Config(**grouped, head_dim=12, **changes),
    }
    model = transformers.AutoModelForCausalLM.from_config(configs[family]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if without_positions and family == "gpt2":
            model.transformer.wpe.weight.zero_()
        elif without_positions:
            model.base_model.rotary_emb.inv_freq.zero_()
            # What plain attention is compared with reads more than the context.
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random token numbers, no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
