"""The backend `milvus` over Milvus Lite: what it keeps, finds again, and refuses."""

from __future__ import annotations

import fcntl
import gc
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.memory_backends import MemoryBackend, canonical_spec, load_backend, make_backend
from recollect.memory_backends import milvus_connection as connecting
from recollect.memory_backends.errors import (
    BackendUnavailable,
    CorruptMemory,
    DiskFull,
    InvalidInput,
    InvalidSpec,
    StoreMissing,
)
from recollect.memory_backends.implementations import milvus
from recollect.memory_backends.milvus_errors import MilvusError
from recollect.memory_backends.records import METRICS
from recollect.memory_backends.testing import skip_unless_available, vectors

M, C, D = 2, 60, 8


@pytest.fixture(autouse=True)
def _library() -> None:
    skip_unless_available("milvus")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "corpus.db")


def make(uri: str, *options: str, **sizes: Any) -> milvus.Milvus:
    spec = ",".join((f"milvus:uri={uri}", *options))
    made = make_backend(spec, **{"num_memories": M, "capacity": C, "dim": D, **sizes})
    assert isinstance(made, milvus.Milvus)
    return made


def exact(memory: MemoryBackend) -> MemoryBackend:
    sizes = {"num_memories": memory.num_memories, "capacity": memory.capacity, "dim": memory.dim}
    return make_backend("exact", metric=memory.metric, **sizes)


def same_answers(one: MemoryBackend, other: MemoryBackend, k: int = 7) -> None:
    queries = vectors(one.num_memories, 9, one.dim, seed=9)
    mine, wanted = one.search(queries, k), other.search(queries, k)
    assert torch.equal(mine.slots, wanted.slots)
    torch.testing.assert_close(mine.scores, wanted.scores, rtol=1e-4, atol=1e-4)


# What is found again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_a_memory_is_found_again(uri: str, metric: str) -> None:
    keys = vectors(M, 100, D) * vectors(M, 100, 1, seed=1).exp()
    memory = make(uri, metric=metric)
    oracle = exact(memory)
    for one in (memory, oracle):
        one.add(keys[:, :45])
        one.reset([1])
        one.add(keys[:, 45:])  # memory 0 has turned over, memory 1 has not
    all_slots = torch.arange(55).expand(M, 1, 55)
    gathered = memory.gather_keys(all_slots)
    memory.close()
    again = make(uri, "existing=reuse", metric=metric)
    assert again.lengths.tolist() == [C, 55]
    assert again.ring.totals.tolist() == [100, 55]
    torch.testing.assert_close(again.gather_keys(all_slots), gathered)
    same_answers(again, oracle)
    more = vectors(M, 30, D, seed=3)
    assert torch.equal(again.add(more), oracle.add(more))
    same_answers(again, oracle)
    again.close()


def test_scores_are_those_of_the_metric(uri: str) -> None:
    key, query = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
    for metric, score in (("inner_product", 9.0), ("l2", -16.0), ("cosine", 0.6)):
        with make(uri, f"collection={metric}", metric=metric, num_memories=1, dim=2) as memory:
            memory.add(key)
            assert memory.search(query, 1).scores.item() == pytest.approx(score)
            assert torch.equal(memory.gather_keys(torch.zeros(1, 1, 1, dtype=torch.int64))[0, 0], key[0])


def test_recall_of_a_graph_beside_other_memories(uri: str) -> None:
    # The other memory's keys suit the queries better: a filter over one graph would wade through them.
    queries = vectors(M, 40, 16, seed=5)
    with make(uri, "index=HNSW", capacity=3000, dim=16, num_memories=M) as memory:
        oracle = exact(memory)
        keys = vectors(M, 3000, 16)
        keys[1] *= 5
        for one in (memory, oracle):
            one.add(keys)
        memory.wait()
        found, wanted = memory.search(queries, 10).slots, oracle.search(queries, 10).slots
        recall = (found[..., :, None] == wanted[..., None, :]).any(-1).float().mean(dim=(1, 2))
        assert (recall > 0.95).all()
        assert not memory.capabilities.exact
    again = make(uri, "index=HNSW", "existing=reuse", "ef=200", capacity=3000, dim=16)
    assert (again.search(queries, 10).slots == wanted).float().mean() > 0.95
    again.set_search_options(ef=1)  # it searches with k candidates at least
    assert (again.search(queries, 10).slots == wanted).float().mean() < 0.95
    again.close()


def test_rows_written_out_and_not_are_searched_together(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "FLUSH_ROWS", 25)
    with make(uri, "batch=7") as memory:
        oracle = exact(memory)
        for step, count in enumerate((20, 20, 45, 3, 61)):
            keys = vectors(M, count, D, seed=step)
            assert torch.equal(memory.add(keys), oracle.add(keys))
            same_answers(memory, oracle)
        memory.wait()
        same_answers(memory, oracle)


