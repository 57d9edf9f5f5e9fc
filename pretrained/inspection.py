"""Which past tokens each memory head retrieved, how much weight they got, and where that changed the prediction.

    inspect(InspectionOptions(corpus="my_novel.txt"), "out/inspect")     # the shipped model, exact memory

The model reads the text twice, with and without memory; during the first reading every search is watched. The gain of
a token is its loss without memory minus its loss with it.

Letters: S segments, B batch rows, T tokens of a segment, H heads, L memory layers, K neighbours, R of them kept.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect._version import __version__
from recollect.memory_backends import canonical_spec
from recollect.model.attention import Attention
from recollect.model.checkpoints import load_checkpoint, reference_checkpoint
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.corpus import load_corpus
from recollect.model.documents import Document
from recollect.model.evaluation import replay
from recollect.model.evaluation_text import EVERYTHING, EvaluationText, choose_text, load_documents
from recollect.model.evaluation_types import TokenLosses
from recollect.model.gates import Gate, Scores
from recollect.model.memory_layer import LayerMemory, Retrieved
from recollect.model.streams import IGNORED
from recollect.model.token_kinds import KINDS, OCCURRENCES, WordCounts, token_kinds
from recollect.model.tokenizer import Tokenizer
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import compute_trunk
from recollect.model.twin import TwinLosses
from recollect.pretrained.inspection_data import InspectedDocument, Inspection, TokenArrays

BACKGROUND_CHARACTERS = 20_000_000
"""As much training text is enough to know which words are rare."""


@dataclass(frozen=True)
class InspectionOptions:
    """What `inspect` runs.

    Attributes:
        checkpoint: folder of a checkpoint; None is the reference model that ships with the package.
        corpus: 'stdlib', or a text file, folder, JSON lines or dataset.
        split: which documents: 'test', 'validation', 'train', or 'all'.
        backend: registry string of the memory's backend.
        memory_size: keys that each memory holds at most; None is the checkpoint's own size.
        k: neighbours that each query retrieves; None is the checkpoint's own number.
        max_tokens: stop after about this many tokens; None reads everything.
        rows: documents read side by side.
        keep: R, how many of the retrieved pairs of each head are kept for the page.
        seed: for backends that draw random numbers.
        device: where model and memory live.
    """

    checkpoint: str | Path | None = None
    corpus: str = "stdlib"
    split: str = "test"
    backend: str = "exact"
    memory_size: int | None = None
    k: int | None = None
    max_tokens: int | None = 50_000
    rows: int = 4
    keep: int = 4
    seed: int = 0
    device: str = "cpu"


def inspect(options: InspectionOptions, *, on_segment: Callable[[int, int], None] | None = None) -> Inspection:
    """Watches a checkpoint's memory at work on a text.

    Args:
        options: what to run.
        on_segment: called with the number of segments read with memory and how many there are, for progress.

    Raises:
        ConfigurationError: the model has no memory to watch, or one that does not evict first in, first out.
        CheckpointError, CorpusError, MemoryBackendError: what was asked for cannot be had.
    """
    canonical_spec(options.backend)
    folder = reference_checkpoint() if options.checkpoint is None else Path(options.checkpoint)
    checkpoint = load_checkpoint(folder, device=options.device)
    config = checkpoint.config
    size = config.memory_size if options.memory_size is None else options.memory_size
    _check(config, size, options)
    tokenized = load_documents(options.corpus, options.split, checkpoint.tokenizer)
    text = choose_text(
        tokenized, rows=options.rows, segment_length=config.segment_length, max_tokens=options.max_tokens
    )
    trunk = compute_trunk(checkpoint.model, text)
    neighbours = config.k if options.k is None else options.k
    watcher = _Watcher(checkpoint.model, text, size, min(options.keep, neighbours))
    with watcher.watching():
        found = replay(
            checkpoint.model,
            trunk,
            backend=options.backend,
            memory_size=size,
            k=neighbours,
            seed=options.seed,
            on_segment=on_segment,
        )
    without = replay(checkpoint.model, trunk, backend="none")
    documents, background = _read_documents(options, checkpoint.tokenizer, text)
    kinds, occurrences = _kinds(documents, found.losses, config, background)
    twin = TwinLosses.load(folder)
    tokens = TokenArrays(
        document=found.losses.document,
        position=found.losses.position,
        token=text.targets[text.targets != IGNORED].numpy().astype(np.int32),
        loss=found.losses.loss,
        loss_without=without.losses.loss,
        loss_twin=_twin_losses(twin, tokenized.digest, found.losses),
        kind=kinds,
        occurrence=occurrences,
        **watcher.arrays(),
    )
    run = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recollect_version": __version__,
        "machine": platform.platform(),
        "model": {
            "name": "the shipped reference model" if options.checkpoint is None else str(options.checkpoint),
            "digest": checkpoint.digest,
            "layers": config.layers,
            "memory_layers": list(config.memory_layers),
            "heads": config.heads,
            "gate": config.gate,
            "local_context": config.segment_length + config.xl_cache,
        },
        "memory": found.memory.as_json(),
        "corpus": {"name": str(options.corpus), "split": options.split},
        "background_words": background.total if background is not None else 0,
        "kinds": KINDS,
        "occurrences": list(OCCURRENCES),
    }
    return Inspection(tokens, documents, run)


def _check(config: ModelConfig, size: int, options: InspectionOptions) -> None:
    if not config.memory_layers or size < 1:
        raise ConfigurationError(
            f"there is no memory to inspect: the model's memory layers are {list(config.memory_layers)} and the memory "
            f"size is {size}; choose another checkpoint or --memory-size"
        )
    if config.eviction != "fifo":
        raise ConfigurationError(
            f"inspect follows keys by their place in a first-in first-out memory, and this model evicts "
            f"{config.eviction!r}: choose a checkpoint with eviction='fifo'"
        )
    if options.keep < 1:
        raise ConfigurationError(f"keep is {options.keep}: at least 1 retrieved pair of each head is kept")


class _Watcher:
    """Notes what each memory layer retrieves while a model reads one text, segment by segment."""

    def __init__(self, model: MemorizingTransformer, text: EvaluationText, size: int, keep: int) -> None:
        self.model, self.text, self.size, self.keep = model, text, size, keep
        self.layers = model.config.memory_layers
        self._tokens = _padded_documents(text)
        self._notes: list[dict[str, list[NDArray[Any]]]] = [{} for _ in self.layers]
        self._segments = [0] * len(self.layers)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, every segment that the model reads with memory is noted."""
        with contextlib.ExitStack() as stack:
            for place, layer in enumerate(self.layers):
                attention = cast(Attention, self.model.layers[layer].attention)
                stack.callback(attention.register_forward_pre_hook(self._memory_hook(place)).remove)
                stack.callback(attention.gate.register_forward_hook(self._gate_hook(place)).remove)
            yield

    def arrays(self) -> dict[str, Any]:
        """What was seen, as `TokenArrays` wants it."""
        names = ("share", "retrieved", "weight", "on_target", "before_target", "distance")
        seen = {name: np.stack([np.concatenate(notes[name]) for notes in self._notes], axis=1) for name in names}
        return {**seen, "origin": np.full(seen["retrieved"].shape, -1, dtype=np.int32)}

    def _memory_hook(self, place: int) -> Callable[..., tuple[Any, ...]]:
        def hook(attention: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, state, memory = arguments
            return hidden, state, _WatchedMemory(memory, lambda found: self._note_retrieved(place, found))

        return hook

    def _gate_hook(self, place: int) -> Callable[..., None]:
        def hook(gate: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            share = _share_of(gate, *arguments)
            self._note(place, "share", share.cpu().to(torch.float16), self._segments[place] - 1)

        return hook

    def _note_retrieved(self, place: int, found: Retrieved) -> None:
        segment = self._segments[place]
        self._segments[place] += 1
        slots, weights = found.slots.cpu(), found.weights.detach().float().cpu()  # (B, H, T, K)
        appended = self.text.position[segment][:, None, None, None]  # keys in the row's memories by now
        positions = torch.where(slots < 0, -1, appended - 1 - (appended - 1 - slots) % self.size)
        self._note(place, "retrieved", positions[..., : self.keep].to(torch.int32), segment)
        self._note(place, "weight", weights[..., : self.keep].to(torch.float16), segment)
        targets = self.text.targets[segment][:, None, :, None]
        rows = self.text.document_index[segment].clamp_min(0)[:, None, None, None]
        for name, step in (("on_target", 0), ("before_target", 1)):
            there = self._tokens[rows, (positions + step).clamp_min(0)]
            self._note(place, name, (weights * (there == targets)).sum(-1).to(torch.float16), segment)
        predicted = appended + torch.arange(1, slots.shape[2] + 1)[:, None]
        away = torch.where(slots < 0, 0, predicted - positions).float()
        self._note(place, "distance", (weights * away).sum(-1).masked_fill((slots < 0).all(-1), torch.nan), segment)

    def _note(self, place: int, name: str, per_token: Tensor, segment: int) -> None:
        """Keeps (B, H, T, ...) as entries (n, H, ...) of the tokens that have a target."""
        wanted = self.text.targets[segment] != IGNORED
        self._notes[place].setdefault(name, []).append(per_token.transpose(1, 2)[wanted].numpy())


class _WatchedMemory:
    """A layer's memory that tells what each search found."""

    def __init__(self, memory: LayerMemory, tell: Callable[[Retrieved], None]) -> None:
        self._memory, self._tell = memory, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def attend(self, queries: Tensor, scale: Tensor) -> Retrieved:
        found = self._memory.attend(queries, scale)
        self._tell(found)
        return found


def _share_of(
    gate: Gate, local: Tensor, remembered: Tensor, found: Tensor, hidden: Tensor, scores: Scores | None = None
) -> Tensor:
    """(B, H, T) memory's share of the joined output; NaN for a gate that does not mix the two in shares.

    A gate that mixes gives the share when the local attention is 0 and memory's is 1, and 1 when both are.
    """
    zeros, ones = torch.zeros_like(local), torch.ones_like(local)
    # Not gate(...): that would call the hook which asks this.
    share = gate.forward(zeros, ones, found, hidden, scores)[..., 0].float()
    whole = gate.forward(ones, ones, found, hidden, scores)
    return share if bool(torch.isclose(whole, ones, atol=1e-3).all()) else torch.full_like(share, torch.nan)


def _padded_documents(text: EvaluationText) -> Tensor:
    """(documents, longest + 1) int64: the tokens that were read, -1 beyond the end."""
    longest = max(text.document_tokens)
    padded = torch.full((len(text.document_names), longest + 1), -1, dtype=torch.int64)
    for segment in range(text.segments):
        for row in range(text.rows):
            document, start, count = (
                int(part[segment, row]) for part in (text.document_index, text.position, text.lengths)
            )
            if document >= 0:
                padded[document, start : start + count] = text.tokens[segment, row, :count]
    return padded


def _read_documents(
    options: InspectionOptions, tokenizer: Tokenizer, text: EvaluationText
) -> tuple[tuple[InspectedDocument, ...], WordCounts | None]:
    """The documents that were read, cut to what was read of them; the words of the training text, if there is any."""
    everything = "test" if options.split == EVERYTHING else None
    corpus = load_corpus(options.corpus, everything_is=everything)
    by_name: dict[str, Document] = {document.name: document for split in corpus.by_split.values() for document in split}
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inspected = []
    for name, count in zip(text.document_names, text.document_tokens, strict=True):
        whole = by_name[name].text
        offsets = np.asarray(inner.encode(whole, add_special_tokens=False).offsets[:count], dtype=np.int32)
        inspected.append(InspectedDocument(name, whole[: int(offsets[-1, 1])], offsets))
    background: list[str] = []
    if options.split not in (EVERYTHING, "train"):
        left = BACKGROUND_CHARACTERS
        for document in corpus.by_split["train"]:
            background.append(document.text)
            left -= len(document.text)
            if left < 0:
                break
    return tuple(inspected), WordCounts.of(background) if background else None


def _kinds(
    documents: Sequence[InspectedDocument], losses: TokenLosses, config: ModelConfig, background: WordCounts | None
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Kind and occurrence of every predicted token, in the order of the losses."""
    kinds = np.zeros(len(losses), dtype=np.int8)
    occurrences = np.zeros(len(losses), dtype=np.int8)
    for number, document in enumerate(documents):
        places = np.arange(len(document.offsets))
        # The token at position p is predicted from p - 1, in that token's segment, which also sees the cache.
        segment = (places - 1).clip(0) // config.segment_length * config.segment_length
        found = token_kinds(document.text, document.offsets, (segment - config.xl_cache).clip(0), background)
        chosen = losses.document == number
        kinds[chosen] = found[0][losses.position[chosen]]
        occurrences[chosen] = found[1][losses.position[chosen]]
    return kinds, occurrences


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
