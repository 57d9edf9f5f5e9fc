"""Snapshots: the keys alive in any backend, as a version of a `KeyLog`, and any backend built over one.

    version = snapshot_memory(memory, "s3://bucket/memory")
    memory = restore_memory("s3://bucket/memory")                                      # as it was, the newest version
    memory = restore_memory("s3://bucket/memory", spec="faiss-ivf", version=version)   # another index over its keys

Numbers and slots stay what they were, so that values which the caller keeps by slot go with the memory. Unlike the
folder that `MemoryBackend.save` writes, a snapshot holds keys alone, as float32, and the index is built over them anew.
A snapshot's version stays until `forget_snapshot`, whatever is pruned.

Letters: M memories, C capacity, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from recollect.memory_backends import key_rows
from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.errors import CorruptMemory, InvalidInput, StoreMissing
from recollect.memory_backends.key_log import KeyLog
from recollect.memory_backends.lance_places import Place, place_of
from recollect.memory_backends.log_state import LogState
from recollect.memory_backends.registry import make_backend

ROWS_AT_ONCE = 16384
TAG = "snapshot-{}"
"""Of a version that no cleaning takes away."""


def snapshot_memory(
    backend: MemoryBackend, uri: str | Path, *, storage_options: Mapping[str, str] | None = None
) -> int:
    """Writes the keys alive in a memory as the newest version of the log at `uri`, which is made if there is none.

    Args:
        backend: stays as it is; appends wait until the snapshot is taken.
        uri: a folder, or an address such as `s3://bucket/memory`.
        storage_options: for the object store.

    Returns:
        The version's number, for `restore_memory`.

    Raises:
        BackendUnavailable: pylance is not installed.
        DiskFull: there is no room; former snapshots are as they were.
        InvalidInput: the log there is of memories of another size.
        StoreUnreachable: the address does not answer.
        WriteConflict: something else lies there, or another writer was at work.
    """
    sizes: dict[str, Any] = {
        "num_memories": backend.num_memories,
        "capacity": backend.capacity,
        "dim": backend.dim,
        "metric": backend.metric,
    }
    with _log_at(place_of(uri, storage_options), sizes) as log, backend.unchanged():
        totals = tuple(backend.ring.totals.tolist())
        generations = tuple(count + 1 for count in log.state.generations)
        about = {"spec": backend.spec, "seed": backend.seed}
        state = LogState(**sizes, totals=totals, generations=generations, about=about)
        log.replace(_batches(backend, totals, generations), state)
        log.keep(TAG.format(log.version))
        return log.version


def restore_memory(
    uri: str | Path,
    *,
    spec: str | None = None,
    version: int | None = None,
    device: str | torch.device = "cpu",
    seed: int | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> MemoryBackend:
    """A memory with the keys of a snapshot, or of any other `KeyLog`.

    Args:
        uri: where `snapshot_memory` wrote.
        spec: of the backend that is built over the keys; the one that the snapshot was taken of when None.
        version: which snapshot; the newest version when None.
        device: where the memory lives.
        seed: as for `make_backend`; the one of the snapshot when None.
        storage_options: for the object store.

    Raises:
        CorruptMemory: a key is missing or altered.
        InvalidInput: the log was written without a backend, and no spec is given.
        StoreMissing: there is no store, or no such version.
        UnknownBackend, InvalidSpec, BackendUnavailable, UnsupportedOperation: as for `make_backend`.
    """
    with KeyLog.open(uri, storage_options, version=version) as log:
        state = log.state
        spec = spec or state.about.get("spec")
        if spec is None:
            raise InvalidInput(f"{log.place} is no snapshot of a backend: say by spec= what to build over its keys")
        backend = make_backend(
            spec,
            num_memories=state.num_memories,
            capacity=state.capacity,
            dim=state.dim,
            metric=state.metric,
            device=device,
            seed=int(state.about.get("seed", 0)) if seed is None else seed,
        )
        try:
            with torch.inference_mode(False), torch.no_grad():
                _fill(backend, log)
        except BaseException:
            backend.close()
            raise
    return backend


def list_snapshots(uri: str | Path, *, storage_options: Mapping[str, str] | None = None) -> tuple[int, ...]:
    """Versions that `snapshot_memory` wrote and nobody has forgotten, oldest first."""
    with KeyLog.open(uri, storage_options) as log:
        return tuple(sorted(log.kept().values()))


def forget_snapshot(uri: str | Path, version: int, *, storage_options: Mapping[str, str] | None = None) -> None:
    """Gives up a snapshot; its files go when the log is pruned.

    Raises:
        StoreMissing: there is no such snapshot.
    """
    with KeyLog.open(uri, storage_options) as log:
        if TAG.format(version) not in log.kept():
            there = ", ".join(map(str, sorted(log.kept().values()))) or "none"
            raise StoreMissing(f"{log.place} has no snapshot of version {version}; there are: {there}")
        log.give_up(TAG.format(version))
        log.prune(keep_seconds=0.0)


def _log_at(place: Place, sizes: dict[str, Any]) -> KeyLog:
    try:
        return KeyLog.open(place.path, place.options, **sizes)
    except StoreMissing:
        return KeyLog.create(place.path, storage_options=place.options, **sizes)


def _batches(backend: MemoryBackend, totals: tuple[int, ...], generations: tuple[int, ...]) -> Iterator[Any]:
    """The keys alive as they were added, memory after memory, oldest first."""
    for memory, total in enumerate(totals):
        first = max(0, total - backend.capacity)
        for start in range(first, total, ROWS_AT_ONCE):
            numbers = torch.arange(start, min(total, start + ROWS_AT_ONCE))
            slots = (numbers % backend.capacity).to(backend.device)
            keys = backend.gather_keys(slots[None, None], memories=[memory])[0].float().cpu()
            which = torch.tensor([memory])
            yield key_rows.batch_of(which, torch.tensor([generations[memory]]), numbers[None], keys, backend.capacity)


def _fill(backend: MemoryBackend, log: KeyLog) -> None:
    """Puts the keys of a log into an empty backend's ring, and has it build its index over them."""
    ring, state = backend.ring, log.state
    for memory in range(state.num_memories):
        ring.totals[memory] = state.first_alive(memory)
    for memories, numbers, keys in log.scan():
        for memory in memories.unique().tolist():
            here = memories == memory
            rows = keys[here].to(backend.device)
            which = torch.tensor([memory])
            if backend._norms is not None:
                norms = rows.norm(dim=-1)
                rows = rows / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
                backend._norms[memory, (numbers[here] % state.capacity).to(backend.device)] = norms
            ring.append(rows[None], which)
    if not torch.equal(ring.totals, log.totals):
        raise CorruptMemory(f"{log.place} gave {ring.totals.tolist()} keys, not {log.totals.tolist()}: restore a copy")
    backend._index_anew(torch.arange(state.num_memories))


__all__ = ["forget_snapshot", "list_snapshots", "restore_memory", "snapshot_memory"]
