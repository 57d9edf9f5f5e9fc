"""Files between machines: what a task needs, named by size and digest, and what it leaves behind.

A file system that machines share is found by looking, file by file: what is there already, and the same, is used where
it lies. What is not travels as bytes and is laid down once on each machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from recollect.memory_backends.atomic import PARTIAL, atomic_folder, write_bytes

Moves = Sequence[tuple[str, str]]
"""Paths of one machine and what stands for them on another, longest first."""

Content = bytes | dict[str, bytes] | None
"""Of a file; of a folder's files by name; None for what is gone."""

LAID_DOWN = ".laid-down.json"
"""In a folder of files that travelled: the digest of each."""


@dataclass(frozen=True)
class Needed:
    """One file that a task reads.

    Attributes:
        path: on the machine that has it.
        size: bytes.
        modified: nanoseconds, as the file system has it: two machines that see one file agree on it.
        digest: sha256 of the content.
    """

    path: str
    size: int
    modified: int
    digest: str

    def is_here(self) -> bool:
        """Whether this machine has the same file under the same path."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        if found.st_size != self.size:
            return False
        return found.st_mtime_ns == self.modified or _digest(self.path, found.st_size, found.st_mtime_ns) == self.digest


def list_needed(paths: Iterable[Path]) -> tuple[Needed, ...]:
    """Every file among `paths` and below those that are folders; without logs, and what is hidden or half written."""
    found: dict[str, Needed] = {}
    for path in paths:
        for file in sorted(_files(path)):
            if file.suffix == ".log":  # of the processes themselves
                continue
            status = file.stat()
            digest = _digest(str(file), status.st_size, status.st_mtime_ns)
            found[str(file)] = Needed(str(file), status.st_size, status.st_mtime_ns, digest)
    return tuple(found.values())


def _files(path: Path) -> Iterator[Path]:
    """The files below a folder, or the file itself; what is hidden, and folders that are being written, left out."""
    if path.is_file():
        yield path
        return
    for place, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and not name.endswith(PARTIAL):
                yield Path(place, name)


@lru_cache(maxsize=100_000)
def _digest(path: str, size: int, modified: int) -> str:
    """sha256 of a file; size and time are there for the cache, which must not answer for another content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_array(path: str) -> NDArray[np.uint8]:
    """A file as an array, which travels without being copied."""
    return np.fromfile(path, dtype=np.uint8)


def relocate(value: Any, moves: Moves) -> Any:
    """`value`, plain values as JSON has them, with every path of one machine replaced by that of the other."""
    if isinstance(value, str):
        for old, new in moves:
            if value == old or value.startswith(old + "/"):
                return new + value[len(old) :]
        return value
    if isinstance(value, Mapping):
        return {name: relocate(item, moves) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [relocate(item, moves) for item in value]
    return value


def lay_down(
    needed: Sequence[Needed],
    folder: Path,
    moves: Moves,
    fetch: Callable[[Needed], bytes],
    *,
    rewritten: Sequence[str] = (),
) -> None:
    """Puts files where `moves` say they belong on this machine, those that are not there yet.

    Args:
        needed: the files, by their paths on the machine that has them.
        folder: holds everything that is laid down here; tasks that share it take turns.
        moves: from there to here, into `folder`.
        fetch: gives a file's content.
        rewritten: names of JSON files in which paths are replaced as well.

    Raises:
        OSError: there is no room, or another task has held the folder for ten minutes.
        ValueError: a content is not what its digest says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / LAID_DOWN
    with filelock.FileLock(folder / ".lock").acquire(timeout=600):
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        for file in needed:
            place = relocate(file.path, moves)
            if known.get(place) == file.digest and Path(place).is_file():
                continue
            content = fetch(file)
            if hashlib.sha256(content).hexdigest() != file.digest:
                raise ValueError(
                    f"{file.path} changed while it was sent to another machine: run the same command again"
                )
            if Path(place).name in rewritten:
                content = json.dumps(relocate(json.loads(content), moves)).encode()
            write_bytes(place, content)
            known[place] = file.digest
            write_bytes(record, json.dumps(known).encode())


class Mirror:
    """Watches a folder that a task writes into, and gives what changed in it.

    Args:
        folder: what lies in it now counts as known.
        whole: names of folders in it whose files belong together: they change, and are given, as one.
    """

    def __init__(self, folder: Path, whole: Sequence[str] = ()) -> None:
        self.folder = folder
        self.whole = frozenset(whole)
        self._known = self._scan()

    def changes(self) -> Iterator[tuple[str, Content]]:
        """(path below the folder, content) of what is new or changed, the oldest first; None for what is gone.

        Results are written after what they name, so whoever writes these in order never has one without the other.
        """
        now = self._scan()
        changed = [name for name, marks in now.items() if self._known.get(name) != marks]
        for name in sorted(changed, key=lambda name: max(mark[2] for mark in now[name])):
            content = self._read(name, [mark[0] for mark in now[name]])
            if content is None:  # replaced or gone since: the next look tells
                now[name] = self._known.get(name, ())
                continue
            yield name, content
        gone = [name for name, marks in self._known.items() if marks and name not in now]
        self._known = now
        for name in gone:
            yield name, None

    def _read(self, name: str, parts: Sequence[str]) -> Content:
        """A file's content, or that of a folder's files by name; None where it is no longer what was looked at."""
        place = self.folder / name
        try:
            if parts == [""]:
                return place.read_bytes()
            # Such a folder is replaced by a rename: while it is the same one, so are all its files.
            before = place.stat().st_ino
            found = {part: (place / part).read_bytes() for part in parts}
            return found if place.stat().st_ino == before else None
        except OSError:
            return None

    def _scan(self) -> dict[str, tuple[tuple[str, int, int], ...]]:
        """What there is: of each file, and of all files of a folder that counts as one, name in it, bytes and time."""
        found: dict[str, list[tuple[str, int, int]]] = {}
        for file in _files(self.folder):
            parts = file.relative_to(self.folder).parts
            cut = next((place for place, part in enumerate(parts[:-1], 1) if part in self.whole), len(parts))
            try:
                status = file.stat()
            except OSError:
                continue
            mark = ("/".join(parts[cut:]), status.st_size, status.st_mtime_ns)
            found.setdefault("/".join(parts[:cut]), []).append(mark)
        return {name: tuple(sorted(marks)) for name, marks in found.items()}


def take_in(folder: Path, name: str, content: Content) -> None:
    """Writes what a `Mirror` gave below `folder`, whole or not at all; None removes it.

    Raises:
        OSError: it cannot be written.
        ValueError: the name leads out of the folder.
    """
    place = _inside(folder, name)
    if content is None and place.is_dir():
        shutil.rmtree(place)
    elif content is None:
        place.unlink(missing_ok=True)
    elif isinstance(content, bytes):
        write_bytes(place, content)
    else:
        with atomic_folder(place) as temporary:
            for part, own in content.items():
                target = _inside(temporary, part)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(own)


def _inside(folder: Path, name: str) -> Path:
    place = (folder / name).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise ValueError(f"a machine sent a file named {name!r}, which lies outside {folder}")
    return place
