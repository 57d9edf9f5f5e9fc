"""The handle of an attached memory, and how it is put onto a model; `recollect.pretrained.attach` is the front door."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recollect.memory_backends import make_backend
from recollect.model.configuration import ConfigurationError
from recollect.pretrained import attention, families
from recollect.pretrained.errors import UnsupportedModel
from recollect.pretrained.gates import check_gate, make_memory_gate
from recollect.pretrained.layer import AttachedLayer
from recollect.pretrained.memory import shared_source
from recollect.pretrained.reading import Reading
from recollect.pretrained.records import KeyStore, LayerShape, MemorySettings, Retrieved, StoredKeys
from recollect.pretrained.rotary import Rotary

SETTINGS = "recollect_memory"
"""The model's attribute that holds the handle, and its configuration's that holds the settings."""


def attach_settings(model: Any, settings: MemorySettings, store: KeyStore | None = None) -> AttachedMemory:
    """`attach_memory` by settings made before; they are checked again, for the model may be another."""
    model = families.causal_model(model)
    check_gate(settings.gate, settings.gate_share)
    families.choose_layers(settings.layers, len(families.attention_modules(model)))
    families.choose_window(model, settings.layers, settings.window)
    if not 0 <= settings.overlap < settings.window:
        raise ConfigurationError(f"overlap={settings.overlap} must be at least 0 and below window={settings.window}")
    if settings.memory_size == 0 and store is None:
        raise ConfigurationError("memory_size=0 leaves nothing to search; give a size, or a store")
    if 0 < settings.memory_size < settings.k:
        raise ConfigurationError(
            f"k={settings.k} is above memory_size={settings.memory_size}: no more can be retrieved than is kept"
        )
    shapes = families.layer_shapes(model, settings.layers)
    # A backend that is unknown, not installed or too wide for its index is told now, not at the first long text.
    make_backend(settings.backend, num_memories=1, capacity=max(1, settings.k), dim=shapes[0].head_dim)
    if store is not None:
        missing = sorted(set(settings.layers) - set(store.layers))
        if missing:
            raise ConfigurationError(
                f"the store holds keys of layers {list(store.layers)}, not of {missing}; "
                "attach to those or make another"
            )
        store.check_fits(shapes, model)
    plain = model.config._attn_implementation or "eager"
    if plain not in attention.PLAIN:
        raise UnsupportedModel(
            f"memory can't stand on the attention implementation {plain!r}; load the model with "
            f"attn_implementation={' or '.join(map(repr, attention.PLAIN))}"
        )
    if plain == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise UnsupportedModel(
            "reorder_and_upcast_attn goes past the attention interface; load with attn_implementation='sdpa'"
        )
    return AttachedMemory(model, settings, shapes, plain, store)


class AttachedMemory(nn.Module):
    """A model's memory: what it holds, and how to take it off. Made by `attach_memory`.

    Letters: B batch rows.

    Attributes:
        settings: what was attached.
        shapes: the memory layers' shapes.
        gates: the layers' gates, by their number as text.
    """

    def __init__(
        self,
        model: Any,
        settings: MemorySettings,
        shapes: tuple[LayerShape, ...],
        plain: str,
        store: KeyStore | None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.shapes = shapes
        self._plain = plain
        self._model = [model]  # in a list, for the model holds this module, not the other way round
        example = model.get_input_embeddings().weight
        self.gates = nn.ModuleDict(
            {
                str(shape.layer): make_memory_gate(settings.gate, shape.heads, settings.gate_share).to(example.device)
                for shape in shapes
            }
        )
        base = model.base_model
        rotary = Rotary(base.rotary_emb) if families.family_of(model).rotary else None
        generation = getattr(model, "generation_config", None)
        ends = _token_numbers(getattr(generation, "eos_token_id", None))
        self._reading = Reading(base, settings, ends, _token_numbers(getattr(generation, "pad_token_id", None)))
        modules = families.attention_modules(model)
        for shape in shapes:
            gate: Any = self.gates[str(shape.layer)]
            layer = AttachedLayer(shape, settings, gate, rotary, self._reading)
            if store is not None:
                keys, values = store.layer_keys(shape.layer), store.layer_values(shape.layer)
                layer.store = shared_source(keys, values, shape, settings, example.device)
            self._reading.layers.append(layer)
            setattr(modules[shape.layer], attention.ATTRIBUTE, layer)
        attention.register()
        model.set_attn_implementation(attention.interface_name(plain))
        self._hooks = [
            base.register_forward_pre_hook(self._reading.before, with_kwargs=True),
            base.register_forward_hook(self._reading.after, with_kwargs=True),
        ]
        setattr(model.config, SETTINGS, settings.to_dict())
        setattr(model, SETTINGS, self)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens that each row's memory holds; empty before the first call."""
        memory = self._reading.layers[0].memory
        return torch.zeros(self._reading.rows, dtype=torch.int64) if memory is None else memory.lengths.clone()

    @property
    def index_bytes(self) -> int:
        """Bytes that all memories take now: keys, values, and what the index has beside them."""
        total = 0
        for layer in self._reading.layers:
            for source in (layer.memory, layer.store):
                if source is not None:
                    stats = source.backend.stats()
                    total += source.backend.ring.nbytes + stats.index_bytes + source.values.nbytes
        return total

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Other documents begin: the memory is emptied, and what is in sight does not enter it any more.

        Args:
            rows: row numbers, or (B,) bool; all rows when None.

        Raises:
            ConfigurationError: there is no such row.
        """
        if rows is None:
            self._reading.forget(None)
            return
        if isinstance(rows, Tensor):
            rows = rows.nonzero().flatten().tolist() if rows.dtype == torch.bool else rows.tolist()
        wrong = [row for row in rows if not 0 <= row < self._reading.rows]
        if wrong:
            raise ConfigurationError(f"there are no rows {wrong}: the memory has {self._reading.rows}")
        self._reading.forget(list(rows))

    def flush(self) -> None:
        """What is in sight enters the memory now; a cache that holds it cannot be continued."""
        self._reading.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is retrieved and what is read never enters the memory: the model by itself.

        Up to `window` tokens its logits are those of the model without memory, bit for bit; longer texts are still
        read window by window.
        """
        before, self._reading.paused = self._reading.paused, True
        try:
            yield
        finally:
            self._reading.paused = before

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it the memory is searched, and what is read never enters it."""
        before, self._reading.frozen = self._reading.frozen, True
        try:
            yield
        finally:
            self._reading.frozen = before

    @contextlib.contextmanager
    def observing(self, observer: Callable[[Retrieved], None]) -> Iterator[None]:
        """Within it `observer` is told what each memory layer retrieves, once a layer and window."""
        self._reading.observers.append(observer)
        try:
            yield
        finally:
            self._reading.observers.remove(observer)

    @contextlib.contextmanager
    def observing_stored(self, observer: Callable[[StoredKeys], None]) -> Iterator[None]:
        """Within it `observer` is told which keys enter the memory, layer by layer; `flush` when a text has ended."""
        self._reading.storing_observers.append(observer)
        try:
            yield
        finally:
            self._reading.storing_observers.remove(observer)

    def detach(self) -> None:
        """Takes the memory off: the model is what it was before `attach_memory`."""
        model = self._model[0]
        if getattr(model, SETTINGS, None) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        for module in families.attention_modules(model):
            if hasattr(module, attention.ATTRIBUTE):
                delattr(module, attention.ATTRIBUTE)
        model.set_attn_implementation(self._plain)
        delattr(model.config, SETTINGS)
        delattr(model, SETTINGS)
        self._reading.forget(None)


def _token_numbers(given: int | list[int] | None) -> tuple[int, ...]:
    """A token number of a generation configuration, which may be one, several or none."""
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)


__all__ = ["SETTINGS", "AttachedMemory", "attach_settings"]
