"""Milvus Lite: an engine in this process, behind a port of its own, and the folders that it keeps collections in.

pymilvus would start it by itself for an address that ends in .db, but keeps the reason to itself when that fails, and
never ends it. Here a folder is opened once in a process, shared by all memories in it, and closed with the last one.
Memories without an address share one folder that is removed when the last of them is closed, or with the process.

What a memory that nobody closed has left is taken away by the next call that opens or closes one: a request to the
engine may not be made from where Python collects garbage, which can be anywhere, the engine itself included.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recollect.memory_backends.errors import InvalidInput
from recollect.memory_backends.milvus_errors import MilvusError, does_not_fit

LEAST_VERSION = 3
"""Of milvus-lite: the ones before are another program, in a process of its own."""
UPGRADE = "pip install --upgrade 'pymilvus[milvus-lite]>=3'"
CLOSING_SECONDS = 5.0
TEMPORARY, FOLDER = "recollect-milvus-", "memory.db"
"""What the names of temporary folders begin with, and the engine's own folder in them."""

_lock = threading.RLock()
_open: dict[str, LiteStore] = {}
_left: list[Callable[[], None]] = []


class LiteStore:
    """A folder that is open in this process.

    Attributes:
        path: the folder.
        uri: where its engine answers, on this machine only.
        temporary: whether the folder goes when it is closed.
        users: memories that use it.
    """

    def __init__(self, path: str, *, temporary: bool) -> None:
        server = _library()
        self.path = path
        self.temporary = temporary
        self.users = 0
        self.client: Any = None
        """What all its memories speak through; made by the first."""
        try:
            self._server, self._database, port = server.start_server_in_thread(path, host="127.0.0.1", port=0)
        except Exception as error:
            if type(error).__name__ == "DataDirLockedError":
                raise MilvusError(
                    f"{path} is open in another process, and Milvus Lite lets in one at a time: close it there, or run "
                    "a Milvus server, which many may use (uri=http://host:19530)"
                ) from error
            raise MilvusError(f"Milvus Lite can't open {path}: {error}") from error
        self.uri = f"http://127.0.0.1:{port}"

    def settle(self, collection: str) -> None:
        """Returns when the engine has no indexes left to build in the background."""
        # The protocol has no request for it: an index counts as finished from the start.
        self._database.get_collection(collection)._wait_for_bg()

    def nbytes(self) -> int:
        """Bytes of the folder."""
        return sum(file.stat().st_size for file in Path(self.path).rglob("*") if file.is_file())

    def close(self) -> None:
        """Writes what is in memory, and ends the engine; of a temporary folder nothing is left."""
        self._close_client()
        self._server.stop(None if self.temporary else CLOSING_SECONDS).wait(CLOSING_SECONDS)
        self._database.close()
        if self.temporary:
            shutil.rmtree(Path(self.path).parent, ignore_errors=True)

    def _close_client(self) -> None:
        # First, or gRPC prints that the engine hung up.
        if self.client is not None:
            with contextlib.suppress(Exception):
                self.client.close()

    def abandon(self) -> None:
        """At the end of the process: a temporary folder goes; another has all in its log, and is read from there."""
        self._close_client()
        self._server.stop(None)
        if self.temporary:
            shutil.rmtree(Path(self.path).parent, ignore_errors=True)


def _library() -> Any:
    """The module that starts the engine.

    Raises:
        BackendUnavailable: milvus-lite is of another generation.
    """
    import milvus_lite

    version = str(getattr(milvus_lite, "__version__", "older"))
    if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < LEAST_VERSION:
        raise does_not_fit("milvus-lite", version, f"{LEAST_VERSION}.0", UPGRADE)
    logger = logging.getLogger("milvus_lite")
    if not logger.handlers:  # a program that sets up no log is told by what is raised
        logger.addHandler(logging.NullHandler())
    try:
        return importlib.import_module("milvus_lite.adapter.grpc.server")
    except ImportError as error:
        raise does_not_fit("milvus-lite", f"{version} without its engine ({error})", "3.0", UPGRADE) from error


def open_store(path: str | None) -> LiteStore:
    """Opens a folder, or joins those that have it open; None is the temporary one of this process.

    Raises:
        InvalidInput: there can be no such folder.
        MilvusError: another process has it open.
    """
    with _lock:
        take_away()
        name = "" if path is None else os.path.abspath(path)
        store = _open.get(name)
        if store is None:
            if name:
                _check_folder(name)
            else:
                _sweep()
            where = name or os.path.join(tempfile.mkdtemp(prefix=TEMPORARY), FOLDER)
            try:
                store = _open[name] = LiteStore(where, temporary=not name)
            except BaseException:
                if not name:
                    shutil.rmtree(Path(where).parent, ignore_errors=True)
                raise
        store.users += 1
        return store


def _sweep() -> None:
    """Removes temporary folders of processes that were killed: nobody holds the lock in them."""
    try:
        import fcntl
    except ImportError:  # Windows, where an open file can't be removed
        return
    for lock in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*/{FOLDER}/LOCK"):
        with contextlib.suppress(OSError), lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent.parent, ignore_errors=True)


def _check_folder(path: str) -> None:
    if not os.path.isdir(os.path.dirname(path)):
        raise InvalidInput(f"uri={path!r}: the folder {os.path.dirname(path)} does not exist; make it first")
    if os.path.isfile(path):
        raise InvalidInput(
            f"uri={path!r} is a file, as Milvus Lite before 3.0 wrote them: its own tools can export it; give the "
            "memory another name"
        )


def close_store(store: LiteStore, collections: Sequence[str] = ()) -> None:
    """Ends the use of a folder by one memory, whose `collections` are dropped if the folder stays open for others."""
    with _lock:
        take_away()
        leave(store, collections)


def leave_behind(end: Callable[[], None]) -> None:
    """Notes what is to be ended of a memory that nobody closed; called while garbage is collected, so no more."""
    _left.append(end)


def take_away() -> None:
    """Ends what memories that nobody closed have left."""
    with _lock:
        while _left:
            _left.pop()()


def leave(store: LiteStore, collections: Sequence[str]) -> None:
    """Ends the use of a folder by one memory; to be called by `close_store` and `take_away` alone."""
    store.users -= 1
    if store.users <= 0:
        for name, each in list(_open.items()):
            if each is store:
                del _open[name]
        store.close()
    elif store.temporary and store.client is not None:
        for name in collections:
            with contextlib.suppress(Exception):  # it may have been dropped by the memory itself
                store.client.drop_collection(name)


@atexit.register
def _abandon_all() -> None:
    for store in list(_open.values()):
        store.abandon()
    _open.clear()
