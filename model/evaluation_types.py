"""What an evaluation takes and what it gives, without the code that runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recollect.memory_backends.atomic import atomic_file


@dataclass(frozen=True)
class EvaluationOptions:
    """What `evaluate` runs.

    Attributes:
        checkpoint: folder of a checkpoint; None is the reference model that ships with the package.
        corpus: 'stdlib' (the source of Python's standard library), or a text file, folder, JSON lines or dataset.
        split: which documents of the corpus: 'test' (never trained on), 'validation', 'train', or 'all'.
        backend: registry string of the memory's backend, such as 'hnswlib:M=16,ef_search=128'.
        memory_size: keys that each memory holds at most; 0 is no memory, None is the checkpoint's own size.
        k: neighbours that each query retrieves; None is the checkpoint's own number.
        max_tokens: stop after about this many tokens; None reads the whole split.
        rows: documents that are read side by side; it changes speed and timings, not what a token sees.
        seed: for backends that draw random numbers.
        device: where model and memory live, such as 'cpu' or 'cuda'.
        values: how the memory's values are stored: 'float32', 'bfloat16', 'bfloat16:in=temporary' for a file.
        cache_directory: where token streams are cached; None is the user's cache folder.
    """

    checkpoint: str | Path | None = None
    corpus: str = "stdlib"
    split: str = "test"
    backend: str = "exact"
    memory_size: int | None = None
    k: int | None = None
    max_tokens: int | None = 100_000
    rows: int = 4
    seed: int = 0
    device: str = "cpu"
    values: str = "float32"
    cache_directory: str | Path | None = None


@dataclass(frozen=True)
class MemorySpecification:
    """Which memory a figure belongs to.

    Attributes:
        backend: canonical registry string; 'none' where there is no memory.
        memory_size: keys that each memory holds at most, 0 for none.
        k: neighbours retrieved per query.
    """

    backend: str
    memory_size: int
    k: int

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {"backend": self.backend, "memory_size": self.memory_size, "k": self.k}


@dataclass(frozen=True)
class TokenLosses:
    """The loss of every predicted token, in reading order; entry i of the three arrays belongs together.

    Two evaluations over the same text have the same order, so their losses are compared token by token.

    Attributes:
        loss: (N,) float32, natural logarithm.
        document: (N,) int32, index of the token's document in `document_names`.
        position: (N,) int32, the predicted token's position in its document.
        correct: (N,) bool, whether the likeliest next token was the right one.
        document_names: names of the documents.
    """

    loss: np.ndarray
    document: np.ndarray
    position: np.ndarray
    correct: np.ndarray
    document_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.loss)

    def save(self, path: str | Path) -> Path:
        """Writes the arrays as an .npz file, whole or not at all; document names go in as an array of text."""
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream,
                loss=self.loss.astype(np.float32),
                document=self.document.astype(np.int32),
                position=self.position.astype(np.int32),
                correct=self.correct.astype(bool),
                document_names=np.asarray(self.document_names, dtype=np.str_),
            )
        return Path(path)


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of one model on one text with one memory.

    Attributes:
        perplexity: exponential of the mean loss per predicted token.
        accuracy: share of tokens whose likeliest prediction was right.
        tokens: number of predicted tokens.
        memory: the memory's specification.
        losses: per token.
        seconds: wall time, without loading.
    """

    perplexity: float
    accuracy: float
    tokens: int
    memory: MemorySpecification
    losses: TokenLosses
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary without the per-token losses."""
        return {
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
            "memory": self.memory.as_json(),
            "documents": len(self.losses.document_names),
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def from_losses(cls, losses: TokenLosses, memory: MemorySpecification, seconds: float) -> EvaluationResult:
        """Figures from per-token losses.

        Raises:
            ValueError: there is no token, or a loss is not finite.
        """
        if not len(losses):
            raise ValueError("there is no token to predict: every document is empty or one token long")
        if not np.isfinite(losses.loss).all():
            bad = int(np.flatnonzero(~np.isfinite(losses.loss))[0])
            raise ValueError(
                f"the loss of token {losses.position[bad]} of document "
                f"{losses.document_names[losses.document[bad]]!r} is {losses.loss[bad]}: the model or the memory "
                f"({memory.backend}) gave a number that is not finite"
            )
        return cls(
            perplexity=math.exp(float(losses.loss.mean(dtype=np.float64))),
            accuracy=float(losses.correct.mean()),
            tokens=len(losses),
            memory=memory,
            losses=losses,
            seconds=seconds,
        )
