"""What everything that keeps its rows in a Lance dataset shares: importing, opening, writing, committing, errors.

A dataset is a folder of data files and of manifests, one for each version; a manifest names the data files, and is
written whole or not at all. Here a change is made in two steps: its rows are written to data files that no manifest
names yet, and then one commit names them. A writer that ends between the two leaves files that nobody reads.

`commit_only` is the commit for state that two writers must not both change: it names exactly the fragments that it is
given, and fails if anybody has committed since. On a disk of this machine a commit also asks the system to write the
files out, so that what was acknowledged outlives a loss of power and not only the end of the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from recollect.memory_backends.errors import (
    BackendUnavailable,
    CorruptMemory,
    DiskFull,
    MemoryBackendError,
    StoreMissing,
    StoreUnreachable,
    WriteConflict,
)
from recollect.memory_backends.lance_places import Place

FILE_VERSION = "2.0"
"""Of Lance's data files. Newer ones pack numbers tighter, of which there is little to gain in keys, and take four times
as long to read."""
PIP = "pip install 'recollect[lance]'"
DEADLINE_SECONDS = 60.0
"""How long one call to an object store may take before it is given up, beside what its bytes need."""
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""Of a network that is not given up."""
LONGEST_REASON = 300

Answer = TypeVar("Answer")

_FULL = ("no space left", "disk quota exceeded", "file too large", "storage full", "os error 28", "os error 27")
_GONE = ("not found", "no such file", "nosuchkey", "nosuchbucket", "does not exist")
_SILENT = (
    "error sending request",
    "connection refused",
    "connection reset",
    "timed out",
    "timeout",
    "dns error",
    "failed to lookup",
    "connect error",
    "max retries",
    "retries, retry_timeout",
)
_REFUSED = (
    "accessdenied",
    "access denied",
    "permission denied",
    "unauthorized",
    "unauthenticated",
    "forbidden",
    "credential",
    "invalidaccesskeyid",
    "signaturedoesnotmatch",
)
_DAMAGED = (
    "corrupt",
    "invalid magic",
    "decode",
    "manifest",
    "unexpected end",
    "out of range",
    "eof",
    "panicked",
    "fill whole",
    "too small",
)


def import_lance() -> Any:
    """The module `lance`.

    Raises:
        BackendUnavailable: pylance is not installed, or does not load here; the message holds the pip command.
    """
    if importlib.util.find_spec("lance") is None:
        raise BackendUnavailable(f"a durable store needs lance, which is not installed: {PIP}")
    try:
        return importlib.import_module("lance")
    except ImportError as error:
        raise BackendUnavailable(f"a durable store needs lance, which does not load here ({error}): {PIP}") from error


def open_dataset(place: Place, *, version: int | str | None = None) -> Any:
    """The dataset at a place, in its newest version or the one asked for.

    Raises:
        StoreMissing: there is none, or no such version.
        StoreUnreachable: the address did not answer within the deadline.
    """
    lance = import_lance()
    if place.folder is not None and not place.folder.is_dir():
        raise StoreMissing(f"there is no store in {place}: make it first, or give another place")
    options: dict[str, Any] = {"storage_options": place.storage_options}
    if not place.remote and place.folder is None:
        options["session"] = _memory_session()
    return ask(place, "open", lambda: lance.dataset(place.address, version=version, **options))


def create_dataset(place: Place, schema: Any) -> Any:
    """An empty dataset with a schema.

    Raises:
        WriteConflict: something lies there.
    """
    lance, pyarrow = import_lance(), importlib.import_module("pyarrow")
    if place.folder is not None and (place.folder.is_file() or (place.folder.is_dir() and any(place.folder.iterdir()))):
        raise WriteConflict(f"{place} is not empty: open what lies there, or give a new place")
    empty = pyarrow.Table.from_batches([], schema=schema)
    options: dict[str, Any] = {"storage_options": place.storage_options}
    if not place.remote and place.folder is None:
        options["session"] = _memory_session()
    made = ask(
        place,
        "make",
        lambda: lance.write_dataset(empty, place.address, mode="create", data_storage_version=FILE_VERSION, **options),
    )
    if "session" in options:
        _in_memory[place.address] = made
    sync_commit(place, made)
    return made


