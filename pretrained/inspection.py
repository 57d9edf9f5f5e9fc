"""Which past tokens each memory head retrieved, how much weight they got, and where that changed the prediction.

    found = inspect(InspectionOptions(corpus="my_novel.txt", split="all"))     # the shipped model, exact memory
    found.save("out/inspect")
    recollect.reports.write_inspection("out/inspect")                          # the page

The model reads the text twice, with and without memory; during the first reading every search is watched. The gain of
a token is its loss without memory minus its loss with it.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recollect._version import __version__
from recollect.memory_backends import canonical_spec
from recollect.model.checkpoints import Checkpoint
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.evaluation import Replay, replay
from recollect.model.evaluation_text import choose_text, load_documents
from recollect.model.evaluation_types import TokenLosses
from recollect.model.streams import IGNORED
from recollect.model.token_kinds import KINDS, OCCURRENCES
from recollect.model.trunk import compute_trunk
from recollect.model.twin import TwinLosses
from recollect.pretrained.inspection_data import InspectedDocument, Inspection, TokenArrays
from recollect.pretrained.inspection_text import StoreEntries, kinds_of, read_texts
from recollect.pretrained.inspection_watcher import Watcher
from recollect.pretrained.loading import is_pretrained_folder, load_own
from recollect.pretrained.store import MemoryStore

OnSegment = Callable[[int, int], None]


@dataclass(frozen=True)
class InspectionOptions:
    """What `inspect` runs.

    Attributes:
        model: folder of a Hugging Face model or of a checkpoint; None is the model that ships with the package.
        store: folder or address of a memory store made with that model.
        corpus: 'stdlib', or a text file, folder, JSON lines or dataset.
        split: which documents: 'test', 'validation', 'train', or 'all'.
        backend: registry string of the memory's backend.
        memory_size: keys that each memory holds at most; None is the model's own size.
        k: neighbours that each query retrieves; None is the model's own number.
        layers, gate, window: of a Hugging Face model, as for `attach_memory`.
        max_tokens: stop after about this many tokens; None reads everything.
        rows: documents read side by side (a Hugging Face model: into which `max_tokens` is divided).
        keep: R, how many of the retrieved pairs of each head are kept for the page.
        seed: for backends that draw random numbers.
        device: where model and memory live.
    """

    model: str | Path | None = None
    store: str | Path | None = None
    corpus: str = "stdlib"
    split: str = "test"
    backend: str = "exact"
    memory_size: int | None = None
    k: int | None = None
    layers: int | str | list[int] | None = None
    gate: str | None = None
    window: int | None = None
    max_tokens: int | None = 50_000
    rows: int = 4
    keep: int = 4
    seed: int = 0
    device: str = "cpu"


def inspect(options: InspectionOptions, *, on_segment: OnSegment | None = None) -> Inspection:
    """Watches a model's memory at work on a text.

    Args:
        options: what to run.
        on_segment: called with how much was read and how much there is, for progress.

    Raises:
        ConfigurationError: the model has no memory to watch, or one that does not evict first in, first out.
        StoreError, CheckpointError, CorpusError, MemoryBackendError: what was asked for cannot be had.
    """
    canonical_spec(options.backend)
    if options.keep < 1:
        raise ConfigurationError(f"keep is {options.keep}: at least 1 retrieved pair of each head is kept")
    store = None if options.store is None else MemoryStore.open(options.store)
    if is_pretrained_folder(options.model):
        from recollect.pretrained.inspection_attached import inspect_pretrained

        return inspect_pretrained(options, store, on_segment)
    return _inspect_checkpoint(load_own(options.model, options.device), options, store, on_segment)


def _inspect_checkpoint(
    checkpoint: Checkpoint, options: InspectionOptions, store: MemoryStore | None, on_segment: OnSegment | None
) -> Inspection:
    config = checkpoint.config
    size = config.memory_size if options.memory_size is None else options.memory_size
    _check(config, size)
    tokenized = load_documents(options.corpus, options.split, checkpoint.tokenizer)
    text = choose_text(
        tokenized, rows=options.rows, segment_length=config.segment_length, max_tokens=options.max_tokens
    )
    trunk = compute_trunk(checkpoint.model, text)
    neighbours = config.k if options.k is None else options.k
    entries = None if store is None else StoreEntries(store)
    named: dict[str, Any] = {"backend": options.backend, "memory_size": size, "k": neighbours, "seed": options.seed}
    run: Replay
    if store is None:
        run = Replay(checkpoint.model, trunk, **named)
    else:
        from recollect.pretrained.stored_memory import ReplayOverStore

        run = ReplayOverStore(checkpoint, trunk, store, **named)
    watcher = Watcher(checkpoint.model, text, size, min(options.keep, neighbours), entries)
    with watcher.watching():
        while run.step():
            if on_segment is not None:
                on_segment(run.done, trunk.segments)
    found = run.result()
    without = replay(checkpoint.model, trunk, backend="none")
    documents, background = read_texts(
        options.corpus, options.split, checkpoint.tokenizer, text.document_names, text.document_tokens
    )
    visible = [_visible_from(count, config) for count in text.document_tokens]
    kinds, occurrences = kinds_of(documents, found.losses, visible, background)
    arrays = watcher.arrays()
    stored: tuple[InspectedDocument, ...] = ()
    if entries is not None:
        arrays["origin"], stored = entries.texts(checkpoint.tokenizer, arrays["origin"])
    twin = None if checkpoint.path is None else TwinLosses.load(checkpoint.path)
    tokens = TokenArrays(
        document=found.losses.document,
        position=found.losses.position,
        token=text.targets[text.targets != IGNORED].numpy().astype(np.int32),
        loss=found.losses.loss,
        loss_without=without.losses.loss,
        loss_twin=_twin_losses(twin, tokenized.digest, found.losses),
        kind=kinds,
        occurrence=occurrences,
        **arrays,
    )
    model = {
        "name": "the shipped reference model" if options.model is None else str(options.model),
        "digest": checkpoint.digest,
        "layers": config.layers,
        "memory_layers": list(config.memory_layers),
        "heads": config.heads,
        "gate": config.gate,
        "local_context": config.segment_length + config.xl_cache,
    }
    words = background.total if background is not None else 0
    return Inspection(tokens, documents, describe_run(options, model, found.memory.as_json(), words), stored)


def describe_run(
    options: InspectionOptions, model: Mapping[str, Any], memory: Mapping[str, Any], background_words: int
) -> dict[str, Any]:
    """What `run.json` says of an inspection, as plain JSON values."""
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recollect_version": __version__,
        "machine": machine,
        "model": dict(model),
        "memory": dict(memory),
        "store": None if options.store is None else str(options.store),
        "corpus": {"name": str(options.corpus), "split": options.split},
        "background_words": background_words,
        "kinds": KINDS,
        "occurrences": list(OCCURRENCES),
    }


def _check(config: ModelConfig, size: int) -> None:
    if not config.memory_layers or size < 1:
        raise ConfigurationError(
            f"there is no memory to inspect: the model's memory layers are {list(config.memory_layers)} and the memory "
            f"size is {size}; choose another model or --memory-size"
        )
    if config.eviction != "fifo":
        raise ConfigurationError(
            f"inspect follows keys by their place in a first-in first-out memory, and this model evicts "
            f"{config.eviction!r}: choose a checkpoint with eviction='fifo'"
        )


def _visible_from(count: int, config: ModelConfig) -> NDArray[np.int64]:
    """(count,) for each token the first that local attention sees when it is predicted."""
    # The token at position p is predicted from p - 1, in that token's segment, which also sees the cache.
    predicting = (np.arange(count) - 1).clip(0)
    first = predicting // config.segment_length * config.segment_length - config.xl_cache
    if config.attention_window:
        first = np.maximum(first, predicting - config.attention_window + 1)
    return first.clip(0)


def _twin_losses(twin: TwinLosses | None, digest: str, losses: TokenLosses) -> NDArray[np.float32]:
    """The twin's loss on each token; NaN where none are known for this text."""
    result = np.full(len(losses), np.nan, dtype=np.float32)
    if twin is None or twin.documents_digest != digest:
        return result
    for number, name in enumerate(losses.document_names):
        chosen = losses.document == number
        result[chosen] = twin.losses[name][losses.position[chosen] - 1]
    return result


__all__ = ["InspectionOptions", "inspect"]
