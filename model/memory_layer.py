"""A memory as one layer uses it: keys in a backend, values in a ring beside it.

`Memory` is what the two kinds share: `LayerMemory` here, and `recollect.model.hidden_keys.HiddenMemory`.

Letters: B batch rows, H heads, M memories (M = B*H, memory b*H + h belongs to row b and head h), T tokens, C capacity,
K neighbours, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend
from recollect.model.configuration import EVICTIONS, ConfigurationError
from recollect.model.eviction import Usage
from recollect.model.value_store import FLOAT32, ValueStore


class RetrievedLogits(torch.autograd.Function):
    """Inner products of queries (N, D) with their retrieved keys (N, K, D); `known` (N, K), where a search gave them.

    Gradients reach the queries, and the keys where they have one. Written out because plain autograd would lay out the
    transposed keys for the gradient, which costs more than all the rest.
    """

    @staticmethod
    def forward(context: Any, queries: Tensor, keys: Tensor, known: Tensor | None = None) -> Tensor:
        context.save_for_backward(keys, queries if keys.requires_grad else None)
        return known.clone() if known is not None else _inner_products(keys, queries)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        keys, queries = context.saved_tensors
        of_keys = None if queries is None else gradients[0][:, :, None] * queries[:, None, :]
        return torch.bmm(gradients[0][:, None, :], keys).squeeze(1), of_keys, None


class WeightedValues(torch.autograd.Function):
    """Sums of retrieved values (N, K, D) weighted by (N, K); gradients as in `RetrievedLogits`."""

    @staticmethod
    def forward(context: Any, weights: Tensor, values: Tensor) -> Tensor:
        context.save_for_backward(values, weights if values.requires_grad else None)
        return torch.bmm(weights[:, None, :], values).squeeze(1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        values, weights = context.saved_tensors
        of_values = None if weights is None else weights[:, :, None] * gradients[0][:, None, :]
        return _inner_products(values, gradients[0]), of_values


def _inner_products(rows: Tensor, vectors: Tensor) -> Tensor:
    """(N, K) of rows (N, K, D) with a vector (N, D) each; the vector goes left, which reads the rows faster."""
    return torch.bmm(vectors[:, None, :], rows.transpose(1, 2)).squeeze(1)


@dataclass(frozen=True)
class Retrieved:
    """What a memory answered.

    Attributes:
        remembered: (B, H, T, D) float32, attention over the K retrieved pairs alone; zero where nothing was found.
        found: (B, H, T) bool, whether there was anything.
        logits: (B, H, T, K) float32, scaled; the least finite number where a neighbour is missing.
        weights: (B, H, T, K) float32, softmax of the logits; zero where a neighbour is missing.
        slots: (B, H, T, K) int64, where each pair lies; -1 where a neighbour is missing.
    """

    remembered: Tensor
    found: Tensor
    logits: Tensor
    weights: Tensor
    slots: Tensor


class Memory:
    """The memories of one layer: a backend, and whatever must follow its keys from slot to slot.

    Args:
        backend: empty memories, the same number for each row.
        per_row: memories that a row has; memory b * per_row + n is the n-th of row b.
        k: pairs to retrieve for each query.
        device: where attention reads; the backend's when None.
        eviction: 'fifo', or 'most_used' (see `recollect.model.eviction`).
        kept_share: for `most_used`, keys that stay for each new key.
        values: how values are stored (see `recollect.model.value_store`); None where they are not.

    Attributes:
        store: each key's value at the key's slot; None where values are not stored.
        usage: what attention used, for `most_used`.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        *,
        per_row: int,
        k: int,
        values: str | None,
        device: torch.device | None = None,
        eviction: str = "fifo",
        kept_share: float = 0.5,
    ) -> None:
        if backend.num_memories % per_row:
            raise ValueError(
                f"a backend of {backend.num_memories} memories cannot serve {per_row} heads: it must be a multiple"
            )
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        self.backend = backend
        self.per_row = per_row
        self.k = k
        self.device = backend.device if device is None else device
        self.store: ValueStore | None = None
        if values is not None:
            self.store = ValueStore(values, (backend.num_memories, backend.capacity, backend.dim), self.device)
        self._offsets = torch.arange(backend.num_memories, device=self.device)[:, None] * backend.capacity
        self.usage: Usage | None = None
        if eviction == "most_used":
            self.usage = Usage(backend.num_memories, backend.capacity, kept_share=kept_share, device=self.device)
        elif eviction != "fifo":
            raise ConfigurationError(f"eviction={eviction!r} is unknown; choose one of {', '.join(EVICTIONS)}")

    @property
    def batch_size(self) -> int:
        """B."""
        return self.backend.num_memories // self.per_row

    @property
    def nbytes(self) -> int:
        """Bytes of main memory of what is remembered now: keys and values alive, and the index."""
        stats = self.backend.stats()
        value_bytes = 0 if self.store is None else self.store.value_bytes
        return stats.key_bytes + stats.keys * value_bytes + stats.index_bytes

    def state_tensors(self) -> dict[str, Tensor]:
        """What it holds beside the backend, by name: the very tensors, so that copying into them restores them."""
        tensors = {} if self.store is None else {"values": self.store.tensor}
        return tensors | ({} if self.usage is None else {"usage": self.usage.totals})

    def reset_rows(self, rows: Tensor) -> None:
        """Forgets everything in the rows marked in `rows` (B,) bool; the others stay as they are."""
        chosen = torch.nonzero(rows.cpu()).flatten()
        if len(chosen) == 0:
            return
        if len(chosen) == self.batch_size:
            self.backend.reset()
        else:
            self.backend.reset((chosen[:, None] * self.per_row + torch.arange(self.per_row)).flatten())

    def _weigh(self, logits: Tensor, scale: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled logits and their softmax, both (B, H, T, K), from plain ones and their slots; the use is counted.

        Args:
            logits: (B, H, T, K) inner products; anything where a neighbour is missing.
            scale: (H,).
            slots: (B, H, T, K), -1 where a neighbour is missing.
        """
        missing = slots < 0
        # The least finite number instead of -inf: a row without any neighbour then stays free of NaN, and its weights
        # are cleared below.
        logits = (logits * scale.float()[:, None, None]).masked_fill(missing, torch.finfo(torch.float32).min)
        weights = torch.softmax(logits, dim=-1).masked_fill(missing, 0.0)
        if self.usage is not None:
            memories = self.backend.num_memories
            self.usage.note(slots.reshape(memories, -1), weights.reshape(memories, -1))
        return logits, weights

    @torch.no_grad()
    def _append(self, keys: Tensor, values: Tensor | None) -> None:
        """Adds keys, and values where they are kept, (M, T, D) float32, oldest first."""
        if self.usage is None:
            self._write(self.backend.add(keys), values)
            return
        for addition in self.usage.additions(self.backend.ring.totals, keys.shape[1]):
            which, old_slots = addition.memories, addition.slots
            old_keys = self.backend.gather_keys(old_slots[:, None], memories=which)[:, 0].to(keys.device)
            rows = which.to(self.device)
            all_values = None
            if self.store is not None and values is not None:
                old_values = self.store.read(old_slots.to(self.device) + self._offsets[rows])
                all_values = torch.cat([old_values, values.to(self.device)[rows]], dim=1)
            all_keys = torch.cat([old_keys, keys[which.to(keys.device)]], dim=1)
            slots = self.backend.add(all_keys, memories=which)
            self._write(slots, all_values, rows)
            self.usage.begin(slots[:, -self.backend.capacity :], rows)

    def _write(self, slots: Tensor, values: Tensor | None, memories: Tensor | None = None) -> None:
        """Puts values (M', T, D) of all memories, or of `memories` (M',), at `slots` (M', T)."""
        if self.store is None or values is None:
            return
        slots = slots.to(self.device)
        offsets = self._offsets if memories is None else self._offsets[memories]
        if slots.shape[1] > self.backend.capacity:  # the oldest are evicted at once and have no slot
            slots, values = slots[:, -self.backend.capacity :], values[:, -self.backend.capacity :]
        self.store.write((slots + offsets).flatten(), values.flatten(0, 1))


class LayerMemory(Memory):
    """Keys and values as each head computed them, one memory for each (row, head).

    The backend holds the keys; `values` (M, C, D) holds each key's value at the key's slot. No gradient flows into
    either.

    Args:
        backend: M = batch_size * heads empty memories of the layer's head dimension.
        heads: H.
        k, device, eviction, kept_share, values: as for `Memory`.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        *,
        heads: int,
        k: int,
        device: torch.device | None = None,
        eviction: str = "fifo",
        kept_share: float = 0.5,
        values: str = FLOAT32,
    ) -> None:
        super().__init__(
            backend, per_row=heads, k=k, values=values, device=device, eviction=eviction, kept_share=kept_share
        )
        self.heads = heads

    @property
    def values(self) -> Tensor:
        """(M, C, D), as they are stored."""
        assert self.store is not None
        return self.store.tensor

    def attend(self, queries: Tensor, scale: Tensor) -> Retrieved:
        """Attention over the K retrieved pairs of each query: softmax(scale * q.k) v.

        Args:
            queries: (B, H, T, D) as searched; the memory's keys are compared with them as they are.
            scale: (H,) multiplies the logits.
        """
        batch, heads, tokens, dim = queries.shape
        flat_queries = queries.float().reshape(batch * heads, tokens, dim)
        result = self.backend.search(flat_queries, self.k)
        slots = result.slots.to(self.device)
        per_head = slots.view(batch, heads, tokens, -1)
        logits, weights = self._weigh(
            self._logits(flat_queries, result.scores, result.slots).view_as(per_head), scale, per_head
        )
        # A missing neighbour reads slot 0 with weight zero, so that nothing of it counts.
        rows = (slots.clamp_min(0).flatten(1) + self._offsets).view(-1, slots.shape[-1])
        flat_weights = weights.reshape(rows.shape)
        assert self.store is not None
        if weights.requires_grad or not self.store.is_plain:
            # The append that follows overwrites slots of the ring, so the gradient needs its own copy of what was read.
            remembered = WeightedValues.apply(flat_weights, self.store.read(rows))
        else:
            values = self.values.flatten(0, 1)
            remembered = functional.embedding_bag(rows, values, per_sample_weights=flat_weights, mode="sum")
        return Retrieved(remembered.view(batch, heads, tokens, dim), per_head[..., 0] >= 0, logits, weights, per_head)

    def _logits(self, queries: Tensor, scores: Tensor, slots: Tensor) -> Tensor:
        """(M, T, K) inner products of queries (M, T, D) with the keys at `slots` (M, T, K)."""
        wants_gradient = torch.is_grad_enabled() and queries.requires_grad
        are_logits = self.backend.capabilities.exact and self.backend.metric == "inner_product"
        if are_logits and not wants_gradient:
            return scores
        # Scores of quantised indexes are not the attention's logits, and no score carries a gradient.
        keys = self.backend.gather_keys(slots).to(queries.dtype)
        known = scores.masked_fill(slots < 0, 0.0).to(keys).flatten(0, 1) if are_logits else None
        return RetrievedLogits.apply(queries.flatten(0, 1), keys.flatten(0, 1), known).view(slots.shape)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds the pairs (B, H, T, D), oldest first, as they are now: later training does not change them."""
        self._append(keys.detach().float().flatten(0, 1), values.detach().float().flatten(0, 1))
