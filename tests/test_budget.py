"""Bytes that are stated, planned, refused, and those that a filled memory really takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recollect.memory_backends import InvalidInput, InvalidSpec, make_backend
from recollect.memory_backends.budget import plan_bytes
from recollect.memory_backends.errors import DiskFull, OutOfMemory, OverBudget
from recollect.memory_backends.options import parse_bytes
from recollect.memory_backends.pages import FileArray
from recollect.memory_backends.registry import class_and_options

SIZES = {"num_memories": 2, "capacity": 2048, "dim": 16}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("17", 17),
        ("17B", 17),
        ("2GiB", 2**31),
        ("2 GB", 2 * 10**9),
        ("1.5MiB", 3 * 2**19),
        ("3kb", 3000),
        ("1tib", 2**40),
    ],
)
def test_bytes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["2G", "GiB", "-1GiB", "2 gigs", "0", "0.1B", "1e9", "nan", "2GiB and more"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec, match="max_bytes="):
        make_backend(f"exact:max_bytes='{text}'", num_memories=1, capacity=8, dim=4)


def test_the_error_says_what_of_and_what_would_fit() -> None:
    with pytest.raises(OverBudget) as caught:
        make_backend("exact:max_bytes=100MB", num_memories=1, capacity=1_000_000, dim=64)
    told = str(caught.value)
    for part in (
        "244.1 MiB of main memory",
        "keys as float32 244.1 MiB",
        "'exact:storage=int8' (64.8 MiB)",
        "'exact:keys_in=temporary' (0 bytes)",
        "a capacity of about 390625",
    ):
        assert part in told, told
    assert "storage=bfloat16" not in told  # 122 MiB do not fit
    # What it offers does fit.
    make_backend("exact:max_bytes=100MB,storage=int8", num_memories=1, capacity=1_000_000, dim=64)
    make_backend("exact:max_bytes=100MB", num_memories=1, capacity=390_625, dim=64)


def test_codes_are_offered_where_keys_do_not_fit() -> None:
    pytest.importorskip("faiss")
    with pytest.raises(OverBudget, match="'faiss-ivfpq:keys_in=temporary'"):
        make_backend("hnswlib:max_bytes=300MB", num_memories=1, capacity=1_000_000, dim=64)


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
@pytest.mark.parametrize(
    "spec",
    [
        "exact:storage=int8",
        "approx-topk",
        "faiss-flat",
        "faiss-ivf",
        "faiss-ivfpq:keys_in=temporary",
        "faiss-hnsw:M=8",
        "hnswlib",
        "scann",
        "rerank:source='exact:storage=int8'",
        "rerank:source=faiss-ivfpq",
    ],
)
def test_a_filled_memory_takes_no_more_than_was_planned(spec: str, metric: str) -> None:
    for library in ("faiss", "hnswlib", "scann"):
        if library in spec:
            pytest.importorskip(library)
    cls, options = class_and_options(spec)
    planned = plan_bytes(cls, options, **SIZES, metric=metric)
    backend = make_backend(spec, **SIZES, metric=metric)  # type: ignore[arg-type]
    backend.add(torch.randn(2, 3000, 16, generator=torch.Generator().manual_seed(0)))
    backend.wait()
    stats = backend.stats()
    assert planned.index is not None
    assert stats.key_bytes == planned.keys
    assert stats.mapped_bytes == planned.mapped
    assert stats.index_bytes <= planned.index
    # An estimate that is far too high would refuse what fits.
    assert planned.index <= 8 * max(stats.index_bytes, 1)


def test_an_index_that_outgrows_its_budget_refuses_the_append() -> None:
    pytest.importorskip("faiss")
    backend = make_backend("faiss-ivf:max_bytes=100MB", num_memories=1, capacity=1024, dim=8)
    backend.add(torch.randn(1, 700, 8, generator=torch.Generator().manual_seed(0)))
    asked = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(1))
    before = backend.search(asked, 4)
    object.__setattr__(backend.key_options, "max_bytes", f"{backend.stats().index_bytes}B")
    with pytest.raises(OverBudget, match="it was not made"):
        backend.add(torch.randn(1, 200, 8))
    assert backend.lengths.tolist() == [700]
    assert torch.equal(backend.search(asked, 4).slots, before.slots)


def test_more_keys_than_the_machine_can_hold_are_refused_at_once() -> None:
    with pytest.raises(OutOfMemory, match=r"storage=int8"):
        make_backend("exact", num_memories=1, capacity=10**12, dim=64)


def test_more_keys_than_the_disk_can_hold_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"free some space"):
        make_backend(f"exact:keys_in={tmp_path}", num_memories=1, capacity=10**12, dim=64)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="keys_in="):
        make_backend(f"exact:keys_in={tmp_path / 'file' / 'folder'}", num_memories=1, capacity=10, dim=4)
    with pytest.raises(InvalidSpec, match="keys_in is empty"):
        make_backend("exact:keys_in=''", num_memories=1, capacity=10, dim=4)


def test_a_file_keeps_what_was_written_when_its_pages_are_let_go(tmp_path: Path) -> None:
    array = FileArray((1000, 64), torch.float32, str(tmp_path))
    assert not array.tensor.any()
    written = torch.randn(1000, 64)
    array.tensor.copy_(written)
    array.touch(1 << 40)
    assert torch.equal(array.tensor, written)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_memory_gives_its_keys_back() -> None:
    backend = make_backend("exact:storage=int8,keys_in=temporary", num_memories=1, capacity=1000, dim=8)
    backend.close()
    assert sum(array.numel() for array in backend.ring.arrays()) == 0