def test_many_queries_and_keys_are_asked_in_parts(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recollect.memory_backends.milvus_collections.LITE_SCORES", 4 * C)
    for metric in ("inner_product", "l2"):
        with make(uri, "existing=replace", metric=metric) as memory:
            oracle = exact(memory)
            for one in (memory, oracle):
                one.add(vectors(M, C, D))
            same_answers(memory, oracle)


# What is there already ------------------------------------------------------------------------------------------------


def test_a_memory_that_is_there_is_refused_reused_or_replaced(uri: str) -> None:
    make(uri).add(vectors(M, 10, D))
    gc.collect()
    with pytest.raises(InvalidInput, match=r"existing=reuse .* existing=replace"):
        make(uri)
    with make(uri, "collection=other") as other:
        assert other.lengths.tolist() == [0, 0]
    with make(uri, "existing=reuse") as memory:
        assert memory.lengths.tolist() == [10, 10]
    with make(uri, "existing=replace") as memory:
        assert memory.lengths.tolist() == [0, 0]
        memory.add(vectors(M, 4, D))
    with make(uri, "existing=reuse") as memory:
        assert memory.lengths.tolist() == [4, 4]
        assert len(memory.collections.find()[0]) == 1, "nothing is left of what was replaced"
        memory.drop()
    with make(uri) as memory:
        assert memory.lengths.tolist() == [0, 0]
        assert set(memory.collections.find()) == {0, 1}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dim": 4}, "dim 8 instead of 4"),
        ({"capacity": 61}, "capacity 60 instead of 61"),
        ({"metric": "l2"}, "metric 'inner_product' instead of 'l2'"),
        ({"num_memories": 3}, "num_memories 2 instead of 3"),
        ({"index": "HNSW"}, "index 'FLAT' instead of 'HNSW'"),
    ],
)
def test_a_memory_of_another_shape_is_refused(uri: str, changes: dict[str, Any], told: str) -> None:
    make(uri).close()
    index = f"index={changes.pop('index', 'FLAT')}"
    with pytest.raises(InvalidInput, match=told):
        make(uri, "existing=reuse", index, **changes)
    with make(uri, "existing=replace", index, **changes) as memory:
        memory.add(vectors(memory.num_memories, 3, memory.dim))


def test_somebody_elses_collection_is_left_alone(uri: str) -> None:
    with make(uri) as memory:
        client = memory.connection._client
        client.create_collection("theirs_0_0", dimension=D)
        with pytest.raises(InvalidInput, match="not made by recollect"):
            make(uri, "collection=theirs", "existing=reuse")
        with pytest.raises(InvalidInput, match="not made by recollect"):
            make(uri, "collection=theirs", "existing=replace")
        assert client.has_collection("theirs_0_0")


def test_rows_that_somebody_took_away_are_noticed(uri: str) -> None:
    memory = make(uri)
    memory.add(vectors(M, 70, D))
    memory.connection._client.delete(memory.collections.names[1], ids=[20])
    memory.close()
    with pytest.raises(CorruptMemory, match=r"memory 1 .* existing=replace"):
        make(uri, "existing=reuse")


def test_keys_that_somebody_else_appended_are_told(uri: str) -> None:
    with make(uri) as memory, make(uri, "existing=reuse") as other:
        memory.add(vectors(M, 10, D))
        assert (other.search(vectors(M, 1, D), 3).slots == -1).all(), "it knows of none"
    with make(uri, "existing=reuse") as memory, make(uri, "existing=reuse") as other:
        other.add(10 * vectors(M, 40, D, seed=1))
        with pytest.raises(MilvusError, match=r"more than the 10 keys .* existing=reuse"):
            memory.search(vectors(M, 9, D), 5)


def test_a_collection_that_somebody_dropped_is_told(uri: str) -> None:
    memory = make(uri)
    memory.add(vectors(M, 10, D))
    memory.connection._client.drop_collection(memory.collections.names[0])
    with pytest.raises(StoreMissing, match="collection is gone"):
        memory.search(vectors(M, 1, D), 1)
    memory.close()
    with pytest.raises(CorruptMemory, match=r"memories \[0\] are missing"):
        make(uri, "existing=reuse")


