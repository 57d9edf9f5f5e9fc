"""Saving and loading: whole or not at all, whatever ends the process, and every damage told with the file's name."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.memory_backends import CorruptMemory, MemoryBackend, load_backend, make_backend
from recollect.memory_backends import atomic as atomic_module
from recollect.memory_backends.atomic import atomic_file, atomic_folder, write_json
from recollect.memory_backends.errors import DiskFull

KILLS = int(os.environ.get("RECOLLECT_KILLS", "12"))
"""Times that a saving process is killed; a few hundred for a thorough run."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes and limits files")


def filled(spec: str = "exact", keys: int = 11, **changes: Any) -> MemoryBackend:
    backend = make_backend(spec, **{"num_memories": 3, "capacity": 8, "dim": 4, **changes})
    backend.add(vectors(3, keys, backend.dim))
    return backend


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
@pytest.mark.parametrize("keys", [5, 11])
def test_saved_memory_comes_back(tmp_path: Path, metric: str, keys: int) -> None:
    backend = filled(metric=metric, keys=keys)
    backend.save(tmp_path / "memory")
    loaded = load_backend(tmp_path / "memory")
    queries = torch.randn(3, 5, 4)
    before, after = backend.search(queries, 9), loaded.search(queries, 9)
    assert torch.equal(before.scores, after.scores)
    assert torch.equal(before.slots, after.slots)
    assert torch.equal(backend.add(torch.ones(3, 2, 4)), loaded.add(torch.ones(3, 2, 4)))


@pytest.mark.parametrize("options", ["storage=bfloat16", "storage=int8", "keys_in=temporary,storage=int8"])
def test_keys_are_saved_as_they_are_stored(tmp_path: Path, options: str) -> None:
    backend = filled(f"exact:{options}", keys=700, capacity=512, dim=16)
    backend.save(tmp_path / "memory")
    loaded = load_backend(tmp_path / "memory")
    assert loaded.spec == backend.spec
    for one, other in zip(backend.ring.arrays(), loaded.ring.arrays(), strict=True):
        assert torch.equal(one, other)


def test_only_slots_that_were_written_are_saved(tmp_path: Path) -> None:
    filled(capacity=1_000_000, keys=10).save(tmp_path / "memory")
    assert sum(file.stat().st_size for file in (tmp_path / "memory").rglob("*")) < 20_000
    assert load_backend(tmp_path / "memory").capacity == 1_000_000


def test_a_memory_that_an_older_release_saved_is_read(tmp_path: Path) -> None:
    backend = filled(keys=5)
    backend.save(tmp_path / "memory")
    header = json.loads((tmp_path / "memory" / "memory.json").read_text())
    (tmp_path / "memory" / "keys.bin").write_bytes(backend.ring.keys.numpy().tobytes())
    digest = digest_of(tmp_path / "memory" / "keys.bin")
    older = {**header, "version": 1, "arrays": {"keys": {"shape": [3, 8, 4], "dtype": "<f4", "sha256": digest}}}
    del older["checksum"]
    (tmp_path / "memory" / "memory.json").write_text(json.dumps(older))
    assert torch.equal(load_backend(tmp_path / "memory").ring.keys, backend.ring.keys)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["exact:storage=int8", "faiss-ivf", "scann"])
