"""A Hugging Face model folder of random weights with a tokenizer trained on a few words: made in a second."""

from __future__ import annotations

from pathlib import Path

import torch

from recollect.model.tokenizer import Tokenizer, train_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "lambda", "return", "import", "class", "self", "value"]
WINDOW = 32


def tiny_tokenizer(vocabulary: int = 300) -> Tokenizer:
    """Byte-level BPE."""
    return train_tokenizer([" ".join(WORDS * 20)], vocabulary)


def write_tiny_llama(folder: Path, *, seed: int = 0, vocabulary: int | None = None) -> Path:
    """A Llama of four layers, four query and two key-value heads, whose context is `WINDOW` tokens."""
    import tokenizers
    import transformers

    tokenizer = tiny_tokenizer()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_json())
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary or tokenizer.vocabulary_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_words(folder: Path, *, documents: int = 3, words: int = 60) -> Path:
    """Text files of random words, among them some that are passed over."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    for number in range(documents):
        places = torch.randint(len(WORDS), (words,), generator=generator).tolist()
        (folder / f"text{number}.txt").write_text(" ".join(WORDS[place] for place in places), encoding="utf-8")
    return folder
