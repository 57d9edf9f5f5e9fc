"""Reading a codebase or a folder of documents into a memory store, and keeping the store in step with what changes.

    memorize("src/", model="my-llama", output="out/store")
    memorize("src/", model="my-llama", output="out/store", update=True)    # a week later

Each document is read by itself, from its start, as the model with memory attached reads any text: window by window (a
checkpoint of this package: segment by segment), so that every key is the one the model would have made. Keys of a
layer above another memory layer depend on what that layer found in the same document.

Letters: H key-value heads, N tokens of a document, T of them read at once, D head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recollect.model.checkpoints import Checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.memory_layer import LayerMemory
from recollect.model.tokenizer import Tokenizer
from recollect.model.trunk import digest_model
from recollect.pretrained.identity import digest_pretrained
from recollect.pretrained.loading import (
    PretrainedFolder,
    device_of,
    is_pretrained_folder,
    load_own,
    load_pretrained,
)
from recollect.pretrained.records import StoredKeys
from recollect.pretrained.sources import Source, read_documents
from recollect.pretrained.store import MemoryStore, StoreError, StoreIdentity, digest_text

LayerPairs = dict[int, tuple[Tensor, Tensor]]
OnDocument = Callable[[int, int], None]

WINDOWS_AT_ONCE = 8


@dataclass(frozen=True)
class Memorized:
    """What `memorize` did.

    Attributes:
        store: the store's folder or address.
        documents, tokens, size_bytes: what it holds now.
        added, changed, dropped, unchanged: documents.
        skipped: by reason, what was passed over.
    """

    store: Path | str
    documents: int
    tokens: int
    size_bytes: int
    added: int
    changed: int
    dropped: int
    unchanged: int
    skipped: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {**self.__dict__, "store": str(self.store)}


class DocumentReader(Protocol):
    """A model that turns a document into keys and values."""

    tokenizer: Tokenizer
    identity: StoreIdentity

    def read(self, tokens: Tensor) -> LayerPairs:
        """For each memory layer the keys and values (H, N, D) of a document's tokens (N,) int64."""


def memorize(
    path: str | Path,
    *,
    model: str | Path | None = None,
    output: str | Path,
    update: bool = False,
    layers: int | str | list[int] | None = None,
    device: str = "cpu",
    on_document: OnDocument | None = None,
) -> Memorized:
    """Reads the documents of `path` into the store in `output`.

    A store that is there already is added to, so that an interrupted run goes on where it stopped; with `update` what
    changed is read again and what is gone is dropped, by the digest of each text.

    Args:
        path: a file, a folder (hidden, ignored and binary files are passed over), JSON lines, or a dataset on disk.
        model: folder of a Hugging Face model or of a checkpoint; None or 'reference' is the shipped model.
        output: the store's folder, or its address on an object store, such as `s3://bucket/store`.
        update: bring an older store up to date.
        layers: of a Hugging Face model, those that get a memory, as for `attach_memory`; a checkpoint has its own.
        device: where the model runs.
        on_document: called with the number of characters read and how many there are to read, for progress.

    Raises:
        BackendUnavailable: pylance, which keeps the store, is not installed.
        StoreError: the store was made by another model, tokenizer or layer, is damaged, or holds other documents and
            `update` was not asked for.
        CorpusError, CheckpointError, ConfigurationError: there is no text, no such model, or no such layer.
    """
    source = read_documents(path)
    existing = MemoryStore.open(output) if MemoryStore.exists(output) else None
    if existing is not None:
        _check_overlap(existing, source, path, update)
    reader = _reader(model, layers, device, existing)
    if existing is None:
        store = MemoryStore.create(output, reader.identity, source=str(path))
    else:
        store = existing
        store.check(reader.identity)
        if store.layers != reader.identity.layers:
            raise StoreError(
                f"{output} holds layers {list(store.layers)}, and layers {list(reader.identity.layers)} were asked "
                "for: leave --layers out, or give another --output"
            )
    return _bring_up_to_date(store, reader, source, update, on_document)


