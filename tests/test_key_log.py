"""The log of keys: what is appended is there when it returns, in order, once, and only while it is alive."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.memory_backends import lance_support
from recollect.memory_backends.errors import (
    BackendUnavailable,
    ClosedMemory,
    CorruptMemory,
    DiskFull,
    InvalidInput,
    NotFinite,
    StoreMissing,
    StoreUnreachable,
    WriteConflict,
)
from recollect.memory_backends.key_log import KeyLog
from recollect.memory_backends.lance_places import place_of

pytest.importorskip("lance")

CAPACITY, DIM = 50, 4


def vectors(memories: int, count: int, seed: int = 0, dim: int = DIM) -> torch.Tensor:
    return torch.randn(memories, count, dim, generator=torch.Generator().manual_seed(seed))


def new_log(path: Path | str, memories: int = 2, capacity: int = CAPACITY) -> KeyLog:
    return KeyLog.create(path, num_memories=memories, capacity=capacity, dim=DIM)


def alive(log: KeyLog, memory: int, **how: int) -> tuple[list[int], torch.Tensor]:
    parts = list(log.read(memory, **how))
    numbers = [int(number) for part in parts for number in part[0]]
    slots = [int(slot) for part in parts for slot in part[1]]
    assert slots == [number % log.capacity for number in numbers]
    return numbers, torch.cat([part[2] for part in parts]) if parts else torch.zeros(0, log.dim)


def test_what_is_appended_is_there(tmp_path: Path) -> None:
    keys = vectors(2, 30)
    with new_log(tmp_path / "log") as log:
        assert log.append(keys).tolist() == [list(range(30))] * 2
        assert log.append(keys[:1, :5], [1], first=30).tolist() == [[30, 31, 32, 33, 34]]
        assert log.totals.tolist() == [30, 35]
    with KeyLog.open(tmp_path / "log") as log:
        assert (log.totals.tolist(), log.generations.tolist(), log.lengths.tolist()) == ([30, 35], [0, 0], [30, 35])
        numbers, found = alive(log, 1, batch_rows=7)
        assert numbers == list(range(35))
        assert torch.equal(found, torch.cat([keys[1], keys[0, :5]]))
        assert log.verify() == 65


def test_only_the_newest_are_alive(tmp_path: Path) -> None:
    keys = vectors(2, 120)
    with new_log(tmp_path / "log") as log:
        for part in keys.split(40, dim=1):
            log.append(part)
        numbers, found = alive(log, 0)
        assert numbers == list(range(70, 120))
        assert torch.equal(found, keys[0, 70:])
        # More than the memory holds, at once: what is evicted within the call is not even written.
        before = log.stored_rows
        log.append(vectors(1, 75, seed=1), [1])
        assert log.stored_rows == before + CAPACITY
        numbers, found = alive(log, 1)
        assert numbers == list(range(145, 195))
        assert torch.equal(found, vectors(1, 75, seed=1)[0, 25:])


def test_shards_share_the_keys_by_slot(tmp_path: Path) -> None:
    keys = vectors(1, 130)
    with new_log(tmp_path / "log", memories=1) as log:
        log.append(keys)
        seen: list[int] = []
        for shard in range(3):
            numbers, found = alive(log, 0, shard=shard, shards=3)
            assert all(number % CAPACITY % 3 == shard for number in numbers)
            assert torch.equal(found, keys[0, numbers])
            seen += numbers
        assert sorted(seen) == list(range(80, 130))


def test_a_reset_is_a_new_generation(tmp_path: Path) -> None:
    with new_log(tmp_path / "log") as log:
        log.append(vectors(2, 10))
        log.reset([0])
        assert (log.totals.tolist(), log.generations.tolist()) == ([0, 10], [1, 0])
        assert alive(log, 0)[0] == []
        log.append(vectors(1, 3, seed=1), [0])
    with KeyLog.open(tmp_path / "log") as log:
        assert (log.totals.tolist(), log.generations.tolist()) == ([3, 10], [1, 0])
        assert torch.equal(alive(log, 0)[1], vectors(1, 3, seed=1)[0])


def test_a_gap_or_an_overlap_is_refused(tmp_path: Path) -> None:
    with new_log(tmp_path / "log") as log:
        log.append(vectors(2, 10))
        for first, what in ((9, "an overlap"), (11, "a gap")):
            with pytest.raises(WriteConflict, match=f"has 10 keys of memory 0, and keys from number {first}.*{what}"):
                log.append(vectors(2, 3), first=first)
        assert log.totals.tolist() == [10, 10]
        assert log.verify() == 20


def test_two_writers_do_not_give_a_number_twice(tmp_path: Path) -> None:
    with new_log(tmp_path / "log") as one, KeyLog.open(tmp_path / "log") as other:
        one.append(vectors(2, 5))
        files = len(list((tmp_path / "log" / "data").iterdir()))
        with pytest.raises(WriteConflict, match="an overlap; call refresh"):
            other.append(vectors(1, 5, seed=1), [0])
        assert len(list((tmp_path / "log" / "data").iterdir())) == files, "what was refused lies there still"
        other.refresh()
        other.append(vectors(1, 5, seed=1), [0])
        # Another memory: its numbers are free, whoever committed meanwhile.
        one.append(vectors(1, 5, seed=2), [1])
        assert one.totals.tolist() == [10, 10]
        assert one.verify() == 20
        other.reset([1])
        with pytest.raises(WriteConflict, match=r"reset by another writer|a gap"):
            one.append(vectors(1, 5, seed=2), [1])


def test_many_small_appends_are_merged(tmp_path: Path) -> None:
    keys = vectors(2, 150)
    with new_log(tmp_path / "log", capacity=1000) as log:
        for part in keys.split(1, dim=1):
            log.append(part)
        assert len(log._dataset.get_fragments()) < 60
        for memory in range(2):
            numbers, found = alive(log, memory)
            assert numbers == list(range(150))
            assert torch.equal(found, keys[memory])


def test_prune_drops_what_is_no_longer_alive(tmp_path: Path) -> None:
    with new_log(tmp_path / "log") as log:
        for turn in range(6):
            log.append(vectors(2, 40, seed=turn))
        log.reset([1])
        log.append(vectors(1, 4, seed=9), [1])
        before = [alive(log, memory) for memory in range(2)]
        assert log.stored_rows == 484
        log.prune(keep_seconds=0.0, alone=True)
        assert log.stored_rows == CAPACITY + 4
        assert len(list((tmp_path / "log" / "data").iterdir())) == 1
        for memory, (numbers, keys) in enumerate(before):
            again = alive(log, memory)
            assert again[0] == numbers
            assert torch.equal(again[1], keys)
        version = log.version
        log.prune()
        assert log.version == version, "there was nothing left to prune"
        log.append(vectors(2, 1))
        assert log.totals.tolist() == [241, 5]


def test_a_reader_keeps_its_version_while_others_write(tmp_path: Path) -> None:
    with new_log(tmp_path / "log", memories=1) as log:
        log.append(vectors(1, 40))
        with KeyLog.open(tmp_path / "log") as reader:
            reading = reader.read(0, batch_rows=10)
            first = next(reading)
            log.append(vectors(1, 40, seed=1))
            rest = list(reading)
            assert [int(n) for part in (first, *rest) for n in part[0]] == list(range(40))
            assert reader.totals.tolist() == [40]
            reader.refresh()
            assert reader.totals.tolist() == [80]
        version = log.version
        log.append(vectors(1, 1, seed=2))
        with KeyLog.open(tmp_path / "log", version=version) as older:
            assert older.totals.tolist() == [80]
            with pytest.raises(InvalidInput, match="to be read"):
                older.append(vectors(1, 1))


def test_nothing_is_appended_to_a_log_that_was_deleted(tmp_path: Path) -> None:
    log = KeyLog.create(tmp_path / "log", num_memories=1, capacity=8, dim=2)
    log.append(torch.randn(1, 3, 2))
    shutil.rmtree(tmp_path / "log")
    with pytest.raises(StoreMissing, match="was deleted"):
        log.append(torch.randn(1, 3, 2))
    with pytest.raises(StoreMissing, match="was deleted"):
        log.reset()
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("address", ["memory://a-log", "file"])
def test_addresses_do_as_folders_do(address: str, tmp_path: Path) -> None:
    uri = address if address != "file" else (tmp_path / "a log").as_uri()
    keys = vectors(2, 70)
    with new_log(uri) as log:
        log.append(keys)
    with KeyLog.open(uri) as log:
        assert torch.equal(alive(log, 1)[1], keys[1, 20:])
        log.reset()
        log.prune()
        assert log.stored_rows == 0


def test_a_log_of_another_size_is_refused(tmp_path: Path) -> None:
    new_log(tmp_path / "log").close()
    KeyLog.open(tmp_path / "log", num_memories=2, capacity=CAPACITY, dim=DIM, metric="inner_product").close()
    with pytest.raises(InvalidInput, match="log of dim=4, metric='inner_product', and dim=8, metric='l2' was asked"):
        KeyLog.open(tmp_path / "log", dim=8, metric="l2")


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="capacity is 0"):
        KeyLog.create(tmp_path / "log", num_memories=1, capacity=0, dim=1)
    with pytest.raises(InvalidInput, match="metric is 'dot'; it is one of inner_product"):
        KeyLog.create(tmp_path / "log", num_memories=1, capacity=1, dim=1, metric="dot")
    with pytest.raises(InvalidInput, match="http:// is no address"):
        KeyLog.create("http://here/log", num_memories=1, capacity=1, dim=1)
    with new_log(tmp_path / "log") as log:
        with pytest.raises(InvalidInput, match="expected \\(memories=2, any, dim=4\\)"):
            log.append(torch.zeros(2, 3, 5))
        with pytest.raises(NotFinite):
            log.append(torch.full((2, 3, 4), torch.nan))
        with pytest.raises(InvalidInput, match="memory is 2"):
            log.read(2)
        with pytest.raises(InvalidInput, match="shard is 3 of 3"):
            log.read(0, shard=3, shards=3)
    with pytest.raises(ClosedMemory, match="is closed"):
        log.append(vectors(2, 1))
    with pytest.raises(WriteConflict, match="not empty"):
        new_log(tmp_path / "log")


def delete(path: Path) -> None:
    shutil.rmtree(path)


def delete_data(path: Path) -> None:
    shutil.rmtree(path / "data")


@pytest.mark.parametrize("damage", [delete, delete_data])
def test_a_log_deleted_under_its_reader_is_told(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with new_log(tmp_path / "log", memories=1) as log:
        log.append(vectors(1, 20))
        reader = KeyLog.open(tmp_path / "log")
        damage(tmp_path / "log")
        with pytest.raises(StoreMissing, match=r"was deleted|gone"):
            list(reader.read(0))
        with pytest.raises(StoreMissing):
            if damage is delete:
                reader.refresh()
            else:
                reader.verify()
    if damage is delete:
        with pytest.raises(StoreMissing, match="there is no store"):
            KeyLog.open(tmp_path / "log")


def test_what_is_no_log_is_told(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreMissing):
        KeyLog.open(tmp_path / "empty")
    lance.write_dataset(pyarrow.table({"x": [1]}), str(tmp_path / "other"))
    with pytest.raises(CorruptMemory, match="no log of keys"):
        KeyLog.open(tmp_path / "other")


def test_an_altered_key_is_told(tmp_path: Path) -> None:
    with new_log(tmp_path / "log", memories=1, capacity=500) as log:
        log.append(vectors(1, 400))
        (file,) = (tmp_path / "log" / "data").iterdir()
    raw = bytearray(file.read_bytes())
    place = raw.find(vectors(1, 400)[0, 200].numpy().tobytes())
    assert place > 0
    raw[place] ^= 1
    file.write_bytes(bytes(raw))
    with KeyLog.open(tmp_path / "log") as log:
        with pytest.raises(CorruptMemory, match=r"altered: their checksums differ .key number 200"):
            list(log.read(0))
        with pytest.raises(CorruptMemory):
            log.verify()
        with pytest.raises(CorruptMemory):
            log.append(vectors(1, 200, seed=1))
            log.prune()


def test_without_lance_the_pip_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'recollect\[lance\]'"):
        new_log(tmp_path / "log")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(BackendUnavailable, match=r"not installed: pip install 'recollect\[lance\]'"):
        KeyLog.open(tmp_path / "log")


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    keys = vectors(1, 40_000)
    with new_log(tmp_path / "log", memories=1, capacity=100_000) as log:
        log.append(keys[:, :100])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(DiskFull, match="no room; free some space"):
                log.append(keys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert log.totals.tolist() == [100]
        log.append(keys[:, 100:200])
    with KeyLog.open(tmp_path / "log") as log:
        assert torch.equal(alive(log, 0)[1], keys[0, :200])


def silent_server() -> tuple[socket.socket, str]:
    """A port that takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    return server, f"http://127.0.0.1:{server.getsockname()[1]}"


