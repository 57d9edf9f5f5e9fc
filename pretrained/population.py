"""What is in the memory before training, during it, and whether training changes it.

* during: `attach_memory(model)`, nothing else. Every row's memory fills with what the row reads.
* before: `attach_memory(model, store=collect_keys(model, documents))`. The rows search the documents from the first
  step on, and their own memory beside it; a new document empties the second, not the first.
* frozen: the same with `memory_size=0`. Nothing but the documents is searched, and training never changes them.

Keys are those of the weights that read the documents. Training memory layers, or all, moves away from them; `populate`
reads the documents again with the weights of today. Where documents are too many to be held, or are to be kept, there
is `recollect memorize` and its `MemoryStore`, which `store` takes in the same way.

Letters: G key heads, N tokens of all documents, T tokens read at once, D head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.model.configuration import ConfigurationError
from recollect.pretrained.attach import AttachedMemory, attach_memory
from recollect.pretrained.document_segments import token_numbers
from recollect.pretrained.families import causal_model
from recollect.pretrained.memory import shared_source
from recollect.pretrained.reading_state import ReadingState, exchange
from recollect.pretrained.records import LayerShape, StoredKeys

Documents = Sequence[str] | Sequence[Sequence[int]] | Sequence[NDArray[Any]]

WINDOWS_AT_ONCE = 8
"""Windows of a long document that the model reads in one call."""


class CollectedKeys:
    """Keys and values of documents, held in memory: a store for `attach_memory(store=...)`.

    Attributes:
        documents: how many were read.
        shapes: of the layers it holds.
    """

    def __init__(self, shapes: tuple[LayerShape, ...], pairs: dict[int, tuple[Tensor, Tensor]], documents: int) -> None:
        self.shapes = shapes
        self.documents = documents
        self._pairs = pairs

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose keys it holds."""
        return tuple(shape.layer for shape in self.shapes)

    @property
    def tokens(self) -> int:
        """N."""
        return next(iter(self._pairs.values()))[0].shape[1]

    def check_fits(self, shapes: tuple[LayerShape, ...], model: Any) -> None:
        """Raises ConfigurationError where a layer has another shape than the one that made the keys."""
        mine = {shape.layer: shape for shape in self.shapes}
        for shape in shapes:
            if mine.get(shape.layer) != shape:
                raise ConfigurationError(
                    f"these keys were collected from {mine.get(shape.layer)}, and the model has {shape}: collect them "
                    "with this model and these layers"
                )

    def layer_keys(self, layer: int) -> Tensor:
        """(G, N, D) float32 on the CPU."""
        return self._pairs[layer][0]

    def layer_values(self, layer: int) -> Tensor:
        """(G, N, D) float32 on the CPU."""
        return self._pairs[layer][1]


def collect_keys(
    model: Any,
    documents: Documents,
    *,
    tokenizer: Any = None,
    layers: int | str | Sequence[int] | None = None,
    **settings: Any,
) -> CollectedKeys:
    """Reads documents, each by itself and in full, and keeps what the memory layers would store of them.

    A model without memory is given one to read with, and left as it was. One with memory keeps its own, and what its
    rows are reading.

    Args:
        model: a Hugging Face causal language model.
        documents: texts, or their token numbers.
        tokenizer: turns texts into numbers, without special tokens.
        layers: as for `attach_memory`; a model that has a memory already has its layers too.
        settings: others for `attach_memory`. With several memory layers give those that the keys will be used with, for
            what a lower layer retrieves within a document is in the keys of the layers above.

    Raises:
        ConfigurationError: there is no text in the documents, or settings were given for a model that has its own.
        UnsupportedModel: the model can't be given a memory.
    """
    model = causal_model(model)
    texts = [text for document in documents if len(text := token_numbers(document, tokenizer))]
    if not texts:
        raise ConfigurationError("there is no text in the documents: nothing to populate the memory with")
    with _memory_to_read_with(model, layers, settings) as handle:
        pairs: dict[int, list[tuple[Tensor, Tensor]]] = {shape.layer: [] for shape in handle.shapes}
        for text in texts:
            for layer, pair in _read(model, handle, torch.from_numpy(text)).items():
                pairs[layer].append(pair)
        joined = {
            layer: (torch.cat([keys for keys, _ in parts], 1), torch.cat([values for _, values in parts], 1))
            for layer, parts in pairs.items()
        }
        return CollectedKeys(handle.shapes, joined, len(texts))


def populate(model: Any, documents: Documents, *, tokenizer: Any = None) -> CollectedKeys:
    """Reads documents with the model as it is now, and puts their keys in the place of the store it searches.

    Args:
        model: a model that has a memory.
        documents, tokenizer: as for `collect_keys`.

    Raises:
        ConfigurationError: the model has no memory, or there is no text in the documents.
    """
    model = causal_model(model)
    handle = getattr(model, "recollect_memory", None)
    if not isinstance(handle, AttachedMemory):
        raise ConfigurationError(f"this {type(model).__name__} has no memory: call attach_memory(model) first")
    collected = collect_keys(model, documents, tokenizer=tokenizer)
    for layer in handle._reading.layers:
        keys, values = collected.layer_keys(layer.shape.layer), collected.layer_values(layer.shape.layer)
        layer.store = shared_source(
            keys, values, layer.shape, handle.settings, model.get_input_embeddings().weight.device
        )
    return collected


@contextlib.contextmanager
def _memory_to_read_with(
    model: Any, layers: int | str | Sequence[int] | None, settings: dict[str, Any]
) -> Iterator[AttachedMemory]:
    """A memory that holds nothing, in evaluation mode; afterwards the model is as it was."""
    handle = getattr(model, "recollect_memory", None)
    training = model.training
    model.eval()
    try:
        if handle is None:
            handle = attach_memory(model, layers, **settings)
            try:
                yield handle
            finally:
                handle.detach()
            return
        if layers is not None or settings:
            given = ", ".join(f"{name}={value!r}" for name, value in {"layers": layers, **settings}.items())
            raise ConfigurationError(
                f"{given} was given, but the model has a memory at layers {list(handle.settings.layers)} already: "
                "detach it, or leave that out"
            )
        reading = handle._reading
        stores = [layer.store for layer in reading.layers]
        former = exchange(reading, ReadingState())
        try:
            for layer in reading.layers:
                layer.store = None
            yield handle
        finally:
            exchange(reading, former)
            for layer, store in zip(reading.layers, stores, strict=True):
                layer.store = store
    finally:
        model.train(training)


@torch.no_grad()
def _read(model: Any, handle: AttachedMemory, text: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, the keys and values (G, T, D) of one document (T,) int64, in the order of the text."""
    settings = handle.settings
    kept: dict[int, list[StoredKeys]] = {shape.layer: [] for shape in handle.shapes}
    at_once = settings.window + (WINDOWS_AT_ONCE - 1) * (settings.window - settings.overlap)
    handle.reset()
    with handle.observing_stored(lambda stored: kept[stored.layer].append(stored)):
        for piece in text[None].to(model.get_input_embeddings().weight.device).split(at_once, dim=1):
            # The base model: the logits of a long text would need more room than all the rest.
            model.base_model(input_ids=piece, use_cache=False)
        handle.flush()
    handle.reset()
    pairs = {}
    for layer, parts in kept.items():
        order = torch.argsort(torch.cat([part.positions[0] for part in parts]), stable=True)
        keys, values = (
            torch.cat([getattr(part, name)[0] for part in parts], 1)[:, order].float().cpu()
            for name in ("keys", "values")
        )
        pairs[layer] = (keys, values)
    return pairs


__all__ = ["CollectedKeys", "collect_keys", "populate"]
