"""The rows of a memory store: one document each, its tokens, and its keys and values of every layer.

    row          no other row ever has it
    number       the order in which documents were added; one that replaces another has its number
    name, text_digest, tokens, size, sha256     as in `StoredDocument`
    holds        whether keys stand in this row: of documents with equal text, in one alone
    token_ids                    list of int32
    keys_L, values_L             for each layer L, a list with for each token its H * D numbers, head after head

Numbers are kept in the type that the model made them in. Arrow has no bfloat16, so that its two bytes are kept as a
whole number.

Letters: H key-value heads, n tokens of a document, N of all documents, D head dimension.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.lance_places import Place
from recollect.memory_backends.lance_support import metadata_of
from recollect.pretrained.store_identity import StoredDocument, StoreError, StoreIdentity

FORMAT = "recollect-memory-store"
VERSION = 2
"""Version 1 was a folder of safetensors files."""
STATE = "recollect"
REPAIR = "copy the store again, or make it anew with `recollect memorize`"
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = {kind: name for name, kind in TYPES.items()}
BYTES_AT_ONCE = 64 << 20
"""Of rows that are read at a time."""
ABOUT = ("row", "number", "name", "text_digest", "tokens", "size", "sha256", "holds")

LayerPairs = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """A document: which row it is, its place in the order, and whether the row holds the keys of its text."""

    row: int
    number: int
    document: StoredDocument
    holds: bool


@dataclass(frozen=True)
class About:
    """What a store's manifest says.

    Attributes:
        identity: what made it.
        source: what was memorized, as it was named.
        dtype: of its keys and values; None before the first document.
        next_row: the next row's number.
        gone: rows that are no longer documents, and go when their files are next written.
    """

    identity: StoreIdentity
    source: str
    dtype: str | None = None
    next_row: int = 0
    gone: tuple[int, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that hold keys and values."""
        return tuple(f"{kind}_{layer}" for layer in self.identity.layers for kind in ("keys", "values"))

    @property
    def schema(self) -> Any:
        """The Arrow schema of a row, without metadata."""
        arrow = importlib.import_module("pyarrow")
        text, number = arrow.string(), arrow.int64()
        kinds = (number, number, text, text, number, number, text, arrow.bool_())
        fields = [arrow.field(name, kind, False) for name, kind in zip(ABOUT, kinds, strict=True)]
        if self.dtype is not None:
            width = {"float32": arrow.float32(), "float16": arrow.float16(), "bfloat16": arrow.uint16()}[self.dtype]
            token = arrow.list_(width, self.identity.heads * self.identity.head_dim)
            fields.append(arrow.field("token_ids", arrow.list_(arrow.int32())))
            fields += [arrow.field(name, arrow.list_(token)) for name in self.columns]
        return arrow.schema(fields)

    @property
    def schema_with_metadata(self) -> Any:
        """The same, and in its metadata what `read` reads."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "identity": self.identity.to_dict(),
            "dtype": self.dtype,
            "next_row": self.next_row,
            "gone": list(self.gone),
        }
        text = json.dumps({**content, "checksum": _checksum(content)}, ensure_ascii=True)
        return self.schema.with_metadata({STATE: text})

    @classmethod
    def read(cls, dataset: Any, place: Place) -> About:
        """What the manifest of a dataset says.

        Raises:
            StoreError: it is no store's, altered, or of another version.
        """
        try:
            content = json.loads(metadata_of(dataset).get(STATE, "null"))
        except (ValueError, RecursionError) as error:
            raise StoreError(f"the manifest of {place} is cut short or not JSON ({error}): {REPAIR}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f"{place} is a Lance dataset of another program: its format is not {FORMAT!r}")
        if content.get("version") != VERSION:
            raise StoreError(f"{place} has version {content.get('version')!r}; this release reads version {VERSION}")
        if content.pop("checksum", None) != _checksum(content):
            raise StoreError(f"the manifest of {place} was altered: its checksum does not hold; {REPAIR}")
        try:
            return cls(
                StoreIdentity.from_dict(content["identity"]),
                str(content["source"]),
                content["dtype"],
                int(content["next_row"]),
                tuple(content["gone"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"the manifest of {place} lacks what a store needs ({error!r}): make it again") from error


def dtype_of(pairs: LayerPairs, name: str) -> str:
    """The type that all keys and values of a document have.

    Raises:
        StoreError: they have several, or one that is not kept.
    """
    kinds = {tensor.dtype for pair in pairs.values() for tensor in pair}
    found = kinds.pop() if len(kinds) == 1 else None
    if found not in NAMES:
        raise StoreError(f"{name}: keys and values are all {', '.join(TYPES)}, got {found or kinds}")
    return NAMES[found]


def batch_of(about: About, row: Row, token_ids: Tensor | None, pairs: LayerPairs | None) -> tuple[Any, Row]:
    """An Arrow batch of one document, and its row with size and checksum.

    Args:
        token_ids: (n,); None for a row that holds nothing.
        pairs: for each layer its keys and values (H, n, D); None likewise.
    """
    arrow = importlib.import_module("pyarrow")
    schema = about.schema
    content: dict[str, Any] = {}
    if token_ids is not None and pairs is not None:
        assert about.dtype is not None
        arrays = [token_ids.detach().to("cpu", torch.int32).numpy()]
        arrays += [_flat(tensor, about.dtype) for layer in about.identity.layers for tensor in pairs[layer]]
        ends = arrow.array([0, len(token_ids)], arrow.int32())
        digest = hashlib.sha256()
        for name, array in zip(("token_ids", *about.columns), arrays, strict=True):
            digest.update(array.data)
            values = arrow.array(array.reshape(-1))
            if array.ndim == 2:
                values = arrow.FixedSizeListArray.from_arrays(values, array.shape[1])
            content[name] = arrow.ListArray.from_arrays(ends, values)
        document = row.document
        size = sum(array.nbytes for array in arrays)
        document = StoredDocument(document.name, document.text_digest, len(token_ids), size, digest.hexdigest())
        row = Row(row.row, row.number, document, True)
    values = {"row": row.row, "number": row.number, "holds": row.holds, **asdict(row.document)}
    columns = [
        content[field.name] if field.name in content else arrow.array([values.get(field.name)], field.type)
        for field in schema
    ]
    return arrow.RecordBatch.from_arrays(columns, schema=schema), row


def renamed(batch: Any, row: Row) -> Any:
    """A document's batch as that of another row."""
    arrow = importlib.import_module("pyarrow")
    values = {"row": row.row, "number": row.number, "holds": row.holds, **asdict(row.document)}
    columns = [
        arrow.array([values[field.name]], field.type) if field.name in values else batch.column(field.name)
        for field in batch.schema
    ]
    return arrow.RecordBatch.from_arrays(columns, schema=batch.schema)


