"""Traces: the recorded workload of a memory layer on real text, replayed causally (`trace_file` keeps them).

Legend: S steps (segments), B batch rows, H heads, M memories (M = B*H, m = b*H + h), T tokens, D head dimension.

A trace holds what every backend is asked, in the order in which it is asked: at step t the memories of rows that start
a document are emptied, the queries are searched, and only then the keys are appended. So a query finds only keys from
before its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, SearchResult
from recollect.model.documents import CorpusError

NEIGHBORS = 32
"""True neighbours of each query that a file holds where nothing else is said."""


class RecordingLike(Protocol):
    """What `recollect.model.recording.record` gives."""

    @property
    def queries(self) -> Tensor: ...
    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def document_starts(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...


@dataclass(frozen=True)
class TraceStep:
    """One step: `reset` memories, search `queries` (M, T, D), append `keys` (M, T, D) and `values` (M, T, D).

    lengths: (B,) int64, how many of the T tokens are text; the rest is padding at the end of a document.
    """

    number: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    document_starts: Tensor
    lengths: Tensor
    reset: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """A workload.

    queries, keys, values: (S, M, T, D) float32. document_starts: (S, B) bool.
    lengths: (S, B) int64, tokens of text in the segment; T everywhere where none is given.
    scale: (H,) float32, times an inner product gives the layer's logit; 1 everywhere where none is given.
    metadata: JSON values: where the trace comes from.
    layer: the layer's number in its model; None where it is not known.
    memory_size: keys that a memory holds, beyond which the oldest are evicted; None evicts nothing.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    document_starts: Tensor
    lengths: Tensor | None = None
    scale: Tensor | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    layer: int | None = None
    memory_size: int | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.queries.shape)
        if len(shape) != 4 or 0 in shape:
            raise CorpusError(f"queries of a trace are (S, M, T, D), none of them 0; here {shape}")
        for name in ("keys", "values"):
            if tuple(getattr(self, name).shape) != shape:
                raise CorpusError(
                    f"{name} of a trace have the shape of its queries, {shape}; here {getattr(self, name).shape}"
                )
        starts = self.document_starts
        if starts.dim() != 2 or len(starts) != shape[0] or not starts.shape[1] or shape[1] % starts.shape[1]:
            raise CorpusError(
                f"document_starts of a trace are (S, B), S {shape[0]} and B a divisor of M {shape[1]}; here "
                f"{tuple(starts.shape)}"
            )
        if self.lengths is None:
            object.__setattr__(self, "lengths", torch.full(starts.shape, shape[2], dtype=torch.int64))
        if self.scale is None:
            object.__setattr__(self, "scale", torch.ones(shape[1] // starts.shape[1]))
        if self.memory_size is not None and self.memory_size < 1:
            raise CorpusError(f"memory_size of a trace is 1 or more, or None to evict nothing; here {self.memory_size}")
        lengths, scale = self.text_lengths, self.logit_scale
        if lengths.shape != starts.shape or scale.shape != (self.heads,):
            raise CorpusError(
                f"lengths are (S, B) and scale (H,); here {tuple(lengths.shape)} and {tuple(scale.shape)}"
            )

    @classmethod
    def of(
        cls,
        recording: RecordingLike,
        *,
        lengths: Tensor | None = None,
        metadata: Mapping[str, Any] | None = None,
        layer: int | None = None,
        memory_size: int | None = None,
    ) -> Trace:
        """A trace of what `record` listened to; `lengths` (S, B) says how much of each segment is text."""
        parts = (recording.queries, recording.keys, recording.values, recording.document_starts)
        about: dict[str, Any] = {"metadata": metadata or {}, "layer": layer, "memory_size": memory_size}
        return cls(*parts, lengths=lengths, scale=recording.scale, **about)

    @property
    def num_memories(self) -> int:
        """M."""
        return int(self.queries.shape[1])

    @property
    def rows(self) -> int:
        """B."""
        return int(self.document_starts.shape[1])

    @property
    def heads(self) -> int:
        """H."""
        return self.num_memories // self.rows

    @property
    def dim(self) -> int:
        """D."""
        return int(self.queries.shape[3])

    @property
    def capacity(self) -> int:
        """Keys that a memory holds at most: `memory_size`, or all that are ever appended."""
        return len(self) * int(self.queries.shape[2]) if self.memory_size is None else self.memory_size

    @property
    def first_keys(self) -> Tensor:
        """(S, B) int64: the number of the oldest key that the memories of a row hold when a step searches.

        Key number n of a memory came with step n // T. A search at step s finds keys from this number to before s * T:
        those of the same document that are not evicted yet. Where the two are equal the memory is empty.
        """
        tokens = int(self.queries.shape[2])
        first = torch.zeros(self.rows, dtype=torch.int64)
        every = []
        for number, starts in enumerate(self.document_starts):
            first = torch.where(starts, number * tokens, first).clamp(min=number * tokens - self.capacity)
            every.append(first)
        return torch.stack(every)

    @property
    def text_lengths(self) -> Tensor:
        """(S, B) int64."""
        assert self.lengths is not None
        return self.lengths

    @property
    def logit_scale(self) -> Tensor:
        """(H,) float32."""
        assert self.scale is not None
        return self.scale

    def __len__(self) -> int:
        return int(self.queries.shape[0])

    def steps(self) -> Iterator[TraceStep]:
        """The steps in order."""
        for number in range(len(self)):
            starts = self.document_starts[number]
            rows = starts.nonzero()[:, 0].tolist()
            reset = tuple(row * self.heads + head for row in rows for head in range(self.heads))
            tensors = (self.queries[number], self.keys[number], self.values[number], starts, self.text_lengths[number])
            yield TraceStep(number, *tensors, reset)

    def save(self, path: str | Path, *, k: int = NEIGHBORS) -> None:
        """Writes the trace with the k true neighbours of every query, as `recollect.model.trace_file` describes.

        The file is written whole or not at all. `save_traces` writes several layers into one.
        """
        from recollect.model.trace_file import save_traces

        save_traces(path, [self], k=k)


def replay(trace: Trace, backend: MemoryBackend, k: int) -> Iterator[tuple[TraceStep, SearchResult]]:
    """Drives `backend` through the trace: empties memories at document starts, searches, yields, then appends.

    What it yields was found before the step's own keys were appended. `backend` has M memories of dimension D.
    """
    if (backend.num_memories, backend.dim) != (trace.num_memories, trace.dim):
        raise CorpusError(
            f"the backend has {backend.num_memories} memories of dimension {backend.dim}, the trace "
            f"{trace.num_memories} of {trace.dim}"
        )
    for step in trace.steps():
        if step.reset:
            backend.reset(step.reset)
        yield step, backend.search(step.queries, k)
        backend.add(step.keys)
