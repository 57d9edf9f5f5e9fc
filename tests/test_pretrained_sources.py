"""What of a folder is memorized; git itself is the oracle for ignore files where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from recollect.model.documents import CorpusError
from recollect.pretrained.sources import read_documents


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_text_is_read_and_the_rest_is_counted(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.py": "x = 1\n",
            "deep/b.md": "\ufeff# B",
            "notes.jsonl": '{"text": "one", "id": "n1"}\n{"text": "two"}\n',
            ".git/config": "hidden",
            ".env": "secret",
            "picture.png": b"\x89PNG\0\0\1",
            "latin.txt": "caf\xe9".encode("latin-1"),
            "empty.txt": " \n",
            "data.jsonl": '{"no": "text"}\n',
            "__pycache__/a.pyc": "x",
            "archive.tar.gz": b"\x1f\x8b",
            ".gitignore": "build/\n",
            "build/made.py": "x = 2",
        },
    )
    source = read_documents(tmp_path)
    assert {document.name: document.text for document in source.documents} == {
        "a.py": "x = 1\n",
        "deep/b.md": "# B",
        "n1": "one",
        "notes.jsonl:2": "two",
    }
    assert source.skipped == {
        "hidden": [".env", ".git", ".gitignore"],
        "ignored": ["__pycache__", "build"],
        "binary": ["archive.tar.gz", "latin.txt", "picture.png"],
        "unreadable": ["data.jsonl"],
        "empty": ["empty.txt"],
    }


def test_a_file_by_itself(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "hello"})
    assert [document.text for document in read_documents(tmp_path / "a.txt").documents] == ["hello"]
    write(tmp_path, {"b.txt": b"\xff\xfe"})
    with pytest.raises(CorpusError, match="not UTF-8"):
        read_documents(tmp_path / "b.txt")


def test_no_text_and_no_path_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere"):
        read_documents(tmp_path / "nowhere")
    write(tmp_path, {".hidden": "x", "a.bin": b"\0"})
    with pytest.raises(CorpusError, match=r"no text to memorize \(1 binary, 1 hidden\)"):
        read_documents(tmp_path)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write(tmp_path, {"sub/a.txt": "text"})
    (tmp_path / "sub" / "round").symlink_to(tmp_path, target_is_directory=True)
    assert [document.name for document in read_documents(tmp_path).documents] == ["sub/a.txt"]


PATTERNS = ["*.log", "!keep.log", "/top.txt", "out/", "docs/*.txt", "**/deep/x.txt", "abc/**", "# comment", "\\#odd"]
NAMES = """a.log keep.log top.txt sub/top.txt out/x.txt sub/out/y.txt docs/a.txt docs/in/a.txt deep/x.txt sub/deep/x.txt
abc/y.txt abc/z/y.txt #odd a.md c.md qz.py qzz.py sub/b.log sub/local.txt local.txt sub/more/local.txt file.txt"""


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_ignore_files_are_read_as_git_reads_them(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(NAMES.split(), "text"))
    write(tmp_path, {".gitignore": "\n".join([*PATTERNS, "[ab].md", "q?.py"]), "sub/.gitignore": "!*.log\nlocal.txt\n"})
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "-z"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    expected = {name for name in listed if name and not Path(name).name.startswith(".")}
    assert {document.name for document in read_documents(tmp_path).documents} == expected
