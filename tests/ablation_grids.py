"""A tiny corpus and a tiny grid for the tests of ablations."""

from __future__ import annotations

import random
from pathlib import Path

TINY = """
name = "tiny"
question = "Does it run?"
reference = "none"
seeds = 1

[scales.small]
seconds = 1.0

[model]
preset = "tiny"
vocabulary_size = 300

[training]
steps = 8
batch_size = 2
warmup_steps = 2
validate_every = 0
save_every = 4

[evaluation]
rows = 2
max_tokens = 256
"""

VARIANTS = """
[[variants]]
name = "none"
model.memory_size = 0

[[variants]]
name = "memory"

[[variants]]
name = "memory k 2"
from = "memory"
evaluation.k = 2
"""


def write_grid(folder: Path, variants: str = VARIANTS, *, head: str = TINY, name: str = "tiny") -> str:
    """Writes a grid's file and returns its path."""
    path = folder / f"{name}.toml"
    path.write_text(head.replace('"tiny"\nquestion', f'"{name}"\nquestion') + variants, encoding="utf-8")
    return str(path)


def write_corpus(folder: Path, *, words: int = 400) -> str:
    """A folder of documents in all splits; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    vocabulary = ["alpha", "beta", "gamma", "delta", "return", "import", "class", "self", "value", "lambda"]
    for number in range(32):
        text = " ".join(generator.choice(vocabulary) for _ in range(words))
        (folder / f"document{number}.txt").write_text(text, encoding="utf-8")
    return str(folder)
