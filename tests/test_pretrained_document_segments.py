"""Documents as consecutive batches: nothing lost, nothing out of order, in a Trainer's own data loader too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from recollect.model.configuration import ConfigurationError
from recollect.model.documents import CorpusError
from recollect.pretrained.document_segments import DocumentSegments

LENGTHS = (50, 33, 70, 21)
DOCUMENTS = [list(range(100 * number, 100 * number + length)) for number, length in enumerate(LENGTHS)]


def batches(dataset: DocumentSegments, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    dataset.set_epoch(epoch)
    return list(DataLoader(dataset, batch_size=dataset.rows))


def read_by_row(parts: list[dict[str, torch.Tensor]], row: int) -> list[list[int]]:
    """The documents that a row reads, put together again."""
    documents: list[list[int]] = []
    for part in parts:
        if part["document_starts"][row]:
            documents.append([])
        documents[-1] += part["labels"][row][part["labels"][row] >= 0].tolist()
    return [document for document in documents if document]


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_evaluation_reads_every_document_once_from_start_to_end(rows: int) -> None:
    dataset = DocumentSegments(DOCUMENTS, rows=rows, segment_length=16, shuffle=False)
    parts = batches(dataset)
    assert len(parts) == dataset.steps == len(dataset) // rows
    read = [document for row in range(rows) for document in read_by_row(parts, row)]
    assert sorted(read) == DOCUMENTS


def test_training_goes_on_from_epoch_to_epoch() -> None:
    dataset = DocumentSegments(DOCUMENTS, rows=2, segment_length=16, seed=3)
    parts = [part for epoch in range(4) for part in batches(dataset, epoch)]
    for row in range(2):
        *whole, last = read_by_row(parts, row)
        assert all(document in DOCUMENTS for document in whole)
        assert any(last == document[: len(last)] for document in DOCUMENTS)
    again = batches(dataset, 2)
    assert all(
        torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(again, parts[14:21], strict=True)
    )
    other = DocumentSegments(DOCUMENTS, rows=2, segment_length=16, seed=4)
    assert not torch.equal(batches(other)[0]["input_ids"], parts[0]["input_ids"])


def test_the_next_token_is_known_over_a_segment_boundary() -> None:
    (first, second, *_) = batches(DocumentSegments(DOCUMENTS, rows=1, segment_length=16, shuffle=False))
    assert first["shift_labels"][0, -1] == second["input_ids"][0, 0]
    assert torch.equal(first["shift_labels"][0, :-1], first["labels"][0, 1:])
    targets = sum(
        int((part["shift_labels"] >= 0).sum())
        for part in batches(DocumentSegments(DOCUMENTS, rows=2, segment_length=16, shuffle=False))
    )
    assert targets == sum(LENGTHS) - len(LENGTHS)  # all but each document's first token


def test_padding_is_masked_and_no_row_sees_nothing_at_all() -> None:
    parts = batches(DocumentSegments(DOCUMENTS, rows=3, segment_length=16, shuffle=False))
    assert all((part["attention_mask"].sum(1) >= 1).all() for part in parts)
    assert all((part["labels"][part["attention_mask"] == 0] == -100).all() for part in parts)
    idle = [part for part in parts if (part["labels"] < 0).all(1).any()]
    assert idle, "the longest row outlasts the others, so this was tried"
    for part in idle:
        rows = (part["labels"] < 0).all(1)
        assert part["document_starts"][rows].all()
        assert (part["shift_labels"][rows] == -100).all()


def test_text_goes_through_the_tokenizer() -> None:
    class Letters:
        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [ord(letter) for letter in text]}

    dataset = DocumentSegments(["abcdefgh"], rows=1, segment_length=4, tokenizer=Letters(), shuffle=False)
    assert dataset.tokens == 8
    assert [part["input_ids"][0].tolist() for part in batches(dataset)] == [[97, 98, 99, 100], [101, 102, 103, 104]]


def test_what_cannot_be_read_is_told() -> None:
    with pytest.raises(ConfigurationError, match="tokenizer"):
        DocumentSegments(["text"], rows=1, segment_length=4)
    with pytest.raises(ConfigurationError, match="token numbers"):
        DocumentSegments([np.zeros((2, 3), dtype=np.int64)], rows=1, segment_length=4)
    with pytest.raises(CorpusError, match="shorter than a segment"):
        DocumentSegments([[1, 2, 3]], rows=1, segment_length=8)
    with pytest.raises(ConfigurationError, match="dataloader_num_workers=0"):
        list(DataLoader(DocumentSegments(DOCUMENTS, rows=1, segment_length=16), batch_size=1, num_workers=1))
