"""Pairs of a context and the token that followed it, searched by distance: the datastore of a kNN-LM.

A context is what Khandelwal et al. 2020 found to serve best: the input of the last layer's feed-forward block, after
its normalisation. `DocumentDatastore` holds the document so far and is as causal as a memory is: a segment is searched
for before it is added. `TrainingDatastore` holds training text and never changes.

Letters: S segments, B batch rows, T tokens of a segment, N tokens in all, W model width, C capacity, K neighbours,
V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.model.documents import CorpusError
from recollect.model.evaluation_text import EvaluationText, choose_text
from recollect.model.streams import IGNORED
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.transformer import MemorizingTransformer

METRIC = "l2"
FLOATS_AT_ONCE = 1 << 25
"""Numbers of retrieved keys that are gathered at one time, to bound the room that exact distances need."""


@dataclass(frozen=True)
class TextReading:
    """What a model made of a text, so that several datastores share one pass of the model.

    Attributes:
        text: what was read.
        contexts: (S, B, T, W) float32, the input of the last feed-forward block.
        hidden: (S, B, T, W) float32, the last residual stream after its normalisation; times the embedding it gives
            the logits.
    """

    text: EvaluationText
    contexts: Tensor
    hidden: Tensor


def read_text(
    model: MemorizingTransformer,
    text: EvaluationText,
    *,
    backend: str = "exact",
    memory_size: int = 0,
    k: int | None = None,
    on_segment: Callable[[int, int], None] | None = None,
) -> TextReading:
    """Reads a text with a model.

    Args:
        model: left in the mode it was in.
        text: to read.
        backend, memory_size, k: of the model's own memory; by default it is off, and the datastore is all it has.
        on_segment: called with the number of segments done and how many there are.
    """
    shape = (text.segments, text.rows, text.segment_length, model.config.width)
    contexts, hidden = torch.empty(shape), torch.empty(shape)
    seen: dict[str, Tensor] = {}

    def keep_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen["context"] = arguments[0]

    def keep_output(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen["hidden"] = output

    last: Any = model.layers[-1]
    handles = [
        last.feed_forward.register_forward_pre_hook(keep_input),
        model.final_norm.register_forward_hook(keep_output),
    ]
    state = model.initial_state(text.rows, backend=backend, memory_size=memory_size, k=k)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for number in range(text.segments):
                starts = text.document_starts[number].to(model.device)
                state = model(text.tokens[number].to(model.device), state, starts).state
                contexts[number], hidden[number] = seen["context"].float().cpu(), seen["hidden"].float().cpu()
                if on_segment is not None:
                    on_segment(number + 1, text.segments)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return TextReading(text, contexts, hidden)


@dataclass(frozen=True)
class Neighbours:
    """The retrieved pairs of each query, nearest first.

    Attributes:
        distances: (..., K) float32, squared Euclidean; infinite where a neighbour is missing.
        tokens: (..., K) int64, the tokens that followed; 0 where a neighbour is missing.
    """

    distances: Tensor
    tokens: Tensor

    @property
    def found(self) -> Tensor:
        """(..., K) bool."""
        return torch.isfinite(self.distances)


class Datastore(ABC):
    """Searched for each segment of a text, and told of the segment afterwards."""

    def __init__(self, backend: MemoryBackend, k: int) -> None:
        self.backend = backend
        self.k = k
        self.tokens = torch.zeros(backend.num_memories, backend.capacity, dtype=torch.int64, device=backend.device)

    def begin(self, document_starts: Tensor) -> None:
        """A segment comes; the rows marked in `document_starts` (B,) bool begin a document with it."""

    @abstractmethod
    def search(self, contexts: Tensor) -> Neighbours:
        """Neighbours (B, T, K) of contexts (B, T, W)."""

    def append(self, contexts: Tensor, targets: Tensor) -> None:
        """The segment is over: these were its contexts (B, T, W) and the tokens that followed (B, T)."""

    @property
    def device(self) -> torch.device:
        """Where queries are best, and where neighbours lie."""
        return self.backend.device

    @property
    def bytes(self) -> int:
        """Room that keys, index and tokens take now."""
        stats = self.backend.stats()
        return stats.key_bytes + stats.index_bytes + 8 * stats.keys

    def _search(self, queries: Tensor) -> Neighbours:
        """Neighbours (M, Q, K) of queries (M, Q, W), each row in the memory of its own."""
        result = self.backend.search(queries, self.k)
        missing = result.slots < 0
        distances = -result.scores if self.backend.capabilities.exact else self._distances(queries, result.slots)
        rows = torch.arange(len(queries), device=queries.device)[:, None, None]
        tokens = self.tokens[rows, result.slots.clamp_min(0)]
        return Neighbours(distances.clamp_min(0.0).masked_fill(missing, torch.inf), tokens.masked_fill(missing, 0))

    def _distances(self, queries: Tensor, slots: Tensor) -> Tensor:
        """Exact squared distances (M, Q, K): the scores of a quantised index are not."""
        at_once = max(1, FLOATS_AT_ONCE // (slots.shape[0] * slots.shape[2] * queries.shape[2]))
        parts = []
        for begin in range(0, slots.shape[1], at_once):
            part = slice(begin, begin + at_once)
            keys = self.backend.gather_keys(slots[:, part].contiguous())
            parts.append((keys - queries[:, part, None]).square().sum(-1))
        return torch.cat(parts, dim=1)

    def _add(self, contexts: Tensor, targets: Tensor) -> None:
        slots = self.backend.add(contexts)
        stay = min(slots.shape[1], self.backend.capacity)  # what is evicted at once has no slot
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.tokens[rows, slots[:, -stay:]] = targets[:, -stay:].clamp_min(0)


class DocumentDatastore(Datastore):
    """The newest C pairs of the document so far, for each row: the very tokens that a memory of C keys knows.

    A pair joins with its segment, when the token that followed has been read by every later query.

    Args:
        spec: registry string of the backend.
        rows: B.
        width: W.
        capacity: C.
        k: K.
        seed: for backends that draw random numbers.
        device: where keys and index lie.
    """

    def __init__(
        self, spec: str, *, rows: int, width: int, capacity: int, k: int, seed: int = 0, device: str = "cpu"
    ) -> None:
        super().__init__(
            make_backend(
                spec, num_memories=rows, capacity=capacity, dim=width, metric=METRIC, seed=seed, device=device
            ),
            k,
        )

    def begin(self, document_starts: Tensor) -> None:
        chosen = torch.nonzero(document_starts).flatten()
        if len(chosen):
            self.backend.reset(chosen)

    def search(self, contexts: Tensor) -> Neighbours:
        return self._search(contexts)

    def append(self, contexts: Tensor, targets: Tensor) -> None:
        # Tokens without a target only stand at a document's end, and the next segment of that row begins another.
        self._add(contexts, targets)


class TrainingDatastore(Datastore):
    """Pairs of training text, the same for every query; nothing is added while a text is read.

    Args:
        reading: of the training text.
        spec: registry string of the backend.
        k: K.
        seed: for backends that draw random numbers.
        device: where keys and index lie.
    """

    def __init__(self, reading: TextReading, spec: str, *, k: int, seed: int = 0, device: str = "cpu") -> None:
        wanted = reading.text.targets != IGNORED
        contexts = reading.contexts[wanted]
        backend = make_backend(
            spec, num_memories=1, capacity=len(contexts), dim=contexts.shape[1], metric=METRIC, seed=seed, device=device
        )
        super().__init__(backend, k)
        self._add(contexts[None], reading.text.targets[wanted][None])

    def search(self, contexts: Tensor) -> Neighbours:
        found = self._search(contexts.flatten(0, 1)[None])
        shape = (*contexts.shape[:2], self.k)
        return Neighbours(found.distances.view(shape), found.tokens.view(shape))


def sample_text(
    documents: TokenizedDocuments, *, tokens: int, rows: int, segment_length: int, seed: int = 0
) -> EvaluationText:
    """A text of about `tokens` tokens: whole documents in a drawn order, the last one cut.

    Raises:
        CorpusError: no document of the sample fills a segment.
    """
    names, arrays, left = [], [], tokens
    for place in np.random.default_rng(seed).permutation(len(documents)):
        if left < 2:
            break
        array = np.asarray(documents.arrays[place])[:left]
        left -= len(array)
        names.append(documents.names[place])
        arrays.append(array)
    if not arrays:
        raise CorpusError(f"{tokens} tokens of training text were asked for, and there are {documents.tokens}")
    sample = TokenizedDocuments(tuple(names), tuple(arrays), documents.digest, documents.split, documents.corpus)
    return choose_text(sample, rows=rows, segment_length=segment_length, max_tokens=None)


def split_documents(documents: TokenizedDocuments, *, every: int = 5) -> tuple[TokenizedDocuments, TokenizedDocuments]:
    """Two disjoint sets: all documents but each `every`-th, and each `every`-th.

    Raises:
        CorpusError: there are too few documents for both.
    """
    if len(documents) < every:
        raise CorpusError(
            f"{len(documents)} training documents are too few to keep some out of the datastore: want {every} or more"
        )

    def part(chosen: list[int], name: str) -> TokenizedDocuments:
        return TokenizedDocuments(
            tuple(documents.names[place] for place in chosen),
            tuple(documents.arrays[place] for place in chosen),
            f"{documents.digest}:{name}",
            documents.split,
            documents.corpus,
        )

    kept = [place for place in range(len(documents)) if place % every]
    out = [place for place in range(len(documents)) if not place % every]
    return part(kept, f"kept{every}"), part(out, f"out{every}")
