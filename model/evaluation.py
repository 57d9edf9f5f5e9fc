"""Perplexity, accuracy and per-token losses of a model with a memory, replayed over a stored trunk.

    evaluate(backend="hnswlib:M=16", memory_size=8192)          # the shipped model on the embedded corpus
    replay(model, trunk, backend="exact", memory_size=2048)     # any model, one trunk for many memories

Letters: B batch rows, T tokens of a segment, V vocabulary, M memories.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.memory_backends import MemoryBackend, canonical_spec
from recollect.model.checkpoints import load_checkpoint, reference_checkpoint
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.evaluation_text import EvaluationText, choose_text, load_documents
from recollect.model.evaluation_types import EvaluationOptions, EvaluationResult, MemorySpecification, TokenLosses
from recollect.model.hidden_keys import AnyMemory
from recollect.model.recording import ObservedBackend
from recollect.model.streams import IGNORED
from recollect.model.transformer import MemorizingTransformer, UpperState
from recollect.model.trunk import TrunkOutput, TrunkStore
from recollect.model.value_store import FLOAT32

NO_MEMORY = "none"
"""Stands for the backend where there is no memory."""

OnSegment = Callable[[int, int], None]


def evaluate(
    options: EvaluationOptions | None = None,
    *,
    trunks: TrunkStore | None = None,
    on_segment: OnSegment | None = None,
    **changes: Any,
) -> EvaluationResult:
    """Evaluates a checkpoint with a memory on a corpus.

    Args:
        options: what to run; the defaults of `EvaluationOptions` where None.
        trunks: shared between calls, it lets several backends use one trunk.
        on_segment: called with the number of segments done and how many there are, for progress.
        changes: single options by name, such as `backend="exact"`.

    Raises:
        CheckpointError, CorpusError, MemoryBackendError, ConfigurationError: what was asked for cannot be had; each
            message names the value and the remedy.
        ValueError: a loss is not finite.
    """
    options = dataclasses.replace(options or EvaluationOptions(), **changes)
    (result,) = evaluate_backends((options.backend,), options, trunks=trunks, on_segment=on_segment)
    return result


def evaluate_backends(
    backends: Sequence[str],
    options: EvaluationOptions | None = None,
    *,
    trunks: TrunkStore | None = None,
    on_segment: OnSegment | None = None,
    **changes: Any,
) -> tuple[EvaluationResult, ...]:
    """Evaluates a checkpoint with several backends over one model, one text and one trunk.

    Args:
        backends: registry strings; 'none' is no memory.
        options: the rest; its own `backend` has no effect.
        trunks, on_segment, changes: as for `evaluate`.

    Returns:
        One result for each backend; `seconds` of the first includes the trunk, if it was computed.

    Raises:
        As `evaluate`.
    """
    options = dataclasses.replace(options or EvaluationOptions(), **changes)
    model, text = prepare(backends, options)
    trunks = trunks or TrunkStore()
    results = []
    for backend in backends:
        start = time.perf_counter()
        result = replay(
            model,
            trunks.get(model, text),
            backend=backend,
            memory_size=options.memory_size,
            k=options.k,
            seed=options.seed,
            values=options.values,
            on_segment=on_segment,
        )
        results.append(dataclasses.replace(result, seconds=time.perf_counter() - start))
    return tuple(results)


def prepare(backends: Sequence[str], options: EvaluationOptions) -> tuple[MemorizingTransformer, EvaluationText]:
    """The model and the text that `options` name, once it is clear that each of `backends` can be had.

    Raises:
        As `evaluate`.
    """
    for backend in backends:
        if backend != NO_MEMORY:
            canonical_spec(backend)  # a misspelt backend is told before anything is loaded
    checkpoint = load_checkpoint(
        reference_checkpoint() if options.checkpoint is None else options.checkpoint, device=options.device
    )
    model = checkpoint.model
    for backend in backends:  # and so is a memory that this model cannot have
        _memory_size(model.config, backend, options.memory_size, _neighbours(model.config, options.k))
    documents = load_documents(options.corpus, options.split, checkpoint.tokenizer, options.cache_directory)
    text = choose_text(
        documents, rows=options.rows, segment_length=model.config.segment_length, max_tokens=options.max_tokens
    )
    return model, text


def replay(
    model: MemorizingTransformer,
    trunk: TrunkOutput,
    *,
    backend: str | Sequence[MemoryBackend | ObservedBackend] = "exact",
    memory_size: int | None = None,
    k: int | None = None,
    seed: int = 0,
    values: str = FLOAT32,
    on_segment: OnSegment | None = None,
) -> EvaluationResult:
    """Evaluates one memory from the first memory layer up.

    Args:
        model: the one that `trunk` was computed with; it is left in the mode it was in.
        trunk: the stored output of the layers below.
        backend: registry string, or empty backends already made, one for each memory layer (then `memory_size` and
            `seed` have no effect). 'none' is no memory.
        memory_size: C; None is the model's own size, 0 is no memory.
        k: neighbours per query; None is the model's own number.
        seed: for backends that draw random numbers.
        values: how the memory's values are stored, as for `initial_state`.
        on_segment: called with the number of segments done and how many there are.

    Raises:
        ConfigurationError: a memory is asked for and the model has no memory layer, or the size is negative.
        ValueError: a loss is not finite.
    """
    run = Replay(model, trunk, backend=backend, memory_size=memory_size, k=k, seed=seed, values=values)
    while run.step():
        if on_segment is not None:
            on_segment(run.done, trunk.segments)
    return run.result()


class Replay:
    """One evaluation from the first memory layer up, a segment at a time, so that several can go side by side.

    Arguments as for `replay`.

    Attributes:
        done: segments evaluated so far.
    """

    def __init__(
        self,
        model: MemorizingTransformer,
        trunk: TrunkOutput,
        *,
        backend: str | Sequence[MemoryBackend | ObservedBackend] = "exact",
        memory_size: int | None = None,
        k: int | None = None,
        seed: int = 0,
        values: str = FLOAT32,
    ) -> None:
        self.model, self.trunk = model, trunk
        self.done = 0
        self._state, self._memory = _initial_state(model, trunk, backend, memory_size, k, seed, values)
        self._losses = LossCollector(trunk.text)
        self._seconds = 0.0

    @property
    def state(self) -> UpperState:
        """What the upper layers carry, before the next segment."""
        return self._state

    @property
    def memories(self) -> list[AnyMemory]:
        """The memory of each memory layer, which may be replaced in place before the first step, to watch them."""
        return self._state.memories

    def step(self) -> bool:
        """Evaluates the next segment; False, and nothing else, where there is none."""
        number = self.done
        if number == self.trunk.segments:
            return False
        model = self.model
        was_training = model.training
        model.eval()
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                hidden = self.trunk.hidden_of(number).to(model.device)
                starts = self.trunk.text.document_starts[number].to(model.device)
                logits, self._state = model.upper(hidden, self._state, starts)
                self._losses.add(number, logits)
        finally:
            model.train(was_training)
        self._seconds += time.perf_counter() - start
        self.done += 1
        return True

    def result(self) -> EvaluationResult:
        """The figures of what was evaluated so far."""
        return EvaluationResult.from_losses(self._losses.result(), self._memory, self._seconds)


def _initial_state(
    model: MemorizingTransformer,
    trunk: TrunkOutput,
    backend: str | Sequence[MemoryBackend | ObservedBackend],
    memory_size: int | None,
    k: int | None,
    seed: int,
    values: str,
) -> tuple[UpperState, MemorySpecification]:
    config = model.config
    neighbours = _neighbours(config, k)
    if not isinstance(backend, str):
        made = cast(list[MemoryBackend], list(backend))
        state = model.initial_upper_state(trunk.rows, backend=made, k=neighbours, values=values)
        return state, MemorySpecification(made[0].spec, made[0].capacity, neighbours)
    size = _memory_size(config, backend, memory_size, neighbours)
    if size == 0:
        return model.initial_upper_state(trunk.rows, memory_size=0), MemorySpecification(NO_MEMORY, 0, neighbours)
    state = model.initial_upper_state(
        trunk.rows, backend=backend, memory_size=size, k=neighbours, seed=seed, values=values
    )
    return state, MemorySpecification(canonical_spec(backend), size, neighbours)


def _neighbours(config: ModelConfig, asked: int | None) -> int:
    """Keys that a query retrieves."""
    neighbours = config.k if asked is None else asked
    if neighbours < 1:
        raise ConfigurationError(f"k is {neighbours}: a query retrieves at least 1 neighbour")
    return neighbours


def _memory_size(config: ModelConfig, backend: str, asked: int | None, k: int) -> int:
    """Keys that each memory is to hold; refuses what this model cannot have."""
    if backend == NO_MEMORY:
        size = 0
    elif asked is None:
        size = config.memory_size if config.memory_layers else 0
    else:
        size = asked
    if size < 0:
        raise ConfigurationError(f"memory_size is {size}: give 0 for no memory, or the number of keys a memory keeps")
    if size and not config.memory_layers:
        raise ConfigurationError(
            f"memory_size is {size}, but this model has no memory layer: give 0 or another checkpoint"
        )
    if 0 < size < k:
        raise ConfigurationError(f"k is {k}, above memory_size {size}: retrieve at most as many keys as a memory holds")
    return size


class LossCollector:
    """Collects per-token losses in reading order; the losses of two evaluations over one text then belong together."""

    def __init__(self, text: EvaluationText) -> None:
        self.text = text
        self.loss: list[np.ndarray] = []
        self.correct: list[np.ndarray] = []
        self.document: list[np.ndarray] = []
        self.position: list[np.ndarray] = []

    def add(self, number: int, logits: Tensor) -> None:
        """Takes the logits (B, T, V) of one segment."""
        targets = self.text.targets[number]
        wanted = targets != IGNORED
        goal = targets[wanted].to(logits.device)
        # Most segments are text to the last token: those are spared a copy of their logits.
        chosen = (logits.flatten(0, 1) if bool(wanted.all()) else logits[wanted.to(logits.device)]).float()
        self.loss.append(functional.cross_entropy(chosen, goal, reduction="none").cpu().numpy())
        # The likeliest token has the highest logit, and a maximum is many times faster than its place.
        correct = chosen.gather(1, goal[:, None])[:, 0] >= chosen.amax(-1)
        self.correct.append(correct.cpu().numpy())
        # A target is the token after its input, hence the one.
        places = self.text.position[number][:, None] + torch.arange(1, targets.shape[1] + 1)
        self.position.append(places[wanted].numpy())
        self.document.append(self.text.document_index[number][:, None].expand_as(targets)[wanted].numpy())

    def result(self) -> TokenLosses:
        return TokenLosses(
            loss=np.concatenate(self.loss).astype(np.float32),
            document=np.concatenate(self.document).astype(np.int32),
            position=np.concatenate(self.position).astype(np.int32),
            correct=np.concatenate(self.correct),
            document_names=self.text.document_names,
        )


__all__ = [
    "EvaluationOptions",
    "EvaluationResult",
    "MemorySpecification",
    "Replay",
    "TokenLosses",
    "evaluate",
    "evaluate_backends",
    "replay",
]
