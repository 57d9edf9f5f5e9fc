"""What is memorized: the text files of a codebase or a folder of documents, and what was passed over and why.

Passed over are hidden files and folders, what .gitignore files say (and the folders that no one writes by hand), files
that are not text, and files too large to be. Everything else is a document under its path in the folder; JSON lines
give a document a line, as in a corpus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recollect.model.corpus_readers import COMPRESSED, DATASET_MARKS, JSON_LINES, read_file, read_source
from recollect.model.documents import CorpusError, Document

IGNORE_FILE = ".gitignore"
NOT_WRITTEN_BY_HAND = frozenset({"__pycache__", "node_modules"})
LARGEST_FILE = 16 << 20
BINARY_SAMPLE = 8192

HIDDEN, IGNORED, BINARY, LARGE, EMPTY, UNREADABLE = "hidden", "ignored", "binary", "too large", "empty", "unreadable"


@dataclass
class Source:
    """What there is to memorize.

    Attributes:
        documents: in the order of their paths.
        skipped: for each reason the names passed over; a folder counts as one.
    """

    documents: list[Document] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        """Notes that something was passed over."""
        self.skipped.setdefault(reason, []).append(name)

    @property
    def counts(self) -> dict[str, int]:
        """How many were passed over, by reason."""
        return {reason: len(names) for reason, names in sorted(self.skipped.items())}


def read_documents(path: str | Path) -> Source:
    """The documents of a file or folder.

    Raises:
        CorpusError: there is no such path, a file named by itself cannot be read, or there is no text at all.
    """
    path = Path(path).expanduser()
    if not path.is_dir() or any((path / mark).is_file() for mark in DATASET_MARKS):
        documents, _ = read_source(path)
        source = Source(list(documents))
    else:
        source = Source()
        for file in _files(path, source):
            _read(file, file.relative_to(path).as_posix(), source)
    names = [document.name for document in source.documents]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise CorpusError(f"{path} has two documents named {twice!r}: names must be unique")
    for document in [document for document in source.documents if not document.text.strip()]:
        source.documents.remove(document)
        source.skip(EMPTY, document.name)
    if not source.documents:
        passed = ", ".join(f"{count} {reason}" for reason, count in source.counts.items())
        raise CorpusError(f"{path} holds no text to memorize{f' ({passed})' if passed else ''}")
    return source


def _read(file: Path, name: str, source: Source) -> None:
    """Adds a file's documents, or notes why not."""
    suffixes = {suffix.lower() for suffix in file.suffixes}
    try:
        if file.stat().st_size > LARGEST_FILE:
            source.skip(LARGE, name)
        elif suffixes & COMPRESSED and not suffixes & JSON_LINES:
            source.skip(BINARY, name)
        elif suffixes & JSON_LINES:
            source.documents += read_file(file, name, "text", "id")
        else:
            content = file.read_bytes()
            if b"\0" in content[:BINARY_SAMPLE]:
                source.skip(BINARY, name)
                return
            source.documents.append(Document(name, content.decode("utf-8").removeprefix("\ufeff")))
    except UnicodeDecodeError:
        source.skip(BINARY, name)
    except (OSError, CorpusError):
        source.skip(UNREADABLE, name)


def _files(folder: Path, source: Source) -> Iterator[Path]:
    """Files below `folder` in the order of their paths, without what is hidden or ignored."""
    pending: list[tuple[Path, tuple[_Ignore, ...]]] = [(folder, ())]
    while pending:
        place, rules = pending.pop()
        if (place / IGNORE_FILE).is_file():
            rules = (*rules, _Ignore.read(place / IGNORE_FILE))
        folders = []
        for entry in sorted(place.iterdir(), key=lambda entry: entry.name):
            name = entry.relative_to(folder).as_posix()
            is_folder = entry.is_dir()
            if entry.name.startswith("."):
                source.skip(HIDDEN, name)
            elif entry.name in NOT_WRITTEN_BY_HAND or _ignored(entry, is_folder, rules):
                source.skip(IGNORED, name)
            elif is_folder and not entry.is_symlink():
                folders.append((entry, rules))
            elif entry.is_file():
                yield entry
        pending += reversed(folders)


def _ignored(entry: Path, is_folder: bool, rules: tuple[_Ignore, ...]) -> bool:
    """The last pattern that matches decides, those of inner folders after those of outer ones."""
    ignored = False
    for rule in rules:
        ignored = rule.decide(entry, is_folder, ignored)
    return ignored


@dataclass(frozen=True)
class _Ignore:
    """One .gitignore file: its folder and its patterns, as (regular expression, negated, only folders)."""

    folder: Path
    patterns: tuple[tuple[re.Pattern[str], bool, bool], ...]

    @classmethod
    def read(cls, file: Path) -> _Ignore:
        patterns = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            text = re.sub(r"(?<!\\)\s+$", "", line)
            if not text or text.startswith("#"):
                continue
            negated = text.startswith("!")
            text = text[1:] if negated else text.removeprefix("\\")
            only_folders = text.endswith("/")
            patterns.append((_expression(text.rstrip("/")), negated, only_folders))
        return cls(file.parent, tuple(patterns))

    def decide(self, entry: Path, is_folder: bool, ignored: bool) -> bool:
        """Whether an entry below this folder is ignored, given what outer files said."""
        name = entry.relative_to(self.folder).as_posix()
        for pattern, negated, only_folders in self.patterns:
            if (is_folder or not only_folders) and pattern.fullmatch(name):
                ignored = not negated
        return ignored


def _expression(pattern: str) -> re.Pattern[str]:
    """A .gitignore pattern as a regular expression over paths relative to its file."""
    anchored = "/" in pattern
    pattern = pattern.removeprefix("/")
    result, place = "" if anchored else "(?:.*/)?", 0
    while place < len(pattern):
        rest = pattern[place:]
        if rest.startswith("**/"):
            result, place = result + "(?:.*/)?", place + 3
        elif rest.startswith("/**") and len(rest) == 3:
            result, place = result + "/.*", place + 3
        elif rest[0] == "*":
            result, place = result + "[^/]*", place + 1
        elif rest[0] == "?":
            result, place = result + "[^/]", place + 1
        elif rest[0] == "[" and "]" in rest[2:]:
            end = rest.index("]", 2)
            inside = rest[1:end].replace("\\", "\\\\")
            result, place = result + "[" + ("^" + inside[1:] if inside[0] in "!^" else inside) + "]", place + end + 1
        elif rest[0] == "\\" and len(rest) > 1:
            result, place = result + re.escape(rest[1]), place + 2
        else:
            result, place = result + re.escape(rest[0]), place + 1
    try:
        return re.compile(result)
    except re.error:
        return re.compile(r"(?!)")  # As git does with a pattern that is none: it matches nothing.
