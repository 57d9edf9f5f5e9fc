"""Watching the memory layers of a checkpoint while it reads: what they retrieve, and how much of the output that is.

Letters: B batch rows, T tokens of a segment, H heads, K neighbours, R of them kept, C capacity of a memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.model.attention import Attention
from recollect.model.evaluation_text import EvaluationText
from recollect.model.gates import Gate, Scores
from recollect.model.hidden_keys import AnyMemory
from recollect.model.memory_layer import Retrieved
from recollect.model.streams import IGNORED
from recollect.model.transformer import MemorizingTransformer
from recollect.pretrained.inspection_text import StoreEntries


class Watcher:
    """Notes what each memory layer retrieves while a model reads one text, segment by segment.

    Args:
        model: with first-in first-out memories.
        text: what it reads.
        size: C, keys that each memory holds.
        keep: R.
        stored: keys of a store under the memories, whose slots follow those of the memory.
    """

    def __init__(
        self,
        model: MemorizingTransformer,
        text: EvaluationText,
        size: int,
        keep: int,
        stored: StoreEntries | None = None,
    ) -> None:
        self.model, self.text, self.size, self.keep, self.stored = model, text, size, keep, stored
        self.layers = model.config.memory_layers
        self._tokens = _padded_documents(text)
        self._notes: list[dict[str, list[NDArray[Any]]]] = [{} for _ in self.layers]
        self._segments = [0] * len(self.layers)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, every segment that the model reads with memory is noted."""
        with contextlib.ExitStack() as stack:
            for place, layer in enumerate(self.layers):
                attention = cast(Attention, self.model.layers[layer].attention)
                stack.callback(attention.register_forward_pre_hook(self._memory_hook(place)).remove)
                stack.callback(attention.gate.register_forward_hook(self._gate_hook(place)).remove)
            yield

    def arrays(self) -> dict[str, Any]:
        """What was seen, as `TokenArrays` wants it."""
        names = ("share", "retrieved", "origin", "weight", "on_target", "before_target", "distance")
        return {name: np.stack([np.concatenate(notes[name]) for notes in self._notes], axis=1) for name in names}

    def _memory_hook(self, place: int) -> Callable[..., tuple[Any, ...]]:
        def hook(attention: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, state, memory = arguments
            return hidden, state, _WatchedMemory(memory, lambda found: self._note_retrieved(place, found))

        return hook

    def _gate_hook(self, place: int) -> Callable[..., None]:
        def hook(gate: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            share = _share_of(gate, *arguments)
            self._note(place, "share", share.cpu().to(torch.float16), self._segments[place] - 1)

        return hook

    def _note_retrieved(self, place: int, found: Retrieved) -> None:
        segment = self._segments[place]
        self._segments[place] += 1
        slots, weights = found.slots.cpu(), found.weights.detach().float().cpu()  # (B, H, T, K)
        appended = self.text.position[segment][:, None, None, None]  # keys in the row's memories by now
        of_store = slots >= self.size
        own = appended - 1 - (appended - 1 - slots) % self.size
        positions = own.masked_fill(of_store | (slots < 0), -1)
        rows = self.text.document_index[segment].clamp_min(0)[:, None, None, None]
        there = self._tokens[rows, positions.clamp_min(0)]
        after = self._tokens[rows, (positions + 1).clamp_min(0)]
        origin = torch.full_like(positions, -1)
        if self.stored is not None:
            entries = (slots - self.size).clamp_min(0)
            origin = torch.where(of_store, torch.from_numpy(self.stored.documents)[entries], origin)
            positions = torch.where(of_store, torch.from_numpy(self.stored.positions)[entries], positions)
            there = torch.where(of_store, torch.from_numpy(self.stored.tokens)[entries], there)
            after = torch.where(of_store, torch.from_numpy(self.stored.following)[entries], after)
        self._note(place, "retrieved", positions[..., : self.keep].to(torch.int32), segment)
        self._note(place, "origin", origin[..., : self.keep].to(torch.int32), segment)
        self._note(place, "weight", weights[..., : self.keep].to(torch.float16), segment)
        targets = self.text.targets[segment][:, None, :, None]
        for name, tokens in (("on_target", there), ("before_target", after)):
            hits = (tokens == targets) & (slots >= 0)
            self._note(place, name, (weights * hits).sum(-1).to(torch.float16), segment)
        predicted = appended + torch.arange(1, slots.shape[2] + 1)[:, None]
        mine = weights.masked_fill(of_store | (slots < 0), 0.0)
        away = (mine * (predicted - own)).sum(-1) / mine.sum(-1)  # NaN where all of it is the store's
        self._note(place, "distance", away, segment)

    def _note(self, place: int, name: str, per_token: Tensor, segment: int) -> None:
        """Keeps (B, H, T, ...) as entries (n, H, ...) of the tokens that have a target."""
        wanted = self.text.targets[segment] != IGNORED
        self._notes[place].setdefault(name, []).append(per_token.transpose(1, 2)[wanted].numpy())


class _WatchedMemory:
    """A layer's memory that tells what each search found."""

    def __init__(self, memory: AnyMemory, tell: Callable[[Retrieved], None]) -> None:
        self._memory, self._tell = memory, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def attend(self, *arguments: Any) -> Retrieved:
        found: Retrieved = self._memory.attend(*arguments)
        self._tell(found)
        return found


def _share_of(
    gate: Gate, local: Tensor, remembered: Tensor, found: Tensor, hidden: Tensor, scores: Scores | None = None
) -> Tensor:
    """(B, H, T) memory's share of the joined output; NaN for a gate that does not mix the two in shares.

    A gate that mixes gives the share when the local attention is 0 and memory's is 1, and 1 when both are.
    """
    zeros, ones = torch.zeros_like(local), torch.ones_like(local)
    # Not gate(...): that would call the hook which asks this.
    share = gate.forward(zeros, ones, found, hidden, scores)[..., 0].float()
    whole = gate.forward(ones, ones, found, hidden, scores)
    return share if bool(torch.isclose(whole, ones, atol=1e-3).all()) else torch.full_like(share, torch.nan)


def _padded_documents(text: EvaluationText) -> Tensor:
    """(documents, longest + 1) int64: the tokens that were read, -1 beyond the end."""
    longest = max(text.document_tokens)
    padded = torch.full((len(text.document_names), longest + 1), -1, dtype=torch.int64)
    for segment in range(text.segments):
        for row in range(text.rows):
            document, start, count = (
                int(part[segment, row]) for part in (text.document_index, text.position, text.lengths)
            )
            if document >= 0:
                padded[document, start : start + count] = text.tokens[segment, row, :count]
    return padded
