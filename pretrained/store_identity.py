"""Who made a store, what a document of it is, and the error that every trouble with a store is told by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
    """One document of a store: its name, the sha256 of its text, its tokens, and its keys' bytes and sha256."""

    name: str
    text_digest: str
    tokens: int
    size: int
    sha256: str


def digest_text(text: str) -> str:
    """The digest by which a document's text is known."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_same(identity: StoreIdentity, mine: StoreIdentity, path: object) -> None:
    """Raises StoreError with the reason if keys made under `identity` cannot be compared with those of a store.

    Args:
        mine: the store's.
        path: where it lies, for the message.
    """
    remedy = "make a store for it with `recollect memorize`"
    if identity.model_digest != mine.model_digest:
        raise StoreError(
            f"{path} was made by another model: {mine.model} {mine.model_digest[:12]}, and this one is "
            f"{identity.model} {identity.model_digest[:12]}; {remedy}"
        )
    if identity.tokenizer_digest != mine.tokenizer_digest:
        raise StoreError(
            f"{path} was made with another tokenizer ({mine.tokenizer_digest[:12]}, this one is "
            f"{identity.tokenizer_digest[:12]}); {remedy}"
        )
    foreign = [layer for layer in identity.layers if layer not in mine.layers]
    if foreign:
        raise StoreError(
            f"{path} holds keys of layers {listed(mine.layers)}, and memory is wanted at {listed(foreign)}: "
            f"attach memory at the store's layers, or {remedy}"
        )
    if (identity.heads, identity.head_dim) != (mine.heads, mine.head_dim):
        raise StoreError(
            f"{path} holds {mine.heads} heads of {mine.head_dim}, and this model has {identity.heads} of "
            f"{identity.head_dim}; {remedy}"
        )
    if identity.key_form != mine.key_form:
        raise StoreError(f"{path} keeps keys {mine.key_form!r}, not {identity.key_form!r}; {remedy}")


def listed(layers: Iterable[int]) -> str:
    """Layers as a message names them."""
    return ", ".join(str(layer) for layer in layers) or "none"
