"""A checkpoint of this package with a store beside its memory: each query searches both, and the best K of all win.

The store's keys are shared by all batch rows and never change; the memory of the text being read stays as it is, one
for each row and head, and is forgotten at a document's start while the store stays.

Letters: B batch rows, H heads, T tokens, N keys of the store, C capacity of a row's memory, K neighbours, D dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, canonical_spec
from recollect.memory_backends.registry import make_backend
from recollect.model.checkpoints import Checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.evaluation import Replay
from recollect.model.evaluation_types import MemorySpecification
from recollect.model.hidden_keys import AnyMemory
from recollect.model.memory_layer import LayerMemory, Retrieved
from recollect.model.transformer import ModelState, UpperState
from recollect.model.trunk import TrunkOutput
from recollect.pretrained.memorizing import checkpoint_identity
from recollect.pretrained.store import MemoryStore, StoreError


class LayerMemoryOverStore(LayerMemory):
    """The memories of one layer, and the store's keys of that layer under all of them.

    In what `attend` returns, slot C + n is the store's key number n.

    Args:
        backend: of the rows' own memories, as for `LayerMemory`.
        stored: one memory a head, which holds the store's keys.
        stored_values: (H, N, D).
        heads, k, device: as for `LayerMemory`.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        stored: MemoryBackend,
        stored_values: Tensor,
        *,
        heads: int,
        k: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(backend, heads=heads, k=k, device=device)
        self.stored = stored
        self.stored_values = stored_values.float().to(self.values.device)

    def attend(self, queries: Tensor, scale: Tensor) -> Retrieved:
        """As `LayerMemory.attend`, over the best K pairs of the row's memory and the store together."""
        batch, heads, tokens, _ = queries.shape
        own_logits, own_slots = self._search(self.backend, queries.float().flatten(0, 1))
        folded = queries.float().transpose(0, 1).flatten(1, 2)  # (H, B * T, D): the store has no rows
        logits, slots = self._search(self.stored, folded)
        shape = (heads, batch, tokens, -1)
        logits, slots = (part.view(shape).transpose(0, 1) for part in (logits, slots))
        whole = (batch, heads, tokens, -1)
        merged = torch.cat([own_logits.view(whole), logits], dim=-1)
        places = torch.cat([own_slots.view(whole), torch.where(slots < 0, -1, slots + self.backend.capacity)], dim=-1)
        best = merged.topk(min(self.k, merged.shape[-1]), dim=-1)
        places = places.gather(-1, best.indices)
        missing = places < 0
        scaled = best.values * scale.float()[:, None, None]
        scaled = scaled.masked_fill(missing, torch.finfo(torch.float32).min)
        weights = torch.softmax(scaled, dim=-1).masked_fill(missing, 0.0)
        remembered = torch.einsum("bhtk,bhtkd->bhtd", weights, self._values_at(places))
        return Retrieved(remembered, ~missing[..., 0], scaled, weights, places)

    def _search(self, backend: MemoryBackend, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products (M, Q, K) with what a backend finds for queries (M, Q, D), -inf for none; and slots."""
        result = backend.search(queries, self.k)
        slots = result.slots.to(self.values.device)
        scores = result.scores
        if not (backend.capabilities.exact and backend.metric == "inner_product"):
            keys = backend.gather_keys(result.slots)
            scores = torch.einsum("mqd,mqkd->mqk", queries.to(keys.device), keys)
        return scores.to(slots.device).masked_fill(slots < 0, -torch.inf), slots

    def _values_at(self, places: Tensor) -> Tensor:
        """(B, H, T, K, D) the values of the rows' own memories and of the store."""
        batch, heads = places.shape[:2]
        capacity = self.backend.capacity
        rows = torch.arange(batch * heads, device=places.device).view(batch, heads, 1, 1)
        head = torch.arange(heads, device=places.device).view(1, heads, 1, 1)
        of_store = places >= capacity
        own = self.values[rows, places.masked_fill(of_store | (places < 0), 0)]
        if not self.stored_values.shape[1]:
            return own
        stored = self.stored_values[head, (places - capacity).masked_fill(~of_store, 0)]
        return torch.where(of_store[..., None], stored, own)


def check_store(checkpoint: Checkpoint, store: MemoryStore) -> None:
    """Raises StoreError if the store was not made by this checkpoint at all its memory layers, or holds nothing."""
    store.check(checkpoint_identity(checkpoint))
    if not store.tokens:
        raise StoreError(f"{store.path} is empty: fill it with `recollect memorize`")


def upper_state_over_store(
    checkpoint: Checkpoint,
    store: MemoryStore,
    batch_size: int,
    *,
    backend: str = "exact",
    memory_size: int | None = None,
    k: int | None = None,
    seed: int = 0,
) -> UpperState:
    """The upper part's state before any token, with a store under every memory; arguments as for `initial_state`.

    Raises:
        StoreError: another model made the store.
        ConfigurationError: the memory of the text being read would be smaller than a segment.
    """
    check_store(checkpoint, store)
    model, config = checkpoint.model, checkpoint.model.config
    size = config.memory_size if memory_size is None else memory_size
    if size < config.segment_length:
        raise ConfigurationError(
            f"memory_size is {size}: beside a store, the memory of the text being read takes at least a segment "
            f"({config.segment_length} keys)"
        )
    neighbours = config.k if k is None else k
    plain = model.initial_upper_state(batch_size, backend=backend, memory_size=size, k=min(neighbours, size), seed=seed)
    memories: list[AnyMemory] = []
    for layer, memory in zip(config.memory_layers, plain.memories, strict=True):
        keys = store.layer_keys(layer).float()
        stored = make_backend(
            backend,
            num_memories=config.heads,
            capacity=keys.shape[1],
            dim=config.head_dim,
            device=memory.backend.device,
            seed=seed + layer,
        )
        stored.add(keys)
        memories.append(
            LayerMemoryOverStore(
                memory.backend,
                stored,
                store.layer_values(layer),
                heads=config.heads,
                k=neighbours,
                device=model.device,
            )
        )
    return UpperState(plain.layers, memories)


def state_over_store(checkpoint: Checkpoint, store: MemoryStore, batch_size: int, **memory: Any) -> ModelState:
    """As `upper_state_over_store`, of the whole model."""
    return ModelState(
        checkpoint.model.initial_trunk_state(batch_size),
        upper_state_over_store(checkpoint, store, batch_size, **memory),
    )


class ReplayOverStore(Replay):
    """An evaluation from the first memory layer up, with a store; arguments as for `upper_state_over_store`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        trunk: TrunkOutput,
        store: MemoryStore,
        *,
        backend: str = "exact",
        memory_size: int | None = None,
        k: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(checkpoint.model, trunk, backend="none")
        self._state = upper_state_over_store(
            checkpoint, store, trunk.rows, backend=backend, memory_size=memory_size, k=k, seed=seed
        )
        memory = self._state.memories[0]
        self._memory = MemorySpecification(canonical_spec(backend), memory.backend.capacity, memory.k)
