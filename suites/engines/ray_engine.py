"""The engine that runs orders as tasks of Ray: on this machine, or on the machines of a cluster.

Ray knows the machines, chooses one with room for each task, carries files and events, and tells of what is lost. What
is decided here is which machines may measure beside each other, and how much of one a task takes: all of it where times
are taken, so that nothing else runs there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..processes import LAST, Event, cannot_write
from . import CONNECT_SECONDS, Engine, EngineError, Item, Note, Order, Stopped
from .files import Needed, list_needed, read_array, take_in
from .machines import Machine, apart, check_versions, choose_kind, name_machines, unlike
from .node import describe_node, missing_here, remove_scratch, run_order
from .ray_cluster import RayCluster, import_ray
from .ray_waiting import await_first, is_mute, shut_off

POLL_SECONDS = 0.25
PROBE_SECONDS = 120.0
"""How long a machine has to say what it is; the first task of a cluster waits for a Python process there."""
ROOM_SECONDS = 900.0
"""How long a task may wait for room while nothing else of the run is going on."""
SILENCE_SECONDS = 120.0
"""After so long without a sign of life a task is given up as lost; it gives one every few seconds."""
ORPHAN_SECONDS = 2.0
"""A process ends within a second of the task over it; what it was at is not begun again before."""
CANCEL_SECONDS = 8.0
"""How long a task has to end its process before it is killed."""


class RayEngine(Engine):
    """Runs orders as Ray tasks.

    Args:
        output: folder of the run.
        threads: of each process; None is what the chosen machines have.
        note: is told what people should read.
        address: of a cluster to join; None starts Ray here.
        device: where orders compute: 'cpu', or 'cuda' for one GPU each.
        hosts: False takes several nodes of one host for machines of their own, whose times disturb each other.
        look: False sends every file and brings back every result, also where machines share a file system.
        deadline: seconds that a cluster has to answer.
    """

    name = "ray"

    def __init__(
        self,
        *,
        output: Path,
        threads: int | None,
        note: Note,
        address: str | None = None,
        device: str = "cpu",
        hosts: bool = True,
        look: bool = True,
        deadline: float = CONNECT_SECONDS,
    ) -> None:
        super().__init__()
        if device.startswith("cuda:"):
            raise EngineError(f"device {device!r}: with Ray each task gets a GPU of its own; give --device cuda")
        self.output = output.resolve()
        self.threads: int | None = threads
        self.note = note
        self.device = device
        self.hosts, self.look = hosts, look
        self.cluster = RayCluster(address, deadline=deadline)
        self.run_name = secrets.token_hex(6)
        self.mark = f".sweep-{self.run_name}"
        self.machines: list[Machine] = []
        self.alone: list[Machine] = []
        self._contents: dict[str, Any] = {}
        self._remotes: dict[Any, Any] = {}
        self._ids: tuple[str, ...] = ()
        self._streams: dict[int, Any] = {}
        self._heard = time.monotonic()
        self._stopped = False

    # Cluster

    def start(self) -> None:
        """Starts Ray or joins the cluster."""
        self.note("starting Ray on this machine" if self.cluster.address is None else f"joining {self.cluster.address}")
        self.cluster.start()
        self.ray = import_ray()
        self.output.mkdir(parents=True, exist_ok=True)
        for left in self.output.glob(".sweep-*"):
            left.unlink(missing_ok=True)  # of a run that was killed: this one holds the folder's lock
        if self.look:
            (self.output / self.mark).write_text("for machines that share this folder\n", encoding="utf-8")

    def close(self) -> None:
        """Ends what is running, removes what was laid down on the machines, and leaves Ray."""
        self.stop()
        with contextlib.suppress(OSError):
            (self.output / self.mark).unlink(missing_ok=True)
        if self.cluster_is_up():
            with contextlib.suppress(Exception):  # what is gone has nothing to remove
                self._on_each(self._ids, _remove_scratch, self.run_name, seconds=10.0)
        self._contents.clear()
        self.cluster.stop()

    def cluster_is_up(self) -> bool:
        """Whether there is anything to talk to."""
        return hasattr(self, "ray") and bool(self.ray.is_initialized())

    def settle(self, former: Mapping[str, Any] | None, *, any_machine: bool = False) -> Mapping[str, Any]:
        """Asks every machine what it is, refuses other versions, and takes those that are alike."""
        here = describe_node("cpu", self.threads)
        found = self._ask_machines()
        for machine in found:
            check_versions(machine, here)
        chosen, left = choose_kind(found, former, here["machine"])
        if any_machine:
            chosen, left = [*chosen, *left], []
        self.machines, self.alone = chosen, apart(chosen, hosts=self.hosts)
        self._ids = tuple(machine.node for machine in chosen)
        if self.threads is None:
            # Of a machine that gives the cluster fewer CPUs than it has, no more than those are used.
            self.threads = min(min(int(m.hardware["cores"]), max(1, m.cpus)) for m in chosen)
        self._tell_machines(left)
        return chosen[0].hardware

    @property
    def unlike(self) -> list[str]:
        """What differs between the machines that are used."""
        return unlike(self.machines)

    def _ask_machines(self) -> list[Machine]:
        wanted = "GPU" if self.device.startswith("cuda") else "CPU"
        nodes = {
            str(node["NodeID"]): node["Resources"]
            for node in self.ray.nodes()
            if node["Alive"] and node["Resources"].get(wanted, 0) >= 1
        }
        if not nodes:
            raise EngineError(f"no machine of the cluster offers a {wanted}: start nodes with one, or another --device")
        told = self._on_each(
            tuple(nodes), _describe(), self.device, self.threads, seconds=PROBE_SECONDS, gpus=0.01 * (wanted == "GPU")
        )
        for node, answer in told.items():
            if "missing" in answer:
                address = next(n["NodeManagerAddress"] for n in self.ray.nodes() if n["NodeID"] == node)
                raise EngineError(
                    f"the machine at {address} cannot measure ({answer['missing']}): install the same recollect there "
                    "as here, for the Python that its Ray runs with, or take it out of the cluster"
                )
        return name_machines(
            [
                (node, int(nodes[node].get("CPU", 0)), int(nodes[node].get("GPU", 0)), told[node])
                for node in nodes
                if node in told
            ]
        )

    def _tell_machines(self, left: list[Machine]) -> None:
        names = ", ".join(f"{machine.name} ({machine.cpus} CPUs)" for machine in self.machines)
        self.note(f"machines: {names}")
        if left:
            what = "; ".join(unlike([self.machines[0], *left]))
            self.note(f"left out, since their figures would not compare: {what}")
        crowded = [machine.name for machine in self.machines if machine not in self.alone]
        if crowded:
            self.note(
                f"no times are taken on {', '.join(crowded)}: it shares a host with another node, or has another "
                "number of CPUs in the cluster"
            )

    def _on_each(
        self, nodes: Iterable[str], function: Any, *arguments: Any, seconds: float, gpus: float = 0.0
    ) -> dict[str, Any]:
        """Calls a function on every node, beside whatever runs there; nodes that are lost meanwhile are left out.

        The function yields its answer, which then comes the same way as the events of orders.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = self._remote(function)
        asked = {}
        for node in self._alive(nodes):
            strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
            asked[node] = remote.options(
                num_returns="streaming", num_cpus=0, num_gpus=gpus, max_retries=2, scheduling_strategy=strategy
            ).remote(*arguments)
        waiting, mute = await_first(self.ray, list(asked.values()), seconds)
        silent = ", ".join(node[:6] for node, stream in asked.items() if stream in (mute or waiting))
        if mute:
            raise EngineError(shut_off(f"node {silent} of the cluster"))
        if waiting:
            raise EngineError(
                f"nodes {silent} of the cluster did not answer within {seconds:.0f} s: take them out of it"
            )
        answers = {}
        for node, stream in asked.items():
            try:
                answers[node] = self.ray.get(next(stream), timeout=seconds)
            except (self.ray.exceptions.NodeDiedError, self.ray.exceptions.TaskUnschedulableError):
                continue
        return answers

    def _remote(self, function: Any) -> Any:
        """The function as Ray knows it, which is told of it once."""
        with self.turn:
            if function not in self._remotes:
                self._remotes[function] = self.ray.remote(function)
            return self._remotes[function]

    def _alive(self, nodes: Iterable[str]) -> list[str]:
        """Those of the nodes that the cluster has not lost."""
        there = {str(node["NodeID"]) for node in self.ray.nodes() if node["Alive"]}
        alive = [node for node in nodes if node in there]
        if not alive:
            raise EngineError(
                "every machine that could measure is lost: start the cluster again, then the same command goes on"
            )
        return alive

    # Orders

    def places(self, *, alone: bool, threads: int, device: str = "cpu") -> int:
        """As many as the machines had room for when the run began."""
        if alone:
            return len(self.alone)
        if device.startswith("cuda"):
            return max(1, sum(machine.gpus for machine in self.machines))
        fit = sum(machine.cpus // threads for machine in self.machines)
        if not fit:
            most = max(machine.cpus for machine in self.machines)
            raise EngineError(
                f"a process wants {threads} threads and no machine of the cluster has more than {most} CPUs"
            )
        return fit

    def each(self, items: Iterable[Item], work: Callable[[Item], None]) -> None:
        """Calls `work` with every item, as many at a time as there are machines."""
        todo = list(items)
        with concurrent.futures.ThreadPoolExecutor(max(1, self.places(alone=True, threads=1))) as pool:
            futures = [pool.submit(work, item) for item in todo]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                self.stop()
                raise

    def run(self, order: Order, on_event: Callable[[Event], None]) -> Event:
        """See `Engine.run`."""
        if self._stopped:
            raise Stopped("the run was stopped")
        try:
            stream = self._submit(order)
        except self.ray.exceptions.ObjectStoreFullError as error:
            raise EngineError(
                f"Ray's object store has no room for the files of {order.label}: {error}; give it more with `ray start "
                "--object-store-memory`, or let the machines share a file system"
            ) from error
        self._streams[id(stream)] = stream
        try:
            return self._listen(stream, order, on_event)
        finally:
            self._streams.pop(id(stream), None)

    def stop(self) -> None:
        """Cancels every task; one that does not end its process in time is killed."""
        self._stopped = True
        streams = list(self._streams.values())
        if not streams or not self.cluster_is_up():
            return
        for force in (False, True):
            for stream in streams:
                with contextlib.suppress(Exception):  # it may have ended by now
                    self.ray.cancel(stream, force=force)
            if force:
                return
            refs = [stream.completed() for stream in streams]
            with contextlib.suppress(Exception):
                _, waiting = self.ray.wait(refs, num_returns=len(refs), timeout=CANCEL_SECONDS)
                streams = [stream for stream in streams if stream.completed() in waiting]

    def _submit(self, order: Order) -> Any:
        machines = self.alone if order.alone else self.machines
        self._alive(machine.node for machine in machines)
        self.places(alone=order.alone, threads=order.threads, device=order.device)
        needs = [(str(path), list_needed([path])) for path in order.needs]
        resumes = list_needed(order.resumes)
        payload = {
            "task": order.task,
            "output": str(order.output),
            "mark": self.mark,
            "look": self.look,
            "run": self.run_name,
            "threads": order.threads,
            "log": str(order.log),
            "timeout": order.timeout,
            "device": order.device,
            "needs": needs,
            "resumes": resumes,
            "rewritten": order.rewritten,
            "machines": {m.node: {"name": m.name, "machine": dict(m.hardware)} for m in self.machines},
        }
        files = [file for _, needed in needs for file in needed] + list(resumes)
        gpus = 1 if order.device.startswith("cuda") else 0
        remote = self._remote(_run_order).options(
            num_returns="streaming",
            num_cpus=machines[0].cpus if order.alone else min(order.threads, max(m.cpus for m in machines)),
            num_gpus=gpus,
            max_retries=0,  # what is lost is run again by those who know what of it is done
            label_selector={"ray.io/node-id": f"in({','.join(machine.node for machine in machines)})"},
        )
        return remote.remote(payload, self._contents_of(files))

    def _contents_of(self, files: Iterable[Needed]) -> dict[str, list[Any]]:
        """References to the contents that not every machine has; in lists, which Ray does not fetch by itself."""
        files = list(files)
        if not files:
            return {}
        wanted: set[str] = {file.path for file in files}
        if self.look:
            asked = self._on_each(self._ids, _missing_here, files, seconds=PROBE_SECONDS)
            wanted = {path for missing in asked.values() for path in missing}
        found = {}
        with self.turn:
            for file in files:
                if file.path in wanted:
                    if file.digest not in self._contents:
                        self._contents[file.digest] = self.ray.put(read_array(file.path))
                    found[file.digest] = [self._contents[file.digest]]
        return found

    def _listen(self, stream: Any, order: Order, on_event: Callable[[Event], None]) -> Event:
        """Takes the task's events until the last."""
        placed: str | None = None
        heard = time.monotonic()
        while True:
            ready, _ = self.ray.wait([stream], timeout=POLL_SECONDS)
            if self._stopped:
                raise Stopped("the run was stopped")
            try:
                if not ready:
                    self._check_patience(stream, order, placed, heard)
                    continue
                heard = self._heard = time.monotonic()
                event: Event = self.ray.get(next(stream), timeout=SILENCE_SECONDS)
            except StopIteration:
                return {"event": "lost", "reason": f"the task on {placed} ended without saying how"}
            except self.ray.exceptions.RayError as error:
                return self._judge(error, placed)
            if event["event"] == "placed":
                placed = str(event["machine"])
            elif event["event"] == "file":
                take_in(order.output, event["name"], event["content"])
            elif event["event"] == "cannot-write":
                raise cannot_write(event)
            elif event["event"] in LAST:
                return {**event, "machine": placed}
            elif event["event"] != "alive":
                with self.turn:
                    if self._stopped:
                        raise Stopped("the run was stopped")
                    on_event({**event, "machine": placed})

    def _check_patience(self, stream: Any, order: Order, placed: str | None, heard: float) -> None:
        """Raises where a task has waited, or has been silent, for too long."""
        if is_mute(self.ray, stream):
            raise self.ray.exceptions.GetTimeoutError(shut_off(placed or "a machine"))
        now = time.monotonic()
        if placed is None and now - self._heard > ROOM_SECONDS:
            raise EngineError(
                f"no machine had room for {order.label or 'a task'} for {ROOM_SECONDS / 60:.0f} minutes, while nothing "
                "else of this run was going on: others use the cluster, or its machines are gone (see `ray status`)"
            )
        if placed is not None and now - heard > SILENCE_SECONDS:
            with contextlib.suppress(Exception):
                self.ray.cancel(stream, force=True)
            raise self.ray.exceptions.GetTimeoutError(f"{placed} was silent for {SILENCE_SECONDS:.0f} s")

    def _judge(self, error: Exception, placed: str | None) -> Event:
        """What a task that Ray reports as failed comes to."""
        exceptions = self.ray.exceptions
        if self._stopped:
            raise Stopped("the run was stopped") from error
        if isinstance(error, exceptions.OutOfMemoryError):
            return {
                "event": "died",
                "reason": f"{placed} ran out of memory, and Ray ended the task: {_first_words(error)}; give smaller "
                "memories or fewer processes at a time, or a machine with more memory",
            }
        if isinstance(error, exceptions.RayTaskError):
            return {"event": "died", "reason": f"on {placed}: {_first_words(error.cause or error)}"}
        if isinstance(error, (exceptions.TaskUnschedulableError, exceptions.RuntimeEnvSetupError)):
            raise EngineError(f"no machine of the cluster can run it: {_first_words(error)}") from error
        time.sleep(ORPHAN_SECONDS)
        return {"event": "lost", "reason": f"{placed or 'the task'} was lost: {_first_words(error)}"}


def _run_order(payload: dict[str, Any], contents: dict[str, list[Any]]) -> Iterator[Event]:
    """Runs on the machine that Ray chose."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def fetch(file: Needed) -> bytes:
        if file.digest not in contents:
            if not file.is_here():
                raise FileNotFoundError(f"{file.path} is not on this machine, and was not sent with the task")
            return Path(file.path).read_bytes()
        return bytes(ray.get(contents[file.digest][0], timeout=600).tobytes())

    for event in run_order(payload, node, fetch):
        if event["event"] == "placed":
            event = {**event, "machine": payload["machines"][node]["name"]}
        yield event


def _missing_here(files: list[Needed]) -> Iterator[list[str]]:
    """Runs on every machine before an order that needs files."""
    yield missing_here(files)


def _remove_scratch(run: str) -> Iterator[None]:
    """Runs on every machine at the end."""
    import ray

    remove_scratch(run, ray.get_runtime_context().get_node_id())
    yield None


def _describe() -> Callable[[str, int | None], Iterator[dict[str, Any]]]:
    """A function that travels by value, so that a machine without recollect can say so."""

    def describe(device: str, threads: int | None) -> Iterator[dict[str, Any]]:
        try:
            from recollect.suites.engines.node import describe_node
        except ImportError as error:
            yield {"missing": f"{type(error).__name__}: {error}"}
        else:
            yield describe_node(device, threads)

    return describe


def _first_words(error: BaseException) -> str:
    """What an error says first: Ray goes on with advice of many lines."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].rstrip(".")[:300]
