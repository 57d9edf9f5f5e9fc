"""Watching a memory at work: what a layer asks and appends, how long the backend takes, and what it finds.

Letters: S segments, B batch rows, H heads, M memories (M = B*H), T tokens of a segment, D head dimension, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, MemoryStats, SearchResult
from recollect.model.configuration import ConfigurationError
from recollect.model.memory_layer import LayerMemory, Retrieved
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import TrunkOutput


class SearchObserver(Protocol):
    """Is shown every search, after it was timed and before anything is appended."""

    def __call__(self, backend: MemoryBackend, queries: Tensor, k: int, result: SearchResult) -> None: ...


class ObservedBackend:
    """A backend that behaves as the one it wraps, and keeps count of time and keys.

    Attributes:
        backend: what it wraps.
        search_seconds: duration of each search.
        append_seconds: duration of each append.
        appended: keys of each append, over all memories.
        reset_seconds: time spent forgetting documents.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        *,
        on_search: SearchObserver | None = None,
        on_append: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.backend = backend
        self.search_seconds: list[float] = []
        self.append_seconds: list[float] = []
        self.appended: list[int] = []
        self.reset_seconds = 0.0
        self._on_search = on_search
        self._on_append = on_append

    def __getattr__(self, name: str) -> Any:
        # Only for what is not defined here: capacity, dim, lengths, gather_keys, capabilities and the rest.
        return getattr(self.backend, name)

    def search(self, queries: Tensor, k: int, *, memories: Iterable[int] | Tensor | None = None) -> SearchResult:
        """As `MemoryBackend.search`, timed."""
        start = self._now()
        result = self.backend.search(queries, k, memories=memories)
        self.search_seconds.append(self._now() - start)
        if self._on_search is not None:
            self._on_search(self.backend, queries, k, result)
        return result

    def add(self, keys: Tensor, *, memories: Iterable[int] | Tensor | None = None) -> Tensor:
        """As `MemoryBackend.add`, timed."""
        start = self._now()
        slots = self.backend.add(keys, memories=memories)
        self.append_seconds.append(self._now() - start)
        self.appended.append(keys.shape[0] * keys.shape[1])
        if self._on_append is not None:
            self._on_append(keys)
        return slots

    def reset(self, memories: Iterable[int] | Tensor | None = None) -> None:
        """As `MemoryBackend.reset`, timed."""
        start = self._now()
        self.backend.reset(memories)
        self.reset_seconds += self._now() - start

    def stats(self) -> MemoryStats:
        """As `MemoryBackend.stats`."""
        return self.backend.stats()

    def _now(self) -> float:
        if self.backend.device.type == "cuda":
            torch.cuda.synchronize(self.backend.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Recording:
    """The workload of the first memory layer on a text: nothing in it depends on any backend.

    Attributes:
        queries: (S, M, T, D) float32, as they are searched.
        keys: (S, M, T, D) float32, appended after the segment's search.
        values: (S, M, T, D) float32.
        document_starts: (S, B) bool: the row's memories are emptied before the segment is searched.
        scale: (H,) float32, multiplies inner products to give the layer's logits.
        heads: H; memory b*H + h belongs to row b and head h.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    document_starts: Tensor
    scale: Tensor
    heads: int

    @property
    def num_memories(self) -> int:
        """M."""
        return self.queries.shape[1]

    @property
    def dim(self) -> int:
        """D."""
        return self.queries.shape[3]


class _Listener:
    """Stands in for a layer's memory: keeps what the layer asks and appends.

    memory: answers, where a layer above needs the answer; None finds nothing.
    """

    def __init__(self, memory: LayerMemory | None = None) -> None:
        self.memory = memory
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.scale = torch.zeros(0)

    def attend(self, queries: Tensor, scale: Tensor) -> Retrieved:
        self.queries.append(_per_memory(queries))
        self.scale = scale.detach().float().cpu()
        if self.memory is not None:
            return self.memory.attend(queries, scale)
        per_query = torch.zeros(queries.shape[:3], device=queries.device)[..., None]
        return Retrieved(
            remembered=torch.zeros_like(queries, dtype=torch.float32),
            found=per_query[..., 0].bool(),
            logits=per_query,
            weights=per_query,
            slots=per_query.long() - 1,
        )

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys.append(_per_memory(keys))
        self.values.append(_per_memory(values))
        if self.memory is not None:
            self.memory.append(keys, values)

    def reset_rows(self, rows: Tensor) -> None:
        if self.memory is not None:
            self.memory.reset_rows(rows)

    def recording(self, document_starts: Tensor, heads: int) -> Recording:
        queries, keys, values = (torch.stack(part) for part in (self.queries, self.keys, self.values))
        return Recording(queries, keys, values, document_starts, self.scale, heads)


def _per_memory(vectors: Tensor) -> Tensor:
    """(B, H, T, D) as (B*H, T, D) float32 on the CPU."""
    return vectors.detach().flatten(0, 1).float().cpu().contiguous()


def record(model: MemorizingTransformer, trunk: TrunkOutput) -> Recording:
    """Records what the first memory layer asks and appends on a text. Only that one layer is computed.

    Raises:
        ValueError: the model has no memory layer.
        ConfigurationError: its memory stores hidden states.
    """
    (recording,) = _record(model, trunk, model.config.memory_layers[:1], 0, 1, lambda done, total: None).values()
    return recording


def record_layers(
    model: MemorizingTransformer,
    trunk: TrunkOutput,
    *,
    memory_size: int | None = None,
    k: int | None = None,
    on_segment: Callable[[int, int], None] | None = None,
) -> dict[int, Recording]:
    """Records every memory layer on a text, by the layer's number.

    What a layer above the first asks depends on what the ones below it found: they search exactly.

    Args:
        memory_size: keys that each memory of those layers holds; None is the configuration's.
        k: neighbours that they find; None is the configuration's.
        on_segment: told how many of how many segments are done.

    Raises:
        ValueError, ConfigurationError: as for `record`.
    """
    size = model.config.memory_size if memory_size is None else memory_size
    tell = on_segment or (lambda done, total: None)
    return _record(model, trunk, model.config.memory_layers, size, model.config.k if k is None else k, tell)


@torch.no_grad()
def _record(
    model: MemorizingTransformer,
    trunk: TrunkOutput,
    layers: tuple[int, ...],
    memory_size: int,
    k: int,
    tell: Callable[[int, int], None],
) -> dict[int, Recording]:
    """Records `layers`, the first memory layer or all; nothing above the last of them is computed."""
    config = model.config
    if not config.memory_layers:
        raise ValueError("this model has no memory layer, so there is nothing to record: choose another checkpoint")
    if config.memory_key != "key":
        raise ConfigurationError(
            f"this model has memory_key={config.memory_key!r}, one memory a row with queries of every head; a "
            "recording is of one memory a head: choose a checkpoint with memory_key='key'"
        )
    first, last = config.first_upper_layer, layers[-1]
    several = len(layers) > 1
    if several and memory_size < 1:
        raise ValueError(f"memory_size is {memory_size}: layers above the first ask what the ones below found; want 1")
    state = model.initial_upper_state(trunk.rows, memory_size=memory_size if several else 0, k=k)
    # Of the last one nobody needs an answer.
    memories: list[Any] = [*state.memories[: len(layers) - 1], None]
    listeners = {layer: _Listener(memory) for layer, memory in zip(layers, memories, strict=True)}
    states = state.layers[: last - first + 1]
    was_training = model.training
    model.eval()
    try:
        for number in range(trunk.segments):
            starts = trunk.text.document_starts[number].to(model.device)
            hidden = trunk.hidden_of(number).to(model.device)
            for listener in listeners.values():
                listener.reset_rows(starts)
            for place, layer in enumerate(range(first, last + 1)):
                memory: Any = listeners.get(layer)
                hidden, states[place] = model.layers[layer](hidden, states[place].without(starts), memory)
            tell(number + 1, trunk.segments)
    finally:
        model.train(was_training)
    return {
        layer: listener.recording(trunk.text.document_starts, config.heads) for layer, listener in listeners.items()
    }


__all__ = ["LayerMemory", "ObservedBackend", "Recording", "SearchObserver", "record", "record_layers"]
