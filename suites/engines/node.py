"""What happens on the machine that an order was sent to: its files laid down, its process run, its results sent back.

Nothing here asks where it runs: `ray_engine` calls these functions as Ray tasks, the tests as they are.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import platform
import queue
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recollect.model.training_state import FOLDER as TRAINING_STATE

from ..environment import training_digest
from ..processes import Event, WorkerProcess
from ..provenance import describe
from .files import Mirror, Needed, lay_down, relocate

BEAT_SECONDS = 5.0
"""After so long without news a task says that it is alive."""

MIRROR_SECONDS = 30.0
"""So often a task sends back what it has written so far, to go on elsewhere should its machine be lost."""

SCRATCH = "recollect-sweep"
STALE_SECONDS = 24 * 3600.0
"""What a run that was killed left in a machine's temporary folder is removed by the next one after this time."""

NEWS = ("done", "failed", "trained", "diverged")
"""Events that tell of results: what they tell of is sent before them."""

Fetch = Callable[[Needed], bytes]


def describe_node(device: str, threads: int | None) -> dict[str, Any]:
    """This machine as `provenance.describe` has it, with what else decides who may measure beside whom."""
    return {
        **describe(threads=threads or 1, device=device),
        "training": training_digest(),
        "host_name": platform.node(),
        "host": boot_identity(),
    }


def boot_identity() -> str:
    """Equal for two processes just where they share a running kernel, in containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def missing_here(needed: Sequence[Needed]) -> list[str]:
    """Paths of those that this machine has not, or not the same."""
    return [file.path for file in needed if not file.is_here()]


def scratch_folder(run: str, node: str) -> Path:
    """Where a run's files lie on this machine; `node` tells two nodes of one host apart."""
    return Path(tempfile.gettempdir()) / f"{SCRATCH}-{_user()}" / f"{run}-{node[:8]}"


def remove_scratch(run: str, node: str) -> None:
    """Removes them, and the folder over them where nothing else is in it."""
    folder = scratch_folder(run, node)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def _remove_stale(over: Path) -> None:
    """Removes what runs left that were killed long ago."""
    for folder in over.iterdir() if over.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def run_order(order: Mapping[str, Any], node: str, fetch: Fetch) -> Iterator[Event]:
    """Runs an order that `ray_engine` packed and yields its events, the last one of `processes.LAST` among them.

    Besides what the process tells: 'placed' before everything, 'alive' now and then, and 'file' with the name and
    content of a file that the output folder, which this machine cannot see, is to get.
    """
    yield {"event": "placed", "host": platform.node()}
    output = Path(order["output"])
    shared = (output / order["mark"]).is_file()
    scratch = scratch_folder(order["run"], node)
    moves = _lay_down_needs(order, scratch, fetch)
    folder, mirror = output, None
    if not shared:
        _remove_stale(scratch.parent)
        # A folder of its own: a process of an earlier try may still be writing into that one's.
        folder = scratch / "orders" / f"{_short(order['log'])}-{secrets.token_hex(4)}"
        moves = _ordered([*moves, (str(output), str(folder))])
        lay_down(order["resumes"], folder, [(str(output), str(folder))], fetch)
        mirror = Mirror(folder, whole=(TRAINING_STATE,))
    log = Path(relocate(order["log"], [(str(output), str(folder))]))
    task = relocate(order["task"], moves)
    here = order["machines"][node]
    task |= {"host": here["name"], "elsewhere": not shared}
    if "provenance" in task:
        task["provenance"] = {**task["provenance"], "machine": here["machine"], "host": here["name"]}
    yield from _follow(task, order, log, mirror, scratch)


def _lay_down_needs(order: Mapping[str, Any], scratch: Path, fetch: Fetch) -> list[tuple[str, str]]:
    """Puts what the task reads where it can be read; returns where that is."""
    moves = []
    here = {root: order["look"] and not missing_here(needed) for root, needed in order["needs"]}
    # A file that holds paths is right where it lies only if they all are.
    if order["rewritten"] and not all(here.values()):
        here = dict.fromkeys(here, False)
    for root in here:
        if here[root]:
            moves.append((root, root))  # not with the output folder that it may lie in
            continue
        folder = scratch / "needs" / _short(root)
        moves.append((root, str(folder / Path(root).name)))
    moves = _ordered(moves)
    for root, needed in order["needs"]:
        folder = scratch / "needs" / _short(root)
        if not here[root]:
            lay_down(needed, folder, moves, fetch, rewritten=order["rewritten"])
    return moves


def _follow(
    task: dict[str, Any], order: Mapping[str, Any], log: Path, mirror: Mirror | None, scratch: Path
) -> Iterator[Event]:
    """Runs the process, and tells what it tells."""
    # A process that starts a Ray of its own must not take itself for a worker of this one.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name.startswith("RAY_AUTH_")
    }
    killed_before = memory_kills()
    worker = WorkerProcess(task, threads=order["threads"], log=log, environment=environment)
    told: queue.Queue[Event] = queue.Queue()

    def listen() -> None:
        for event in worker.events(timeout=order["timeout"]):
            told.put(event)

    try:
        threading.Thread(target=listen, daemon=True).start()
        looked = time.monotonic()
        while True:
            try:
                event = told.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                event = {"event": "alive"}
            last = event["event"] in ("end", "died", "timeout", "cannot-write")
            if last or event["event"] in NEWS or time.monotonic() - looked > MIRROR_SECONDS:
                yield from _changed(mirror)
                looked = time.monotonic()
                with contextlib.suppress(OSError):
                    os.utime(scratch)  # not stale: see `_remove_stale`
            if event["event"] == "cannot-write" and mirror is not None:
                event = {
                    "event": "died",
                    "reason": f"{platform.node()} cannot write {event['path']}: {event['reason']}",
                }
            elif event["event"] == "died":
                event = judge_death(event, worker.process.returncode, memory_kills() - killed_before)
            yield event
            if last:
                return
    finally:
        worker.kill()


def _changed(mirror: Mirror | None) -> Iterator[Event]:
    if mirror is not None:
        for name, content in mirror.changes():
            yield {"event": "file", "name": name, "content": content}


def judge_death(event: Event, code: int | None, memory_kills: int) -> Event:
    """Whether a process that died is at fault itself: ended by somebody from outside, it is 'lost' and run again.

    Args:
        event: 'died', with its reason.
        code: the process's exit code, negative for a signal.
        memory_kills: processes that the kernel ended meanwhile for lack of memory.
    """
    if code is None or -code not in (signal.SIGKILL, signal.SIGTERM):
        return event
    if memory_kills > 0:
        return {
            **event,
            "reason": f"{event['reason']}: {platform.node()} had no memory left, and its kernel ended it; give "
            "smaller memories or fewer processes at a time, or a machine with more memory",
        }
    return {**event, "event": "lost"}


def memory_kills() -> int:
    """How many processes this machine's kernel, or this container's limit, has ended for lack of memory so far."""
    found = 0
    for path, name in (
        ("/proc/vmstat", "oom_kill"),
        ("/sys/fs/cgroup/memory.events", "oom_kill"),
        ("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill"),
    ):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text(encoding="ascii").splitlines():
                key, _, value = line.partition(" ")
                if key == name:
                    found += int(value)
    return found


def _ordered(moves: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(moves, key=lambda move: -len(move[0]))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