def read_rows(about: About, dataset: Any) -> list[Row]:
    """Every document, in the order they were added; keys are not read."""
    table, gone = dataset.to_table(columns=list(ABOUT)).to_pylist(), set(about.gone)
    rows = [
        Row(
            int(found["row"]),
            int(found["number"]),
            StoredDocument(*(found[name] for name in ("name", "text_digest", "tokens", "size", "sha256"))),
            bool(found["holds"]),
        )
        for found in table
        if found["row"] not in gone
    ]
    return sorted(rows, key=lambda row: row.number)


def scan(
    about: About, dataset: Any, columns: list[str], rows: list[Row], fragments: list[Any] | None = None
) -> Iterator[Any]:
    """Arrow batches of some columns, of about `BYTES_AT_ONCE`, document after document as they lie in the files."""
    arrow, gone = importlib.import_module("pyarrow"), set(about.gone)
    bytes_of_row = max((row.document.size for row in rows), default=1)
    at_once = max(1, min(1024, BYTES_AT_ONCE // max(1, bytes_of_row)))
    scanner = dataset.scanner(columns=columns, batch_size=at_once, scan_in_order=True, fragments=fragments)
    for batch in scanner.to_batches():
        if gone:
            stays = [row not in gone for row in batch.column("row").to_pylist()]
            batch = batch if all(stays) else batch.filter(arrow.array(stays))
        if batch.num_rows:
            yield batch


def rows_in(fragment: Any) -> set[int]:
    """The rows that a fragment holds."""
    return {row for batch in fragment.to_batches(columns=["row"]) for row in batch.column("row").to_pylist()}


def read_joined(about: About, dataset: Any, rows: list[Row], column: str, place: Place) -> Tensor:
    """A column of all documents that hold keys, in their order: (H, N, D), or (N,) int64 of `token_ids`."""
    held = [row for row in rows if row.holds]
    starts = dict(zip((row.row for row in held), _starts(held), strict=True))
    total = sum(row.document.tokens for row in held)
    identity = about.identity
    if about.dtype is None or column == "token_ids":
        shape: tuple[int, ...] = (total,) if column == "token_ids" else (identity.heads, 0, identity.head_dim)
        joined = torch.empty(shape, dtype=torch.int64 if column == "token_ids" else torch.float32)
    else:
        joined = torch.empty(identity.heads, total, identity.head_dim, dtype=TYPES[about.dtype])
    if about.dtype is None:
        return joined
    into: np.ndarray[Any, Any] = (joined.view(torch.int16) if joined.dtype == torch.bfloat16 else joined).numpy()
    seen = 0
    for batch in scan(about, dataset, ["row", column], rows):
        lists = batch.column(column)
        flat = _numbers(lists)
        ends = np.cumsum([0, *(length or 0 for length in arrow_lengths(lists))])
        for index, row in enumerate(batch.column("row").to_pylist()):
            part = flat[ends[index] : ends[index + 1]]
            if not len(part):
                continue
            start = starts.pop(row, None)
            if start is None or start + len(part) > total:
                raise StoreError(f"{place} holds other documents than it lists: {REPAIR}")
            if column == "token_ids":
                into[start : start + len(part)] = part
            else:
                kept = part.reshape(len(part), identity.heads, identity.head_dim).view(into.dtype)
                into[:, start : start + len(part)] = kept.transpose(1, 0, 2)
            seen += len(part)
    if seen != total or starts:
        raise StoreError(f"{place} holds {seen} tokens, and its documents have {total}: {REPAIR}")
    return joined


def arrow_lengths(lists: Any) -> list[int | None]:
    """How many there are in each list; None where there is no list."""
    lengths: list[int | None] = importlib.import_module("pyarrow.compute").list_value_length(lists).to_pylist()
    return lengths


def check_rows(about: About, dataset: Any, rows: list[Row], place: Place) -> None:
    """Reads everything and compares each document's checksum.

    Raises:
        StoreError: one was altered or is missing.
    """
    wanted = {row.row: row.document for row in rows if row.holds}
    if about.dtype is None:
        return
    columns = ["token_ids", *about.columns]
    for batch in scan(about, dataset, ["row", "holds", *columns], rows):
        for index, (row, holds) in enumerate(
            zip(batch.column("row").to_pylist(), batch.column("holds").to_pylist(), strict=True)
        ):
            if not holds:
                continue
            digest = hashlib.sha256()
            for name in columns:
                digest.update(np.ascontiguousarray(_numbers(batch.column(name).slice(index, 1))).data)
            document = wanted.pop(row, None)
            if document is None or digest.hexdigest() != document.sha256:
                what = "a document" if document is None else f"the document {document.name!r}"
                raise StoreError(f"{what} of {place} was altered: its checksum differs; {REPAIR}")
    if wanted:
        name = next(iter(wanted.values())).name
        raise StoreError(f"the document {name!r} of {place} is gone: {REPAIR}")


def _flat(tensor: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """(n, H * D) of keys or values (H, n, D), as they are kept."""
    heads, count, dim = tensor.shape
    rows = tensor.detach().to("cpu", TYPES[dtype]).transpose(0, 1).reshape(count, heads * dim).contiguous()
    array: np.ndarray[Any, Any] = (rows.view(torch.int16) if dtype == "bfloat16" else rows).numpy()
    return array.view(np.uint16) if dtype == "bfloat16" else array


def _numbers(lists: Any) -> np.ndarray[Any, Any]:
    """The numbers of lists, one list after another: (rows, width) or (rows,), which nobody may write into."""
    values = lists.flatten()
    width = getattr(values.type, "list_size", None)
    if width is not None:
        values = values.flatten()
    array: np.ndarray[Any, Any] = values.to_numpy(zero_copy_only=False)
    return array if width is None else array.reshape(-1, width)


def _starts(rows: list[Row]) -> list[int]:
    counts = [row.document.tokens for row in rows]
    return [int(start) for start in np.cumsum([0, *counts])[:-1]]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
