"""The store on disk: what is written comes back, and nothing damaged or foreign is ever opened in silence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from recollect.pretrained.records import KeyStore
from recollect.pretrained.store import MemoryStore, StoreError, StoreIdentity, digest_text

IDENTITY = StoreIdentity("LlamaForCausalLM", "m" * 64, "t" * 64, (1, 3), 2, 4, "unrotated", "windows of 32")


def pairs(count: int, seed: int = 0) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: tuple(torch.randn(2, 2, count, 4, generator=generator)) for layer in (1, 3)}  # type: ignore[misc]


def filled(path: Path, names: tuple[str, ...] = ("a.py", "b.py")) -> MemoryStore:
    store = MemoryStore.create(path, IDENTITY, source="src")
    with store.writing():
        for number, name in enumerate(names):
            count = 3 + number
            store.add(name, digest_text(name), torch.arange(count) + 10 * number, pairs(count, number))
    return store


def files_of(path: Path) -> list[Path]:
    return sorted((path / "documents").iterdir())


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    store = MemoryStore.open(tmp_path / "store")
    assert isinstance(store, KeyStore)
    assert (store.identity, store.source, len(store), store.tokens) == (IDENTITY, "src", 2, 7)
    assert store.token_ids.tolist() == [0, 1, 2, 10, 11, 12, 13]
    assert store.document_of.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert store.position_of.tolist() == [0, 1, 2, 0, 1, 2, 3]
    for layer in (1, 3):
        keys = torch.cat([pairs(3, 0)[layer][0], pairs(4, 1)[layer][0]], dim=1)
        values = torch.cat([pairs(3, 0)[layer][1], pairs(4, 1)[layer][1]], dim=1)
        torch.testing.assert_close(store.layer_keys(layer), keys, rtol=0, atol=0)
        torch.testing.assert_close(store.layer_values(layer), values, rtol=0, atol=0)
    with pytest.raises(StoreError, match="no layer 2: it holds layers 1, 3"):
        store.layer_keys(2)


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    store = MemoryStore.create(tmp_path, IDENTITY)
    half = {layer: tuple(part.bfloat16() for part in pair) for layer, pair in pairs(5).items()}
    with store.writing():
        store.add("a", digest_text("a"), torch.arange(5), half)  # type: ignore[arg-type]
    assert MemoryStore.open(tmp_path).layer_keys(1).dtype == torch.bfloat16


def test_an_empty_store_opens(tmp_path: Path) -> None:
    MemoryStore.create(tmp_path, IDENTITY)
    store = MemoryStore.open(tmp_path)
    assert (len(store), store.tokens, store.token_ids.tolist()) == (0, 0, [])
    assert store.layer_keys(1).shape == (2, 0, 4)


def test_equal_texts_share_a_file_until_the_last_is_gone(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store.writing():
        assert store.link("copy.py", digest_text("a.py"))
        assert not store.link("other.py", digest_text("nothing like it"))
    assert (len(store), store.tokens, len(files_of(tmp_path))) == (3, 7, 2)
    with store.writing():
        store.remove(["a.py"])
    again = MemoryStore.open(tmp_path)
    assert {document.name for document in again.documents} == {"b.py", "copy.py"}
    assert (again.tokens, set(again.names)) == (7, {"b.py", "copy.py"})
    with store.writing():
        store.remove(["copy.py"])
    assert (MemoryStore.open(tmp_path).tokens, len(files_of(tmp_path))) == (4, 1)


def test_a_replaced_document_leaves_no_file_behind(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store.writing():
        store.add("a.py", digest_text("changed"), torch.arange(6), pairs(6, 9))
    again = MemoryStore.open(tmp_path)
    assert again.tokens == 10
    assert len(files_of(tmp_path)) == 2


def test_a_killed_writer_leaves_a_store_that_opens(tmp_path: Path) -> None:
    """A file that the manifest never came to name is no harm, and goes with the next writing."""
    store = filled(tmp_path)
    (tmp_path / "documents" / "0123.safetensors").write_bytes(b"half a docu")
    (tmp_path / "documents" / ".0123.safetensors.x.partial").write_bytes(b"")
    assert MemoryStore.open(tmp_path).tokens == 7
    with store.writing():
        pass
    assert len(files_of(tmp_path)) == 2


def test_an_error_while_writing_keeps_what_was_read(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.writing():
        store.add("c.py", digest_text("c"), torch.arange(2), pairs(2))
        raise KeyboardInterrupt
    assert "c.py" in MemoryStore.open(tmp_path)


def test_damage_is_told(tmp_path: Path) -> None:
    filled(tmp_path)
    victim = files_of(tmp_path)[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-3])
    with pytest.raises(StoreError, match="cut short"):
        MemoryStore.open(tmp_path)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    victim.write_bytes(bytes(flipped))
    with pytest.raises(StoreError, match="altered: its checksum"):
        MemoryStore.open(tmp_path)
    victim.unlink()
    with pytest.raises(StoreError, match="is gone"):
        MemoryStore.open(tmp_path)
    victim.write_bytes(whole)
    assert MemoryStore.open(tmp_path).tokens == 7


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    filled(tmp_path)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"tokens": 3', '"tokens": 4'))
    with pytest.raises(StoreError, match="altered: its checksum does not hold"):
        MemoryStore.open(tmp_path)
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match="cut short or not JSON"):
        MemoryStore.open(tmp_path)
    manifest.write_text(json.dumps({**json.loads(text), "version": 9}))
    with pytest.raises(StoreError, match="version 9"):
        MemoryStore.open(tmp_path)
    manifest.write_text("[]")
    with pytest.raises(StoreError, match="another program"):
        MemoryStore.open(tmp_path)
    manifest.unlink()
    with pytest.raises(StoreError, match="no memory store"):
        MemoryStore.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_digest": "x" * 64}, "another model"),
        ({"tokenizer_digest": "x" * 64}, "another tokenizer"),
        ({"layers": (1, 2)}, "holds keys of layers 1, 3, and memory is wanted at 2"),
        ({"heads": 4}, "holds 2 heads of 4"),
        ({"key_form": "as_projected"}, "'unrotated', not 'as_projected'"),
    ],
)
def test_another_maker_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    store = filled(tmp_path)
    with pytest.raises(StoreError, match=reason):
        store.check(dataclasses.replace(IDENTITY, **changes))  # type: ignore[arg-type]


def test_fewer_layers_and_another_way_of_reading_are_no_matter(tmp_path: Path) -> None:
    filled(tmp_path).check(dataclasses.replace(IDENTITY, layers=(3,), reading="otherwise"))


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    store = MemoryStore.create(tmp_path, IDENTITY)
    good = pairs(3)
    with pytest.raises(StoreError, match="want \\(2, 4, 4\\)"):
        store.add("a", "d", torch.arange(4), good)
    with pytest.raises(StoreError, match="got layers 1"):
        store.add("a", "d", torch.arange(3), {1: good[1]})
    good[3][1][0, 0, 0] = torch.nan
    with pytest.raises(StoreError, match="not finite"):
        store.add("a", "d", torch.arange(3), good)
    assert len(store) == 0


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with (
        store.writing(),
        pytest.raises(StoreError, match="another process"),
        MemoryStore.open(tmp_path).writing(),
    ):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="not empty"):
        MemoryStore.create(tmp_path, IDENTITY)
