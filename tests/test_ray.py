"""One memory in shards: the same answers as in one piece, whatever its history, and what its options do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from recollect.memory_backends import (
    BackendUnavailable,
    InvalidInput,
    InvalidSpec,
    MemoryBackend,
    UnsupportedOperation,
    canonical_spec,
    load_backend,
    make_backend,
)
from recollect.memory_backends.implementations.ray import Ray
from recollect.memory_backends.ray_options import parse_resources
from recollect.memory_backends.ray_start import check_version, knock
from recollect.memory_backends.registry import build_spec, capabilities_of
from recollect.memory_backends.testing import skip_unless_available, vectors

pytestmark = pytest.mark.usefixtures("ray_running")
K = 7


@pytest.fixture(autouse=True)
def _library() -> None:
    skip_unless_available("ray")


def made(options: str, **changes: Any) -> Ray:
    sizes: dict[str, Any] = {"num_memories": 1, "capacity": 100, "dim": 8, **changes}
    memory = make_backend(f"ray:{options}", **sizes)
    assert isinstance(memory, Ray)
    return memory


def hosts_of(memory: Ray) -> list[dict[str, Any]]:
    import ray

    return ray.get([link.host.actor.where.remote() for link in memory.shards.links], timeout=60)


def assert_same(one: MemoryBackend, other: MemoryBackend, queries: Tensor, k: int = K, **which: Any) -> None:
    mine, true = one.search(queries, k, **which), other.search(queries, k, **which)
    torch.testing.assert_close(mine.scores, true.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine.slots, true.slots)
    torch.testing.assert_close(one.gather_keys(mine.slots, **which), other.gather_keys(true.slots, **which))


@pytest.mark.parametrize(
    ("shards", "capacity"), [(1, 20), (2, 20), (2, 21), (3, 20), (3, 40), (3, 2), (2, 1)], ids=lambda value: str(value)
)
def test_exact_over_exact_shards_is_exact_whatever_the_history(shards: int, capacity: int) -> None:
    memories, dim = 3, 8
    sizes = {"num_memories": memories, "capacity": capacity, "dim": dim}
    memory, exact = made(f"shards={shards}", **sizes), make_backend("exact", **sizes)
    drawn = torch.Generator().manual_seed(capacity * 10 + shards)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=drawn))

    for step in range(30):
        which = torch.randperm(memories, generator=drawn)[: number(1, memories)].tolist()
        match number(0, 5):
            case 0:
                memory.reset(which)
                exact.reset(which)
            case 1:  # more than the memory holds
                count = number(capacity, 3 * capacity + 2)
            case _:
                count = number(0, max(2, capacity // 2))
        keys = vectors(len(which), count if step else 3, dim, seed=step)
        assert torch.equal(memory.add(keys, memories=which), exact.add(keys, memories=which))
        if step % 3 == 0:
            assert_same(memory, exact, vectors(len(which), 5, dim, seed=900 + step), number(1, 9), memories=which)
    assert_same(memory, exact, vectors(memories, 5, dim, seed=99), 2 * capacity)
    assert memory.recoveries == [], "no shard was ever found to stand elsewhere than expected"


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_other_metrics_are_the_same_too(metric: str) -> None:
    sizes = {"num_memories": 2, "capacity": 50, "dim": 8, "metric": metric}
    memory, exact = made("shards=3", **sizes), make_backend("exact", **sizes)
    for one in (memory, exact):
        one.add(vectors(2, 80, 8))
    assert_same(memory, exact, vectors(2, 9, 8, seed=1))


def test_keys_too_many_for_one_message_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from recollect.memory_backends import ray_link

    monkeypatch.setattr(ray_link, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(ray_link, "MOST_PENDING", 4)
    sizes = {"num_memories": 2, "capacity": 1000, "dim": 8}
    memory, exact = made("shards=3", **sizes), make_backend("exact", **sizes)
    for step, count in enumerate((700, 500, 1, 1500, 40)):
        for one in (memory, exact):
            one.add(vectors(2, count, 8, seed=step))
        assert_same(memory, exact, vectors(2, 5, 8, seed=9))
    assert memory.recoveries == []


def test_shards_are_even_at_any_time() -> None:
    memory = made("shards=3", num_memories=2, capacity=20)
    for step in range(25):
        memory.add(vectors(2, 1 + step % 3, 8, seed=step))
        held = [answer["keys"] for answer in memory._ask("stats", lambda _: ()).values()]
        assert sum(held) == int(memory.lengths.sum())
        assert max(held) - min(held) <= 2, "one key of each memory"


def test_memories_share_processes_and_give_them_back() -> None:
    one, other = made("shards=2"), made("shards=3", capacity=5)
    pids = [host["pid"] for host in hosts_of(other)]
    assert [host["pid"] for host in hosts_of(one)] == pids[:2]
    assert len(set(pids)) == 3
    assert os.getpid() not in pids
    before = hosts_of(one)[0]["shards"]
    other.close()
    assert hosts_of(one)[0]["shards"] == before - 1
    memory = made("shards=1")
    del memory  # nobody closed it
    assert_eventually(lambda: hosts_of(one)[0]["shards"] == before - 1)


def assert_eventually(true: Any, seconds: float = 20.0) -> None:
    import time

    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_append_is_not_waited_for() -> None:
    memory, exact = made("shards=2"), make_backend("exact", num_memories=1, capacity=100, dim=8)
    process = psutil.Process(hosts_of(memory)[1]["pid"])
    process.send_signal(signal.SIGSTOP)
    try:
        for step in range(40):  # more than may be under way: the rest waits in the ring
            for one in (memory, exact):
                one.add(vectors(1, 5, 8, seed=step))
    finally:
        process.send_signal(signal.SIGCONT)
    assert_same(memory, exact, vectors(1, 5, 8, seed=99))
    assert memory.recoveries == []


@pytest.mark.parametrize(
    "storage", ["storage=int8", "storage=bfloat16", "keys_in=temporary,storage=int8", "keys_in=temporary"]
)
def test_the_caller_s_keys_may_be_stored_otherwise(storage: str) -> None:
    sizes = {"num_memories": 1, "capacity": 60, "dim": 8}
    memory, exact = made(f"shards=2,{storage}", **sizes), make_backend(f"exact:{storage}", **sizes)
    for one in (memory, exact):
        one.add(vectors(1, 90, 8))
    torch.testing.assert_close(
        memory.search(vectors(1, 9, 8, seed=1), K).scores,
        exact.search(vectors(1, 9, 8, seed=1), K).scores,
        rtol=2e-2,
        atol=2e-2,
    )


def test_search_options_of_the_shards_change_without_a_rebuild() -> None:
    skip_unless_available("faiss-ivf")
    memory = made("shards=2,backend='faiss-ivf:nlist=16,nprobe=1'", capacity=2000)
    keys, queries = vectors(1, 2000, 8), vectors(1, 50, 8, seed=1)
    memory.add(keys)
    built = memory.stats().build_seconds
    memory.set_search_options(backend="faiss-ivf:nprobe=16,nlist=16", deadline_seconds=20, partial=True)
    assert memory.spec == canonical_spec(
        "ray:backend='faiss-ivf:nlist=16,nprobe=16',deadline_seconds=20,partial=true,shards=2"
    )
    exact = make_backend("exact", num_memories=1, capacity=2000, dim=8)
    exact.add(keys)
    assert torch.equal(memory.search(queries, K).slots, exact.search(queries, K).slots)
    assert memory.stats().build_seconds == built
    for wrong in ("faiss-ivf:nlist=32", "exact"):
        with pytest.raises(UnsupportedOperation, match=r"can't turn backend='faiss-ivf:nlist=16'"):
            memory.set_search_options(backend=wrong)
    with pytest.raises(InvalidSpec, match="nprobes"):
        memory.set_search_options(backend="faiss-ivf:nprobes=4")
    assert torch.equal(memory.search(queries, K).slots, exact.search(queries, K).slots)


def test_an_index_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    skip_unless_available("faiss-ivf")
    memory = made("shards=3,backend='faiss-ivf:nlist=8,nprobe=2'", num_memories=2, capacity=1000)
    for step, count in enumerate((700, 100, 1500, 60)):
        memory.add(vectors(2, count, 8, seed=step))
    memory.reset([1])
    memory.add(vectors(1, 300, 8, seed=8), memories=[1])
    queries = vectors(2, 30, 8, seed=9)
    before = memory.search(queries, K)
    memory.save(tmp_path / "memory")
    loaded = load_backend(tmp_path / "memory")
    assert torch.equal(loaded.search(queries, K).slots, before.slots)
    for one in (memory, loaded):
        one.add(vectors(2, 200, 8, seed=10))
    assert torch.equal(loaded.search(queries, K).slots, memory.search(queries, K).slots)


def test_it_serves_as_the_source_of_another_backend() -> None:
    sizes = {"num_memories": 1, "capacity": 300, "dim": 8}
    memory = make_backend("rerank:candidates=32,source='ray:shards=2'", **sizes)
    exact = make_backend("exact", **sizes)
    for step in range(3):
        for one in (memory, exact):
            one.add(vectors(1, 200, 8, seed=step))
    assert_same(memory, exact, vectors(1, 9, 8, seed=9))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("shards=0", "shards=0 is below 1"),
        ("deadline_seconds=0", "deadline_seconds=0 is not above 0"),
        ("cpus_per_shard=1.5", "cpus_per_shard=1.5"),
        ("gpus_per_shard=-1", "gpus_per_shard=-1"),
        ("gpus_per_shard=1,backend=hnswlib", "'hnswlib' can't live on a GPU"),
        ("backend=exakt", "backend='exakt'.*did you mean 'exact'"),
        ("backend='faiss-ivf:nlists=4'", "backend='faiss-ivf:nlists=4'.*did you mean 'nlist'"),
        ("backend=ray", "backend='ray' spreads its keys itself"),
        ("backend='rerank:source=ray'", "spreads its keys itself"),
        ("address='ray://somewhere:10001'", "ray://somewhere:10001.*10.0.0.1:6379"),
        ("resources='big=lots'", "resources='big=lots'.*name=1"),
        ("resources='=1'", "needs a name"),
        ("placement=spred", "did you mean 'spread'"),
    ],
)
def test_bad_options_say_what_would_do(options: str, says: str) -> None:
    with pytest.raises(InvalidSpec, match=says):
        canonical_spec(f"ray:{options}")


def test_resources_as_written() -> None:
    assert parse_resources("b=0.5, a=2") == (("a", 2.0), ("b", 0.5))
    assert parse_resources("") == ()


def test_what_does_not_suit_a_shard_is_told_when_it_is_made() -> None:
    skip_unless_available("faiss-ivf")
    with pytest.raises(InvalidSpec, match=r"'ray': backend='faiss-ivf:nlist=80': shard [01] of 2.*nlist=80"):
        made("shards=2,backend='faiss-ivf:nlist=80'", capacity=100)


def test_what_is_true_of_it_is_what_is_true_of_its_shards() -> None:
    assert capabilities_of("ray").exact
    assert not capabilities_of("ray:backend=hnswlib").exact
    assert capabilities_of("ray:backend=hnswlib").eviction == "rebuilt"
    assert capabilities_of("ray").devices == ("cpu",)
    one = build_spec("ray:backend='faiss-ivf:nlist=16,nprobe=2',partial=true,deadline_seconds=9")
    assert one == "ray:backend=faiss-ivf:nlist=16"
    assert Ray.one_shared


def test_a_place_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from recollect.memory_backends.errors import Unreachable
    from recollect.memory_backends.implementations import ray as implementation

    monkeypatch.setattr(implementation, "START_SECONDS", 1.0)
    with pytest.raises(Unreachable, match=r"away for 1 s.*asks for no_such_thing 1, and the cluster has"):
        made("shards=1,resources='no_such_thing=1',deadline_seconds=1")


def test_another_address_than_the_one_in_use_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"address='10.9.8.7:6379'.*connected to Ray at 'local'"):
        made("address='10.9.8.7:6379'")


def test_a_ray_that_is_too_old_is_told_with_the_command() -> None:
    check_version("2.60.0")
    with pytest.raises(BackendUnavailable, match=r"2\.9\.3 is here: pip install 'ray>=2.50'"):
        check_version("2.9.3")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:port"])
def test_nobody_at_the_address_is_told_at_once(address: str) -> None:
    from recollect.memory_backends.errors import Unreachable

    with pytest.raises(Unreachable, match=rf"no Ray cluster answers at address='{address}'"):
        knock(address, 5.0)
