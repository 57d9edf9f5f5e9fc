"""This process's one connection to Ray, the processes that hold shards, and their end.

Ray is started on this machine when the first memory is made, in a folder of its own, and ended with the last: then no
process and no file is left, nor are they after Ctrl-C or when this process is killed (Ray's processes end with the one
that started them, and a watcher removes the folder). Where the program has connected to Ray itself, that connection is
used and never ended.

A host is one process for the shards number s of every memory with the same placement, so that many memories need no
more processes than one.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recollect.memory_backends.errors import InvalidInput, Unreachable
from recollect.memory_backends.ray_host import ShardHost
from recollect.memory_backends.ray_start import (
    check_version,
    environment,
    first_line,
    import_path,
    innermost,
    knock,
    object_store_bytes,
    processes_of,
    remedy,
    short_folder,
    usual_signals,
    watch,
    within,
)
from recollect.memory_backends.ray_token import Token

LOCAL = "local"
LOOPBACK = "127.0.0.1"
"""An embedded Ray listens nowhere else."""
DIRECT_BYTES = 1 << 20
"""What an embedded Ray sends along with a call rather than by its object store, which costs a millisecond each way."""
DIRECT_BYTES_ELSEWHERE = 64 << 10
"""The same of another Ray, whose own limit is 100 KiB."""
START_SECONDS = 60.0
"""For Ray to start on this machine."""


@dataclass(frozen=True)
class Placement:
    """Where a shard's process may run.

    Attributes:
        cpus, gpus: that Ray reserves for it.
        resources: of the cluster's own names, with how much of each.
        spread: over the machines of the cluster; else on this one as long as there is room.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()
    spread: bool = True

    def __str__(self) -> str:
        wanted = {"cpus_per_shard": self.cpus, "gpus_per_shard": self.gpus, **dict(self.resources)}
        return ", ".join(f"{name} {amount:g}" for name, amount in wanted.items() if amount) or "nothing in particular"


