"""Snapshots: the keys of any backend as a version of a log, and any backend built over one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_s3 import fake_s3

from recollect.memory_backends import InvalidInput, InvalidSpec, StoreMissing, make_backend
from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.key_log import KeyLog
from recollect.memory_backends.snapshots import forget_snapshot, list_snapshots, restore_memory, snapshot_memory

pytest.importorskip("lance")

SIZES = {"num_memories": 3, "capacity": 40, "dim": 8}


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(spec: str = "exact", metric: str = "inner_product", keys: int = 65) -> MemoryBackend:
    """Three memories: one wrapped round, one half full, one empty."""
    backend = make_backend(spec, **SIZES, metric=metric)
    backend.add(vectors(1, keys, 8), memories=[0])
    backend.add(vectors(1, 20, 8, seed=1), memories=[2])
    return backend


def same(one: MemoryBackend, other: MemoryBackend) -> None:
    queries = vectors(3, 6, 8, seed=5)
    first, second = one.search(queries, 5), other.search(queries, 5)
    assert torch.equal(first.slots, second.slots)
    torch.testing.assert_close(first.scores, second.scores)
    assert torch.equal(one.add(vectors(3, 3, 8, seed=6)), other.add(vectors(3, 3, 8, seed=6))), "slots go on alike"
    after = vectors(3, 6, 8, seed=7)
    assert torch.equal(one.search(after, 5).slots, other.search(after, 5).slots)


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_a_memory_comes_back(tmp_path: Path, metric: str) -> None:
    backend = filled(metric=metric)
    version = snapshot_memory(backend, tmp_path / "memory")
    restored = restore_memory(tmp_path / "memory")
    assert (restored.spec, restored.metric, restored.lengths.tolist()) == ("exact", metric, [40, 0, 20])
    slots = torch.arange(20)[None, None].expand(2, 1, 20)
    torch.testing.assert_close(
        restored.gather_keys(slots, memories=[0, 2]), backend.gather_keys(slots, memories=[0, 2])
    )
    assert list_snapshots(tmp_path / "memory") == (version,)
    same(backend, restored)


@pytest.mark.parametrize("spec", ["exact:storage=int8", "faiss-ivf:nlist=4,nprobe=4", "hnswlib"])
def test_any_backend_is_built_over_any_snapshot(tmp_path: Path, spec: str) -> None:
    backend = filled()
    snapshot_memory(backend, tmp_path / "memory")
    restored = restore_memory(tmp_path / "memory", spec=spec)
    queries = vectors(3, 6, 8, seed=5)
    found, wanted = restored.search(queries, 1).slots, backend.search(queries, 1).slots
    assert (found == wanted).float().mean() > 0.8
    snapshot_memory(restored, tmp_path / "other")
    again = restore_memory(tmp_path / "other", spec="exact")
    assert again.lengths.tolist() == backend.lengths.tolist()
    assert (again.search(queries, 1).slots == wanted).float().mean() > 0.8


def test_versions_stay_until_they_are_forgotten(tmp_path: Path) -> None:
    place = tmp_path / "memory"
    backend = filled()
    first = snapshot_memory(backend, place)
    wanted = backend.search(vectors(3, 6, 8, seed=5), 5).slots
    backend.add(vectors(3, 30, 8, seed=2))
    backend.reset([2])
    second = snapshot_memory(backend, place)
    with KeyLog.open(place) as log:
        log.prune(keep_seconds=0.0, alone=True)
    assert list_snapshots(place) == (first, second)
    older = restore_memory(place, version=first)
    assert torch.equal(older.search(vectors(3, 6, 8, seed=5), 5).slots, wanted)
    assert restore_memory(place).lengths.tolist() == [40, 30, 0]
    forget_snapshot(place, first)
    assert list_snapshots(place) == (second,)
    with pytest.raises(StoreMissing):
        restore_memory(place, version=first)
    with pytest.raises(StoreMissing, match=f"no snapshot of version {first}; there are: {second}"):
        forget_snapshot(place, first)


def test_a_log_that_grew_by_appends_is_restored_too(tmp_path: Path) -> None:
    keys = vectors(3, 50, 8)
    with KeyLog.create(tmp_path / "log", **SIZES) as log:
        for part in keys.split(7, dim=1):
            log.append(part)
    with pytest.raises(InvalidInput, match="say by spec= what to build"):
        restore_memory(tmp_path / "log")
    restored = restore_memory(tmp_path / "log", spec="exact")
    backend = make_backend("exact", **SIZES)
    backend.add(keys)
    same(backend, restored)


def test_what_cannot_be_restored_is_told(tmp_path: Path) -> None:
    snapshot_memory(filled(), tmp_path / "memory")
    with pytest.raises(InvalidInput, match="log of capacity=40, and capacity=9 was asked for"):
        snapshot_memory(make_backend("exact", num_memories=3, capacity=9, dim=8), tmp_path / "memory")
    with pytest.raises(InvalidSpec):
        restore_memory(tmp_path / "memory", spec="exact:nonsense=1")
    with pytest.raises(StoreMissing):
        restore_memory(tmp_path / "nothing")


def test_a_snapshot_goes_to_an_object_store() -> None:
    backend = filled()
    with fake_s3() as (_, options):
        version = snapshot_memory(backend, "s3://bucket/memory", storage_options=options)
        restored = restore_memory("s3://bucket/memory", version=version, storage_options=options)
    same(backend, restored)
