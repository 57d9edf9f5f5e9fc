"""What an inspection finds, token by token, and the two files it is kept in.

`run.json` says what was run on which documents, with their text; `inspection.npz` holds one entry a predicted token.
`recollect.reports` reads both and makes the page.

Letters: N predicted tokens, L memory layers, H heads, R retrieved pairs kept of the K that attention uses.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.memory_backends.atomic import write_bytes, write_json

SCHEMA = 1
ARRAYS, RUN = "inspection.npz", "run.json"


@dataclass(frozen=True)
class InspectedDocument:
    """A document as it was read: name, text, and where each token that was read begins and ends in the text (n, 2)."""

    name: str
    text: str
    offsets: NDArray[np.int32]


@dataclass(frozen=True)
class TokenArrays:
    """One entry a predicted token, in reading order.

    Attributes:
        document: (N,) int32, place in the documents.
        position: (N,) int32, place in its document.
        token: (N,) int32, its id.
        loss: (N,) float32, with memory, natural logarithm.
        loss_without: (N,) float32, the same model with nothing to remember.
        loss_twin: (N,) float32, a model trained without memory; NaN where there is none.
        kind: (N,) int8, place in `KINDS`.
        occurrence: (N,) int8, place in `OCCURRENCES`.
        share: (N, L, H) float16, memory's share of the head's output; NaN where the gate has no such number.
        retrieved: (N, L, H, R) int32, positions of the retrieved pairs that got most weight, -1 for none.
        origin: (N, L, H, R) int32, where they stand: -1 in the document itself, else a place in `Inspection.stored`.
        weight: (N, L, H, R) float16, their weight among all that the head retrieved.
        on_target: (N, L, H) float16, weight on pairs of tokens equal to the one to be predicted.
        before_target: (N, L, H) float16, weight on pairs whose next token equals the one to be predicted.
        distance: (N, L, H) float32, mean distance in tokens from the predicted token back, NaN where nothing was
            retrieved from the document itself.
    """

    document: NDArray[np.int32]
    position: NDArray[np.int32]
    token: NDArray[np.int32]
    loss: NDArray[np.float32]
    loss_without: NDArray[np.float32]
    loss_twin: NDArray[np.float32]
    kind: NDArray[np.int8]
    occurrence: NDArray[np.int8]
    share: NDArray[np.float16]
    retrieved: NDArray[np.int32]
    origin: NDArray[np.int32]
    weight: NDArray[np.float16]
    on_target: NDArray[np.float16]
    before_target: NDArray[np.float16]
    distance: NDArray[np.float32]


@dataclass(frozen=True)
class Inspection:
    """The tokens, the documents they are of, what was run as plain JSON values, and the store's documents."""

    tokens: TokenArrays
    documents: tuple[InspectedDocument, ...]
    run: Mapping[str, Any]
    stored: tuple[InspectedDocument, ...] = ()

    def save(self, folder: str | Path) -> Path:
        """Writes both files into `folder`, each whole or not at all; `run.json`, without which the other is not read,
        comes last."""
        folder = Path(folder)
        arrays: dict[str, NDArray[Any]] = {
            field.name: getattr(self.tokens, field.name) for field in fields(self.tokens)
        }
        for name, texts in (("", self.documents), ("stored_", self.stored)):
            if texts:
                arrays[f"{name}offsets"] = np.concatenate([document.offsets for document in texts])
                counts = [len(document.offsets) for document in texts]
                # The documents' counts are `document_tokens`, since `tokens` would say something else.
                arrays[f"{name or 'document_'}tokens"] = np.asarray(counts, dtype=np.int64)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_bytes(folder / ARRAYS, buffer.getvalue())
        texts_of = {
            name: [{"name": document.name, "text": document.text} for document in texts]
            for name, texts in (("documents", self.documents), ("stored", self.stored))
        }
        write_json(folder / RUN, {"schema": SCHEMA, "kind": "inspection", **self.run, **texts_of})
        return folder