def _check_overlap(store: MemoryStore, source: Source, path: str | Path, update: bool) -> None:
    """Refuses, before any model is loaded, what would throw away a store by mistake."""
    digests = {document.name: digest_text(document.text) for document in source.documents}
    gone = [document.name for document in store.documents if document.name not in digests]
    changed = [d.name for d in store.documents if digests.get(d.name, d.text_digest) != d.text_digest]
    if len(store) and len(gone) == len(store):
        raise StoreError(
            f"none of the {len(store)} documents of {store.path} is in {path}: it was made from {store.source!r}; give "
            "that path, or another --output"
        )
    if (gone or changed) and not update:
        raise StoreError(
            f"{store.path} holds documents that are not in {path} as they are there: {len(changed)} changed, "
            f"{len(gone)} gone (such as {(changed + gone)[0]!r}); give --update to bring it up to date, or another "
            "--output"
        )


def _bring_up_to_date(
    store: MemoryStore, reader: DocumentReader, source: Source, update: bool, on_document: OnDocument | None
) -> Memorized:
    known = {document.name: document.text_digest for document in store.documents}
    wanted = [(document, digest_text(document.text)) for document in source.documents]
    pending = [(document, digest) for document, digest in wanted if known.get(document.name) != digest]
    gone = sorted(set(known) - {document.name for document in source.documents}) if update else []
    total, done = sum(len(document.text) for document, _ in pending), 0
    added = changed = 0
    with store.writing():
        for document, digest in pending:
            before = document.name in store
            # A text that stands in the store under another name is not read again.
            if not store.link(document.name, digest):
                tokens = torch.from_numpy(reader.tokenizer.encode(document.text).astype("int64"))
                if len(tokens) == 0:
                    source.skip("without tokens", document.name)
                    continue
                store.add(document.name, digest, tokens, reader.read(tokens))
            added, changed = added + (not before), changed + before
            done += len(document.text)
            if on_document is not None:
                on_document(done, total)
        store.remove(gone)  # last, so that a text that only moved is not read again
    unchanged = len(wanted) - len(pending)
    return Memorized(
        store.path, len(store), store.tokens, store.size, added, changed, len(gone), unchanged, source.counts
    )


def _reader(
    model: str | Path | None, layers: int | str | list[int] | None, device: str, store: MemoryStore | None
) -> DocumentReader:
    if not is_pretrained_folder(model):
        if layers is not None:
            raise ConfigurationError(
                f"--layers {layers} was given, but a recollect checkpoint has its memory layers already"
            )
        return CheckpointReader(load_own(model, device))
    assert model is not None
    folder = load_pretrained(model, device)
    return PretrainedReader(folder, list(store.layers) if store is not None and layers is None else layers)


