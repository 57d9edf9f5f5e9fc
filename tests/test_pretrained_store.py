"""The store on disk: what is written comes back, and nothing damaged or foreign is ever opened in silence."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from fake_s3 import fake_s3

from recollect.memory_backends.errors import BackendUnavailable, StoreUnreachable
from recollect.pretrained.records import KeyStore
from recollect.pretrained.store import MemoryStore, StoreError, StoreIdentity, digest_text

pytest.importorskip("lance")

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
    return sorted((path / "data").iterdir())


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


def test_equal_texts_share_their_keys_until_the_last_is_gone(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store.writing():
        assert store.link("copy.py", digest_text("a.py"))
        assert not store.link("other.py", digest_text("nothing like it"))
    assert (len(store), store.tokens) == (3, 7)
    with store.writing():
        store.remove(["a.py"])
    again = MemoryStore.open(tmp_path)
    assert {document.name for document in again.documents} == {"b.py", "copy.py"}
    assert (again.tokens, set(again.names)) == (7, {"b.py", "copy.py"})
    kept = again.layer_keys(1)[:, again.document_of == again.names.index("copy.py")]
    assert torch.equal(kept, pairs(3, 0)[1][0])
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
    """A file that no manifest came to name is no harm, and goes with the next writing."""
    store = filled(tmp_path)
    (tmp_path / "data" / "0123.lance").write_bytes(b"half a docu")
    assert MemoryStore.open(tmp_path).tokens == 7
    with store.writing():
        pass
    assert len(files_of(tmp_path)) == 2


def test_many_documents_stay_few_files(tmp_path: Path) -> None:
    names = tuple(f"{number}.py" for number in range(70))
    store = filled(tmp_path, names)
    assert len(files_of(tmp_path)) < 40
    again = MemoryStore.open(tmp_path)
    assert again.names == store.names == names
    for number in (0, 31, 69):
        rows = again.document_of == number
        assert torch.equal(again.layer_values(3)[:, rows], pairs(3 + number, number)[3][1])
    with store.writing():
        store.remove([f"{number}.py" for number in range(0, 70, 2)])
        store.add("1.py", digest_text("changed"), torch.arange(2), pairs(2, 99))
    again = MemoryStore.open(tmp_path)
    assert again.names == names[1::2], "a document that is replaced keeps its place"
    assert torch.equal(again.layer_keys(1)[:, :2], pairs(2, 99)[1][0])
    assert torch.equal(again.layer_keys(1)[:, 2:8], pairs(6, 3)[1][0])


def test_documents_of_another_type_are_refused(tmp_path: Path) -> None:
    store = filled(tmp_path)
    half = {layer: tuple(part.half() for part in pair) for layer, pair in pairs(5).items()}
    with store.writing(), pytest.raises(StoreError, match=r"its keys are float16, and .* holds float32"):
        store.add("c", digest_text("c"), torch.arange(5), half)  # type: ignore[arg-type]
    mixed = {1: pairs(5)[1], 3: half[3]}
    with store.writing(), pytest.raises(StoreError, match="float32, float16, bfloat16"):
        store.add("c", digest_text("c"), torch.arange(5), mixed)  # type: ignore[arg-type]
    with store.writing():
        store.remove(store.names)
        store.add("c", digest_text("c"), torch.arange(5), half)  # type: ignore[arg-type]
    assert MemoryStore.open(tmp_path).layer_keys(1).dtype == torch.float16


def test_an_error_while_writing_keeps_what_was_read(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.writing():
        store.add("c.py", digest_text("c"), torch.arange(2), pairs(2))
        raise KeyboardInterrupt
    assert "c.py" in MemoryStore.open(tmp_path)


def test_damage_is_told(tmp_path: Path) -> None:
    filled(tmp_path)
    victim = next(file for file in files_of(tmp_path) if pairs(3, 0)[1][0].numpy()[0, 0].tobytes() in file.read_bytes())
    whole = victim.read_bytes()
    for damaged in (whole[:-3], whole[: len(whole) // 2], b""):
        victim.write_bytes(damaged)
        with pytest.raises(StoreError, match="cut short"):
            MemoryStore.open(tmp_path)
    flipped = bytearray(whole)
    flipped[whole.index(pairs(3, 0)[1][0].numpy()[0, 0].tobytes())] ^= 1
    victim.write_bytes(bytes(flipped))
    with pytest.raises(StoreError, match=r"the document .a.py. of .* was altered: its checksum"):
        MemoryStore.open(tmp_path)
    victim.unlink()
    with pytest.raises(StoreError, match="gone"):
        MemoryStore.open(tmp_path)
    victim.write_bytes(whole)
    assert MemoryStore.open(tmp_path).tokens == 7


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    filled(tmp_path)
    manifest = min((tmp_path / "_versions").glob("*.manifest"))
    raw = manifest.read_bytes()
    assert b"LlamaForCausalLM" in raw
    manifest.write_bytes(raw.replace(b"LlamaForCausalLM", b"LlamaForCausalLN"))
    with pytest.raises(StoreError, match="altered: its checksum does not hold"):
        MemoryStore.open(tmp_path)
    manifest.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(StoreError, match="cut short"):
        MemoryStore.open(tmp_path)
    manifest.unlink()
    with pytest.raises(StoreError, match="no memory store"):
        MemoryStore.open(tmp_path)


def test_what_is_no_store_is_told(tmp_path: Path) -> None:
    lance, arrow = pytest.importorskip("lance"), pytest.importorskip("pyarrow")
    table = arrow.table({"x": [1]})
    lance.write_dataset(table, str(tmp_path / "other"))
    with pytest.raises(StoreError, match="another program"):
        MemoryStore.open(tmp_path / "other")
    newer = json.dumps({"format": "recollect-memory-store", "version": 9})
    lance.write_dataset(table.replace_schema_metadata({"recollect": newer}), str(tmp_path / "newer"))
    with pytest.raises(StoreError, match="version 9"):
        MemoryStore.open(tmp_path / "newer")
    (tmp_path / "former").mkdir()
    (tmp_path / "former" / "manifest.json").write_text('{"format": "recollect-memory-store", "version": 1}')
    with pytest.raises(StoreError, match=r"earlier release.*make it again with `recollect memorize`"):
        MemoryStore.open(tmp_path / "former")
    with pytest.raises(StoreError, match="http:// is no address"):
        MemoryStore.open("http://there/store")


def test_a_store_lives_on_an_object_store() -> None:
    address = "s3://bucket/some/store"
    with fake_s3() as (objects, options):
        assert not MemoryStore.exists(address, storage_options=options)
        store = MemoryStore.create(address, IDENTITY, source="src", storage_options=options)
        with store.writing():
            store.add("a", digest_text("a"), torch.arange(3), pairs(3))
            other = MemoryStore.open(address, storage_options=options)
            with other.writing():
                other.add("b", digest_text("b"), torch.arange(2), pairs(2, 1))
            with pytest.raises(StoreError, match="another process: wait"):
                store.add("c", digest_text("c"), torch.arange(4), pairs(4, 2))
        again = MemoryStore.open(address, storage_options=options)
        assert (str(again.path), again.names, again.tokens) == (address, ("a", "b"), 5)
        assert torch.equal(again.layer_keys(1)[:, :3], pairs(3)[1][0])
        objects.refuse = True
        with pytest.raises(StoreUnreachable, match="access was refused"):
            MemoryStore.open(address, storage_options=options)


def test_without_lance_the_pip_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    for call in (lambda: MemoryStore.create(tmp_path / "s", IDENTITY), lambda: MemoryStore.open(tmp_path)):
        with pytest.raises(BackendUnavailable, match=r"pip install 'recollect\[lance\]'"):
            call()


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
