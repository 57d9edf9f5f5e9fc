"""A durable memory: what a model keeps of documents it has read, in a folder that other runs load.

    STORE/
      manifest.json                     what made it, which documents, every file's size and sha256, its own checksum
      documents/<text digest>.safetensors   one file a document: token_ids, and keys and values of every layer

Keys are of use only to the model, the tokenizer and the layers that made them, so a store says who made it and refuses
everyone else. Every file is written whole or not at all, and the manifest last: a run that is killed leaves a store
that opens, and loses at most the document it was reading. Documents of equal text share one file and are remembered
once.

`MemoryStore` is the only reader and writer of these files.

Letters: H key-value heads, N tokens of all documents together, D head dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from recollect.memory_backends.atomic import write_bytes, write_json
from recollect.pretrained.records import LayerShape

MANIFEST, DOCUMENTS, LOCK = "manifest.json", "documents", ".lock"
FORMAT = "recollect-memory-store"
VERSION = 1
# Writing the manifest after every small document would cost more than reading the document.
SECONDS_BETWEEN_MANIFESTS = 2.0


class StoreError(ValueError):
    """A memory store that cannot be read, or does not fit the model; the message names the reason and the remedy."""


@dataclass(frozen=True)
class StoreIdentity:
    """What the keys of a store depend on; two that are equal can share a store.

    Attributes:
        model: the model's class or family, for people.
        model_digest: of its weights and sizes.
        tokenizer_digest: of everything that decides token ids.
        layers: the memory layers, 0-based, rising.
        heads: H.
        head_dim: D.
        key_form: what is kept as a key, in words, such as "before rotary position".
        reading: how documents were read, in words, such as "windows of 512, 256 of them new".
    """

    model: str
    model_digest: str
    tokenizer_digest: str
    layers: tuple[int, ...]
    heads: int
    head_dim: int
    key_form: str
    reading: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StoreIdentity:
        """The inverse of `to_dict`."""
        return cls(**{**values, "layers": tuple(int(layer) for layer in values["layers"])})


@dataclass(frozen=True)
class StoredDocument:
    """One document of a store: its name, the sha256 of its text, its tokens, and its file's size and sha256."""

    name: str
    text_digest: str
    tokens: int
    size: int
    sha256: str


