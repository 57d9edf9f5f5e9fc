"""Everything that a backend raises on purpose. Each message names the value that was wrong and what would do."""

from __future__ import annotations


class MemoryBackendError(Exception):
    """The root of every error that the memory raises on purpose."""


class UnknownBackend(MemoryBackendError, LookupError):
    """No backend has this name; the message offers the nearest names."""


class BackendUnavailable(MemoryBackendError, ImportError):
    """The backend exists but its library is not installed; the message holds the pip command that brings it."""


class InvalidSpec(MemoryBackendError, ValueError):
    """A registry string does not follow the grammar, or an option in it is unknown, ill-typed or out of range."""


class InvalidInput(MemoryBackendError, ValueError):
    """A tensor or a number handed to a backend has a wrong shape, a wrong value, or holds NaN or infinity."""


class UnsupportedOperation(MemoryBackendError):
    """The backend can't do this (a metric, a device, an option change), and says what it can do instead."""


class CorruptMemory(MemoryBackendError):
    """A saved memory is truncated, altered, or was not written by this library."""


class NotFinite(InvalidInput):
    """Keys or queries hold NaN or infinity."""


class ClosedMemory(UnsupportedOperation):
    """The backend was closed, by `close()` or at the end of its `with` block."""


class OutOfMemory(MemoryBackendError, MemoryError):
    """There is not enough memory for what was asked; the message says for how much, and what needs less."""


class UnusableMemory(MemoryBackendError):
    """An append failed half way and the index could not be brought back to what it was; `reset()` mends it."""


class BuildFailed(MemoryBackendError):
    """Building an index in the background failed; no key is lost, those that it was built over are searched exactly."""


class OverBudget(MemoryBackendError, ValueError):
    """A memory would take more bytes than `max_bytes` allows; the message says how many, and what takes fewer."""


class DiskFull(MemoryBackendError):
    """A folder has no room for the file that was asked for; the message says how much there is, and what to do."""


class StoreMissing(CorruptMemory):
    """There is nothing at a store's address, or it was deleted while it was open."""


class StoreUnreachable(MemoryBackendError, ConnectionError):
    """A store's address refused, or did not answer within the deadline."""


class WriteConflict(MemoryBackendError):
    """Another writer changed the store first; nothing was written, and the message says what to do."""


class Unreachable(MemoryBackendError, ConnectionError):
    """A cluster, a server or a process that the memory needs does not answer within its deadline; nothing is lost."""
