"""A connection to Milvus, whichever there is: Lite in a folder, a server, a cluster. One client speaks to all of them.

Every request has a deadline. What may pass by itself (a server that starts, a connection that broke) is tried again
until then, and only requests that may be made twice are ever made here: an upsert of the same rows, a deletion, a
search. Credentials are read when the connection is made, handed to the client, and kept by nobody else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from recollect.memory_backends.errors import InvalidInput
from recollect.memory_backends.milvus_errors import does_not_fit, is_passing, translate, unavailable
from recollect.memory_backends.milvus_lite_server import UPGRADE, LiteStore, open_store

TOKEN_VARIABLE = "MILVUS_TOKEN"
LITE_SECONDS = 3600.0
"""A deadline for the engine in this process, which cannot go away alone: it only keeps a fault from being endless."""
LEAST_CLIENT = (3, 0)
LEAST_SERVER = (2, 3)
"""The first with an upsert."""
NOT_LOADED = 101
"""Milvus' code for a collection that is not in memory: somebody released it, or a server came back without it."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
ATTEMPT_SECONDS = 10.0
"""The longest that one attempt to connect takes, so that a server which comes up late is found."""


def is_lite(uri: str) -> bool:
    """Whether an address is a folder on this machine."""
    return not uri or "://" not in uri


def check_uri(uri: str) -> None:
    """Raises ValueError where an address can't be one, without telling a password that may stand in it."""
    if not uri:
        return
    if is_lite(uri):
        if not uri.endswith(".db"):
            raise ValueError(
                f"uri={uri!r} is no address of Milvus: write http://host:19530, https://host:443, or a path that ends "
                "in .db for Milvus Lite in a folder"
            )
        return
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise ValueError(
            "uri holds credentials, which would be stored with the memory and shown in reports: leave them out, and "
            f"set the environment variable {TOKEN_VARIABLE} to 'user:password', or name a file with it in token_file"
        )
    try:
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        port_is_right = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
        raise ValueError(f"uri={uri!r} is no address of Milvus: write http://host:19530 or https://host:443")


def read_token(token_file: str) -> str:
    """The credentials, from the file if one is named, else from the environment; empty where there are none.

    Raises:
        InvalidInput: the file can't be read or is empty.
    """
    if not token_file:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidInput(
            f"token_file={token_file!r} can't be read ({reason}): name a file that holds the token"
        ) from None
    if not token:
        raise InvalidInput(f"token_file={token_file!r} is empty: put 'user:password' or an API key into it")
    return token


class Connection:
    """Speaks to Milvus within a deadline.

    Args:
        uri: empty or a path for Lite, else http:// or https://.
        deadline: seconds that a request may take, attempts and pauses together.
        token_file: a file with the credentials; empty: the environment.
        ca_file: certificates that a server's must be signed by; empty: those of the system.

    Attributes:
        where: the address as messages name it.
        store: the open folder of Lite, else None.
        version: of the server, such as "2.3.5".

    Raises:
        BackendUnavailable: pymilvus, milvus-lite or the server is too old.
        InvalidInput: a file that is named can't be read.
        MilvusError: the credentials are refused, or another process has the folder open.
        MilvusUnavailable: nothing answers.
    """

    def __init__(self, uri: str, *, deadline: float, token_file: str = "", ca_file: str = "") -> None:
        import pymilvus

        _check_version("pymilvus", str(pymilvus.__version__), LEAST_CLIENT, UPGRADE)
        self.store: LiteStore | None = None
        self._secret = ""
        if is_lite(uri):
            self.deadline = LITE_SECONDS
            self.store = open_store(uri or None)
            self.where = self.store.path
            if self.store.client is None:
                self.store.client = self._connect(pymilvus, self.store.uri, {})
            self._client = self.store.client
            self.version = "lite"
            return
        self.deadline = deadline
        self.where = uri
        self._secret = read_token(token_file)
        named: dict[str, Any] = {"token": self._secret} if self._secret else {}
        if ca_file:
            if not os.path.isfile(ca_file):
                raise InvalidInput(f"ca_file={ca_file!r} is no file: name one with the certificates in PEM")
            named["server_pem_path"] = ca_file
        self._client = self._connect(pymilvus, uri, named)
        self.version = str(self.call("ask for the version", "get_server_version")).removeprefix("v")
        _check_version("Milvus", self.version, LEAST_SERVER, f"upgrade the server at {uri}")

    @property
    def lite(self) -> bool:
        """Whether this is Lite."""
        return self.store is not None

    def _connect(self, pymilvus: Any, uri: str, named: dict[str, Any]) -> Any:
        def attempt(timeout: float) -> Any:
            return pymilvus.MilvusClient(uri=uri, dedicated=True, timeout=min(timeout, ATTEMPT_SECONDS), **named)

        return self._until_deadline("connect", attempt)

    def call(
        self,
        doing: str,
        method: str,
        *arguments: Any,
        seconds: float | None = None,
        loaded: str = "",
        **named: Any,
    ) -> Any:
        """Calls a method of the client that may be called twice.

        Args:
            doing: for messages, such as "append keys".
            method: of `pymilvus.MilvusClient`.
            seconds: another deadline than the connection's.
            loaded: a collection that is loaded first, should the server say that it is not.

        Raises:
            MilvusUnavailable: it has not succeeded by the deadline.
            MilvusError, DiskFull: it was refused.
        """

        def attempt(timeout: float) -> Any:
            return getattr(self._client, method)(*arguments, timeout=timeout, **named)

        return self._until_deadline(doing, attempt, seconds, loaded)

    def _until_deadline(self, doing: str, attempt: Any, seconds: float | None = None, loaded: str = "") -> Any:
        import grpc
        from pymilvus.exceptions import MilvusException

        deadline = self.deadline if seconds is None else seconds
        end, pause = time.monotonic() + deadline, FIRST_PAUSE
        last: BaseException | None = None
        while (left := end - time.monotonic()) > 0:
            try:
                with _unlogged():
                    if loaded and getattr(last, "code", None) == NOT_LOADED:
                        self._client.load_collection(loaded, timeout=left)
                    return attempt(left)
            except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
                if not is_passing(error):
                    raise translate(error, doing, self.where, self._secret) from None
                last = error
            except ValueError as error:
                # gRPC says so of a channel that another thread closes while it reconnects.
                if "closed channel" not in str(error):
                    raise
                last = error
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE)
        raise unavailable(last, doing, self.where, deadline, self._secret) from None

    def close(self) -> None:
        """Closes the connection to a server; a folder of Lite is closed by `close_store`."""
        if self.store is None:
            with contextlib.suppress(Exception):
                self._client.close()


PYMILVUS_HANDLER = "no_color_console"
"""The one that pymilvus gives its log when it is loaded; what a user adds is left alone."""
_here = threading.local()


def _is_to_be_shown(record: logging.LogRecord) -> bool:
    return not getattr(_here, "unlogged", False)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps off the screen what pymilvus logs of a request here: a traceback of every attempt, by a handler of its own.

    What comes of the request is raised, in the words of `milvus_errors`.
    """
    for handler in logging.getLogger("pymilvus").handlers:
        if handler.name == PYMILVUS_HANDLER and _is_to_be_shown not in handler.filters:
            handler.addFilter(_is_to_be_shown)
    _here.unlogged = True
    try:
        yield
    finally:
        _here.unlogged = False


def _check_version(what: str, version: str, least: tuple[int, ...], remedy: str) -> None:
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers and numbers < least:
        raise does_not_fit(what, version, ".".join(map(str, least)), remedy)
