"""A lock that many may hold for reading, or one for writing.

Searches of one memory go side by side; what changes it waits until they are done and keeps new ones out meanwhile.
Neither side starves: a writer that waits lets no new reader in, and when a writer is done, the readers that waited for
it come before the next writer.

A thread that holds the lock may take it again (a method of a backend may call another of its methods), also for
reading what it is writing. Only reading and then writing in one thread is refused: two threads that did it would wait
for each other for ever.
"""

from __future__ import annotations

import threading
from types import TracebackType

from recollect.memory_backends.errors import UnsupportedOperation


class ReadersWriterLock:
    """`with lock.reading:` beside other readers, `with lock.writing:` alone.

    A copy or a pickle of the lock is a new one that nobody holds, so that what holds a lock can be copied.
    """

    def __init__(self) -> None:
        self.reading = _Reading(self)
        self.writing = _Writing(self)
        self._changed = threading.Condition(threading.Lock())
        self._readers: dict[int, int] = {}
        """How often each reading thread holds the lock."""
        self._writer = 0
        """The writing thread, 0 if there is none."""
        self._depth = 0
        """How often it holds the lock."""
        self._waiting_writers = 0
        self._waiting_readers = 0
        self._let_in = 0
        """Readers that waited while the last writer wrote, and come before the next one."""
        self._phase = 0
        """Counts the times that writers have given the lock back."""

    def acquire_reading(self) -> None:
        """Waits until nobody writes."""
        me = threading.get_ident()
        with self._changed:
            if self._writer == me:
                self._depth += 1
                return
            if me not in self._readers and (self._writer or self._waiting_writers):
                self._wait_to_read()
            self._readers[me] = self._readers.get(me, 0) + 1

    def _wait_to_read(self) -> None:
        phase = self._phase
        self._waiting_readers += 1
        try:
            while self._writer or (self._waiting_writers and self._phase == phase):
                self._changed.wait()
        finally:
            self._waiting_readers -= 1
            if self._let_in and self._phase != phase:
                self._let_in -= 1
                if not self._let_in:
                    self._changed.notify_all()

    def release_reading(self) -> None:
        """Gives back what `acquire_reading` took."""
        me = threading.get_ident()
        with self._changed:
            if self._writer == me:
                self._depth -= 1
                return
            left = self._readers[me] - 1
            if left:
                self._readers[me] = left
                return
            del self._readers[me]
            if self._waiting_writers and not self._readers:
                self._changed.notify_all()

    def acquire_writing(self) -> None:
        """Waits until nobody else reads or writes.

        Raises:
            UnsupportedOperation: this thread is reading.
        """
        me = threading.get_ident()
        with self._changed:
            if self._writer == me:
                self._depth += 1
                return
            if me in self._readers:
                raise UnsupportedOperation(
                    "a memory can't be changed from within a search of it, or while `unchanged()` holds it as it is: "
                    "change it afterwards"
                )
            if self._readers or self._writer or self._let_in:
                self._wait_to_write()
            self._writer, self._depth = me, 1

    def _wait_to_write(self) -> None:
        self._waiting_writers += 1
        try:
            while self._readers or self._writer or self._let_in:
                self._changed.wait()
        finally:
            self._waiting_writers -= 1
            if not self._waiting_writers:
                # If this thread was interrupted, readers that waited for it alone may go on.
                self._changed.notify_all()

    def release_writing(self) -> None:
        """Gives back what `acquire_writing` took."""
        with self._changed:
            self._depth -= 1
            if self._depth:
                return
            self._writer = 0
            self._phase += 1
            self._let_in = self._waiting_readers
            if self._waiting_readers or self._waiting_writers:
                self._changed.notify_all()

    def __reduce__(self) -> tuple[type[ReadersWriterLock], tuple[()]]:
        return (ReadersWriterLock, ())


class _Reading:
    def __init__(self, lock: ReadersWriterLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire_reading()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release_reading()


class _Writing:
    def __init__(self, lock: ReadersWriterLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire_writing()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release_writing()
