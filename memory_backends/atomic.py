"""Files that are written whole or not at all.

A writer that is killed, or that meets a full disk, leaves what was there before. Files appear under their name
through one `os.replace` from a neighbour in the same folder, which POSIX makes atomic; folders likewise through a
rename. What a killed writer left half written is removed by the next one that writes under the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked and nothing left over is removed
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
LONGEST_RENAME_SECONDS = 5.0
"""Far longer than a living writer needs between its two renames."""


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the caller writes there replaces `path` when the block ends well.

    Raises whatever the block raises, after removing the temporary file; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _writing_beside(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            # mkstemp makes files private; a result should have the permissions of any other new file.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Writes `content` as UTF-8 to `path`, whole or not at all."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as readable JSON to `path`, whole or not at all; NaN and infinity raise ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it takes the place of `path` when the block ends well.

    An older folder of that name is moved aside first and removed last, so a crash between the two renames leaves
    the older state whole on disk, from where `recover_folder` brings it back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    with _writing_beside(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as stream:
                        os.fsync(stream.fileno())
            _sync_names(temporary, *(folder for folder in temporary.rglob("*") if folder.is_dir()))
            if path.exists():
                older = _older(path)
                shutil.rmtree(older, ignore_errors=True)
                os.replace(path, older)
                os.replace(temporary, path)
                _sync_names(path.parent)
                shutil.rmtree(older, ignore_errors=True)
            else:
                os.replace(temporary, path)
                _sync_names(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(path: str | Path) -> None:
    """Brings back the former state of a folder whose writer was killed between the two renames; readers call it."""
    path = Path(path)
    if path.exists() or not _older(path).exists():
        return
    # A writer that is alive between its two renames must not find its place taken: wait until it is done. Not for
    # ever, since whoever waits may be what is writing another file there.
    patience = 0.0 if fcntl is None else LONGEST_RENAME_SECONDS
    until = time.monotonic() + patience
    while True:
        with _locked(path.parent, wait=False) as alone:
            if path.exists() or not _older(path).exists():
                return
            if alone or time.monotonic() >= until:
                os.replace(_older(path), path)
                return
        time.sleep(0.05)


@contextlib.contextmanager
def _writing_beside(path: Path) -> Iterator[None]:
    """Says, by a shared lock on the folder, that somebody writes in it; removes what killed writers of `path` left.

    A lock ends with the process that holds it, however that ends. Whoever gets the folder for itself knows that nobody
    writes there.
    """
    with _locked(path.parent, wait=False) as alone:
        if alone:
            for left in path.parent.glob(f".{_escaped(path.name)}.*{PARTIAL}"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
    with _locked(path.parent, wait=True, shared=True):
        yield


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool, shared: bool = False) -> Iterator[bool]:
    """Holds a lock on a folder; yields whether it was got. Not got where file systems or systems have no locks."""
    descriptor = None
    got = False
    if fcntl is not None:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
            got = True
    try:
        yield got
    finally:
        if descriptor is not None:
            if got:
                # Closing alone would leave it to a process that was forked meanwhile.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _sync_names(*folders: Path) -> None:
    """Makes renames and new names outlive a loss of power; where folders cannot be opened, nothing is done."""
    for folder in folders:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _older(path: Path) -> Path:
    return path.with_name(f".{path.name}.older")
