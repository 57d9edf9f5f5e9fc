"""What the model sees by itself: the tokens of the call and of the cache, which enter the memory when they leave.

Letters: B batch rows, G key heads, S columns in sight, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class SightLayer(DynamicLayer):
    """One layer of a cache whose oldest tokens can be given up to the memory.

    The cache of a generation counts every token (`get_seq_length`), whatever it still holds: the first `forgotten`
    columns are gone, and masks are told so.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.forgotten = 0
        self.reordered = False

    @classmethod
    def holding(cls, keys: Tensor, values: Tensor) -> SightLayer:
        """A layer with these keys and values (B, G, S, D), not copied."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return layer

    def get_seq_length(self) -> int:
        """Columns seen, forgotten ones included."""
        return self.forgotten + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next attention sees, and the number of the first of them."""
        return super().get_seq_length() + query_length, self.forgotten

    def forget(self, seen: int) -> None:
        """Gives up all columns held; the next one will count as number `seen`."""
        self.keys = self.values = None
        self.is_initialized = False
        self.forgotten = seen

    def reset(self) -> None:
        super().reset()
        self.forgotten = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.reordered = True


@dataclass
class Sight:
    """The tokens in sight, and the memory layers' keys of them.

    Attributes:
        mask: (B, S) bool, which columns hold a real token that is visible.
        enters: (B, S) bool, which of them are to enter the memory when they leave.
        positions: (B, S) or (1, S) int64, the position that the model gave to each column.
        pieces: what was read, in order: token numbers (B, T) or embeddings (B, T, W).
        counts: visible tokens of each row.
        layers: by layer, the keys and values (B, G, S, D) as the model's cache has them.
        restarted: a window began within the text, so that positions and masks are ours to give.
        ended: (B,) bool, rows whose generation is over, so that what follows is filling; None while none is.
    """

    mask: Tensor
    enters: Tensor
    positions: Tensor
    pieces: list[Tensor]
    counts: list[int]
    layers: dict[int, SightLayer] = field(default_factory=dict)
    restarted: bool = False
    ended: Tensor | None = None

    def extend(self, other: Sight) -> None:
        """Adds the columns of a call that continued this sight."""
        self.mask = torch.cat((self.mask, other.mask), 1)
        self.enters = torch.cat((self.enters, other.enters), 1)
        rows = max(len(self.positions), len(other.positions))
        self.positions = torch.cat((self.positions.expand(rows, -1), other.positions.expand(rows, -1)), 1)
        self.pieces += other.pieces
        self.ended = other.ended
        self.counts = [old + new for old, new in zip(self.counts, other.counts, strict=True)]

    def crop(self, columns: int) -> None:
        """Keeps the first columns, after the cache was cropped (assisted generation takes tokens back)."""
        if columns >= self.mask.shape[1]:
            return
        self.mask, self.enters = self.mask[:, :columns], self.enters[:, :columns]
        self.positions = self.positions[:, :columns]
        kept: list[Tensor] = []
        for piece in self.pieces:
            kept.append(piece[:, : max(0, columns - sum(one.shape[1] for one in kept))])
        self.pieces = kept
        self.counts = self.mask.sum(1).tolist()

    @property
    def reordered(self) -> bool:
        """A beam search has moved rows about."""
        return any(layer.reordered for layer in self.layers.values())
