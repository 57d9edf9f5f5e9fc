"""What the calls of a model with memory have in common: what is in sight, when it leaves, and long texts in windows.

Two hooks on the base model do all of it. Before a call they settle what has left the model's sight, and if a text is
longer than a window they rearrange the call; after it they put the outputs back into the caller's shape.

Letters: B batch rows, T columns of a call, S columns in sight, N windows, W tokens of a window, R rows of the memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recollect.pretrained.errors import MemoryStateError, UnsupportedModel
from recollect.pretrained.layer import AttachedLayer
from recollect.pretrained.planning import Gather, Plan, plan_call, plan_continued, plan_windows
from recollect.pretrained.records import MemorySettings, Retrieved, StoredKeys
from recollect.pretrained.sight import Sight, SightLayer


class Reading:
    """The state between calls, and the two hooks.

    Args:
        base: the base model, whose forward is hooked.
        settings: what was attached.
        end_tokens, fill_tokens: what ends a generated text, and what may follow in a batch until all rows have ended.

    Attributes:
        layers: the layers with memory.
        holding: whether some memory holds a token.
        paused, frozen: nothing is retrieved and stored; nothing is stored.
        observers, storing_observers: called with every `Retrieved` and `StoredKeys`.
    """

    def __init__(
        self,
        base: Any,
        settings: MemorySettings,
        end_tokens: tuple[int, ...] = (),
        fill_tokens: tuple[int, ...] = (),
    ) -> None:
        self._base = [base]  # in a list, for no module of the model is to be registered twice
        self.settings = settings
        self.end_tokens = end_tokens
        self.fill_tokens = fill_tokens
        self.layers: list[AttachedLayer] = []
        self.holding = False
        self.paused = False
        self.frozen = False
        self.observers: list[Callable[[Retrieved], None]] = []
        self.storing_observers: list[Callable[[StoredKeys], None]] = []
        self.plan: Plan
        self.sight: Sight | None = None
        self.first: list[int] = []  # tokens of each memory row's text that came before the sight
        self.caught: dict[int, SightLayer] = {}
        self._prepared: tuple[Plan, Callable[[], None] | None] | None = None
        self.cached = False
        self.commit: Callable[[], None] | None = None
        self.split: tuple[list[Any], Gather] | None = None
        self._parameters = tuple(inspect.signature(base.forward).parameters)

    @property
    def base(self) -> Any:
        """The base model."""
        return self._base[0]

    @property
    def active(self) -> bool:
        """Whether the memory layers take part."""
        return not self.paused

    @property
    def stores(self) -> bool:
        """Whether what leaves the sight enters the memory."""
        return not (self.paused or self.frozen)

    @property
    def rows(self) -> int:
        """R."""
        return len(self.first)

    # The hooks --------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the base model."""
        self.split = None
        self.commit = None
        if self._prepared is not None:  # a call of our own, planned already
            (self.plan, self.commit), self._prepared = self._prepared, None
            return args, kwargs
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if inputs is None:
            return args, kwargs
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UnsupportedModel(
                "with memory, attention_mask must be the (batch, tokens) mask of padding: prepared 4-D masks (and "
                "static caches, which need them) are not supported"
            )
        cache = self._cache(given)
        seen = cache.get_seq_length() if cache is not None else 0
        batch, tokens = inputs.shape[:2]
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
        lengths = [tokens] * batch
        if mask is not None:
            if mask.shape[1] < tokens or len(mask) != batch:
                raise MemoryStateError(
                    f"attention_mask {tuple(mask.shape)} does not cover {batch} rows of {tokens} tokens"
                )
            valid = mask[:, -tokens:].bool()
            lengths = valid.sum(1).tolist()
        if not seen:
            self.close()
            self._fit_rows(batch)
            counts = [0] * batch
        else:
            counts = self._continued(cache, seen).counts
        longest = max((old + new for old, new in zip(counts, lengths, strict=True)), default=0)
        if longest <= self.settings.window:
            plan_call(self, given, inputs, valid, lengths, cache, self.sight if seen else None)
        else:
            for name in ("output_attentions", "token_type_ids"):
                if given.get(name) is not None and given[name] is not False:
                    raise UnsupportedModel(f"{name} can't be given for a text longer than the window")
            if seen:
                plan_continued(self, given, inputs, valid, cache)
            else:
                plan_windows(self, given, inputs, valid, cache)
        return (), given

    @torch.compiler.disable
    def after(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the base model."""
        if self.commit is not None:
            self.commit()
            self.commit = None
        if self.split is None:
            return None
        earlier, gather = self.split
        self.split = None
        outputs = [*earlier, output]
        if isinstance(output, tuple):
            return (gather([one[0] for one in outputs]), *output[1:])
        output.last_hidden_state = gather([one.last_hidden_state for one in outputs])
        if getattr(output, "hidden_states", None) is not None:
            by_layer = zip(*(one.hidden_states for one in outputs), strict=True)
            output.hidden_states = tuple(gather(list(states)) for states in by_layer)
        return output

    # What the layers report -------------------------------------------------------------------------------------------

    def catch(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Remembers the keys and values (B, G, S, D) that are in sight of a layer, where no cache holds them."""
        if self.cached:
            return
        self.caught[layer] = SightLayer.holding(keys.detach(), values.detach())

    # What is in sight -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """What is in sight leaves it: it enters the memory."""
        sight, self.sight = self.sight, None
        # Rows that share a memory, or that a beam search has moved about, have no one text that could be remembered.
        if sight is not None and len(sight.mask) == self.rows and not sight.reordered:
            self.leave(sight, sight.counts)

    def forget(self, rows: list[int] | None) -> None:
        """New documents begin: nothing of the old is stored later."""
        if rows is None:
            self.sight, self.first = None, [0] * self.rows
            self.holding = False
            for layer in self.layers:
                layer.memory = None
            return
        for row in rows:
            self.first[row] = 0
            if self.sight is not None:
                self.sight.enters[row] = False
        for layer in self.layers:
            if layer.memory is not None:
                layer.memory.reset(rows)
                self.holding = bool(layer.memory.lengths.any())

    def leave(self, sight: Sight, counts: list[int]) -> None:
        """The first `counts[b]` visible tokens of each row leave the sight, and enter the memory if they should."""
        device = sight.mask.device
        ranks = sight.mask.cumsum(1) - 1
        before = self.first_of(len(counts), device)[:, None]
        leaving = sight.enters & sight.mask & (ranks < torch.tensor(counts, device=device)[:, None])
        numbers = leaving.sum(1).tolist()
        self.advance(counts)
        longest = max(numbers, default=0)
        if not longest:
            return
        columns = torch.argsort(~leaving, dim=1, stable=True)[:, :longest]
        positions = sight.positions.expand(len(columns), -1).gather(1, columns)
        text_numbers = (before + ranks).gather(1, columns)
        together = bool(leaving[:, :longest].all())
        for layer in self.layers:
            held = sight.layers[layer.shape.layer]
            assert held.keys is not None
            assert held.values is not None
            if together:
                keys, values = held.keys[:, :, :longest], held.values[:, :, :longest]
            else:
                where = columns[:, None, :, None].expand(-1, held.keys.shape[1], -1, held.keys.shape[3])
                keys, values = held.keys.gather(2, where), held.values.gather(2, where)
            layer.append(keys, values, positions, text_numbers, numbers)

    def _fit_rows(self, batch: int) -> None:
        if batch == self.rows:
            return
        if not self.holding:
            for layer in self.layers:
                layer.memory = None
            self.first = [0] * batch
        elif batch % self.rows:
            raise MemoryStateError(
                f"the memory holds the texts of {self.rows} rows and this call has {batch}: call handle.reset() before "
                "other texts, or give the same rows again"
            )

    def first_of(self, batch: int, device: torch.device) -> Tensor:
        """(B,) tokens of each row's text before the sight, rows that share a memory alike."""
        return torch.tensor(self.first, device=device).repeat_interleave(batch // self.rows)

    def advance(self, counts: list[int]) -> None:
        """Tokens of each memory row's text have gone out of sight."""
        # Rows that share a memory are continuations of one text, and of one length.
        self.first = [
            first + count for first, count in zip(self.first, counts[:: len(counts) // self.rows], strict=True)
        ]

    def call(self, given: dict[str, Any]) -> Any:
        """Calls the base model as it was planned, within the planning of another call."""
        self._prepared = (self.plan, self.commit)
        return self.base(**given)

    def check_can_store(self, batch: int, sight: Sight | None) -> None:
        if self.stores and (batch != self.rows or (sight is not None and sight.reordered)):
            raise MemoryStateError(
                f"tokens would have to leave the window of {self.settings.window} tokens for the memory, but "
                + (
                    "beam search moves its rows about"
                    if batch == self.rows
                    else f"{batch} rows share {self.rows} memories"
                )
                + ": keep prompt and new tokens within the window, attach with a longer window, or generate one "
                "sequence per row without beams"
            )

    def _cache(self, given: dict[str, Any]) -> Any:
        """The cache of this call, made ours if it is empty; None without one."""
        from transformers.cache_utils import DynamicCache

        cache = given.get("past_key_values")
        wanted = given.get("use_cache")
        if wanted is None:
            wanted = getattr(self.base.config, "use_cache", False)
        checkpointing = getattr(self.base, "gradient_checkpointing", False) and self.base.training
        if cache is None and (not wanted or checkpointing):
            given["use_cache"] = False
            self.cached = False
            return None
        if cache is None:
            cache = DynamicCache()
            given["past_key_values"] = cache
        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            raise UnsupportedModel(
                f"memory works with transformers' DynamicCache, which model.generate makes by itself, not with "
                f"{type(cache).__name__}: leave cache_implementation and past_key_values out"
            )
        if not cache.get_seq_length():
            cache.layers = [SightLayer() for _ in range(self.base.config.num_hidden_layers)]
        self.cached = True
        return cache

    def _continued(self, cache: Any, seen: int) -> Sight:
        """The sight that this cache continues."""
        ours = [cache.layers[layer.shape.layer] for layer in self.layers]
        sight = self.sight
        if sight is None or any(
            sight.layers.get(layer.shape.layer) is not own for layer, own in zip(self.layers, ours, strict=True)
        ):
            raise MemoryStateError(
                "this cache's tokens are not what the model last read (another text was read since, or the memory was "
                "attached, flushed or reset): start again without past_key_values"
            )
        sight.crop(seen - ours[0].forgotten)
        return sight
