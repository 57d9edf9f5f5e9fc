"""Evaluating a model on a text, with its memory full from the first scored token on where that is asked for.

Letters: B batch rows, T tokens of a segment, M memories.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.records import SearchResult
from recollect.model.configuration import ModelConfig
from recollect.model.evaluation import Replay
from recollect.model.evaluation_text import EvaluationText
from recollect.model.evaluation_types import EvaluationResult, TokenLosses
from recollect.model.transformer import MemorizingTransformer, UpperState
from recollect.model.trunk import TrunkOutput, compute_trunk

from .settings import NO_MEMORY, EvaluationSettings


@dataclass(frozen=True)
class Evaluated:
    """An evaluation's losses and what it cost.

    Attributes:
        result: figures and losses, the losses sorted by document and position.
        seconds: wall time of trunk and upper part over the scored tokens.
        scored_tokens: tokens that were read while scoring.
        memory_bytes, cache_bytes: of the memories, and of the caches that layers carry, for each sequence.
    """

    result: EvaluationResult
    seconds: float
    scored_tokens: int
    memory_bytes: int
    cache_bytes: int


class Trunks:
    """The last trunk output of one model, shared by the evaluations that agree in all that it depends on.

    Attributes:
        computed: how many were computed.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str], tuple[TrunkOutput, float]] = {}
        self.computed = 0

    def get(self, model: MemorizingTransformer, text: EvaluationText, precision: str) -> tuple[TrunkOutput, float]:
        """The trunk's output on a text, and the seconds that it took."""
        key = (trunk_config(model.config).to_json(), text.digest, precision)
        if key not in self._kept:
            self._kept.clear()  # one trunk of long documents fills hundreds of megabytes
            start = time.perf_counter()
            with autocast(model, precision):
                trunk = compute_trunk(model, text, model_digest="of this process")
            self._kept[key] = (trunk, time.perf_counter() - start)
            self.computed += 1
        return self._kept[key]


def trunk_config(config: ModelConfig) -> ModelConfig:
    """The values of a configuration that the trunk's output depends on, the others at their defaults."""
    plain = ModelConfig()
    names = ("memory_size", "k", "gate", "gate_share", "memory_key", "eviction", "eviction_kept_share")
    return config.replace(**{name: getattr(plain, name) for name in names})


def autocast(model: MemorizingTransformer, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where the precision says so."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def with_config(model: MemorizingTransformer, config: ModelConfig) -> MemorizingTransformer:
    """The same weights in a model of another configuration, of which no weight depends on what differs."""
    if config == model.config:
        return model
    other = MemorizingTransformer(config).to(model.device)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def evaluate_model(
    model: MemorizingTransformer, text: EvaluationText, settings: EvaluationSettings, trunks: Trunks, *, seed: int
) -> Evaluated:
    """Evaluates `model`, already of the configuration to be evaluated, with the memory that `settings` name.

    Raises:
        ValueError: a loss is not finite.
    """
    trunk, trunk_seconds = trunks.get(model, text, settings.precision)
    size = settings.memory_size or 0
    with autocast(model, settings.precision):
        replay = Replay(
            model,
            trunk,
            backend=settings.backend if size and settings.backend else NO_MEMORY,
            memory_size=size,
            k=settings.k or None,
            seed=seed,
        )
        first = text_segments_to_skip(text, settings)
        skipped = fill(model, replay, trunk, until=first, size=size) if first else 0
        start = time.perf_counter()
        while replay.step():
            pass
        seconds = time.perf_counter() - start
    result = replay.result()
    losses = sorted_losses(result.losses, after=settings.fill_tokens)
    read = int(text.lengths[skipped:].sum())
    seconds += trunk_seconds * (text.segments - skipped) / text.segments
    return Evaluated(
        result=EvaluationResult.from_losses(losses, result.memory, seconds),
        seconds=seconds,
        scored_tokens=read,
        memory_bytes=memory_bytes(replay.state) // text.rows,
        cache_bytes=cache_bytes(replay.state, model, text.rows) // text.rows,
    )


def text_segments_to_skip(text: EvaluationText, settings: EvaluationSettings) -> int:
    """Segments before the first scored one."""
    return settings.fill_tokens // text.segment_length


class _WriteOnly:
    """A backend as the memory layer sees it while the memory is filled: keys go in, and a search finds nothing."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def search(self, queries: Tensor, k: int, **_: Any) -> SearchResult:
        shape = (*queries.shape[:2], k)
        return SearchResult(
            torch.full(shape, -torch.inf, device=queries.device),
            torch.full(shape, -1, dtype=torch.int64, device=queries.device),
        )


def fill(model: MemorizingTransformer, replay: Replay, trunk: TrunkOutput, *, until: int, size: int) -> int:
    """Reads the segments before `until` as far as what is scored later depends on them; returns how many were passed.

    With one memory layer, a key depends on the trunk's output alone, so the memory is filled without a search. The
    layers above carry short caches, which a few segments with everything in place fill.
    """
    config = model.config
    carried = config.xl_cache + config.compressed_memory * config.compression_rate
    # Each layer looks back by its cache, or by its convolution into the segment before, and the layer below did so too.
    reach = (config.layers - config.first_upper_layer) * max(1, -(-carried // config.segment_length))
    warm = max(0, until - reach)
    begin = max(0, warm - -(-size // config.segment_length) - reach)
    was_training = model.training
    model.eval()
    # None where there is no memory; a model with several is refused before it comes to this.
    memory = replay.state.memories[0] if replay.state.memories else None
    if memory is not None:
        kept = memory.backend, memory.k
        memory.backend, memory.k = _WriteOnly(memory.backend), 1  # type: ignore[assignment]
        with torch.inference_mode():
            for segment in range(begin, warm):
                starts = trunk.text.document_starts[segment].to(model.device)
                memory.reset_rows(starts)
                state = replay.state.layers[0].without(starts)
                hidden = trunk.hidden_of(segment).to(model.device)
                _, replay.state.layers[0] = model.layers[config.first_upper_layer](hidden, state, memory)
        memory.backend, memory.k = kept
    model.train(was_training)
    replay.done = warm
    return warm


def sorted_losses(losses: TokenLosses, *, after: int = 0) -> TokenLosses:
    """Losses in the order of documents and positions, those of positions up to `after` left out."""
    order = np.lexsort((losses.position, losses.document))
    order = order[losses.position[order] > after]
    return dataclasses.replace(
        losses,
        loss=losses.loss[order],
        document=losses.document[order],
        position=losses.position[order],
        correct=losses.correct[order],
    )


def memory_bytes(state: UpperState) -> int:
    """Bytes of keys, index and values of all memories when they are full."""
    total = 0
    for memory in state.memories:
        # What is alive at the end of a text may be less than all: a document's start resets its row.
        total += round(memory.backend.stats().bytes_per_key * memory.backend.capacity * memory.backend.num_memories)
        total += sum(value.numel() * value.element_size() for value in memory.state_tensors().values())
    return total


def cache_bytes(state: UpperState, model: MemorizingTransformer, rows: int) -> int:
    """Bytes of what all layers carry from segment to segment, those of the trunk included."""
    layers = [*model.initial_trunk_state(rows).layers, *state.layers]
    return sum(
        value.numel() * value.element_size()
        for layer in layers
        for value in vars(layer).values()
        if isinstance(value, Tensor)
    )
