"""Perplexity of a Hugging Face model over texts longer than its context, with memory and without.

Both readings cut a text into the same windows, each with the same tokens read again at its start; with memory the
tokens that have left the sight can be found again, without they are gone. The difference is the memory's.

Letters: V vocabulary, N tokens of a document, K neighbours.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from recollect.memory_backends import canonical_spec
from recollect.model.checkpoints import Checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.documents import CorpusError
from recollect.model.evaluation import replay
from recollect.model.evaluation_text import choose_text, load_documents
from recollect.model.evaluation_types import EvaluationOptions, EvaluationResult, MemorySpecification, TokenLosses
from recollect.model.trunk import compute_trunk
from recollect.pretrained.attach import AttachedMemory, attach_memory
from recollect.pretrained.loading import (
    PretrainedFolder,
    device_of,
    is_pretrained_folder,
    load_own,
    load_pretrained,
)
from recollect.pretrained.store import MemoryStore, StoreError
from recollect.pretrained.stored_memory import ReplayOverStore, check_store

LOGITS_AT_ONCE = 1 << 26
"""Numbers in the logits of one call: a quarter of a gigabyte in float32."""
LONGEST_CALL = 1 << 14

OnSegment = Callable[[int, int], None]


@dataclass(frozen=True)
class MemoryChoice:
    """Which memory a Hugging Face model gets; None is what `attach_memory` takes by itself.

    Attributes:
        layers: memory layers; with a store, None is the store's.
        backend: registry string of the index.
        memory_size: keys for each row and key head; 0 searches the store alone.
        k: pairs retrieved for each query.
        gate: how memory and local attention are joined.
        window: tokens that the model attends to by itself.
        seed: of the index.
    """

    layers: int | str | list[int] | None = None
    backend: str = "exact"
    memory_size: int | None = None
    k: int | None = None
    gate: str | None = None
    window: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class MemoryComparison:
    """One text read with memory and without.

    Attributes:
        result: with memory, and with the store where there is one.
        without: the same model with nothing to remember.
        store: the store's folder or address, None without one.
        gate, window, overlap: what a Hugging Face model was given; None for a checkpoint, which has its own.
    """

    result: EvaluationResult
    without: EvaluationResult
    store: Path | str | None = None
    gate: str | None = None
    window: int | None = None
    overlap: int | None = None

    def as_json(self) -> dict[str, Any]:
        """As `EvaluationResult.as_json`, with what the memory changed."""
        answer = self.result.as_json()
        for name in ("gate", "window", "overlap"):
            if getattr(self, name) is not None:
                answer["memory"][name] = getattr(self, name)
        if self.store is not None:
            answer["store"] = str(self.store)
        answer["without_memory"] = {
            "perplexity": self.without.perplexity,
            "accuracy": self.without.accuracy,
            "seconds": round(self.without.seconds, 3),
        }
        answer["change_percent"] = 100 * (self.result.perplexity / self.without.perplexity - 1)
        return answer


def attach_choice(folder: PretrainedFolder, choice: MemoryChoice, store: MemoryStore | None) -> AttachedMemory:
    """Gives a model the memory that was chosen, or the one it was saved with, and the store.

    Raises:
        StoreError: another model, tokenizer or layer made the store.
        ConfigurationError: the choice does not fit, or the model was saved with a memory and another was chosen.
    """
    if store is not None:
        store.check_tokenizer(folder.tokenizer.digest)
        if not store.tokens:
            raise StoreError(f"{store.path} is empty: fill it with `recollect memorize`")
    given = {
        name: value for name in ("memory_size", "k", "gate", "window") if (value := getattr(choice, name)) is not None
    }
    layers = choice.layers
    if folder.saved_memory:
        handle = folder.model.recollect_memory
        if store is None and layers is None and not given:
            attached: AttachedMemory = handle
            return attached
        saved = handle.settings
        gates = handle.gates.state_dict()
        handle.detach()
        kept = {name: getattr(saved, name) for name in ("memory_size", "k", "gate", "gate_share", "window", "overlap")}
        handle = attach_memory(
            folder.model,
            list(saved.layers) if layers is None else layers,
            backend=choice.backend if choice.backend != "exact" else saved.backend,
            distance=saved.distance or None,
            store=store,
            seed=choice.seed,
            **{**kept, **given},
        )
        if handle.settings.gate == saved.gate and handle.settings.layers == saved.layers:
            handle.gates.load_state_dict(gates)
        return handle
    if store is not None and layers is None:
        layers = list(store.layers)
    return attach_memory(folder.model, layers, backend=choice.backend, store=store, seed=choice.seed, **given)


def evaluate_with_store(
    options: EvaluationOptions,
    *,
    store: str | Path | None = None,
    choice: MemoryChoice | None = None,
    on_segment: OnSegment | None = None,
) -> MemoryComparison:
    """Evaluates a Hugging Face model, or a checkpoint with a store, with memory and without.

    Args:
        options: `checkpoint` is the model's folder, of either kind; backend, memory_size, k and seed count for both.
        store: folder or address of a memory store.
        choice: what only a Hugging Face model can be told (layers, gate, window).
        on_segment: called with the tokens read so far and how many there are, both readings together.

    Raises:
        StoreError, CheckpointError, CorpusError, ConfigurationError, MemoryBackendError: what was asked for cannot be
            had; each message names the value and the remedy.
    """
    canonical_spec(options.backend)
    opened = None if store is None else MemoryStore.open(store)
    if not is_pretrained_folder(options.checkpoint):
        return _evaluate_checkpoint(load_own(options.checkpoint, options.device), options, opened, on_segment)
    assert options.checkpoint is not None
    folder = load_pretrained(options.checkpoint, options.device)
    choice = dataclasses.replace(
        choice or MemoryChoice(),
        backend=options.backend,
        memory_size=options.memory_size,
        k=options.k,
        seed=options.seed,
    )
    handle = attach_choice(folder, choice, opened)
    texts = choose_documents(folder, options)
    settings = handle.settings
    total = 2 * sum(len(array) for _, array in texts)
    read = 0

    def advance(tokens: int) -> None:
        nonlocal read
        read += tokens
        if on_segment is not None:
            on_segment(read, total)

    memory = MemorySpecification(settings.backend, settings.memory_size, settings.k)
    result = evaluate_attached(folder, handle, texts, memory, advance)
    with handle.paused():
        without = evaluate_attached(folder, handle, texts, MemorySpecification("none", 0, settings.k), advance)
    path = None if opened is None else opened.path
    return MemoryComparison(result, without, path, settings.gate, settings.window, settings.overlap)


def _evaluate_checkpoint(
    checkpoint: Checkpoint, options: EvaluationOptions, store: MemoryStore | None, on_segment: OnSegment | None
) -> MemoryComparison:
    if store is None:
        raise ConfigurationError("a checkpoint without a store is evaluated by `recollect.evaluate`")
    check_store(checkpoint, store)
    config = checkpoint.config
    documents = load_documents(options.corpus, options.split, checkpoint.tokenizer, options.cache_directory)
    text = choose_text(
        documents, rows=options.rows, segment_length=config.segment_length, max_tokens=options.max_tokens
    )
    trunk = compute_trunk(checkpoint.model, text)
    run = ReplayOverStore(
        checkpoint,
        trunk,
        store,
        backend=options.backend,
        memory_size=options.memory_size,
        k=options.k,
        seed=options.seed,
    )
    while run.step():
        if on_segment is not None:
            on_segment(run.done, trunk.segments)
    return MemoryComparison(run.result(), replay(checkpoint.model, trunk, backend="none"), store.path)


def choose_documents(folder: PretrainedFolder, options: EvaluationOptions) -> list[tuple[str, NDArray[np.int64]]]:
    """The documents that are read, the longest first, each cut to its share of `max_tokens` over `rows` documents.

    As in `choose_text`: a memory can only show what it does where there is much to remember.
    """
    documents = load_documents(options.corpus, options.split, folder.tokenizer, options.cache_directory)
    order = sorted(range(len(documents)), key=lambda place: (-len(documents.arrays[place]), documents.names[place]))
    left = options.max_tokens
    share = None if left is None else max(2, left // max(1, min(options.rows, len(order))))
    chosen = []
    for place in order:
        array = np.asarray(documents.arrays[place]).astype(np.int64)
        if left is not None and share is not None:
            array = array[: min(share, left)]
            left -= len(array)
        if len(array) >= 2:
            chosen.append((documents.names[place], array))
        if left is not None and left < 2:
            break
    if not chosen:
        raise CorpusError(
            f"corpus {options.corpus!r} has no document of two tokens or more: there is nothing to predict"
        )
    return chosen


def evaluate_attached(
    folder: PretrainedFolder,
    handle: AttachedMemory,
    texts: list[tuple[str, NDArray[np.int64]]],
    memory: MemorySpecification,
    advance: Callable[[int], None] | None = None,
) -> EvaluationResult:
    """Per-token losses over documents, each read from its start with an empty memory."""
    start = time.perf_counter()
    losses, correct, document, position = [], [], [], []
    for number, (_, array) in enumerate(texts):
        for first, loss, right in read_losses(folder, handle, array):
            losses.append(loss)
            correct.append(right)
            document.append(np.full(len(loss), number, dtype=np.int32))
            position.append(np.arange(first, first + len(loss), dtype=np.int32))
            if advance is not None:
                advance(len(loss))
    found = TokenLosses(
        loss=np.concatenate(losses),
        document=np.concatenate(document),
        position=np.concatenate(position),
        correct=np.concatenate(correct),
        document_names=tuple(name for name, _ in texts),
    )
    return EvaluationResult.from_losses(found, memory, time.perf_counter() - start)


def read_losses(
    folder: PretrainedFolder, handle: AttachedMemory, tokens: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.bool_]]]:
    """Reads one document (N,); yields, piece by piece, the first predicted position, losses, and whether right."""
    settings, skip = handle.settings, len(folder.prefix)
    whole = torch.cat([torch.tensor(folder.prefix, dtype=torch.int64), torch.from_numpy(tokens)])
    handle.reset()
    begin = 0
    for piece in whole.split(tokens_at_once(folder, settings.window, settings.overlap)):
        end = begin + len(piece)
        with torch.no_grad():  # not around the whole: a generator would leave its mode to the caller between pieces
            logits = folder.model(input_ids=piece[None].to(device_of(folder.model)), use_cache=False).logits[0]
        # The model's row i predicts token i + 1; the first token of the text itself is not predicted, nor is any after
        # the last.
        first = max(begin + 1, skip + 1)
        last = min(end, len(whole) - 1)
        if first <= last:
            rows = logits[first - 1 - begin : last - begin].float()
            loss, right = losses_of(rows, whole[first : last + 1].to(rows.device))
            yield first - skip, loss, right
        begin = end
    handle.reset()


def losses_of(logits: Tensor, targets: Tensor) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Losses (N,) in natural logarithm and whether the likeliest token was right, from logits (N, V)."""
    loss = functional.cross_entropy(logits, targets, reduction="none")
    right = logits.gather(1, targets[:, None])[:, 0] >= logits.amax(-1)
    return loss.cpu().numpy().astype(np.float32), right.cpu().numpy()


def tokens_at_once(folder: PretrainedFolder, window: int, overlap: int) -> int:
    """Tokens of one call: whole windows, few enough that their logits have room."""
    vocabulary = int(folder.model.get_input_embeddings().weight.shape[0])
    most = min(LONGEST_CALL, LOGITS_AT_ONCE // vocabulary)
    return window + max(0, (most - window) // (window - overlap)) * (window - overlap)