def write_rows(place: Place, dataset: Any, batches: Iterable[Any], schema: Any, *, size: int = 0) -> list[Any]:
    """Writes rows to new data files, which a commit must name before anybody reads them.

    Args:
        batches: Arrow record batches.
        schema: theirs, without metadata.
        size: their bytes, for the deadline.

    Returns:
        The metadata of the new fragments.

    Raises:
        StoreMissing: the store was deleted.
    """
    check_there(place)
    pyarrow, fragment = importlib.import_module("pyarrow"), importlib.import_module("lance.fragment")
    reader = pyarrow.RecordBatchReader.from_batches(schema, iter(batches))
    fragments: list[Any] = ask(
        place,
        "write to",
        lambda: fragment.write_fragments(
            reader,
            dataset,
            mode="append",
            data_storage_version=FILE_VERSION,
            storage_options=place.storage_options,
        ),
        size=size,
    )
    if place.folder is not None:
        for path in data_files(place, fragments):
            sync_file(path)
        sync_file(place.folder / "data")
    return fragments


def drop_rows(place: Place, fragments: Iterable[Any]) -> None:
    """Removes data files that no commit came to name, where they lie on this machine."""
    if place.folder is not None:
        for path in data_files(place, fragments):
            path.unlink(missing_ok=True)


def data_files(place: Place, fragments: Iterable[Any]) -> list[Path]:
    """The files of fragments on this machine."""
    assert place.folder is not None
    return [place.folder / "data" / file.path for fragment in fragments for file in fragment.files]


def commit_only(place: Place, dataset: Any, schema: Any, fragments: list[Any]) -> Any:
    """Makes `fragments`, in this order, the rows of the next version, if `dataset` is still the newest.

    Args:
        schema: the dataset's, with the metadata that the new version has.

    Returns:
        The new version's dataset.

    Raises:
        StoreMissing: the store was deleted.
        WriteConflict: somebody has committed since; nothing was changed.
    """
    check_there(place)
    lance = import_lance()
    # An overwrite without retries is Lance's only commit that is never merged with what others committed meanwhile.
    # Numbered here, since releases before 14 take the fragments' numbers as they are, and new ones all have 0.
    numbered = [dataclasses.replace(metadata, id=number) for number, metadata in enumerate(fragments)]
    operation = lance.LanceOperation.Overwrite(schema, numbered)
    options = {"read_version": dataset.version, "max_retries": 0, "storage_options": place.storage_options}
    committed = ask(place, "commit to", lambda: lance.LanceDataset.commit(dataset, operation, **options))
    if committed.version != dataset.version + 1:
        raise CorruptMemory(
            f"{place}: a commit upon version {dataset.version} became version {committed.version}: this release of "
            f"pylance merges commits that must not be merged; {PIP} with the version in constraints.txt"
        )
    sync_commit(place, committed)
    return committed


def commit(place: Place, dataset: Any, operation: Any) -> Any:
    """Commits a `LanceOperation`, which Lance merges with what others have committed where the two do not touch.

    Raises:
        WriteConflict: they touch; nothing was changed.
    """
    lance = import_lance()
    options = {"read_version": dataset.version, "storage_options": place.storage_options}
    committed = ask(place, "commit to", lambda: lance.LanceDataset.commit(dataset, operation, **options))
    sync_commit(place, committed)
    return committed


def metadata_of(dataset: Any) -> dict[str, str]:
    """What was written into the schema's metadata."""
    found = dataset.schema.metadata or {}
    return {_text(name): _text(value) for name, value in found.items()}


def check_there(place: Place) -> None:
    """Raises StoreMissing if an open store of this machine was deleted: Lance would write to the place all the same."""
    if place.folder is not None and not (place.folder / "_versions").is_dir():
        raise StoreMissing(f"{place} was deleted while it was open: make it again, or bring it back from a copy")


def newest(place: Place, dataset: Any) -> Any:
    """The newest version of the same dataset.

    Raises:
        StoreMissing: it was deleted meanwhile.
    """
    check_there(place)

    def checkout() -> Any:
        latest = dataset.latest_version
        return dataset if latest == dataset.version else dataset.checkout_version(latest)

    return ask(place, "open", checkout)


