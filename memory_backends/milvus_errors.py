"""What Milvus' errors mean in the user's words, and which of them pass by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from recollect.memory_backends.errors import (
    BackendUnavailable,
    DiskFull,
    MemoryBackendError,
    StoreMissing,
    StoreUnreachable,
)


class MilvusError(MemoryBackendError):
    """Milvus refused a request, or what it keeps is not what was expected; the message says what would do."""


class MilvusUnavailable(MilvusError, StoreUnreachable):
    """Nothing answered at the address within the deadline."""


class MilvusMissing(MilvusError, StoreMissing):
    """A collection was dropped while a memory had it open."""


PASSING_GRPC = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED")
"""Statuses of gRPC that a later attempt may not meet."""
CREDENTIAL_GRPC = ("UNAUTHENTICATED", "PERMISSION_DENIED")
PASSING_CODES = (2, 4, 8, 9, 10, 101, 103)
"""Codes of Milvus: service not up, too many requests, rate limit, quota used up, timeout, collection not loaded yet."""
PASSING_SAYINGS = (
    "not ready",
    "unhealthy",
    "not healthy",
    "is abnormal",
    "service unavailable",
    "no available",
    "node not found",
    "node offline",
    "channel not",
    "not loaded into memory",
    "collection not loaded",
    "not fully loaded",
    "connection refused",
    "connection is closing",
    "context deadline exceeded",
    "context canceled",
    "rate limit",
    "fail connecting to server",
    "retry timeout",
    "retry run out",
    "wait for",
)
"""What a server says while it starts, or while one of its parts comes back; compared in lower case."""
FULL_SAYINGS = ("no space left", "disk quota exceeded", "disk quota exhausted", "file too large")
MISSING_SAYINGS = ("collection not found", "can't find collection", "does not exist", "collection not exist")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def grpc_statuses(error: BaseException) -> list[str]:
    """Names of the gRPC statuses in an error and its causes, such as "UNAVAILABLE"."""
    found = []
    for each in chain(error):
        code = getattr(each, "code", None)
        code = code() if callable(code) else code
        name = getattr(code, "name", None)
        if isinstance(name, str):
            found.append(name)
    return found


def message_of(error: BaseException) -> str:
    """What the error says, without its class and code, on one line and not without end."""
    details = getattr(error, "details", None)
    text = getattr(error, "message", None) or (details() if callable(details) else None) or str(error)
    line = " ".join(str(text).split())
    return line[:400] + (" ..." if len(line) > 400 else "")


def refuses_credentials(error: BaseException) -> bool:
    """Whether the server does not accept who asks."""
    text = message_of(error).lower()
    return any(name in CREDENTIAL_GRPC for name in grpc_statuses(error)) or "auth check failure" in text


def is_missing(error: BaseException) -> bool:
    """Whether a collection is not there."""
    codes = (getattr(error, "code", None) == 100, getattr(error, "compatible_code", None) == 4)
    return any(codes) or any(say in message_of(error).lower() for say in MISSING_SAYINGS)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if refuses_credentials(error) or is_missing(error):
        return False
    if getattr(error, "retriable", False) is True or any(name in PASSING_GRPC for name in grpc_statuses(error)):
        return True
    text = message_of(error).lower()
    return getattr(error, "code", None) in PASSING_CODES or any(saying in text for saying in PASSING_SAYINGS)


def translate(error: BaseException, doing: str, where: str, secret: str = "") -> MemoryBackendError:
    """The error to raise instead of what pymilvus raised.

    Args:
        error: what pymilvus or gRPC raised.
        doing: what was being done, such as "append keys".
        where: the address, without credentials.
        secret: what must not be told, wherever it may stand in the message.
    """
    text = hide(message_of(error), secret)
    lower = text.lower()
    if refuses_credentials(error):
        return MilvusError(
            f"Milvus at {where} refuses the credentials: set the environment variable MILVUS_TOKEN to 'user:password' "
            "or an API key, or name a file that holds it in token_file"
        )
    if any(saying in lower for saying in FULL_SAYINGS):
        return DiskFull(f"no room to {doing} in Milvus at {where}: free some space there ({text})")
    if is_missing(error):
        return MilvusMissing(
            f"can't {doing} in Milvus at {where}: the collection is gone ({text}). Somebody has dropped it: make the "
            "memory anew, with existing=replace"
        )
    return MilvusError(f"Milvus at {where} refused to {doing}: {text}")


def unavailable(error: BaseException | None, doing: str, where: str, seconds: float, secret: str = "") -> Any:
    """The error for a server that has not answered in time."""
    last = f" (last: {hide(message_of(error), secret)})" if error is not None else ""
    return MilvusUnavailable(
        f"can't {doing}: Milvus at {where} did not answer within {seconds:g} seconds{last}. See that the server runs "
        "and that the address and port are right, https:// where it speaks TLS; or raise deadline_seconds"
    )


def hide(text: str, secret: str) -> str:
    """The text without the secret, or either half of a 'user:password'."""
    for part in (secret, secret.partition(":")[2]):
        if part:
            text = text.replace(part, "***")
    return text


def does_not_fit(what: str, version: str, least: str, remedy: str) -> BackendUnavailable:
    """The error for a library or server of another generation."""
    return BackendUnavailable(f"backend 'milvus' needs {what} {least} or newer, and this is {version}: {remedy}")