class Host:
    """A process that holds shards, which Ray starts again when it ends."""

    def __init__(self, placement: Placement, index: int, machines: tuple[str, ...]) -> None:
        self.placement = placement
        self.index = index
        self.machines = machines
        self.users = 0
        self.actor: Any = None
        self.start()

    def start(self) -> None:
        """Asks Ray for the process, without waiting for it; anew where Ray has given the former one up."""
        import ray

        self.actor = (
            ray.remote(ShardHost)
            .options(
                num_cpus=self.placement.cpus,
                num_gpus=self.placement.gpus,
                resources=dict(self.placement.resources) or None,
                # The process comes back, empty. What was asked of it is never repeated by Ray: whoever asked
                # finds out how it stands first.
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy=self._strategy(),
            )
            .remote()
        )

    def _strategy(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Nothing here asks the head: where that is gone, it would wait for it beyond any deadline.
        asks = self.placement.cpus or self.placement.gpus or self.placement.resources
        if self.placement.spread and asks:
            return "SPREAD"
        # What asks for nothing is put where Ray pleases, all on one machine: so they are dealt out here. Once that
        # machine is gone, any other will do.
        own = ray.get_runtime_context().get_node_id()
        spread = self.placement.spread and self.machines
        chosen = self.machines[self.index % len(self.machines)] if spread else own
        return NodeAffinitySchedulingStrategy(chosen, soft=True)

    def end(self) -> None:
        """Ends the process for good."""
        import ray

        with contextlib.suppress(Exception):  # a process that is gone needs no end
            ray.kill(self.actor, no_restart=True)


@dataclass(eq=False)
class Lease:
    """The hosts that one memory uses, and the name of its shards there."""

    hosts: list[Host]
    name: str
    given_back: bool = field(default=False)


class Session:
    """The connection, counted by the memories that use it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._hosts: dict[tuple[Placement, int], Host] = {}
        self._leases: set[Lease] = set()
        self.address: str | None = None
        """What was asked for by the memories that there are; None where there are none."""
        self.machines: tuple[str, ...] = ()
        """Of the cluster, when it was connected to."""
        self._connected = False
        """Whether the connection is this session's own, to be ended with the last memory."""
        self._folder: Path | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._token = Token()
        self._identity: tuple[str, str] | None = None
        self._process = 0
        """That connected: a fork of it ends nothing."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def stands(self) -> bool:
        """Whether the connection that memories were made over is still there, and no other one."""
        import ray

        return self.address is not None and ray.is_initialized() and self._identity == _identity()

    @property
    def embedded(self) -> bool:
        """Whether Ray runs on this machine because this session started it."""
        return self._folder is not None

    @property
    def direct_bytes(self) -> int:
        """Up to how many bytes had better go along with a call, though it be one for each shard."""
        return DIRECT_BYTES if self.embedded else DIRECT_BYTES_ELSEWHERE

    def lease(self, address: str, placement: Placement, shards: int, name: str, deadline: float) -> Lease:
        """Connects if need be, and takes a host for each shard.

        Raises:
            BackendUnavailable: Ray is too old.
            InvalidInput: this process is connected to another address.
            Unreachable: Ray does not start, or does not answer at the address.
        """
        with self._lock:
            self._connect(address, deadline)
            lease = Lease([], name)
            self._leases.add(lease)
            try:
                for index in range(shards):
                    host = self._hosts.get((placement, index))
                    if host is None:
                        host = self._hosts[placement, index] = Host(placement, index, self.machines)
                    host.users += 1
                    lease.hosts.append(host)
            except BaseException:
                self.give_back(lease)
                raise
            return lease

    def give_back(self, lease: Lease) -> None:
        """Forgets a memory's shards, ends hosts that nobody uses any more, and with the last memory the connection."""
        with self._lock:
            if lease.given_back or self._process != os.getpid():
                return
            lease.given_back = True
            self._leases.discard(lease)
            # Where it does not stand any more, Ray would take any call for a wish to connect to whatever it finds.
            there = self.stands()
            for host in lease.hosts:
                host.users -= 1
                if not host.users:
                    self._hosts.pop((host.placement, host.index), None)
                    if there:
                        host.end()
                elif there:
                    with contextlib.suppress(Exception):  # a process that is gone holds nothing
                        host.actor.forget.remote(lease.name)
            if not self._leases:
                self._disconnect()

    def give_back_later(self, lease: Lease) -> None:
        """The same from a finaliser, which may run at any point of any thread: nothing is done there."""
        self._tasks.put(lambda: self.give_back(lease))

    def end(self) -> None:
        """Ends everything, at the exit of the process."""
        if self._process != os.getpid():
            return
        with self._lock:
            for lease in list(self._leases):
                self.give_back(lease)

    # Connecting -------------------------------------------------------------------------------------------------------

    def _connect(self, address: str, deadline: float) -> None:
        import ray

        check_version(ray.__version__)
        if self.address is not None and not self.stands():
            # The program has shut Ray down under the memories that there are; they find out when they are used.
            self._hosts.clear()
            self._leases.clear()
            self._disconnect()
        if self.address is not None:
            if address != self.address:
                raise InvalidInput(
                    f"address={address!r}: this process is connected to Ray at {self.address!r} by other memories; "
                    "close them first, or use the same address"
                )
            return
        self._start_thread()
        if ray.is_initialized():
            there = ray.get_runtime_context().gcs_address
            if address not in (LOCAL, "auto", there):
                raise InvalidInput(
                    f"address={address!r}: this program is connected to Ray at {there}; leave the address out to use "
                    "that, or call ray.shutdown() first"
                )
        elif address == LOCAL:
            self._start()
        else:
            self._join(address, deadline)
        self.address = address
        self._process = os.getpid()
        self._identity = _identity()
        self.machines = tuple(sorted(node["NodeID"] for node in ray.nodes() if node["Alive"]))

    def _start(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="rcl-", dir=short_folder()))
        try:
            self._folder = folder
            self._watcher = watch(folder)
            # What Ray starts ends with the *thread* that started it: so no thread but the main one or a lasting one.
            if threading.current_thread() is threading.main_thread():
                self._init_local(folder)
            else:
                self._in_lasting_thread(lambda: self._init_local(folder))
        except BaseException as error:
            self._shutdown()
            if isinstance(error, Exception):
                raise Unreachable(
                    f"Ray does not start on this machine: {first_line(error)}. Free some main memory or disk in "
                    f"{folder.parent}, or name a cluster with address="
                ) from error
            raise
        self._connected = True

    def _init_local(self, folder: Path) -> None:
        import ray

        with (
            usual_signals(),
            environment(RAY_USAGE_STATS_ENABLED="0"),
            import_path(),
            self._token.settled(own=True),
        ):
            ray.init(
                address=LOCAL,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes(),
                _node_ip_address=LOOPBACK,
                _system_config={"max_direct_call_object_size": DIRECT_BYTES},
                _temp_dir=str(folder),
            )

    def _join(self, address: str, deadline: float) -> None:
        import ray

        knock(address, deadline)

        def join() -> None:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)

        try:
            with usual_signals(), self._token.settled(own=False):
                within(join, deadline)
        except TimeoutError:
            raise Unreachable(
                f"Ray at address={address!r} did not take this program in within {deadline:g} s: what answers there "
                "may be no head of a Ray cluster. `ray status --address=...` tells; deadline_seconds waits longer"
            ) from None
        except Exception as error:
            with contextlib.suppress(Exception):
                ray.shutdown()
            self._token.end()
            raise Unreachable(
                f"Ray at address={address!r} does not take this program in: {innermost(error)}. {remedy(error)}"
            ) from error
        self._connected = True

    # The end ----------------------------------------------------------------------------------------------------------

    def _disconnect(self) -> None:
        if self.address is None:
            return
        try:
            if self._connected and (self.stands() or self.embedded):
                self._shutdown()
        finally:
            self._clean()

    def _shutdown(self) -> None:
        import ray

        ours = [] if self._folder is None else processes_of(self._folder)
        if not self.address or self.stands():  # it is not another one, of the program's own by now
            with contextlib.suppress(Exception):
                ray.shutdown()
        if ours:
            import psutil

            # Ray asks its processes to end and does not look back; nothing in them is worth waiting for.
            for process in ours:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(ours, timeout=5)
        self._clean()

    def _clean(self) -> None:
        self.address, self._connected = None, False
        self._ended.set()
        self._token.end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            if self._watcher.stdin is not None:
                self._watcher.stdin.close()
            self._watcher = None

    # A thread of its own ----------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="recollect-ray", daemon=True)
            self._thread.start()
            atexit.register(self.end)

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            try:
                task()
            except Exception:  # a memory that nobody holds any more has nobody to tell
                logging.getLogger(__name__).debug("giving back a shard failed", exc_info=True)

    def _in_lasting_thread(self, call: Callable[[], None]) -> None:
        """Calls in a thread that lives as long as the connection."""
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        ended = self._ended = threading.Event()

        def run() -> None:
            try:
                call()
            except BaseException as error:
                done.put(error)
                return
            done.put(None)
            ended.wait()

        threading.Thread(target=run, name="recollect-ray-start", daemon=True).start()
        error = done.get()
        if error is not None:
            raise error


def _identity() -> tuple[str, str]:
    """Which connection there is now."""
    import ray

    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


SESSION = Session()
"""Of this process."""
