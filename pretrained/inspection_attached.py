"""Inspecting the memory that was attached to a Hugging Face model.

Letters: N tokens of a document, L memory layers, H query heads, T tokens of a call, K neighbours, R of them kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.model.evaluation_types import EvaluationOptions, MemorySpecification
from recollect.pretrained.evaluation import (
    MemoryChoice,
    attach_choice,
    choose_documents,
    evaluate_attached,
    read_losses,
    tokens_at_once,
)
from recollect.pretrained.inspection import InspectionOptions, OnSegment, describe_run
from recollect.pretrained.inspection_data import Inspection, TokenArrays
from recollect.pretrained.inspection_text import StoreEntries, kinds_of, read_texts
from recollect.pretrained.loading import PretrainedFolder, load_pretrained
from recollect.pretrained.records import Retrieved
from recollect.pretrained.store import MemoryStore


def inspect_pretrained(
    options: InspectionOptions, store: MemoryStore | None, on_segment: OnSegment | None
) -> Inspection:
    """As `inspect`, of a Hugging Face model."""
    assert options.model is not None
    folder = load_pretrained(options.model, options.device)
    choice = MemoryChoice(
        layers=options.layers,
        backend=options.backend,
        memory_size=options.memory_size,
        k=options.k,
        gate=options.gate,
        window=options.window,
        seed=options.seed,
    )
    handle = attach_choice(folder, choice, store)
    settings = handle.settings
    texts = choose_documents(
        folder,
        EvaluationOptions(corpus=options.corpus, split=options.split, max_tokens=options.max_tokens, rows=options.rows),
    )
    total, done = 2 * sum(len(array) for _, array in texts), 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if on_segment is not None:
            on_segment(done, total)

    entries = None if store is None else StoreEntries(store)
    seen = []
    for _, array in texts:
        observer = _Observer(array, settings.layers, handle.shapes[0].heads, len(folder.prefix), options.keep, entries)
        with handle.observing(observer.note):
            for _, loss, right in read_losses(folder, handle, array):
                observer.losses.append(loss)
                observer.correct.append(right)
                advance(len(loss))
        seen.append(observer)
    memory = MemorySpecification(settings.backend, settings.memory_size, settings.k)
    with handle.paused():
        without = evaluate_attached(folder, handle, texts, MemorySpecification("none", 0, settings.k), advance)
    documents, background = read_texts(
        options.corpus,
        options.split,
        folder.tokenizer,
        [name for name, _ in texts],
        [len(array) for _, array in texts],
    )
    visible = [visible_from(folder, len(array), settings.window, settings.overlap) for _, array in texts]
    kinds, occurrences = kinds_of(documents, without.losses, visible, background)
    arrays = {name: np.concatenate([observer.arrays[name][:-1] for observer in seen]) for name in seen[0].arrays}
    stored: tuple[Any, ...] = ()
    if entries is not None:
        arrays["origin"], stored = entries.texts(folder.tokenizer, arrays["origin"])
    loss = np.concatenate([part for observer in seen for part in observer.losses])
    tokens = TokenArrays(
        document=without.losses.document,
        position=without.losses.position,
        token=np.concatenate([array[1:] for _, array in texts]).astype(np.int32),
        loss=loss,
        loss_without=without.losses.loss,
        loss_twin=np.full(len(loss), np.nan, dtype=np.float32),
        kind=kinds,
        occurrence=occurrences,
        **arrays,
    )
    model = {
        "name": str(options.model),
        "digest": store.identity.model_digest if store is not None else _digest(folder),
        "layers": int(folder.model.config.num_hidden_layers),
        "memory_layers": list(settings.layers),
        "heads": handle.shapes[0].heads,
        "gate": settings.gate,
        "local_context": settings.window,
    }
    words = background.total if background is not None else 0
    return Inspection(tokens, documents, describe_run(options, model, memory.as_json(), words), stored)


def _digest(folder: PretrainedFolder) -> str:
    from recollect.pretrained.identity import digest_pretrained

    return digest_pretrained(folder.model)


def visible_from(folder: PretrainedFolder, count: int, window: int, overlap: int) -> NDArray[np.int64]:
    """(count,) for each token of a document the first that attention sees when it is predicted."""
    at_once, skip = tokens_at_once(folder, window, overlap), len(folder.prefix)
    predicting = (np.arange(count) - 1).clip(0) + skip
    within = predicting % at_once
    windows = np.where(within < window, 0, (within - window) // (window - overlap) + 1)
    result: NDArray[np.int64] = (predicting - within + windows * (window - overlap) - skip).clip(0)
    return result


class _Observer:
    """What the memory layers retrieved for one document; row i of every array belongs to the prediction of token i + 1.

    Attributes:
        arrays: as in `TokenArrays`, one row a token that was read.
        losses, correct: piece by piece.
    """

    def __init__(
        self,
        tokens: NDArray[np.int64],
        layers: tuple[int, ...],
        heads: int,
        skip: int,
        keep: int,
        entries: StoreEntries | None,
    ) -> None:
        self._tokens, self._layers, self._skip, self._keep, self._entries = tokens, layers, skip, keep, entries
        shape = (len(tokens), len(layers), heads)
        self.arrays: dict[str, NDArray[Any]] = {
            "share": np.zeros(shape, dtype=np.float16),
            "retrieved": np.full((*shape, keep), -1, dtype=np.int32),
            "origin": np.full((*shape, keep), -1, dtype=np.int32),
            "weight": np.zeros((*shape, keep), dtype=np.float16),
            "on_target": np.zeros(shape, dtype=np.float16),
            "before_target": np.zeros(shape, dtype=np.float16),
            "distance": np.full(shape, np.nan, dtype=np.float32),
        }
        self.losses: list[NDArray[np.float32]] = []
        self.correct: list[NDArray[np.bool_]] = []

    def note(self, found: Retrieved) -> None:
        """Takes what one layer retrieved in one window of one row."""
        place = self._layers.index(found.layer)
        numbers = found.query_positions[0].cpu().numpy()
        queries = numbers - self._skip
        # A query at the text's last token predicts nothing; nor do special tokens before it and what is read again.
        wanted = np.flatnonzero((numbers >= 0) & (queries >= 0) & (queries + 1 < len(self._tokens)))
        if not len(wanted) or not found.positions.shape[-1]:
            return
        rows = queries[wanted]
        own, stored, weights, share = (
            part[0].detach().cpu().float().numpy() if part.is_floating_point() else part[0].cpu().numpy()
            for part in (found.positions, found.store_entries, found.weights, found.share)
        )
        own, stored, weights = (part[:, wanted].transpose(1, 0, 2) for part in (own, stored, weights))  # (n, H, K)
        own = np.where(own >= 0, own - self._skip, own)
        # A special token before the text can be found too; it has no place in the text.
        mine, of_store = (own >= 0) & (stored < 0), stored >= 0
        there, after = self._tokens_at(own, mine), self._tokens_at(own + 1, mine)
        position, origin = np.where(mine, own, -1), np.full_like(own, -1)
        if self._entries is not None:
            entries = np.where(of_store, stored, 0)
            there = np.where(of_store, self._entries.tokens[entries], there)
            after = np.where(of_store, self._entries.following[entries], after)
            position = np.where(of_store, self._entries.positions[entries], position)
            origin = np.where(of_store, self._entries.documents[entries], origin)
        target = self._tokens[rows + 1][:, None, None]
        self._put("share", place, rows, share[:, wanted].T)
        self._put("on_target", place, rows, (weights * (there == target)).sum(-1))
        self._put("before_target", place, rows, (weights * (after == target)).sum(-1))
        known = np.where(mine, weights, 0.0)
        with np.errstate(invalid="ignore"):
            away = (known * (rows[:, None, None] + 1 - own)).sum(-1) / known.sum(-1)
        self._put("distance", place, rows, away)
        best = np.argsort(-weights, axis=-1, kind="stable")[..., : self._keep]
        for name, values in (("retrieved", position), ("origin", origin), ("weight", weights)):
            kept = np.take_along_axis(values, best, axis=-1)
            self.arrays[name][rows, place, :, : kept.shape[-1]] = kept

    def _put(self, name: str, place: int, rows: NDArray[Any], values: NDArray[Any]) -> None:
        self.arrays[name][rows, place] = values

    def _tokens_at(self, positions: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The document's tokens at `positions`, -1 where there is none."""
        inside = known & (positions < len(self._tokens))
        return np.where(inside, self._tokens[np.where(inside, positions, 0)], -1)
