"""Corpora: every kind of source, the split rule, and what bad input says."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections import Counter
from pathlib import Path

import pytest

from recollect.model.corpus import SPLITS, Corpus, CorpusError, Document, load_corpus, split_of_name


def write_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_split_rule_is_fixed() -> None:
    """Pinned: a different answer would move documents that a shipped model was trained on into its test split."""
    for split, names in {
        "test": ("document 9", "document 10", "books/3.txt"),
        "validation": ("document 20", "document 34"),
        "train": ("document 1", "ein Gedicht über Bäume", ""),
    }.items():
        assert [split_of_name(name) for name in names] == [split] * len(names)


def test_split_rule_gives_the_stated_shares() -> None:
    counts = Counter(split_of_name(f"document {number}") for number in range(8000))
    assert abs(counts["test"] / 8000 - 2 / 16) < 0.015
    assert abs(counts["validation"] / 8000 - 1 / 16) < 0.015


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "tale.txt"
    path.write_text("Es war einmal … \U0001f40d\r\n", encoding="utf-8", newline="")
    corpus = load_corpus(path, everything_is="test")
    assert corpus.documents("test") == (Document("tale.txt", "Es war einmal … \U0001f40d\r\n"),)


def test_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / ".git" / "config").write_text("no")
    write_lines(tmp_path / "c.jsonl", [{"text": "three"}])
    names = load_corpus(tmp_path, everything_is="train").document_names("train")
    assert names == ("a.txt", "b/two.md", "c.jsonl:1")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    plain = '{"text": "one\u2028line", "id": "first"}\n\n{"text": "zwei ü", "other": 1}\n{"id": 7, "text": "three"}'
    content = plain.encode("utf-8")
    path = tmp_path / f"data{suffix}"
    packed = {".jsonl": content, ".jsonl.gz": gzip.compress(content), ".jsonl.xz": lzma.compress(content)}
    path.write_bytes(packed[suffix])
    corpus = load_corpus(path, everything_is="validation")
    assert corpus.documents("validation") == (
        Document("first", "one\u2028line"),
        Document(f"data{suffix}:3", "zwei ü"),
        Document("7", "three"),
    )


def test_json_lines_with_other_fields(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"content": "x", "key": "k"}])
    corpus = load_corpus(path, everything_is="test", text_field="content", id_field="key")
    assert corpus.documents("test") == (Document("k", "x"),)


def test_user_documents_follow_the_rule(tmp_path: Path) -> None:
    records: list[object] = [{"id": f"document {number}", "text": f"text {number}"} for number in range(100)]
    corpus = load_corpus(write_lines(tmp_path / "data.jsonl", records))
    for split in SPLITS:
        assert corpus.document_names(split)
        assert all(split_of_name(name) == split for name in corpus.document_names(split))


def test_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "id": ["a", "b"]})
    rows.save_to_disk(tmp_path / "single")
    single = load_corpus(tmp_path / "single", everything_is="test")
    assert single.documents("test") == (Document("a", "one"), Document("b", "two"))
    parts = datasets.DatasetDict({"train": rows, "dev": datasets.Dataset.from_dict({"text": ["three"]})})
    parts.save_to_disk(tmp_path / "parts")
    corpus = load_corpus(tmp_path / "parts")
    assert corpus.document_names("train") == ("train/a", "train/b")
    assert corpus.document_names("validation") == ("dev/row 0",)
    with pytest.raises(CorpusError, match="no column 'body'; its columns: text, id"):
        load_corpus(tmp_path / "single", text_field="body")
    (tmp_path / "single" / "state.json").write_text("{")
    with pytest.raises(CorpusError, match="cannot be read as a Hugging Face dataset"):
        load_corpus(tmp_path / "single")


def test_dataset_without_the_library_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install 'recollect\[transformers\]'"):
        load_corpus(tmp_path)


def test_same_text_stays_out_of_training() -> None:
    documents = [Document("a", "one"), Document("b", "one"), Document("c", "one"), Document("d", "two")]
    corpus = Corpus.of("c", documents, splits={"a": "train", "b": "validation", "c": "test", "d": "train"})
    assert [corpus.document_names(split) for split in SPLITS] == [("d",), (), ("c",)]
    assert set(corpus.dropped) == {"a", "b"}


def test_digests_tell_contents_apart() -> None:
    base = Corpus.of("x", [Document("a", "one"), Document("b", "two")], splits={"a": "train", "b": "test"})
    renamed = Corpus.of("y", [Document("a", "one"), Document("b", "two")], splits={"a": "train", "b": "test"})
    other = Corpus.of("x", [Document("a", "one!"), Document("b", "two")], splits={"a": "train", "b": "test"})
    moved = Corpus.of("x", [Document("a", "one"), Document("b", "two")], everything_is="test")
    assert base.digest == renamed.digest
    assert len({base.digest, other.digest, moved.digest}) == 3
    assert base.split_digest("test") == other.split_digest("test")
    assert base.split_digest("train") != other.split_digest("train")


def test_missing_path() -> None:
    with pytest.raises(CorpusError, match=r"no such corpus: 'not/here'.*stdlib"):
        load_corpus("not/here")


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    for source in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(CorpusError, match="is empty: it holds no text"):
            load_corpus(source)


def test_not_utf8_names_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("ein Käfer".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"latin\.txt is not UTF-8: byte 5 is 0xe4.*iconv"):
        load_corpus(path)
    packed = tmp_path / "latin.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "\xff"}'))
    with pytest.raises(CorpusError, match=r"latin\.jsonl\.gz is not UTF-8: unpacked byte 10 is 0xff"):
        load_corpus(packed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 1}', "line 2 has no field 'text'; its fields: 'body', 'id'"),
        ("{}", "line 2 has no field 'text'; its fields: none"),
        ('{"text": 3}', "line 2: the field 'text' is a int; want a string"),
        ('{"text": null}', "line 2: the field 'text' is a NoneType"),
        ('["x"]', "line 2 is a list; want an object"),
        ('{"text": "x"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2"),
        ('{"text": "a\\ud800"}', "line 2: character 1 of 'text' is half a surrogate pair"),
    ],
)
def test_bad_line_names_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=message):
        load_corpus(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}' * 100, mtime=0)[:-12]),
        ("cut.jsonl.xz", lzma.compress(b'{"text": "x"}' * 100)[:-12]),
        ("plain.txt.gz", b"not packed"),
        ("plain.txt.xz", b"not packed"),
    ],
)
def test_damaged_archive(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=f"{name} cannot be unpacked"):
        load_corpus(tmp_path / name)


def test_two_documents_of_one_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"id": "a", "text": "one"}, {"id": "a", "text": "two"}])
    with pytest.raises(CorpusError, match="two documents named 'a'"):
        load_corpus(path)


def test_unknown_and_empty_split() -> None:
    corpus = Corpus.of("mine", [Document("a", "one")], everything_is="train")
    with pytest.raises(CorpusError, match=r"unknown split 'tset': .*did you mean 'test'"):
        corpus.documents("tset")
    with pytest.raises(CorpusError, match="unknown split 'eval'"):
        load_corpus(everything_is="eval")
    with pytest.raises(CorpusError, match=r"no test documents \(1 train, 0 validation, 0 test\).*everything_is='test'"):
        corpus.documents("test")
