"""One layer with a memory: what its attention does with it.

Letters: B batch rows, N windows folded into them, H query heads, G key heads, T queries, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recollect.pretrained.attention import attention_with_mass
from recollect.pretrained.gates import MemoryGate
from recollect.pretrained.memory import KeySource, Recalled, RowMemory, recall
from recollect.pretrained.records import LayerShape, MemorySettings, Retrieved, StoredKeys
from recollect.pretrained.rotary import Rotary

if TYPE_CHECKING:
    from recollect.pretrained.reading import Reading


class AttachedLayer:
    """The memory of one layer. Made by `attach_memory`.

    Args:
        shape, settings: what was attached.
        gate: the layer's gate, which the handle owns.
        rotary: turns queries and keys; None where positions are learned.
        reading: what the calls have in common.

    Attributes:
        memory: the rows' memory; None until something is to be stored.
        store: a fixed source that all rows search, or None.
    """

    def __init__(
        self, shape: LayerShape, settings: MemorySettings, gate: MemoryGate, rotary: Rotary | None, reading: Reading
    ) -> None:
        self.shape = shape
        self.settings = settings
        self.gate = gate
        self.rotary = rotary
        self.reading = reading
        self.memory: RowMemory | None = None
        self.store: KeySource | None = None

    @torch.compiler.disable
    def attend(
        self,
        local: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over sight and memory; arguments and result as in `memory_attention`."""
        plan = self.reading.plan
        mass: Tensor | None = None
        if not plan.in_turn:
            self.reading.catch(self.shape.layer, key, value)
            if not self._sources():
                return local(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        if self.gate.needs_local_mass:
            seen, mass = attention_with_mass(query, key, value, mask, scaling=scaling, dropout=dropout)
        else:
            seen = local(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)[0].transpose(1, 2)
        if not plan.in_turn:
            joined = self._join(seen, mass, query, scaling, plan.positions, plan.numbers[:, 0])
        else:
            joined = self._attend_in_turn(seen, mass, query, key, value, scaling)
        return joined.transpose(1, 2).contiguous(), None

    def _attend_in_turn(
        self, seen: Tensor, mass: Tensor | None, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """The windows of each row one after another, each finding what the ones before it have left behind.

        All tensors have B * N rows, window n of row b in b * N + n; the local part of all is there already.
        """
        plan = self.reading.plan
        count = plan.windows
        by_window = [part.unflatten(0, (-1, count)) for part in (seen, query, key, value)]
        masses = None if mass is None else mass.unflatten(0, (-1, count))
        joined = []
        for number in range(count):
            one_seen, one_query, one_key, one_value = (part[:, number] for part in by_window)
            one_mass = None if masses is None else masses[:, number]
            if self._sources():
                joined.append(
                    self._join(one_seen, one_mass, one_query, scaling, plan.positions, plan.numbers[:, number])
                )
            else:
                joined.append(one_seen)
            leaving = plan.leaving[number]
            longest = max(leaving)
            if longest and self.reading.stores:
                self.append(
                    one_key[:, :, :longest],
                    one_value[:, :, :longest],
                    plan.positions[:, :longest],
                    plan.all_numbers[:, number, :longest],
                    leaving,
                )
        if plan.last is not None:
            rows = torch.arange(len(plan.last), device=key.device)
            last_key, last_value = (part[rows, plan.last] for part in by_window[2:])
            self.reading.catch(self.shape.layer, last_key, last_value)
        return torch.stack(joined, 1).flatten(0, 1)

    def _sources(self) -> list[KeySource]:
        """Where there is something to find now."""
        sources: list[KeySource] = []
        if self.memory is not None and self.reading.holding:
            sources.append(self.memory)
        if self.store is not None:
            sources.append(self.store)
        return sources

    def _join(
        self, seen: Tensor, mass: Tensor | None, query: Tensor, scaling: float, positions: Tensor, numbers: Tensor
    ) -> Tensor:
        """(B, H, T, D): the local part `seen` joined with what the queries, at `positions`, remember."""
        sources = self._sources()
        with torch.autocast(query.device.type, enabled=False):
            if self.rotary is not None:
                query = self.rotary.turn(query, self.settings.distance - positions)
            recalled = recall(sources, query.float(), self.settings.k, scaling)
            share = self.gate(mass, recalled.mass)
            joined = torch.lerp(seen.float(), recalled.remembered, share[..., None]).to(seen.dtype)
        if self.reading.observers:
            self._report(sources, recalled, share, numbers)
        return joined

    def _report(self, sources: list[KeySource], recalled: Recalled, share: Tensor, numbers: Tensor) -> None:
        """Tells the observers what was retrieved, the best K of all sources where there are several."""
        own, entries = [], []
        for source, slots in zip(sources, recalled.slots, strict=True):
            none = torch.full_like(slots, -1)
            is_own = isinstance(source, RowMemory)
            own.append(source.numbers_at(slots) if isinstance(source, RowMemory) else none)
            entries.append(none if is_own else slots)
        logits, order = recalled.logits.detach().topk(min(self.settings.k, recalled.logits.shape[-1]), dim=-1)
        missing = torch.isneginf(logits)
        positions, found = (torch.cat(parts, -1).gather(-1, order).masked_fill(missing, -1) for parts in (own, entries))
        weights = recalled.weights.detach().gather(-1, order)
        record = Retrieved(self.shape.layer, numbers, positions, found, logits, weights, share.detach())
        for observer in list(self.reading.observers):
            observer(record)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, numbers: Tensor, counts: list[int]) -> None:
        """Adds each row's first `counts[b]` tokens to its memory.

        Args:
            keys, values: (B, G, T, D) as the model's attention has them.
            positions: (B, T) or (1, T), what the model turned the keys by.
            numbers: (B, T), which token of the row's text each one is.
            counts: B numbers.
        """
        with torch.no_grad():
            keys, values = keys.detach(), values.detach()
            if self.rotary is not None:
                keys = self.rotary.turn(keys, -positions)
            if self.reading.storing_observers:
                ranks = torch.arange(keys.shape[2], device=keys.device)
                beyond = ranks >= torch.tensor(counts, device=keys.device)[:, None]
                record = StoredKeys(self.shape.layer, keys.to(values.dtype), values, numbers.masked_fill(beyond, -1))
                for observer in list(self.reading.storing_observers):
                    observer(record)
            if self.settings.memory_size:
                if self.memory is None:
                    self.memory = RowMemory(self.shape, self.settings, len(keys), keys.device)
                self.memory.append(keys, values, numbers, counts)
                self.reading.holding = True
