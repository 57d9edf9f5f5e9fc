"""Documents as a dataset whose batches follow one another: what a model with memory is fine-tuned on.

Every batch row reads its documents from start to end, a segment a batch, so that what a row read before is in its
memory when the row goes on. A `transformers.Trainer` keeps the order of an iterable dataset; a shuffling sampler would
tear the documents apart.

Letters: B batch rows, T tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from recollect.model.configuration import ConfigurationError
from recollect.model.streams import DocumentStreams, Segment


class DocumentSegments(IterableDataset[dict[str, Tensor]]):
    """Segments of documents, in the order in which B rows read them: items t*B to t*B + B-1 are batch t.

    Give it to a Trainer as `train_dataset` or `eval_dataset`, with a batch size of exactly `rows`. Each item has

    * `input_ids`, `attention_mask` (T,): the segment, padded with token 0 behind a document's end;
    * `labels` (T,): the same tokens, -100 on padding, as Hugging Face's models shift them;
    * `shift_labels` (T,): the next token of the document at every place, also at a segment's last, which `labels` can
      not give; the loss uses these;
    * `document_starts` (): true where the segment is its document's first, and the row is to forget what it read.

    Args:
        documents: texts, or their token numbers.
        rows: B, the batch size of one step (not multiplied by gradient accumulation).
        segment_length: T, at most the tokens that the model attends to by itself.
        tokenizer: turns texts into numbers, without special tokens; without it the documents must be numbers already.
        shuffle: documents in an order of their own in every epoch, read on from epoch to epoch, so that no row ever
            waits; otherwise, for evaluation, each document once, the longest first.
        seed: of the order.

    Raises:
        ConfigurationError: documents that are no text and no numbers, or text without a tokenizer.
        CorpusError: no document fills a segment.
    """

    def __init__(
        self,
        documents: Sequence[str] | Sequence[Sequence[int]] | Sequence[NDArray[Any]],
        *,
        rows: int,
        segment_length: int,
        tokenizer: Any = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.documents = [token_numbers(document, tokenizer) for document in documents]
        self.rows = rows
        self.segment_length = segment_length
        self.shuffle = shuffle
        self.seed = seed
        self._epoch = 0
        streams = self._streams()
        if shuffle:
            self.steps = -(-streams.segments_per_epoch() // rows)
        else:
            self.steps = streams.total_steps() or 0

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(map(len, self.documents))

    def __len__(self) -> int:
        """Items of one epoch, so that a Trainer knows its number of steps."""
        return self.steps * self.rows

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration reads; a Trainer calls it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if torch.utils.data.get_worker_info() is not None:
            raise ConfigurationError(
                "DocumentSegments keeps its order in one process alone: set dataloader_num_workers=0, the default"
            )
        streams = self._streams()
        for _ in range(self._epoch * self.steps if self.shuffle else 0):
            streams.next_segment()
        for _ in range(self.steps):
            segment = streams.next_segment()
            assert segment is not None  # an epoch was counted with these very streams
            yield from self._items(segment)

    def _streams(self) -> DocumentStreams:
        epochs = None if self.shuffle else 1
        return DocumentStreams(
            self.documents, self.rows, self.segment_length, seed=self.seed, shuffle=self.shuffle, epochs=epochs
        )

    def _items(self, segment: Segment) -> Iterator[dict[str, Tensor]]:
        # A row with nothing left still reads one token, for which there is no loss and which the next batch forgets:
        # attention over nothing at all is not defined.
        visible = torch.arange(self.segment_length) < segment.lengths.clamp_min(1)[:, None]
        is_text = torch.arange(self.segment_length) < segment.lengths[:, None]
        labels = segment.tokens.masked_fill(~is_text, -100)
        for row in range(self.rows):
            yield {
                "input_ids": segment.tokens[row],
                "attention_mask": visible[row].long(),
                "labels": labels[row],
                "shift_labels": segment.targets[row],
                "document_starts": segment.document_starts[row],
            }


def token_numbers(document: str | Sequence[int] | NDArray[Any], tokenizer: Any) -> NDArray[np.int64]:
    """The token numbers (N,) of a document; raises ConfigurationError where they cannot be had."""
    if isinstance(document, str):
        if tokenizer is None:
            raise ConfigurationError("a document is text: give the model's tokenizer, or documents as token numbers")
        # verbose: a document longer than the model's context is nothing to warn of here.
        document = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    numbers = np.asarray(document)
    if numbers.ndim != 1 or (len(numbers) and not np.issubdtype(numbers.dtype, np.integer)):
        raise ConfigurationError(
            f"a document must be a text or a row of token numbers, not {numbers.dtype} of shape {numbers.shape}"
        )
    return numbers.astype(np.int64)


__all__ = ["DocumentSegments", "token_numbers"]