# Files of this machine ------------------------------------------------------------------------------------------------


def sync_commit(place: Place, dataset: Any) -> None:
    """Makes the manifest of a commit outlive a loss of power."""
    if place.folder is None:
        return
    versions = place.folder / "_versions"
    # Lance counts manifests down, so that the newest comes first in a listing.
    for name in (f"{2**64 - 1 - dataset.version:020d}.manifest", f"{dataset.version}.manifest"):
        if (versions / name).exists():
            sync_file(versions / name)
    sync_file(versions)
    sync_file(place.folder)


def sync_file(path: Path) -> None:
    """Has the system write out a file, or the names in a folder; nothing where folders cannot be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Errors and deadlines -------------------------------------------------------------------------------------------------


def ask(place: Place, doing: str, call: Callable[[], Answer], *, size: int = 0) -> Answer:
    """What a call of Lance returns; its errors told in this package's words, and on a network within a deadline.

    Args:
        doing: what for, as in "cannot open s3://...".
        size: bytes that the call moves.

    Raises:
        StoreMissing, StoreUnreachable, WriteConflict, DiskFull, CorruptMemory, MemoryBackendError.
    """
    with told(place, doing):
        if not place.remote:
            return call()
        return _within(DEADLINE_SECONDS + size / SLOWEST_BYTES_PER_SECOND, call, place, doing)


@contextlib.contextmanager
def told(place: Place, doing: str) -> Iterator[None]:
    """Raises Lance's errors in this package's words."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("recollect."):
            raise  # told already
        raise _translated(error, place, doing) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Lance's own faults, which Python does not count as errors
            raise
        raise _translated(error, place, doing) from None


def _within(seconds: float, call: Callable[[], Answer], place: Place, doing: str) -> Answer:
    answer: list[Answer] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True, name="recollect-lance")
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise StoreUnreachable(
            f"cannot {doing} {place}: no answer within {seconds:.0f} seconds; see whether the address is right and can "
            "be reached from here"
        )
    return answer[0]


def _translated(error: BaseException, place: Place, doing: str) -> MemoryBackendError:
    text = place.hide(" ".join(str(error).split()))
    low = text.lower()
    reason = text.partition(", /")[0][:LONGEST_REASON]  # what follows is a line of Lance's sources
    what = f"cannot {doing} {place}"
    if type(error).__name__ == "CommitConflictError" or "commit conflict" in low or "preempted" in low:
        return WriteConflict(f"{what}: another writer committed first ({reason}); read its state anew and try again")
    if "already exists" in low:
        return WriteConflict(f"{what}: something lies there already; open it, or give a new place")
    if any(saying in low for saying in _FULL):
        return DiskFull(
            f"{what}: there is no room; free some space and do it again, what was acknowledged before is as it was"
        )
    if place.remote and any(saying in low for saying in _REFUSED):
        return StoreUnreachable(
            f"{what}: access was refused ({reason}); give credentials by the environment, such as AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, or by storage_options"
        )
    if place.remote and any(saying in low for saying in _SILENT):
        return StoreUnreachable(
            f"{what}: it does not answer ({reason}); see whether the address is right and can be reached from here"
        )
    if any(saying in low for saying in _GONE):
        return StoreMissing(
            f"{what}: what it names is gone or was never there ({reason}); make the store, or bring it back from a copy"
        )
    if isinstance(error, PermissionError) or "permission denied" in low:
        return MemoryBackendError(f"{what}: permission denied; mend the permissions, or give another place")
    if any(saying in low for saying in _DAMAGED):
        return CorruptMemory(f"{what}: damaged or cut short ({reason}); bring it back from a copy, or make it again")
    return MemoryBackendError(f"{what}: {reason}")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


_sessions: dict[int, Any] = {}
_in_memory: dict[str, Any] = {}
"""A dataset of each `memory://` address: what lies there goes with the last that holds it."""


def _memory_session() -> Any:
    """What makes `memory://` one place for this process, rather than a new one for each call."""
    pid = os.getpid()
    if pid not in _sessions:
        _sessions.clear()
        where = import_lance()
        _sessions[pid] = (where if hasattr(where, "Session") else importlib.import_module("lance.fragment")).Session()
    return _sessions[pid]