# Appends that fail ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [20, 85])
def test_an_append_that_fails_half_way_is_undone(uri: str, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make(uri, "batch=8")
    oracle = exact(memory)
    for one in (memory, oracle):
        one.add(vectors(M, before, D))
    call, calls = connecting.Connection.call, []

    def failing(self: Any, doing: str, *arguments: Any, **named: Any) -> Any:
        calls.append(doing)
        if calls.count("append keys") > 3:
            raise MilvusError("the cable is out")
        return call(self, doing, *arguments, **named)

    monkeypatch.setattr(connecting.Connection, "call", failing)
    with pytest.raises(MilvusError, match="cable"):
        memory.add(10 * vectors(M, 30, D, seed=1))
    assert memory.lengths.tolist() == oracle.lengths.tolist()
    if before > C:
        with pytest.raises(MilvusError, match="cable"):  # there are keys to bring back, and it can't
            memory.search(vectors(M, 1, D), 1)
    monkeypatch.setattr(connecting.Connection, "call", call)
    same_answers(memory, oracle)
    keys = vectors(M, 5, D, seed=2)
    assert torch.equal(memory.add(keys), oracle.add(keys))
    same_answers(memory, oracle)
    memory.close()
    with make(uri, "existing=reuse") as again:
        assert again.ring.totals.tolist() == [before + 5] * M
        same_answers(again, oracle)


def test_the_next_append_takes_the_place_of_one_that_failed(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make(uri, "batch=8", num_memories=1)
    oracle = exact(memory)
    for one in (memory, oracle):
        one.add(vectors(1, 70, D))
    with monkeypatch.context() as patched:
        patched.setattr(memory, "_warn_of_lite", lambda: (_ for _ in ()).throw(MilvusError("after the last key")))
        with pytest.raises(MilvusError, match="after the last key"):
            memory.add(10 * vectors(1, 30, D, seed=1))
    for count in (4, 0, 60):
        keys = vectors(1, count, D, seed=count)
        assert torch.equal(memory.add(keys), oracle.add(keys))
        same_answers(memory, oracle)
    memory.close()


def test_a_full_disk_loses_nothing(uri: str) -> None:
    memory = make(uri, num_memories=1, capacity=8000)
    oracle = exact(memory)
    for one in (memory, oracle):
        one.add(vectors(1, 500, D))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond it, which is told as full
    try:
        with pytest.raises(DiskFull, match="free some space"):
            memory.add(vectors(1, 7000, D, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same_answers(memory, oracle)
    for one in (memory, oracle):
        one.add(vectors(1, 100, D, seed=2))
    same_answers(memory, oracle)
    # As after a kill: what was written before and after the disk was full is read from the log.
    memory.connection.store.abandon()  # type: ignore[union-attr]
    copy = shutil.copytree(uri, uri.replace("corpus", "copy"))
    memory.close()
    with make(str(copy), "existing=reuse", num_memories=1, capacity=8000) as again:
        assert again.lengths.tolist() == [600]
        same_answers(again, oracle)


def test_a_reset_that_fails_is_made_up_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make(uri)
    memory.add(vectors(M, 30, D))
    with monkeypatch.context() as patched:
        patched.setattr(memory.collections, "empty", lambda memory: (_ for _ in ()).throw(MilvusError("away")))
        with pytest.raises(MilvusError, match="away"):
            memory.reset()
    oracle = exact(memory)
    for one in (memory, oracle):
        one.add(vectors(M, 5, D, seed=1))
    same_answers(memory, oracle)
    memory.close()
    with make(uri, "existing=reuse") as again:
        assert again.lengths.tolist() == [5, 5]
        same_answers(again, oracle)


# Folders --------------------------------------------------------------------------------------------------------------


FORGOTTEN = """
import gc, tempfile
from pathlib import Path
import torch
from recollect.memory_backends import make_backend
sizes = {"num_memories": 1, "capacity": 8, "dim": 4}
def folders():
    return set(Path(tempfile.gettempdir()).glob("recollect-milvus-*"))
with make_backend("milvus", **sizes) as memory:
    before = folders()
    assert before
    memory.add(torch.ones(1, 8, 4))
    forgotten = make_backend("milvus", **sizes)
    forgotten.add(torch.ones(1, 8, 4))
    name = forgotten.collections.names[0]
    del forgotten
    gc.collect()
    with make_backend("milvus", **sizes) as another:
        assert not another.connection._client.has_collection(name), "what nobody closed is taken away"
    assert folders() == before
assert not folders()
"""


def test_nothing_is_left_of_a_temporary_memory(tmp_path: Path) -> None:
    # In a process of its own: memories that other tests forgot share the engine and its folder.
    environment = {"TMPDIR": str(tmp_path), **_environment()}
    command = [sys.executable, "-c", FORGOTTEN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_nothing_is_left_of_a_process_that_ends(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch\n"
        "from recollect.memory_backends import make_backend\n"
        "memory = make_backend('milvus', num_memories=1, capacity=8, dim=4)\n"
        "memory.add(torch.ones(1, 8, 4))\n"
        "os.kill(os.getpid(), 9) if sys.argv[1:] else print(memory.search(torch.ones(1, 1, 4), 1).slots.shape)\n"
    )
    environment = {"TMPDIR": str(tmp_path), **_environment()}
    killed = subprocess.run([sys.executable, "-c", code, "killed"], capture_output=True, env=environment)
    assert killed.returncode == -9
    assert len(list(tmp_path.glob("recollect-milvus-*"))) == 1
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "torch.Size([1, 1, 1])" in ended.stdout
    told = [line for line in ended.stderr.splitlines() if "chttp2_transport" not in line]  # gRPC's own log
    assert told == []
    assert not list(tmp_path.glob("recollect-milvus-*")), "the one that was killed is swept up as well"


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "TMPDIR"}


def test_a_folder_open_elsewhere_is_told(uri: str) -> None:
    make(uri).close()
    with (Path(uri) / "LOCK").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MilvusError, match="open in another process"):
            make(uri, "existing=reuse")
    make(uri, "existing=reuse").close()


def test_memories_share_a_folder(uri: str) -> None:
    one = make(uri, "collection=one")
    other = make(uri, "collection=other")
    one.add(vectors(M, 5, D))
    one.close()
    other.add(vectors(M, 7, D))
    assert other.search(vectors(M, 1, D), 20).slots.ge(0).sum() == 14
    other.close()
    with make(uri, "collection=one", "existing=reuse") as again:
        assert again.lengths.tolist() == [5, 5]


@pytest.mark.parametrize(("name", "told"), [("no-such-folder/corpus.db", "does not exist"), ("old.db", "is a file")])
def test_a_folder_that_cannot_be(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "old.db").write_text("SQLite format 3")
    with pytest.raises(InvalidInput, match=told):
        make(str(tmp_path / name))


def test_saving_and_loading(uri: str, tmp_path: Path) -> None:
    memory = make(uri, "existing=reuse")
    memory.add(vectors(M, 100, D))
    memory.save(tmp_path / "saved")
    memory.add(vectors(M, 7, D, seed=1))
    oracle = exact(memory)
    oracle.add(vectors(M, 100, D))
    memory.close()
    # It is put into the place of what Milvus has.
    loaded = load_backend(tmp_path / "saved")
    assert loaded.ring.totals.tolist() == [100, 100]
    same_answers(loaded, oracle)
    loaded.close()


def test_many_keys_in_lite_are_warned_of(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "LITE_KEYS", 50)
    memory = make(uri)
    memory.add(vectors(M, 25, D))
    with pytest.warns(UserWarning, match=r"51 keys .* in Python.*run a Milvus server"):
        memory.add(vectors(1, 1, D), memories=[0])
    memory.close()


# Options and versions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("uri=corpus", r"ends in \.db"),
        ("uri=ftp://host:19530", "http://host:19530"),
        ("uri=http://host:port", "http://host:19530"),
        ("uri=http://:19530", "http://host:19530"),
        ("collection=a-b", "letters, digits and _"),
        ("collection=''", "letters, digits and _"),
        ("existing=keep", "'refuse', 'reuse', 'replace'"),
        ("existing=reuse", "needs a uri"),
        ("index=IVF_PQ", "IVF_FLAT"),
        ("nprobe=4", "nprobe=4 is for index=IVF_FLAT"),
        ("index=HNSW,nlist=4", "nlist=4 is for index=IVF_FLAT"),
        ("index=HNSW,M=1", "M=1 is below 2"),
        ("batch=0", "batch=0"),
        ("deadline_seconds=0", "deadline_seconds=0"),
        ("token_file=secret", "for a server"),
    ],
)
def test_options_that_cannot_be(options: str, told: str) -> None:
    with pytest.raises(InvalidSpec, match=told):
        canonical_spec(f"milvus:{options}")


@pytest.mark.parametrize(
    ("library", "version", "told"),
    [("pymilvus", "2.4.9", "pymilvus 3.0 or newer, and this is 2.4.9"), ("milvus_lite", "2.5.1", "milvus-lite 3.0")],
)
def test_libraries_that_do_not_fit(
    library: str, version: str, told: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{library}.__version__", version)
    with pytest.raises(BackendUnavailable, match=f"{told}.*pip install"):
        make(uri)


def test_a_server_that_does_not_fit() -> None:
    with pytest.raises(BackendUnavailable, match=r"Milvus 2\.3 or newer, and this is 2\.2\.16: upgrade"):
        connecting._check_version("Milvus", "2.2.16", connecting.LEAST_SERVER, "upgrade the server")
