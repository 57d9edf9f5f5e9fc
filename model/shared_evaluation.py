"""Evaluation with its rows dealt to the ranks of a job: each rank reads its own, and the losses are put together.

Rows have memories of their own, so a token's loss does not depend on which rank reads it, to rounding.

Letters: S segments, B batch rows, T tokens of a segment.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy as np
import torch

from recollect.model.distributed import Ranks
from recollect.model.evaluation import OnSegment, Replay, prepare
from recollect.model.evaluation_text import PER_SEGMENT, EvaluationText
from recollect.model.evaluation_types import EvaluationOptions, EvaluationResult, TokenLosses
from recollect.model.parallel import whole_root
from recollect.model.streams import IGNORED
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import TrunkOutput, compute_trunk


def rows_of(text: EvaluationText, start: int, stop: int) -> EvaluationText:
    """Rows `start` to `stop` - 1 of a text."""
    parts = {name: getattr(text, name)[:, start:stop] for name in PER_SEGMENT}
    return dataclasses.replace(text, **parts, digest=f"{text.digest}:rows{start}-{stop}")


class SharedText:
    """One rank's rows of a text, and the trunk over them.

    A rank for which no row is left reads the first, so that all make the same calls, and counts for nothing.
    """

    def __init__(self, model: MemorizingTransformer, text: EvaluationText, ranks: Ranks) -> None:
        self.model, self.text, self.ranks = model, text, ranks
        self.start, self.stop = ranks.some_rows(text.rows)
        read = (self.start, self.stop) if self.start < self.stop else (0, 1)
        self.first_row = read[0]
        self.trunk: TrunkOutput = compute_trunk(model, rows_of(text, *read), model_digest="")

    def replay(self, on_segment: OnSegment | None = None, **memory: Any) -> EvaluationResult:
        """This rank's figures with one memory; arguments as for `Replay`."""
        run = Replay(self.model, self.trunk, **memory)
        for layer in run.memories:
            layer.backend.number_from(self.first_row * layer.per_row)
        while run.step():
            if on_segment is not None:
                on_segment(run.done, self.trunk.segments)
        return run.result()

    @property
    def counts(self) -> bool:
        """Whether this rank's rows are its own."""
        return self.start < self.stop


def shared_perplexities(
    model: MemorizingTransformer, text: EvaluationText, ranks: Ranks, *, memory_sizes: tuple[int, ...], **memory: Any
) -> list[float]:
    """The perplexity with each memory size, over the rows of all ranks."""
    with whole_root(model):
        shared = SharedText(model, text, ranks)
        found = []
        for size in memory_sizes:
            result = shared.replay(memory_size=size, **memory)
            own = [float(result.losses.loss.sum(dtype=np.float64)), float(result.tokens)] if shared.counts else [0, 0]
            total, tokens = ranks.sum(own)
            found.append(math.exp(total / tokens))
    return found


def evaluate_shared(
    options: EvaluationOptions, ranks: Ranks, *, on_segment: OnSegment | None = None
) -> EvaluationResult:
    """As `evaluate`, with the rows dealt to `ranks`; every rank gets the whole result.

    Raises:
        As `evaluate`.
    """
    options = dataclasses.replace(options, device=str(ranks.device))
    model, text = prepare((options.backend,), options)
    ranks.agree({"text": text.digest})
    started = time.perf_counter()
    shared = SharedText(model, text, ranks)
    result = shared.replay(
        on_segment,
        backend=options.backend,
        memory_size=options.memory_size,
        k=options.k,
        seed=options.seed,
        values=options.values,
    )
    losses = result.losses
    everything = ranks.all((shared.start, shared.stop, losses.loss, losses.correct) if shared.counts else None)
    merged = merge_losses(text, [part for part in everything if part is not None])
    return EvaluationResult.from_losses(merged, result.memory, time.perf_counter() - started)


def merge_losses(text: EvaluationText, parts: list[tuple[int, int, np.ndarray, np.ndarray]]) -> TokenLosses:
    """The losses of a text in its reading order, from those of its rows.

    Args:
        parts: first row, one past the last, and per token of those rows, in their reading order, loss and whether the
            likeliest token was right.
    """
    wanted = (text.targets != IGNORED).numpy()
    loss = np.zeros(wanted.shape, dtype=np.float32)
    correct = np.zeros(wanted.shape, dtype=bool)
    for start, stop, losses, right in parts:
        mask = wanted[:, start:stop]
        loss[:, start:stop][mask] = losses
        correct[:, start:stop][mask] = right
    places = (text.position[..., None] + torch.arange(1, text.segment_length + 1)).numpy()
    documents = text.document_index[..., None].expand(wanted.shape).numpy()
    return TokenLosses(
        loss=loss[wanted],
        document=documents[wanted].astype(np.int32),
        position=places[wanted].astype(np.int32),
        correct=correct[wanted],
        document_names=text.document_names,
    )
