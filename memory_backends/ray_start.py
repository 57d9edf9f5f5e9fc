"""What starting Ray here, or joining a cluster, needs of the system: folders, signals, a watcher, a deadline."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import recollect
from recollect.memory_backends.errors import BackendUnavailable, Unreachable

LEAST_VERSION = (2, 50)
PIP = "ray>=2.50"
OBJECT_STORE_BYTES = 1 << 30
"""Of an embedded Ray at most: what is on its way to shards lies there, never the keys themselves."""
LONGEST_FOLDER = 40
"""Ray makes sockets below its folder, and the path of a socket has 107 letters at most."""
_WATCHER = """
cat >/dev/null
away=0
for second in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
  sleep 1
  if [ -e "$1" ]; then away=0; rm -rf -- "$1"; else away=$((away + 1)); fi
  [ "$away" -lt 3 ] || exit 0
done
"""
"""Waits until this process is gone, then removes the folder until Ray's processes, which are ending, bring it back no
more."""

Result = TypeVar("Result")


def check_version(version: str) -> None:
    """Raises BackendUnavailable, with the pip command, for a Ray that is too old."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < LEAST_VERSION:
        raise BackendUnavailable(f"backend 'ray' needs Ray 2.50 or later, and {version} is here: pip install '{PIP}'")


def knock(address: str, deadline: float) -> None:
    """Raises Unreachable at once where nobody listens at an address such as 10.0.0.1:6379; 'auto' is left to Ray."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
        if not address or address == "auto":
            return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=min(deadline, 10.0)).close()
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"no Ray cluster answers at address={address!r} ({error}): `ray start --head` on its head prints the "
            "address; leave it out to run Ray on this machine"
        ) from error


def within(call: Callable[[], Result], seconds: float) -> Result:
    """What a call answers, or TimeoutError; then it goes on in a thread that nobody waits for."""
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="recollect-ray-join", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def short_folder() -> str:
    """Where folders with a short path can be made."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_FOLDER or not os.path.isdir("/tmp") else "/tmp"


def object_store_bytes() -> int:
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else OBJECT_STORE_BYTES
    return max(min(OBJECT_STORE_BYTES, room * 6 // 10), 100 << 20)


def watch(folder: Path) -> subprocess.Popen[bytes] | None:
    """A process that removes a folder when this one has ended, however it ends; None where there is no shell."""
    shell = shutil.which("sh")
    if shell is None or sys.platform == "win32":
        return None
    return subprocess.Popen(
        [shell, "-c", _WATCHER, "recollect-ray-watcher", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def processes_of(folder: Path) -> list[Any]:
    """The processes that Ray started for a folder, which their commands name, and those that they started."""
    import psutil

    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.name() != "sh" and str(folder) in " ".join(process.cmdline()):
                found[process.pid] = process
                found.update({child.pid: child for child in process.children(recursive=True)})
    return list(found.values())


@contextlib.contextmanager
def usual_signals() -> Iterator[None]:
    """Leaves a program its own handler of SIGTERM, which `ray.init` replaces; where it has none, Ray's cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if former not in (signal.SIG_DFL, None):
            signal.signal(signal.SIGTERM, former)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for as long as Ray starts; those that are set already stay."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def import_path() -> Iterator[None]:
    """Has the processes that Ray starts find this very package, however this one found it."""
    former = os.environ.get("PYTHONPATH")
    here = str(Path(recollect.__file__).absolute().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *([former] if former else [])])
    try:
        yield
    finally:
        if former is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = former


def innermost(error: BaseException) -> str:
    """What an error began with, in a line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return first_line(error)


def remedy(error: BaseException) -> str:
    """What to do where a cluster does not take a program in."""
    if "AuthToken" in innermost(error) or "AuthToken" in str(error):
        return (
            "The cluster asks for its token: set RAY_AUTH_MODE=token, and bring the token of its head to this machine "
            "(`ray get-auth-token --generate`, see Ray's page on token authentication)"
        )
    return (
        "This machine has to be one of the cluster (`ray start --address=...` joins it), with the same versions of Ray "
        "and Python"
    )


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
