"""The texts of an inspection: what was read, what of the store was found, and what kind of token each is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from recollect.model.corpus import load_corpus
from recollect.model.documents import Document
from recollect.model.evaluation_text import EVERYTHING
from recollect.model.evaluation_types import TokenLosses
from recollect.model.token_kinds import WordCounts, token_kinds
from recollect.model.tokenizer import Tokenizer
from recollect.pretrained.inspection_data import InspectedDocument
from recollect.pretrained.store import MemoryStore

BACKGROUND_CHARACTERS = 20_000_000
"""As much training text is enough to know which words are rare."""


def read_texts(
    corpus: str | Path, split: str, tokenizer: Tokenizer, names: Sequence[str], counts: Sequence[int]
) -> tuple[tuple[InspectedDocument, ...], WordCounts | None]:
    """Documents as they were read: the first `counts[i]` tokens of each `names[i]`; and the words of the training text.

    There is no such text, and None instead, where the corpus is read whole.
    """
    loaded = load_corpus(corpus, everything_is="test" if split == EVERYTHING else None)
    by_name: dict[str, Document] = {document.name: document for part in loaded.by_split.values() for document in part}
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inspected = []
    for name, count in zip(names, counts, strict=True):
        whole = by_name[name].text
        offsets = np.asarray(inner.encode(whole, add_special_tokens=False).offsets[:count], dtype=np.int32)
        inspected.append(InspectedDocument(name, whole[: int(offsets[-1, 1])], offsets))
    background: list[str] = []
    if split not in (EVERYTHING, "train"):
        left = BACKGROUND_CHARACTERS
        for document in loaded.by_split["train"]:
            background.append(document.text)
            left -= len(document.text)
            if left < 0:
                break
    return tuple(inspected), WordCounts.of(background) if background else None


def kinds_of(
    documents: Sequence[InspectedDocument],
    losses: TokenLosses,
    visible_from: Sequence[NDArray[np.int64]],
    background: WordCounts | None,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Kind and occurrence of every predicted token, in the order of the losses.

    visible_from: for each document (n,) the first token that local attention sees when a token is predicted.
    """
    kinds = np.zeros(len(losses), dtype=np.int8)
    occurrences = np.zeros(len(losses), dtype=np.int8)
    for number, (document, visible) in enumerate(zip(documents, visible_from, strict=True)):
        found = token_kinds(document.text, document.offsets, visible, background)
        chosen = losses.document == number
        kinds[chosen] = found[0][losses.position[chosen]]
        occurrences[chosen] = found[1][losses.position[chosen]]
    return kinds, occurrences


class StoreEntries:
    """The keys of a store by number: their tokens, and where each stands.

    Attributes:
        tokens: (N,) int64, the token of each key.
        documents: (N,) int64, its place in the store's names.
        positions: (N,) int64, its place in its document.
        following: (N,) int64, the token after it in its document, -1 at the end.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.tokens = store.token_ids.numpy()
        self.documents = store.document_of.numpy()
        self.positions = store.position_of.numpy()
        self.following = np.append(self.tokens[1:], -1)
        self.following[:-1][self.positions[1:] == 0] = -1
        self._names = store.names

    def texts(
        self, tokenizer: Tokenizer, origin: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], tuple[InspectedDocument, ...]]:
        """The documents that `origin` names by their places in the store, -1 for none, and `origin` with their places
        among these documents instead. A store has tokens and no text: it is put together again token by token."""
        used = np.unique(origin[origin >= 0])
        places = np.full(len(self._names) + 1, -1, dtype=np.int32)  # the last is for -1
        places[used] = np.arange(len(used), dtype=np.int32)
        pieces: dict[int, str] = {}
        found = []
        for document in used:
            tokens = self.tokens[self.documents == document]
            for token in np.unique(tokens):
                if int(token) not in pieces:
                    pieces[int(token)] = _piece(tokenizer, int(token))
            texts = [pieces[int(token)] for token in tokens]
            ends = np.cumsum([len(text) for text in texts])
            offsets = np.stack([ends - [len(text) for text in texts], ends], axis=1).astype(np.int32)
            found.append(InspectedDocument(self._names[document], "".join(texts), offsets))
        return places[origin], tuple(found)


def _piece(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token in the middle of others: alone, some decoders would strip the space before it."""
    before = [int(number) for number in tokenizer.encode("a")]
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
