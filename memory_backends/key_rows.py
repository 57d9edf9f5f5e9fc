"""The rows of a `KeyLog`: how keys become Arrow batches and come back.

Letters: M' memories, T keys of each, D dimension.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from recollect.memory_backends.errors import CorruptMemory

if TYPE_CHECKING:
    from recollect.memory_backends.key_log import LogState

Array = np.ndarray[Any, Any]
Part = tuple[Array, Array, Array]

COLUMNS = ("memory", "generation", "number", "slot", "checksum", "key")
MERGED_ROWS = 16384
"""Rows at a time while files are merged."""
SPARSE = 8
"""Where less than one row in so many is wanted, Lance finds the rows first and then fetches their keys."""


def schema_of(dim: int) -> Any:
    """The Arrow schema of a row."""
    pyarrow = importlib.import_module("pyarrow")
    types = (
        pyarrow.int32(),
        pyarrow.int32(),
        pyarrow.int64(),
        pyarrow.int64(),
        pyarrow.uint32(),
        pyarrow.list_(pyarrow.float32(), dim),
    )
    return pyarrow.schema([pyarrow.field(name, kind, False) for name, kind in zip(COLUMNS, types, strict=True)])


def checksums(keys: Array) -> Array:
    """(n,) uint32 of keys (n, D) float32: their bits, added up; any one altered component shows."""
    return keys.view(np.uint32).sum(axis=1, dtype=np.uint32)


def batch_of(memories: Tensor, generations: Tensor, numbers: Tensor, keys: Tensor, capacity: int) -> Any:
    """An Arrow batch of keys (M', T, D) float32 with numbers (M', T), memory after memory."""
    pyarrow = importlib.import_module("pyarrow")
    rows = keys.contiguous().numpy().reshape(-1, keys.shape[2])
    each = numbers.shape[1]
    flat = numbers.numpy().reshape(-1)
    key = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), keys.shape[2])
    columns = (
        pyarrow.array(memories.numpy().astype(np.int32).repeat(each)),
        pyarrow.array(generations.numpy().astype(np.int32).repeat(each)),
        pyarrow.array(flat),
        pyarrow.array(flat % capacity),
        pyarrow.array(checksums(rows)),
        key,
    )
    return pyarrow.RecordBatch.from_arrays(list(columns), schema=schema_of(keys.shape[2]))


def expected_numbers(state: LogState, memory: int, shard: int, shards: int) -> Array:
    """The numbers alive in a memory and shard, rising."""
    numbers = np.arange(state.first_alive(memory), state.totals[memory], dtype=np.int64)
    return numbers if shards == 1 else numbers[(numbers % state.capacity) % shards == shard]


def scan_memory(dataset: Any, state: LogState, memory: int, shard: int, shards: int, batch_rows: int) -> Iterator[Part]:
    """Numbers, slots and keys alive in a memory and shard, in the order of the files."""
    first, total = state.first_alive(memory), state.totals[memory]
    if first == total:
        return
    conditions = [f"memory = {memory}", f"generation = {state.generations[memory]}", f"number >= {first}"]
    if shards > 1:
        conditions.append(f"slot % {shards} = {shard}")
    share = (total - first) / shards / max(1, dataset.count_rows())
    scanner = dataset.scanner(
        columns=["number", "slot", "checksum", "key"],
        filter=" AND ".join(conditions),
        batch_size=batch_rows,
        scan_in_order=True,
        late_materialization=share * SPARSE < 1,
    )
    for batch in scanner.to_batches():
        if batch.num_rows:
            yield _column(batch, "number"), _column(batch, "slot"), _keys(batch)


def scan_alive(dataset: Any, state: LogState, batch_rows: int) -> Iterator[Part]:
    """Memories, numbers and keys of all that is alive, in the order of the files."""
    if not state.alive:
        return
    for batch in dataset.scanner(columns=list(COLUMNS), batch_size=batch_rows, scan_in_order=True).to_batches():
        some = batch.filter(_alive(batch, state))
        if some.num_rows:
            yield _column(some, "memory").astype(np.int64), _column(some, "number"), _keys(some)


def out_of_turn(memories: Array, numbers: Array, following: Array) -> tuple[int | None, Array]:
    """The first place where a number is not its memory's next one, if any; and what follows after these."""
    order = np.argsort(memories, kind="stable")
    grouped = memories[order]
    counts = np.bincount(grouped, minlength=len(following))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    wanted = following[grouped] + np.arange(len(grouped)) - starts[grouped]
    wrong = order[numbers[order] != wanted]
    return (int(wrong.min()) if len(wrong) else None), following + counts


def alive_batches(dataset: Any, fragments: list[Any], state: LogState) -> Iterator[Any]:
    """Arrow batches of the rows alive in some fragments, in their order."""
    scanner = dataset.scanner(columns=list(COLUMNS), fragments=fragments, batch_size=MERGED_ROWS, scan_in_order=True)
    for batch in scanner.to_batches():
        some = batch.filter(_alive(batch, state))
        _keys(some)  # what was altered on disk must not be written again under a file that is whole
        if some.num_rows:
            yield some


def has_dead(fragment: Any, state: LogState) -> bool:
    """Whether a fragment holds a row that is no longer alive."""
    columns = ["memory", "generation", "number"]
    return any(not _mask(batch, state).all() for batch in fragment.to_batches(columns=columns))


def _alive(batch: Any, state: LogState) -> Any:
    return importlib.import_module("pyarrow").array(_mask(batch, state))


def _mask(batch: Any, state: LogState) -> Array:
    memories = _column(batch, "memory")
    totals, generations = np.array(state.totals), np.array(state.generations)
    firsts = np.maximum(0, totals - state.capacity)
    mask: Array = (_column(batch, "generation") == generations[memories]) & (
        _column(batch, "number") >= firsts[memories]
    )
    return mask


def _column(batch: Any, name: str) -> Array:
    # A copy: Arrow's memory is read-only, and torch takes none that is.
    return np.array(batch.column(name).to_numpy(zero_copy_only=False), copy=True)


def _keys(batch: Any) -> Array:
    """(n, D) float32, their checksums compared."""
    column = batch.column("key")
    dim = column.type.list_size
    keys = np.array(column.flatten().to_numpy(zero_copy_only=False), copy=True).reshape(-1, dim)
    wrong = np.flatnonzero(checksums(keys) != batch.column("checksum").to_numpy(zero_copy_only=False))
    if len(wrong):
        where = f" (key number {batch.column('number')[int(wrong[0])].as_py()})"
        raise CorruptMemory(f"{len(wrong)} stored keys are altered: their checksums differ{where}; restore a copy")
    return keys
