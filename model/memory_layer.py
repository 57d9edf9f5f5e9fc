"""A memory as one layer uses it: keys in a backend, values in a ring beside it.

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


class _RetrievedLogits(torch.autograd.Function):
    """Inner products of queries (N, D) with their retrieved keys (N, K, D); gradients reach the queries alone.

    Written out because plain autograd would lay out the transposed keys for the gradient, which costs more than all
    the rest.
    """

    @staticmethod
    def forward(context: Any, queries: Tensor, keys: Tensor) -> Tensor:
        context.save_for_backward(keys)
        return torch.bmm(keys, queries[:, :, None]).squeeze(2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keys,) = context.saved_tensors
        return torch.bmm(gradients[0][:, None, :], keys).squeeze(1), None


class _WeightedValues(torch.autograd.Function):
    """Sums of retrieved values (N, K, D) weighted by (N, K); gradients reach the weights alone."""

    @staticmethod
    def forward(context: Any, weights: Tensor, values: Tensor) -> Tensor:
        context.save_for_backward(values)
        return torch.bmm(weights[:, None, :], values).squeeze(1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (values,) = context.saved_tensors
        return torch.bmm(values, gradients[0][:, :, None]).squeeze(2), None


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


class LayerMemory:
    """The memories of one layer, one for each (row, head): search, attend, append, reset.

    The backend holds the keys; `values` (M, C, D) holds each key's value at the key's slot. No gradient flows into
    either.

    Args:
        backend: M = batch_size * heads empty memories of the layer's head dimension.
        heads: H.
        k: pairs to retrieve for each query.
        device: where the values lie: the model's, since attention reads them there; the backend's when None.
        eviction: 'fifo', or 'most_used' (see `recollect.model.eviction`).
        kept_share: for `most_used`, keys that stay for each new key.
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
    ) -> None:
        if backend.num_memories % heads:
            raise ValueError(
                f"a backend of {backend.num_memories} memories cannot serve {heads} heads: it must be a multiple"
            )
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        self.backend = backend
        self.heads = heads
        self.k = k
        device = backend.device if device is None else device
        self.values = torch.zeros(backend.num_memories, backend.capacity, backend.dim, device=device)
        self._offsets = torch.arange(backend.num_memories, device=device)[:, None] * backend.capacity
        self.usage: Usage | None = None
        if eviction == "most_used":
            self.usage = Usage(backend.num_memories, backend.capacity, kept_share=kept_share, device=device)
        elif eviction != "fifo":
            raise ConfigurationError(f"eviction={eviction!r} is unknown; choose one of {', '.join(EVICTIONS)}")

    @property
    def batch_size(self) -> int:
        """B."""
        return self.backend.num_memories // self.heads

    def state_tensors(self) -> dict[str, Tensor]:
        """What it holds beside the backend, by name: the very tensors, so that copying into them restores them."""
        return {"values": self.values} | ({} if self.usage is None else {"usage": self.usage.totals})

    def reset_rows(self, rows: Tensor) -> None:
        """Forgets everything in the rows marked in `rows` (B,) bool; the others stay as they are."""
        chosen = torch.nonzero(rows.cpu()).flatten()
        if len(chosen) == 0:
            return
        if len(chosen) == self.batch_size:
            self.backend.reset()
        else:
            self.backend.reset((chosen[:, None] * self.heads + torch.arange(self.heads)).flatten())

    def attend(self, queries: Tensor, scale: Tensor) -> Retrieved:
        """Attention over the K retrieved pairs of each query: softmax(scale * q.k) v.

        Args:
            queries: (B, H, T, D) as searched; the memory's keys are compared with them as they are.
            scale: (H,) multiplies the logits.
        """
        batch, heads, tokens, dim = queries.shape
        flat_queries = queries.float().reshape(batch * heads, tokens, dim)
        result = self.backend.search(flat_queries, self.k)
        slots = result.slots.to(self.values.device)
        missing = slots < 0
        logits = self._logits(flat_queries, result.scores, result.slots)
        logits = logits.view(batch, heads, tokens, -1) * scale.float()[:, None, None]
        missing = missing.view_as(logits)
        # The least finite number instead of -inf: a row without any neighbour then stays free of NaN, and its weights
        # are cleared below.
        logits = logits.masked_fill(missing, torch.finfo(torch.float32).min)
        weights = torch.softmax(logits, dim=-1).masked_fill(missing, 0.0)
        if self.usage is not None:
            self.usage.note(slots.flatten(1), weights.reshape(len(slots), -1))
        # A missing neighbour reads slot 0 with weight zero, so that nothing of it counts.
        rows = (slots.clamp_min(0).flatten(1) + self._offsets).view(-1, slots.shape[-1])
        flat_weights = weights.reshape(rows.shape)
        values = self.values.flatten(0, 1)
        if weights.requires_grad:
            # The append that follows overwrites slots of the ring, so the gradient needs its own copy of what was read.
            remembered = _WeightedValues.apply(flat_weights, functional.embedding(rows, values))
        else:
            remembered = functional.embedding_bag(rows, values, per_sample_weights=flat_weights, mode="sum")
        return Retrieved(
            remembered.view(batch, heads, tokens, dim), ~missing[..., 0], logits, weights, slots.view_as(logits)
        )

    def _logits(self, queries: Tensor, scores: Tensor, slots: Tensor) -> Tensor:
        """(M, T, K) inner products of queries (M, T, D) with the keys at `slots` (M, T, K)."""
        wants_gradient = torch.is_grad_enabled() and queries.requires_grad
        if self.backend.capabilities.exact and self.backend.metric == "inner_product" and not wants_gradient:
            return scores
        # Scores of quantised indexes are not the attention's logits, and no score carries a gradient.
        keys = self.backend.gather_keys(slots).to(queries.dtype)
        return _RetrievedLogits.apply(queries.flatten(0, 1), keys.flatten(0, 1)).view(slots.shape)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds the pairs (B, H, T, D), oldest first, as they are now: later training does not change them."""
        with torch.no_grad():
            new_keys = keys.detach().float().flatten(0, 1)
            new_values = values.detach().float().flatten(0, 1)
            if self.usage is None:
                self._write(self.backend.add(new_keys), new_values)
                return
            for addition in self.usage.additions(self.backend.ring.totals, new_keys.shape[1]):
                which = addition.memories
                old_keys = self.backend.gather_keys(addition.slots[:, None], memories=which)[:, 0]
                rows = which.to(self.values.device)
                old_values = self.values[rows[:, None], addition.slots.to(self.values.device)]
                slots = self.backend.add(
                    torch.cat([old_keys.to(new_keys.device), new_keys[rows.to(new_keys.device)]], dim=1),
                    memories=which,
                )
                self._write(slots, torch.cat([old_values, new_values[rows.to(new_values.device)]], dim=1), rows)

    def _write(self, slots: Tensor, values: Tensor, memories: Tensor | None = None) -> None:
        """Puts values (M', T, D) of all memories, or of `memories` (M',), at `slots` (M', T)."""
        slots, offsets = slots.to(self.values.device), self._offsets
        if memories is not None:
            offsets = offsets[memories]
        if slots.shape[1] > self.backend.capacity:  # the oldest are evicted at once and have no slot
            slots, values = slots[:, -self.backend.capacity :], values[:, -self.backend.capacity :]
        self.values.view(-1, values.shape[-1])[(slots + offsets).flatten()] = values.flatten(0, 1)
        if self.usage is not None and memories is not None:
            self.usage.begin(slots, memories)
