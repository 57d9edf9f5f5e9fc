"""Keys in a durable log: shards filled from it, the owner's tail, and a memory that outlives its program."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.memory_backends import InvalidSpec, MemoryBackend, UnsupportedOperation, canonical_spec, make_backend
from recollect.memory_backends import ray_store as ray_store_module
from recollect.memory_backends.errors import StoreMissing, WriteConflict
from recollect.memory_backends.implementations.ray import Ray
from recollect.memory_backends.key_log import KeyLog
from recollect.memory_backends.ray_store import StoreRing
from recollect.memory_backends.testing import skip_unless_available, vectors

pytestmark = pytest.mark.usefixtures("ray_running")
D, K = 8, 7


@pytest.fixture(autouse=True)
def _libraries() -> None:
    skip_unless_available("ray")
    pytest.importorskip("lance", reason="pylance is not installed: pip install 'recollect[lance]'")


@pytest.fixture
def small_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the tail written every few appends, and nothing kept of it."""
    monkeypatch.setattr(ray_store_module, "COMMIT_BYTES", 60 * 4 * D)
    monkeypatch.setattr(ray_store_module, "COMMIT_SECONDS", 1e9)
    monkeypatch.setattr(ray_store_module, "KEPT_BYTES", 0)


def pair(store: Path, options: str = "shards=2", **changes: Any) -> tuple[Ray, MemoryBackend]:
    sizes: dict[str, Any] = {"num_memories": 2, "capacity": 101, "dim": D, **changes}
    memory = make_backend(f"ray:keys=store,store='{store}',deadline_seconds=60,{options}", **sizes)
    assert isinstance(memory, Ray)
    return memory, make_backend("exact", **sizes)


def assert_same(memory: MemoryBackend, exact: MemoryBackend, seed: int = 50) -> None:
    queries = vectors(2, 9, D, seed=seed)
    mine, true = memory.search(queries, K), exact.search(queries, K)
    assert torch.equal(mine.slots, true.slots)
    torch.testing.assert_close(mine.scores, true.scores)
    torch.testing.assert_close(memory.gather_keys(mine.slots), exact.gather_keys(true.slots))


def kill(memory: Ray, shard: int) -> None:
    import ray

    os.kill(ray.get(memory.shards.links[shard].host.actor.where.remote(), timeout=60)["pid"], signal.SIGKILL)


def history(memory: MemoryBackend, exact: MemoryBackend) -> Iterator[int]:
    """Appends and resets of both, some longer than the memory; yields in between."""
    for step, count in enumerate((3, 70, 20, 1, 55, 250, 40, 120, 5)):
        for one in (memory, exact):
            one.add(vectors(2, count, D, seed=step))
            if step == 4:
                one.reset([1])
            if step in (5, 7):
                one.add(vectors(1, 31, D, seed=20 + step), memories=[0])
        yield step


@pytest.mark.usefixtures("small_tail")
def test_the_same_answers_as_exact_whatever_the_history(tmp_path: Path) -> None:
    memory, exact = pair(tmp_path / "store", "shards=3")
    for _ in history(memory, exact):
        assert_same(memory, exact)
    assert memory.recoveries == []
    with KeyLog.open(tmp_path / "store") as log:
        assert 0 < int(log.totals.sum()) < int(memory.ring.totals.sum()), "part of it is written, part is the tail"
    assert memory.stats().key_bytes == 0


@pytest.mark.usefixtures("small_tail")
def test_a_killed_shard_is_filled_from_the_store_and_the_tail(tmp_path: Path) -> None:
    memory, exact = pair(tmp_path / "store")
    for step in history(memory, exact):
        if step in (2, 6):
            kill(memory, step // 6)
        if step != 6:  # once several changes find the process gone
            assert_same(memory, exact)
    assert [(one.shard, one.keys_lost) for one in memory.recoveries] == [(0, 0), (1, 0)]
    assert all(one.keys_refilled > 0 for one in memory.recoveries)


@pytest.mark.usefixtures("small_tail")
def test_it_goes_on_with_what_is_in_the_store(tmp_path: Path) -> None:
    memory, exact = pair(tmp_path / "store")
    for _ in history(memory, exact):
        pass
    memory.wait()
    with KeyLog.open(tmp_path / "store") as log:
        assert torch.equal(log.totals, memory.ring.totals), "wait() leaves nothing in the tail"
    memory.add(vectors(2, 4, D, seed=77))
    exact.add(vectors(2, 4, D, seed=77))
    memory.close()
    again, _ = pair(tmp_path / "store", "shards=3")  # over another number of shards
    assert torch.equal(again.lengths, exact.lengths)
    assert_same(again, exact)
    for one in (again, exact):
        one.add(vectors(2, 9, D, seed=78))
    assert_same(again, exact)


def test_an_append_that_is_taken_back_is_not_in_the_tail(tmp_path: Path) -> None:
    memory, exact = pair(tmp_path / "store")
    for one in (memory, exact):
        one.add(vectors(2, 30, D))
    append = memory.shards.append
    memory.shards.append = _fails  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        memory.add(vectors(2, 20, D, seed=1))
    memory.shards.append = append  # type: ignore[method-assign]
    for one in (memory, exact):
        one.add(vectors(2, 10, D, seed=2))
    assert_same(memory, exact)
    memory.wait()
    assert isinstance(memory.ring, StoreRing)
    assert memory.ring.committed.tolist() == [40, 40]
    kill(memory, 0)
    assert_same(memory, exact)


def _fails(*_: Any) -> None:
    raise MemoryError("no room")


def test_a_store_deleted_under_the_memory_is_told(tmp_path: Path) -> None:
    memory, _ = pair(tmp_path / "store")
    memory.add(vectors(2, 30, D))
    memory.wait()
    memory.add(vectors(2, 3, D))
    shutil.rmtree(tmp_path / "store")
    memory.search(vectors(2, 3, D), K)  # the shards have all that they need
    with pytest.raises(StoreMissing):
        memory.wait()
    with pytest.raises(StoreMissing):
        memory.close()


def test_another_writer_of_the_same_store_is_told(tmp_path: Path) -> None:
    memory, _ = pair(tmp_path / "store")
    other, _ = pair(tmp_path / "store")
    for one in (memory, other):
        one.add(vectors(2, 30, D))
    memory.wait()
    with pytest.raises(WriteConflict, match="another program writes to it"):
        other.wait()
    with pytest.raises(WriteConflict):
        other.close()


def test_what_a_store_cannot_do_is_told(tmp_path: Path) -> None:
    for options, says in (
        ("keys=store", "keys=store and store='' do not go together"),
        ("store=here", "keys=caller and store='here'"),
        ("keys=store,store=here,storage=int8", "leave out storage"),
    ):
        with pytest.raises(InvalidSpec, match=says):
            canonical_spec(f"ray:{options}")
    with pytest.raises(UnsupportedOperation, match="metric 'cosine'"):
        pair(tmp_path / "store", metric="cosine")
    memory, _ = pair(tmp_path / "store")
    with pytest.raises(UnsupportedOperation, match=r"durable in its store.*wait\(\)"):
        memory.save(tmp_path / "saved")
    spec = f"rerank:source='ray:keys=store,store={tmp_path}/other'"
    with pytest.raises(UnsupportedOperation, match="keeps its keys in a store"):
        make_backend(spec, num_memories=1, capacity=9, dim=D).add(vectors(1, 3, D))