def test_a_changed_byte_anywhere_is_found_and_its_file_named(tmp_path: Path, spec: str) -> None:
    pytest.importorskip({"faiss-ivf": "faiss", "scann": "scann"}.get(spec, "torch"))
    folder = tmp_path / "memory"
    filled(spec, keys=60, capacity=48, metric="cosine").save(folder)
    draw = random.Random(0)
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    assert {"keys.bin", "norms.bin", "memory.json"} <= {file.name for file in files}
    for file in files:
        raw = file.read_bytes()
        places = {0, len(raw) - 1, *(draw.randrange(len(raw)) for _ in range(12))}
        spoilt = [raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :] for at in places]
        for damaged in (*spoilt, raw[:-1], raw[: len(raw) // 2], raw + b"\0", b""):
            file.write_bytes(damaged)
            with pytest.raises(CorruptMemory, match=file.name):
                load_backend(folder)
        file.unlink()
        with pytest.raises(CorruptMemory, match=file.name):
            load_backend(folder)
        file.write_bytes(raw)
    load_backend(folder)


def test_what_is_wrong_with_a_header_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with pytest.raises(CorruptMemory, match="holds no saved memory"):
        load_backend(folder)
    filled().save(folder)
    header = json.loads((folder / "memory.json").read_text())
    del header["checksum"]
    for broken, says in (
        ("{", "not readable JSON"),
        ("[]", "not written by recollect"),
        ('{"format": "other"}', "not written by recollect"),
        (json.dumps({**header, "version": 99}), "version 99"),
        (json.dumps(header), "checksum"),
        (json.dumps({**header, "version": 1, "spec": "nobody"}), "not here"),
        (json.dumps({key: value for key, value in header.items() if key != "dim"} | {"version": 1}), "dim"),
        (json.dumps({**header, "version": 1, "totals": [1]}), "counts keys for 1 memories"),
        (json.dumps({**header, "version": 1, "dim": 5}), "keys.bin holds float32 of shape"),
    ):
        (folder / "memory.json").write_text(broken)
        with pytest.raises(CorruptMemory, match=says):
            load_backend(folder)


# Killed ---------------------------------------------------------------------------------------------------------------


def in_a_process_of_its_own(*arguments: object) -> None:
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_saves.py")), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]


@needs_fork
@pytest.mark.parametrize("spec", ["exact:storage=int8", "faiss-ivf"])
def test_a_killed_save_leaves_the_state_before_or_after(tmp_path: Path, spec: str) -> None:
    if spec.startswith("faiss"):
        pytest.importorskip("faiss")
    in_a_process_of_its_own("kill", tmp_path / "memory", spec, KILLS)


def test_a_save_killed_between_its_two_renames_is_undone(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    filled().save(folder)
    folder.rename(tmp_path / ".memory.older")
    assert load_backend(folder).lengths.tolist() == [8, 8, 8]


def test_a_reader_waits_for_a_writer_between_its_two_renames(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    filled(keys=5).save(folder)
    read: list[MemoryBackend] = []
    reader = threading.Thread(target=lambda: read.append(load_backend(folder)))
    with atomic_module._writing_beside(folder):
        folder.rename(tmp_path / ".memory.older")
        reader.start()
        reader.join(0.3)
        assert not read
        # The writer's second rename finds its place free.
        (tmp_path / ".memory.older").rename(folder)
    reader.join()
    assert read[0].lengths.tolist() == [5] * 3


def test_a_living_writer_is_not_disturbed_by_another(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "memory") as one:
        (one / "file").write_text("one")
        with atomic_folder(tmp_path / "memory") as other:
            (other / "file").write_text("other")
        assert (one / "file").read_text() == "one"
    assert (tmp_path / "memory" / "file").read_text() == "one"
    assert [item.name for item in tmp_path.iterdir()] == ["memory"]


# A full disk ----------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize(("spec", "most"), [("exact", 100_000), ("faiss-ivf:storage=int8", 40_000)])
def test_a_full_disk_is_told_and_the_former_state_kept(tmp_path: Path, spec: str, most: int) -> None:
    """Full while the keys are written, or while faiss writes its index."""
    if spec.startswith("faiss"):
        pytest.importorskip("faiss")
    in_a_process_of_its_own("full", tmp_path / "memory", spec, most)


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(DiskFull, match="100 bytes free"):
        filled().save(tmp_path / "memory")
    assert list(tmp_path.iterdir()) == []


# Files ----------------------------------------------------------------------------------------------------------------


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError, match="half way"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError("half way")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["result.json"]
