"""Documents dealt to batch rows, segment by segment: what training and evaluation read.

Legend: B batch rows, T tokens per segment.

Each row reads its own documents, one after the other, each from its start to its end. The next document goes to the
row that is free first. In evaluation (`shuffle=False`) the longest documents come first, which is the classical rule
(longest processing time) for rows that end at about the same step; in training each epoch has an order of its own,
drawn from (seed, epoch), so that the state of a stream is a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.model.documents import CorpusError
from recollect.model.token_cache import TokenizedDocuments

IGNORED = -100  # The target that torch's cross-entropy passes over.
STATE_VERSION = 1


@dataclass(frozen=True)
class Segment:
    """One step of text for every row.

    tokens: (B, T) int64. After the end of a document, and in a row with nothing left, 0.
    targets: (B, T) int64, the next token of the same document; -100 at its last token and on padding. The target of
        a segment's last token is the first token of the row's next segment.
    document_starts: (B,) bool, true where the segment is the first of its document, and in a row with nothing left,
        so that what such a row leaves behind is forgotten at every step.
    document_index: (B,) int64, the place in `TokenizedDocuments`; -1 in a row with nothing left.
    position: (B,) int64, the place of the segment's first token in its document; 0 in a row with nothing left.
    lengths: (B,) int64, how many of the T tokens are text.
    """

    tokens: Tensor
    targets: Tensor
    document_starts: Tensor
    document_index: Tensor
    position: Tensor
    lengths: Tensor

    def of_rows(self, start: int, stop: int) -> Segment:
        """The same of rows `start` to `stop` - 1 alone."""
        return Segment(*(getattr(self, item.name)[start:stop] for item in fields(self)))


class DocumentStreams:
    """Iterates over the segments of `documents`; every token that has a predecessor is a target once per epoch.

    epochs: how often each document is read; None goes on for ever.
    seed: decides the order of each epoch if `shuffle`; without, the order is by length and the seed has no effect.

    Iteration goes on where it stopped: `state_dict()` between two segments, given to `load_state_dict` of streams made
    with the same arguments, continues with the very next segment. Documents of one token have no target and are passed
    over. Raises CorpusError where no document fills a segment: a memory could never hold anything by then.
    """

    def __init__(
        self,
        documents: TokenizedDocuments | Sequence[NDArray[Any]],
        batch_size: int,
        segment_length: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        epochs: int | None = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("segment_length", segment_length), ("epochs", epochs)):
            if value is not None and value < 1:
                raise CorpusError(f"{name} is {value}: want 1 or more")
        if not isinstance(documents, TokenizedDocuments):
            names = tuple(str(number) for number in range(len(documents)))
            documents = TokenizedDocuments(names, tuple(documents), digest="")
        longest = max((len(array) for array in documents.arrays), default=0)
        if longest < max(2, segment_length):
            remedy = f"give longer documents, or a segment length of at most {longest}"
            raise CorpusError(
                f"the corpus is shorter than a segment: its longest document has {longest} tokens and a segment "
                f"{segment_length}; {remedy if longest >= 2 else 'give longer documents'}"
            )
        self.documents = documents
        self.batch_size = batch_size
        self.segment_length = segment_length
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs
        self._usable = np.asarray([i for i, array in enumerate(documents.arrays) if len(array) >= 2], dtype=np.int64)
        self._lengths = np.asarray([len(array) for array in documents.arrays], dtype=np.int64)
        self._epoch = 0
        self._dealt = 0  # Documents of this epoch that rows have taken.
        self._order = self._order_of(0)
        self._rows: list[tuple[int, int]] = [(-1, 0)] * batch_size  # (document, position of its next segment)
        self.steps = 0

    def __iter__(self) -> Iterator[Segment]:
        while (segment := self.next_segment()) is not None:
            yield segment

    def next_segment(self) -> Segment | None:
        """The next segment of every row; None when all rows have nothing left."""
        shape = (self.batch_size, self.segment_length)
        tokens, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        index = np.full(self.batch_size, -1, dtype=np.int64)
        position, lengths = np.zeros_like(index), np.zeros_like(index)
        self._deal()
        for row, (document, start) in enumerate(self._rows):
            if document < 0:
                continue
            text = self.documents.arrays[document]
            piece = text[start : start + self.segment_length]
            following = text[start + 1 : start + 1 + self.segment_length]
            tokens[row, : len(piece)] = piece
            targets[row, : len(following)] = following
            index[row], position[row], lengths[row] = document, start, len(piece)
            end = start + self.segment_length
            self._rows[row] = (document, end) if end < len(text) else (-1, 0)
        if not lengths.any():
            return None
        self.steps += 1
        starts = torch.from_numpy(position == 0)
        parts = (torch.from_numpy(array) for array in (index, position, lengths))
        return Segment(torch.from_numpy(tokens), torch.from_numpy(targets), starts, *parts)

    def segments_per_epoch(self) -> int:
        """Segments that the documents make together, over all rows: an epoch takes about a B-th as many steps."""
        return int(np.sum(-(-self._lengths[self._usable] // self.segment_length)))

    def total_steps(self) -> int | None:
        """Steps from the first segment to the last; None for streams that never end."""
        if self.epochs is None:
            return None
        ends = [0] * self.batch_size
        for epoch in range(self.epochs):
            for document in self._order_of(epoch):
                row = int(np.argmin(ends))
                ends[row] += -(-int(self._lengths[document]) // self.segment_length)
        return max(ends)

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand, in JSON's types: what they read (to be checked) and how far they are."""
        return {
            "version": STATE_VERSION,
            **self._identity(),
            "epoch": self._epoch,
            "dealt": self._dealt,
            "rows": [list(row) for row in self._rows],
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken; raises CorpusError if it is damaged or of other streams."""
        for key, value in {"version": STATE_VERSION, **self._identity()}.items():
            if state.get(key) != value:
                raise CorpusError(f"this state is of other streams: its {key} is {state.get(key)!r}, here {value!r}")
        try:
            epoch, dealt, steps = (int(state[key]) for key in ("epoch", "dealt", "steps"))
            rows = [(int(document), int(position)) for document, position in state["rows"]]
            sound = len(rows) == self.batch_size and 0 <= dealt <= len(self._usable) and epoch >= 0 and steps >= 0
            sound = sound and all(
                (document, position) == (-1, 0)
                or (0 <= document < len(self.documents) and 0 <= position < self._lengths[document])
                for document, position in rows
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"this state of document streams is damaged: {error!r}") from error
        if not sound:
            raise CorpusError("this state of document streams is damaged: it names rows or documents that are not here")
        self._epoch, self._dealt, self.steps, self._rows = epoch, dealt, steps, rows
        self._order = self._order_of(epoch)

    def _identity(self) -> dict[str, Any]:
        return {
            "documents": self.documents.digest,
            "lengths": [len(self.documents), self.documents.tokens],
            "batch_size": self.batch_size,
            "segment_length": self.segment_length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epochs": self.epochs,
        }

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if self.shuffle:
            return np.random.default_rng([self.seed, epoch]).permutation(self._usable)
        return self._usable[np.argsort(-self._lengths[self._usable], kind="stable")]

    def _deal(self) -> None:
        """Gives a document to every row that is free, as long as there are any."""
        for row, (document, _) in enumerate(self._rows):
            if document >= 0:
                continue
            if self._dealt == len(self._order) and (self.epochs is None or self._epoch + 1 < self.epochs):
                self._epoch, self._dealt = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            if self._dealt == len(self._order):
                continue
            self._rows[row] = (int(self._order[self._dealt]), 0)
            self._dealt += 1
