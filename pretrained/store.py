"""A durable memory: what a model keeps of documents it has read, in a Lance dataset that other runs load.

The dataset is a folder of this machine, or lies at an address of an object store (`s3://bucket/store`). A row is a
document: its name, the digest of its text, its tokens, and keys and values of every layer; see `store_rows`.

Keys are of use only to the model, the tokenizer and the layers that made them, so a store says who made it and refuses
everyone else. Every change is one commit, whole or not at all: a run that is killed leaves a store that opens, and
loses at most the document it was reading. Documents of equal text share one row's keys and are remembered once.

`MemoryStore` is the only reader and writer of these files.

Letters: H key-value heads, N tokens of all documents together, D head dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from recollect.memory_backends import lance_support
from recollect.memory_backends.errors import CorruptMemory, InvalidInput, StoreMissing, WriteConflict
from recollect.memory_backends.lance_places import Place, place_of
from recollect.pretrained import store_rows
from recollect.pretrained.records import KeyStore, LayerShape
from recollect.pretrained.store_files import StoreFiles
from recollect.pretrained.store_identity import (
    StoredDocument,
    StoreError,
    StoreIdentity,
    check_same,
    digest_text,
    listed,
)
from recollect.pretrained.store_rows import About

LOCK = ".lock"
FORMER_MANIFEST = "manifest.json"
"""Of a store that an earlier release wrote as a folder of safetensors files."""


class MemoryStore:
    """The documents that a model has read, on disk. Made by `create`, read by `open`.

    Attributes:
        path: its folder, or its address on an object store.
        identity: what made it.
        source: what was memorized, as it was named.
    """

    def __init__(self, place: Place, dataset: Any) -> None:
        self._place = place
        self.path: Path | str = place.path
        self._files = StoreFiles(place, dataset)

    # Making and opening

    @classmethod
    def create(
        cls,
        path: str | Path,
        identity: StoreIdentity,
        *,
        source: str = "",
        storage_options: Mapping[str, str] | None = None,
    ) -> MemoryStore:
        """An empty store in a folder that is new or empty, or at an address where nothing lies.

        Raises:
            BackendUnavailable: pylance is not installed.
            StoreError: something lies there.
        """
        lance_support.import_lance()
        with _told():
            place = place_of(path, storage_options)
            folder = place.folder
            if folder is not None and folder.exists():
                if not folder.is_dir() or any(entry.name != LOCK for entry in folder.iterdir()):
                    raise StoreError(f"{path} is not empty: give a new folder, or the folder of a store to add to")
                (folder / LOCK).unlink(missing_ok=True)
            return cls(place, lance_support.create_dataset(place, About(identity, source).schema_with_metadata))

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = True, storage_options: Mapping[str, str] | None = None
    ) -> MemoryStore:
        """Opens a store; `verify` reads it whole and compares every checksum, so that nothing fails hours later.

        Raises:
            BackendUnavailable: pylance is not installed.
            StoreError: there is no store, a part is missing, cut short or altered, or an earlier release made it.
            StoreUnreachable: the address does not answer.
        """
        lance_support.import_lance()
        with _told():
            place = place_of(path, storage_options)
            if place.folder is not None and (place.folder / FORMER_MANIFEST).is_file():
                raise StoreError(
                    f"{path} was made by an earlier release, as a folder of safetensors files that this one does not "
                    "read: make it again with `recollect memorize`, in a new folder"
                )
            try:
                dataset = lance_support.open_dataset(place)
            except StoreMissing as error:
                raise StoreError(
                    f"there is no memory store in {str(path)!r}: make one with `recollect memorize`"
                ) from error
            store = cls(place, dataset)
        if verify:
            with store._reading():
                store_rows.check_rows(store._files.about, store._files.dataset, store._files.listed, place)
        return store

    @classmethod
    def exists(cls, path: str | Path, *, storage_options: Mapping[str, str] | None = None) -> bool:
        """Whether a store lies there, of whatever release; raises StoreUnreachable where an address does not answer."""
        with _told():
            place = place_of(path, storage_options)
        if place.folder is not None:
            return (place.folder / "_versions").is_dir() or (place.folder / FORMER_MANIFEST).is_file()
        try:
            lance_support.open_dataset(place)
        except StoreMissing:
            return False
        return True

    def check(self, identity: StoreIdentity) -> None:
        """Raises StoreError with the reason if keys made under `identity` cannot be compared with this store's."""
        check_same(identity, self.identity, self.path)

    def check_tokenizer(self, tokenizer_digest: str) -> None:
        """Raises StoreError if the store's documents were cut into tokens by another tokenizer."""
        self.check(dataclasses.replace(self.identity, tokenizer_digest=tokenizer_digest))

    def check_fits(self, shapes: tuple[LayerShape, ...], model: Any) -> None:
        """Raises StoreError, with the reason, if it was not made by this Hugging Face model and these layers.

        The tokenizer is not asked: a model does not know it (see `check_tokenizer`).
        """
        from recollect.pretrained.identity import digest_pretrained

        for shape in shapes:
            self.check(
                dataclasses.replace(
                    self.identity,
                    model=type(model).__name__,
                    model_digest=digest_pretrained(model),
                    layers=tuple(other.layer for other in shapes),
                    heads=shape.key_heads,
                    head_dim=shape.head_dim,
                    key_form=shape.key_form,
                )
            )

    # What is in it

    @property
    def identity(self) -> StoreIdentity:
        """What made it."""
        return self._files.about.identity

    @property
    def source(self) -> str:
        """What was memorized, as it was named."""
        return self._files.about.source

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose keys it holds."""
        return self.identity.layers

    def __len__(self) -> int:
        return len(self._files.rows)

    def __contains__(self, name: object) -> bool:
        return name in self._files.rows

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """Every document, in the order they were added."""
        return tuple(row.document for row in self._files.listed)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the documents whose tokens are remembered, one of equal texts. `document_of` points here."""
        return tuple(document.name for document in self._distinct())

    @property
    def tokens(self) -> int:
        """N, equal texts counted once."""
        return sum(document.tokens for document in self._distinct())

    @property
    def size(self) -> int:
        """Bytes of its token ids, keys and values."""
        return sum(document.size for document in self._distinct())

    @property
    def version(self) -> int:
        """The dataset's version that it shows; every change makes one."""
        return int(self._files.dataset.version)

    def layer_keys(self, layer: int) -> Tensor:
        """Keys (H, N, D) of a memory layer, document after document, in the type they were stored in."""
        return self._joined(f"keys_{self._known(layer)}")

    def layer_values(self, layer: int) -> Tensor:
        """Values (H, N, D), as `layer_keys`."""
        return self._joined(f"values_{self._known(layer)}")

    @property
    def token_ids(self) -> Tensor:
        """(N,) int64."""
        return self._joined("token_ids")

    @property
    def document_of(self) -> Tensor:
        """(N,) int64: each token's place in `names`."""
        counts = torch.tensor([document.tokens for document in self._distinct()], dtype=torch.int64)
        return torch.arange(len(counts)).repeat_interleave(counts)

    @property
    def position_of(self) -> Tensor:
        """(N,) int64: each token's place in its document."""
        parts = [torch.arange(document.tokens) for document in self._distinct()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    # Changing it

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the store for one writer, and shows what is there now; on leaving, small files are merged.

        On an object store, which has no locks, a second writer is noticed when it commits.
        """
        with contextlib.ExitStack() as held:
            folder = self._place.folder
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                lock = filelock.FileLock(folder / LOCK)
                try:
                    lock.acquire(timeout=0)
                except filelock.Timeout as error:
                    raise StoreError(f"{self.path} is being written by another process: wait for it to end") from error
                held.callback(lock.release)
            with _told():
                self._files.refresh()
            yield
            with _told():
                self._files.tidy()

    def add(self, name: str, text_digest: str, token_ids: Tensor, layers: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Adds a document, or replaces the one of that name; it is durable when this returns.

        Args:
            name: unique in the store.
            text_digest: `digest_text` of its text.
            token_ids: (n,) whole numbers.
            layers: for each memory layer its keys and values, each (H, n, D).

        Raises:
            DiskFull: there is no room; the store is as it was.
            StoreError: the layers or shapes are not the store's, or a value is not finite.
        """
        wanted = (self.identity.heads, len(token_ids), self.identity.head_dim)
        if set(layers) != set(self.identity.layers):
            raise StoreError(f"{name}: got layers {listed(sorted(layers))}, the store has {listed(self.layers)}")
        for layer, pair in layers.items():
            for kind, tensor in zip(("keys", "values"), pair, strict=True):
                if tuple(tensor.shape) != wanted:
                    raise StoreError(f"{name}: {kind} of layer {layer} are {tuple(tensor.shape)}, want {wanted}")
                if not bool(torch.isfinite(tensor).all()):
                    raise StoreError(f"{name}: {kind} of layer {layer} hold a number that is not finite")
        if self.link(name, text_digest):
            return
        with _told():
            self._files.settle_type(store_rows.dtype_of(layers, name), name)
        row = self._files.row_of(name, StoredDocument(name, text_digest, len(token_ids), 0, ""), holds=True)
        with _told():
            self._files.change([name], [store_rows.batch_of(self._files.about, row, token_ids, layers)])

    def link(self, name: str, text_digest: str) -> bool:
        """Adds a document whose text the store knows already; False, and nothing else, if it does not."""
        known = self._files.texts.get(text_digest)
        if known is None:
            return False
        same = self._files.rows.get(name)
        if same is None or same.document.text_digest != text_digest:
            row = self._files.row_of(name, dataclasses.replace(known.document, name=name), holds=False)
            with _told():
                self._files.change([name], [store_rows.batch_of(self._files.about, row, None, None)])
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Forgets documents; their keys go when no other document has that text."""
        gone = list(names)
        for name in gone:
            if name not in self:
                raise KeyError(name)
        if gone:
            with _told():
                self._files.change(gone, [])

    # Inside

    def _distinct(self) -> list[StoredDocument]:
        """One document for each text."""
        return [row.document for row in self._files.listed if row.holds]

    def _known(self, layer: int) -> int:
        if layer not in self.layers:
            raise StoreError(f"{self.path} has no layer {layer}: it holds layers {listed(self.layers)}")
        return layer

    def _joined(self, column: str) -> Tensor:
        with self._reading():
            return store_rows.read_joined(
                self._files.about, self._files.dataset, self._files.listed, column, self._place
            )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with _told(), lance_support.told(self._place, "read"):
            yield


def opened_store(store: KeyStore | str | Path | None) -> KeyStore | None:
    """A store as it was given, or the one that lies at the path or address that was given."""
    return MemoryStore.open(store) if isinstance(store, str | Path) else store


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raises what is wrong with a store as StoreError; no room and no answer stay what they are."""
    try:
        yield
    except (StoreMissing, CorruptMemory, WriteConflict, InvalidInput) as error:
        raise StoreError(str(error)) from error


__all__ = ["MemoryStore", "StoreError", "StoreIdentity", "StoredDocument", "digest_text", "opened_store"]