def digest_text(text: str) -> str:
    """The digest by which a document's text is known."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class MemoryStore:
    """The documents that a model has read, on disk. Made by `create`, read by `open`.

    Attributes:
        path: its folder.
        identity: what made it.
        source: what was memorized, as it was named.
    """

    def __init__(
        self, path: Path, identity: StoreIdentity, source: str, documents: Mapping[str, StoredDocument]
    ) -> None:
        self.path = path
        self.identity = identity
        self.source = source
        self._documents = dict(documents)
        self._written = 0.0

    # Making and opening

    @classmethod
    def create(cls, path: str | Path, identity: StoreIdentity, *, source: str = "") -> MemoryStore:
        """An empty store in a folder that is new or empty; raises StoreError where something lies there."""
        path = Path(path).expanduser()
        if path.exists() and (not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir())):
            raise StoreError(f"{path} is not empty: give a new folder, or the folder of a store to add to")
        store = cls(path, identity, source, {})
        store.flush()
        return store

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> MemoryStore:
        """Opens a store; `verify` reads every file and compares its checksum, so that nothing fails hours later.

        Raises:
            StoreError: there is no store, a file is missing, cut short or altered.
        """
        path = Path(path).expanduser()
        content = _read_manifest(path)
        try:
            identity = StoreIdentity.from_dict(content["identity"])
            documents = {name: StoredDocument(name=name, **entry) for name, entry in content["documents"].items()}
            store = cls(path, identity, str(content["source"]), documents)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path / MANIFEST} lacks what a store needs ({error!r}): make the store again") from error
        for document in store._distinct():
            store._check_file(document, whole=verify)
        return store

    def check(self, identity: StoreIdentity) -> None:
        """Raises StoreError with the reason if keys made under `identity` cannot be compared with this store's."""
        mine, remedy = self.identity, "make a store for it with `recollect memorize`"
        if identity.model_digest != mine.model_digest:
            raise StoreError(
                f"{self.path} was made by another model: {mine.model} {mine.model_digest[:12]}, and this one is "
                f"{identity.model} {identity.model_digest[:12]}; {remedy}"
            )
        if identity.tokenizer_digest != mine.tokenizer_digest:
            raise StoreError(
                f"{self.path} was made with another tokenizer ({mine.tokenizer_digest[:12]}, this one is "
                f"{identity.tokenizer_digest[:12]}); {remedy}"
            )
        foreign = [layer for layer in identity.layers if layer not in mine.layers]
        if foreign:
            raise StoreError(
                f"{self.path} holds keys of layers {_list(mine.layers)}, and memory is wanted at {_list(foreign)}: "
                f"attach memory at the store's layers, or {remedy}"
            )
        if (identity.heads, identity.head_dim) != (mine.heads, mine.head_dim):
            raise StoreError(
                f"{self.path} holds {mine.heads} heads of {mine.head_dim}, and this model has {identity.heads} of "
                f"{identity.head_dim}; {remedy}"
            )
        if identity.key_form != mine.key_form:
            raise StoreError(f"{self.path} keeps keys {mine.key_form!r}, not {identity.key_form!r}; {remedy}")

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
    def layers(self) -> tuple[int, ...]:
        """The layers whose keys it holds."""
        return self.identity.layers

    def __len__(self) -> int:
        return len(self._documents)

    def __contains__(self, name: object) -> bool:
        return name in self._documents

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """Every document, in the order they were added."""
        return tuple(self._documents.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the documents whose tokens are remembered: of equal texts the first. `document_of` points here."""
        return tuple(document.name for document in self._distinct())

    @property
    def tokens(self) -> int:
        """N, equal texts counted once."""
        return sum(document.tokens for document in self._distinct())

    @property
    def size(self) -> int:
        """Bytes of the documents' files."""
        return sum(document.size for document in self._distinct())

    def layer_keys(self, layer: int) -> Tensor:
        """Keys (H, N, D) of a memory layer, document after document, in the type they were stored in."""
        return self._joined(f"keys.{self._known(layer)}", 1)

    def layer_values(self, layer: int) -> Tensor:
        """Values (H, N, D), as `layer_keys`."""
        return self._joined(f"values.{self._known(layer)}", 1)

    @property
    def token_ids(self) -> Tensor:
        """(N,) int64."""
        return self._joined("token_ids", 0).long()

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
        """Holds the store for one writer; on leaving, by an error too, the manifest says what is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise StoreError(f"{self.path} is being written by another process: wait for it to end") from error
        try:
            yield
            self._drop_strays()
        finally:
            try:
                self.flush()
            finally:
                lock.release()

    def add(self, name: str, text_digest: str, token_ids: Tensor, layers: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Adds a document, or replaces the one of that name.

        Args:
            name: unique in the store.
            text_digest: `digest_text` of its text.
            token_ids: (n,) whole numbers.
            layers: for each memory layer its keys and values, each (H, n, D).

        Raises:
            StoreError: the layers or shapes are not the store's, or a value is not finite.
        """
        wanted = (self.identity.heads, len(token_ids), self.identity.head_dim)
        if set(layers) != set(self.identity.layers):
            raise StoreError(f"{name}: got layers {_list(sorted(layers))}, the store has {_list(self.identity.layers)}")
        tensors = {"token_ids": token_ids.to("cpu", torch.int32).contiguous()}
        for layer, pair in layers.items():
            for kind, tensor in zip(("keys", "values"), pair, strict=True):
                if tuple(tensor.shape) != wanted:
                    raise StoreError(f"{name}: {kind} of layer {layer} are {tuple(tensor.shape)}, want {wanted}")
                if not bool(torch.isfinite(tensor).all()):
                    raise StoreError(f"{name}: {kind} of layer {layer} hold a number that is not finite")
                tensors[f"{kind}.{layer}"] = tensor.detach().to("cpu").contiguous()
        content = safetensors.torch.save(tensors, metadata={"format": FORMAT, "name": name})
        write_bytes(self._file(text_digest), content)
        self._documents[name] = StoredDocument(
            name, text_digest, len(token_ids), len(content), hashlib.sha256(content).hexdigest()
        )
        if time.monotonic() - self._written > SECONDS_BETWEEN_MANIFESTS:
            self.flush()

    def link(self, name: str, text_digest: str) -> bool:
        """Adds a document whose text the store knows under another name; False, and nothing else, if it does not."""
        known = next((d for d in self._documents.values() if d.text_digest == text_digest), None)
        if known is not None:
            self._documents[name] = StoredDocument(name, text_digest, known.tokens, known.size, known.sha256)
        return known is not None

    def remove(self, names: Iterable[str]) -> None:
        """Forgets documents; their files go when no other document has that text, after the manifest is written."""
        for name in names:
            del self._documents[name]
        self.flush()
        self._drop_strays()

    def flush(self) -> None:
        """Writes the manifest."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "identity": self.identity.to_dict(),
            "documents": {
                document.name: {key: value for key, value in asdict(document).items() if key != "name"}
                for document in self._documents.values()
            },
        }
        write_json(self.path / MANIFEST, {**content, "checksum": _checksum(content)})
        self._written = time.monotonic()

    # Inside

    def _file(self, text_digest: str) -> Path:
        return self.path / DOCUMENTS / f"{text_digest}.safetensors"

    def _distinct(self) -> list[StoredDocument]:
        """One document for each text."""
        first: dict[str, StoredDocument] = {}
        for document in self._documents.values():
            first.setdefault(document.text_digest, document)
        return list(first.values())

    def _drop_strays(self) -> None:
        """Removes files of documents that the manifest no longer names, such as those of a run that was killed."""
        kept = {self._file(document.text_digest) for document in self._documents.values()}
        for file in (self.path / DOCUMENTS).glob("*"):
            if file not in kept:
                file.unlink(missing_ok=True)

    def _known(self, layer: int) -> int:
        if layer not in self.identity.layers:
            raise StoreError(f"{self.path} has no layer {layer}: it holds layers {_list(self.identity.layers)}")
        return layer

    def _joined(self, tensor: str, dim: int) -> Tensor:
        parts = [self._tensor(document, tensor) for document in self._distinct()]
        if parts:
            return torch.cat(parts, dim)
        empty = torch.zeros(self.identity.heads, 0, self.identity.head_dim)
        return empty if dim else torch.zeros(0, dtype=torch.int64)

    def _tensor(self, document: StoredDocument, name: str) -> Tensor:
        file = self._file(document.text_digest)
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise StoreError(f"{file} cannot be read ({error}): {_REPAIR}") from error
        if tensor.shape[0 if name == "token_ids" else 1] != document.tokens:
            raise StoreError(f"{file} holds another number of tokens than the manifest says: {_REPAIR}")
        return tensor

    def _check_file(self, document: StoredDocument, *, whole: bool) -> None:
        file = self._file(document.text_digest)
        if not file.is_file():
            raise StoreError(f"the document {document.name!r} of {self.path} is gone ({file.name}): {_REPAIR}")
        size = file.stat().st_size
        if size != document.size:
            what = "cut short" if size < document.size else "altered"
            raise StoreError(f"{file} is {what}: {size} bytes, and the manifest says {document.size}; {_REPAIR}")
        if whole:
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != document.sha256:
                raise StoreError(f"{file} was altered: its checksum is not the manifest's; {_REPAIR}")


_REPAIR = "copy the store again, or make it anew with `recollect memorize`"


def _list(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in layers) or "none"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise StoreError(f"there is no memory store in {str(path)!r}: make one with `recollect memorize`")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} is cut short or not JSON ({error}): {_REPAIR}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(f"{file} is of another program: its format is not {FORMAT!r}")
    if content.get("version") != VERSION:
        raise StoreError(f"{file} has version {content.get('version')!r}; this release reads version {VERSION}")
    if content.pop("checksum", None) != _checksum(content):
        raise StoreError(f"{file} was altered: its checksum does not hold; {_REPAIR}")
    return content
