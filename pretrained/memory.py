"""Keys that a pretrained layer can retrieve: each row's own memory, and a store that all rows share.

Letters: B batch rows of a call, R rows of the memory (B is a multiple), H query heads, G key heads, T queries, K
neighbours, C capacity, D head dimension, M memories of a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.memory_backends import make_backend
from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.registry import capabilities_of
from recollect.pretrained.records import LayerShape, MemorySettings


def backend_device(spec: str, device: torch.device) -> torch.device:
    """Where the index lives: on the model's device if it can, else on the CPU."""
    devices = capabilities_of(spec).devices
    return device if device.type in devices else torch.device("cpu")


class KeySource:
    """A backend with the values beside it.

    Args:
        backend: M = G memories that all rows of a call search, or R * G, memory r * G + g for row r and head g.
        values: (M, C, D) float32 where the model is.
        key_heads: G.
    """

    def __init__(self, backend: MemoryBackend, values: Tensor, key_heads: int) -> None:
        self.backend = backend
        self.values = values
        self.key_heads = key_heads
        self._offsets = torch.arange(len(values), device=values.device)[:, None] * values.shape[1]

    @property
    def rows(self) -> int:
        """R, or 1 where all rows search the same memories: the rows of a call are a multiple of it."""
        return len(self.values) // self.key_heads

    def fold(self, by_head: Tensor) -> Tensor:
        """(B, H, T, X) as the memories see it: (M, Q, X), the query heads of a key head and their rows together."""
        batch, heads, tokens, _ = by_head.shape
        group = (self.rows, batch // self.rows, self.key_heads, heads // self.key_heads, tokens, -1)
        return by_head.reshape(group).transpose(1, 2).reshape(len(self.values), -1, by_head.shape[-1])

    def unfold(self, folded: Tensor, batch: int, heads: int) -> Tensor:
        """The inverse of `fold`."""
        width = folded.shape[-1]
        group = (self.rows, self.key_heads, batch // self.rows, heads // self.key_heads, -1, width)
        return folded.reshape(group).transpose(1, 2).reshape(batch, heads, -1, width)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best keys of each query (B, H, T, D) float32.

        Returns:
            Inner products (B, H, T, K) float32, -inf where missing, through which gradients reach the queries; slots
            (B, H, T, K) int64, -1 where missing.
        """
        batch, heads = queries.shape[:2]
        folded = self.fold(queries)
        result = self.backend.search(folded, k)
        scores = result.scores
        differentiable = torch.is_grad_enabled() and queries.requires_grad
        if differentiable or not self.backend.capabilities.exact:
            # Scores of quantised indexes are not the attention's logits, and no score carries a gradient.
            keys = self.backend.gather_keys(result.slots).to(folded.device)
            exact = torch.matmul(keys, folded[..., None]).squeeze(-1)
            scores = exact.masked_fill(result.slots < 0, -torch.inf)
        return self.unfold(scores, batch, heads), self.unfold(result.slots, batch, heads)

    def weigh(self, weights: Tensor, slots: Tensor) -> Tensor:
        """Sums (B, H, T, D) of the values at `slots` (B, H, T, K) by `weights`, which are 0 where a slot is -1."""
        batch, heads, _, found = weights.shape
        table = self.values.flatten(0, 1)
        # A missing neighbour reads slot 0 with weight zero, so that nothing of it counts.
        places = (self.fold(slots.clamp(min=0)).flatten(1) + self._offsets).view(-1, found)
        folded = self.fold(weights).reshape(-1, found)
        if folded.requires_grad:
            sums = torch.bmm(folded[:, None], functional.embedding(places, table)).squeeze(1)
        else:
            sums = functional.embedding_bag(places, table, per_sample_weights=folded, mode="sum")
        return self.unfold(sums.view(len(self.values), -1, table.shape[-1]), batch, heads)


class RowMemory(KeySource):
    """The memory of R batch rows: a ring of C tokens each, and which token of its text each one was.

    Attributes:
        numbers: (R, C) int64 on the CPU: the number of the token at each slot, counted from the row's reset.
    """

    def __init__(self, shape: LayerShape, settings: MemorySettings, rows: int, device: torch.device) -> None:
        backend = make_backend(
            settings.backend,
            num_memories=rows * shape.key_heads,
            capacity=settings.memory_size,
            dim=shape.head_dim,
            device=backend_device(settings.backend, device),
            seed=settings.seed + shape.layer,
        )
        values = torch.zeros(backend.num_memories, settings.memory_size, shape.head_dim, device=device)
        super().__init__(backend, values, shape.key_heads)
        self.numbers = torch.zeros(rows, settings.memory_size, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """(R,) int64: tokens held for each row."""
        return self.backend.lengths.view(self.rows, self.key_heads)[:, 0]

    def append(self, keys: Tensor, values: Tensor, numbers: Tensor, counts: Sequence[int]) -> None:
        """Adds each row's first `counts[r]` of keys and values (R, G, T, D), the tokens `numbers` (R, T)."""
        numbers = numbers.cpu()
        for count in sorted({count for count in counts if count}):
            rows = [row for row, own in enumerate(counts) if own == count]
            whole = len(rows) == len(counts)
            chosen: slice | list[int] = slice(None) if whole else rows
            heads = torch.arange(self.key_heads)
            memories = None if whole else (torch.tensor(rows)[:, None] * self.key_heads + heads).flatten()
            some_keys = keys[chosen, :, :count].detach().float().flatten(0, 1)
            slots = self.backend.add(some_keys, memories=memories)
            stay = min(count, self.backend.capacity)  # older ones are evicted at once and have no slot
            slots = slots[:, -stay:].to(self.values.device)
            some_values = values[chosen, :, count - stay : count].detach().to(self.values.dtype).flatten(0, 1)
            offsets = self._offsets if memories is None else self._offsets[memories.to(self._offsets.device)]
            self.values.flatten(0, 1)[(slots + offsets).flatten()] = some_values.flatten(0, 1)
            by_row = slots.view(len(rows), self.key_heads, stay)[:, 0].cpu()
            self.numbers[torch.tensor(rows)[:, None], by_row] = numbers[chosen, count - stay : count]

    def reset(self, rows: Sequence[int]) -> None:
        """Forgets everything of some rows."""
        if len(rows) == self.rows:
            self.backend.reset()
        elif rows:
            heads = torch.arange(self.key_heads)
            self.backend.reset((torch.tensor(list(rows))[:, None] * self.key_heads + heads).flatten())

    def numbers_at(self, slots: Tensor) -> Tensor:
        """The tokens' numbers at `slots` (B, H, T, K); -1 where the slot is."""
        rows = torch.arange(len(slots)) // (len(slots) // self.rows)
        where = slots.cpu()
        found = self.numbers[rows[:, None, None, None], where.clamp(min=0)]
        return found.masked_fill(where < 0, -1).to(slots.device)


def shared_source(
    keys: Tensor, values: Tensor, shape: LayerShape, settings: MemorySettings, device: torch.device
) -> KeySource:
    """A source of fixed keys and values (G, N, D) that every row searches; entry n has slot n."""
    backend = make_backend(
        settings.backend,
        num_memories=shape.key_heads,
        capacity=keys.shape[1],
        dim=shape.head_dim,
        device=backend_device(settings.backend, device),
        seed=settings.seed + shape.layer,
    )
    backend.add(keys)
    return KeySource(backend, values.detach().float().to(device).contiguous(), shape.key_heads)


@dataclass(frozen=True)
class Recalled:
    """What a search over a layer's sources gave; one entry of `slots` for each source, in order.

    Attributes:
        logits: (B, H, T, K') float32, K' over all sources; -inf where missing or not among the best K.
        weights: their softmax, 0 where nothing was found.
        mass: (B, H, T) logarithm of the summed exponentials of the logits; -inf where nothing was found.
        remembered: (B, H, T, D) float32, the values weighted; 0 where nothing was found.
        slots: per source (B, H, T, K).
    """

    logits: Tensor
    weights: Tensor
    mass: Tensor
    remembered: Tensor
    slots: tuple[Tensor, ...]


def recall(sources: Sequence[KeySource], queries: Tensor, k: int, scaling: float) -> Recalled:
    """Attention of queries (B, H, T, D) float32 over the k best keys of all sources together.

    Args:
        sources: at least one.
        queries: as the keys are stored.
        k: K.
        scaling: multiplies inner products, as in the layer.
    """
    found = [source.search(queries, k) for source in sources]
    logits = torch.cat([scores for scores, _ in found], -1) * scaling
    if len(found) > 1:
        best = logits.topk(k, dim=-1).indices
        others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, best, False)
        logits = logits.masked_fill(others, -torch.inf)
    missing = torch.isneginf(logits)
    nothing = missing.all(-1)
    # Zero instead of -inf where a row found nothing keeps softmax and its gradient free of NaN; it is cleared below.
    safe = logits.masked_fill(nothing[..., None], 0.0)
    mass = torch.logsumexp(safe, -1).masked_fill(nothing, -torch.inf)
    weights = torch.softmax(safe, -1).masked_fill(missing, 0.0)
    slots = tuple(where for _, where in found)
    parts = weights.split([where.shape[-1] for where in slots], -1)
    sums = [source.weigh(part, where) for source, part, where in zip(sources, parts, slots, strict=True)]
    return Recalled(logits, weights, mass, sum(sums[1:], sums[0]), slots)