class CheckpointReader:
    """Reads documents with a model of this package."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.identity = checkpoint_identity(checkpoint)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> LayerPairs:
        """As `DocumentReader.read`."""
        model, config = self.model, self.model.config
        state = model.initial_state(
            1, memory_size=max(1, config.memory_size), k=min(config.k, max(1, config.memory_size))
        )
        kept: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in config.memory_layers}
        with _listening(model, kept):
            starts = torch.ones(1, dtype=torch.bool, device=model.device)
            for segment in tokens[None].to(model.device).split(config.segment_length, dim=1):
                hidden, state.trunk = model.trunk(segment, state.trunk, starts)
                _, state.upper = model.upper(hidden, state.upper, starts)
                starts = torch.zeros_like(starts)
        return {
            layer: (torch.cat([keys for keys, _ in pairs], 1), torch.cat([values for _, values in pairs], 1))
            for layer, pairs in kept.items()
        }


def checkpoint_identity(checkpoint: Checkpoint) -> StoreIdentity:
    """Who makes the keys of a checkpoint's memory layers.

    Raises:
        ConfigurationError: it has no memory layer, or a memory that a store cannot serve.
    """
    config = checkpoint.model.config
    if not config.memory_layers:
        raise ConfigurationError("this checkpoint has no memory layer: there is nothing that a store could serve")
    if config.memory_key != "key" or config.eviction != "fifo":
        raise ConfigurationError(
            f"a store serves memories of keys that are evicted first in, first out; this checkpoint has memory_key="
            f"{config.memory_key!r} and eviction={config.eviction!r}"
        )
    return StoreIdentity(
        model="MemorizingTransformer",
        model_digest=digest_model(checkpoint.model),
        tokenizer_digest=checkpoint.tokenizer.digest,
        layers=config.memory_layers,
        heads=config.heads,
        head_dim=config.head_dim,
        key_form="as the layer compares them",
        reading=f"segments of {config.segment_length}, cache of {config.xl_cache}",
    )


@contextlib.contextmanager
def _listening(model: Any, kept: dict[int, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """While this is open, what the memory layers append is kept too."""
    with contextlib.ExitStack() as stack:
        for layer, pairs in kept.items():

            def hook(
                attention: Any, arguments: tuple[Any, ...], pairs: list[tuple[Tensor, Tensor]] = pairs
            ) -> tuple[Any, ...]:
                hidden, state, memory = arguments
                return hidden, state, _Listener(memory, pairs)

            stack.callback(model.layers[layer].attention.register_forward_pre_hook(hook).remove)
        yield


class _Listener:
    """A layer's memory of one row that also keeps what is appended."""

    def __init__(self, memory: LayerMemory, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._memory, self._pairs = memory, pairs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._pairs.append((keys[0].detach().float().cpu(), values[0].detach().float().cpu()))
        self._memory.append(keys, values)


class PretrainedReader:
    """Reads documents with a Hugging Face model."""

    def __init__(self, folder: PretrainedFolder, layers: int | str | list[int] | None) -> None:
        from recollect.pretrained.attach import attach_memory

        self.model, self.tokenizer, self.prefix = folder.model, folder.tokenizer, folder.prefix
        if folder.saved_memory and layers is not None:
            raise ConfigurationError(
                f"--layers {layers} was given, but {folder.path} was saved with a memory at layers "
                f"{list(self.model.recollect_memory.settings.layers)}"
            )
        self.handle = self.model.recollect_memory if folder.saved_memory else attach_memory(self.model, layers=layers)
        shape, settings = self.handle.shapes[0], self.handle.settings
        self.identity = StoreIdentity(
            model=type(self.model).__name__,
            model_digest=digest_pretrained(self.model),
            tokenizer_digest=self.tokenizer.digest,
            layers=settings.layers,
            heads=shape.key_heads,
            head_dim=shape.head_dim,
            key_form=shape.key_form,
            reading=f"windows of {settings.window}, {settings.overlap} of them read again",
        )

    @torch.no_grad()
    def read(self, tokens: Tensor) -> LayerPairs:
        """As `DocumentReader.read`. The special tokens before the text are read, and not kept."""
        kept: dict[int, list[StoredKeys]] = {layer: [] for layer in self.identity.layers}
        settings = self.handle.settings
        whole = torch.cat([torch.tensor(self.prefix, dtype=torch.int64), tokens])[None].to(device_of(self.model))
        at_once = settings.window + (WINDOWS_AT_ONCE - 1) * (settings.window - settings.overlap)
        self.handle.reset()
        with self.handle.observing_stored(lambda stored: kept[stored.layer].append(stored)):
            for piece in whole.split(at_once, dim=1):
                # The base model: logits of a long text would need more room than all the rest.
                self.model.base_model(input_ids=piece, use_cache=False)
            self.handle.flush()
        self.handle.reset()
        return {layer: _in_order(parts, len(self.prefix), len(tokens)) for layer, parts in kept.items()}


def _in_order(parts: list[StoredKeys], skip: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values (H, N, D) of one row's tokens in the order of the text, without the first `skip`."""
    positions = torch.cat([part.positions[0].cpu() for part in parts])
    keys = torch.cat([part.keys[0].cpu() for part in parts], dim=1)
    values = torch.cat([part.values[0].cpu() for part in parts], dim=1)
    wanted = positions >= skip
    order = torch.argsort(positions[wanted], stable=True)
    if not torch.equal(positions[wanted][order], torch.arange(skip, skip + count)):
        raise StoreError(f"the memory was given other tokens than the {count} of the document: this is a fault of ours")
    return keys[:, wanted][:, order], values[:, wanted][:, order]
