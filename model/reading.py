"""Reading text in pieces of any size, with the same result as reading it in whole segments.

The model is trained on whole segments: a memory is searched before the segment is appended, so within a segment no
token finds another of that segment there. A reader keeps to that when text comes token by token, as it does in
generation: the segment stays *open* until it has `segment_length` tokens. Its keys and values wait beside the
Transformer-XL cache, where the tokens after them attend to them, and enter the memory all at once when the segment is
full. The logits are then those of reading the whole text at once, to rounding, however it was cut.

Letters: B batch rows, T tokens of a segment, N tokens given, X cached tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from recollect.model.attention import Attention
from recollect.model.hidden_keys import AnyMemory
from recollect.model.local_attention import LayerState
from recollect.model.transformer import MemorizingTransformer, ModelState, TrunkState, UpperState


class Reader:
    """Feeds text to a model, in pieces of any size, every row from the beginning of a document.

    The rows share the places where segments end, so each call gives every row equally many tokens. No gradient flows:
    training reads whole segments, through the model itself.

    Args:
        model: it is used in the mode it is in; switch it to `eval()` first.
        state: of B rows, new or at the end of a segment; the reader changes its memories. None makes a new one with the
            arguments of `MemorizingTransformer.initial_state`.

    Attributes:
        position: tokens read so far.
    """

    def __init__(
        self, model: MemorizingTransformer, state: ModelState | None = None, *, batch_size: int = 1, **memory: Any
    ) -> None:
        self.model = model
        self.position = 0
        self._state = model.initial_state(batch_size, **memory) if state is None else state
        self._open: _OpenSegment | None = None

    @torch.no_grad()
    def read(self, tokens: Tensor, *, last_only: bool = False) -> Tensor:
        """Logits (B, N, V) for the token after each of `tokens` (B, N) int64; (B, 1, V), the last, with `last_only`.

        With `last_only` a long text needs no more room than one segment's logits.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} cannot be read: want (rows, tokens), at least one")
        kept: list[Tensor] = []
        while tokens.shape[1]:
            room = self.model.config.segment_length - (self._open.length if self._open else 0)
            logits = self._read_piece(tokens[:, :room])
            tokens = tokens[:, room:]
            if last_only:
                kept = [logits[:, -1:]]
            else:
                kept.append(logits)
        return torch.cat(kept, dim=1)

    def _read_piece(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, V) of tokens that fit into the segment."""
        self.position += tokens.shape[1]
        begins = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        if self._open is None and tokens.shape[1] == self.model.config.segment_length:
            output = self.model(tokens, self._state, begins)
            self._state = output.state
            return output.logits
        if self._open is None:
            self._open = _OpenSegment(self._state)
        logits = self._open.read(self.model, tokens, begins)
        if self._open.length == self.model.config.segment_length:
            self._state = self._open.close(self.model)
            self._open = None
        return logits


class _OpenSegment:
    """A segment of which only the first tokens are known.

    Attributes:
        length: tokens of it that were read.
    """

    def __init__(self, state: ModelState) -> None:
        self.length = 0
        self._before = state
        self._trunk = TrunkState([layer.opened() for layer in state.trunk.layers])
        self._upper = UpperState(
            [layer.opened() for layer in state.upper.layers],
            [cast(AnyMemory, _WaitingMemory(memory)) for memory in state.memories],
        )

    def read(self, model: MemorizingTransformer, tokens: Tensor, begins: Tensor) -> Tensor:
        hidden, self._trunk = model.trunk(tokens, self._trunk, begins)
        logits, self._upper = model.upper(hidden, self._upper, begins)
        self.length += tokens.shape[1]
        return logits

    def close(self, model: MemorizingTransformer) -> ModelState:
        """The state at the end of the segment: every key enters the memory now."""
        for memory in self._upper.memories:
            cast(_WaitingMemory, memory).append_what_waits()
        first = len(self._trunk.layers)
        layers = [
            _closed(model, number, before, grown)
            for number, (before, grown) in enumerate(
                zip(
                    self._before.trunk.layers + self._before.upper.layers,
                    self._trunk.layers + self._upper.layers,
                    strict=True,
                )
            )
        ]
        return ModelState(TrunkState(layers[:first]), UpperState(layers[first:], self._before.memories))


def _closed(model: MemorizingTransformer, number: int, before: LayerState, grown: LayerState) -> LayerState:
    """The state of a layer after the whole segment, as one step over it would have left it."""
    cached = before.cached_keys.shape[2]
    attention = cast(Attention, model.layers[number].attention)
    return attention.advance(
        before, grown.cached_keys[:, :, cached:], grown.cached_values[:, :, cached:], grown.convolution
    )


class _WaitingMemory:
    """A layer's memory that is searched as it is, while what is appended waits for the end of the segment."""

    def __init__(self, memory: AnyMemory) -> None:
        self._memory = memory
        self._waiting: list[tuple[Tensor, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def append(self, *pairs: Tensor) -> None:
        self._waiting.append(pairs)

    def append_what_waits(self) -> None:
        # Tokens are the last dimension but one, of keys (B, H, T, D) as of hidden states (B, T, W).
        self._memory.append(*(torch.cat(parts, dim=-2) for parts in zip(*self._waiting, strict=True)))
        self._waiting = []