def s3_options(endpoint: str) -> dict[str, str]:
    return {
        "aws_endpoint": endpoint,
        "aws_access_key_id": "an-access-key",
        "aws_secret_access_key": "a-very-secret-key",
        "aws_region": "nowhere",
        "allow_http": "true",
    }


def test_an_address_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server, endpoint = silent_server()
    monkeypatch.setattr(lance_support, "DEADLINE_SECONDS", 0.5)
    with server, pytest.raises(StoreUnreachable, match="s3://bucket/log: no answer within 0 seconds") as told:
        KeyLog.open("s3://bucket/log", s3_options(endpoint))
    assert "secret" not in str(told.value)


def test_an_address_that_refuses_is_told_without_credentials() -> None:
    server, endpoint = silent_server()
    server.close()
    options = {**s3_options(endpoint), "client_max_retries": "0"}
    with pytest.raises(StoreUnreachable, match=r"it does not answer|no answer") as told:
        KeyLog.create("s3://bucket/log", num_memories=1, capacity=1, dim=1, storage_options=options)
    assert "a-very-secret-key" not in f"{told.value!r} {told.value.__cause__!r} {told.value.__context__!r}"


def test_credentials_are_neither_shown_nor_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="leave user, password") as told:
        place_of("s3://somebody:topsecret@bucket/log")
    assert "topsecret" not in str(told.value)
    place = place_of("s3://bucket/log", {"aws_secret_access_key": "topsecret"})
    assert "topsecret" not in repr(place)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "anothersecret")
    assert place.hide("got topsecret, anothersecret?sig=abc&x=1") == "got ***, ***?sig=***&x=1"
    options: dict[str, Any] = {"storage_options": s3_options("http://127.0.0.1:1")}
    with KeyLog.create(tmp_path / "log", num_memories=1, capacity=9, dim=DIM, **options) as log:
        log.append(vectors(1, 3))
    for file in (tmp_path / "log").rglob("*"):
        assert file.is_dir() or b"a-very-secret-key" not in file.read_bytes()
