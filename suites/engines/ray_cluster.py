"""Starting Ray on this machine, or joining a cluster, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from recollect.memory_backends.ray_start import (
    environment,
    import_path,
    object_store_bytes,
    processes_of,
    short_folder,
    watch,
)
from recollect.memory_backends.ray_token import Token

from . import CONNECT_SECONDS, EngineError

INSTALL = "pip install 'recollect[ray]'"
FOLDER = "recollect-ray"
END_SECONDS = 5.0
"""How long a process of Ray has to end before it is killed."""
RECONNECT_SECONDS = 600
"""For which a run outlives the head of its cluster: Ray would end it after 60, and every wait here has an end."""


def import_ray() -> Any:
    """The library.

    Raises:
        EngineError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise EngineError(f"--engine ray needs Ray, which is not installed: {INSTALL}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


class RayCluster:
    """A connection to Ray: `start`, then `stop`.

    Args:
        address: of a cluster, 'host:port' or 'auto'; None starts Ray on this machine and ends it afterwards.
        deadline: seconds that a cluster has to answer.
    """

    def __init__(self, address: str | None, *, deadline: float = CONNECT_SECONDS) -> None:
        self.address = address
        self.deadline = deadline
        self._folder: Path | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._connected = False
        self._token = Token()
        self._former_handler: Any = None

    def start(self) -> None:
        """Connects.

        Raises:
            EngineError: Ray is not installed, no cluster answers, or it is of another version.
        """
        ray = import_ray()
        if ray.is_initialized():
            if self.address is None:
                return  # somebody's in this process: it is used and left running
            raise EngineError(
                f"this process is connected to Ray already: call ray.shutdown() before joining {self.address}"
            )
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.getsignal(signal.SIGTERM)
        try:
            if self.address is None or self.address == "local":
                self._start_here(ray)
            else:
                self._join(ray, self.address)
        except BaseException:
            self.stop()
            raise
        self._connected = True
        if self._former_handler is not None:
            # Ray's own handler ends the process with a trace, and without what there is to clean up.
            unset = self._former_handler == signal.SIG_DFL
            signal.signal(signal.SIGTERM, _leave if unset else self._former_handler)

    def stop(self) -> None:
        """Disconnects; ends Ray's processes and removes its files where it was started here."""
        ray = sys.modules.get("ray")
        started = [] if self._folder is None else processes_of(self._folder)
        if ray is not None and (self._connected or self._folder is not None) and ray.is_initialized():
            ray.shutdown()
        self._connected = False
        self._token.end()
        for process in psutil.wait_procs(started, timeout=END_SECONDS)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)
            self._former_handler = None
        if self._folder is not None:
            _remove(self._folder)
            self._folder = None
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()
            self._watcher = None

    def _start_here(self, ray: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}-", dir=short_folder()))
        self._watcher = watch(self._folder)  # it removes the folder should this process be killed
        try:
            with import_path(), self._token.settled(own=True):
                ray.init(
                    address="local",  # whatever RAY_ADDRESS or a file of an earlier cluster says
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=object_store_bytes(),
                    _temp_dir=str(self._folder),
                )
        except Exception as error:
            raise EngineError(f"Ray could not be started on this machine: {error}") from error

    def _join(self, ray: Any, address: str) -> None:
        if "://" in address:
            raise EngineError(
                f"address {address!r} is of Ray's client, which runs no driver in the cluster: give host:port of the "
                "cluster's head, on one of its machines"
            )
        if address != "auto":
            self._await_answer(address)
        try:
            reconnecting = environment(RAY_gcs_rpc_server_reconnect_timeout_s=str(RECONNECT_SECONDS))
            with reconnecting, self._token.settled(own=False):
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            raise EngineError(
                f"the Ray cluster at {address} could not be joined: {error}. This machine must be one of its nodes: "
                f"run `ray start --address={address}` on it first"
            ) from error

    def _await_answer(self, address: str) -> None:
        """Returns when a cluster answers; Ray itself would wait for minutes, or end this process."""
        host, separator, port = address.rpartition(":")
        if not separator or not port.isdigit() or not host:
            raise EngineError(f"address {address!r} is none: want host:port, such as 10.0.0.1:6379, or auto")
        remedy = (
            "start one with `ray start --head` and give the address that it prints, or leave --address out to use this "
            "machine alone"
        )
        until = time.monotonic() + self.deadline
        while True:
            try:
                with socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, self.deadline)):
                    break
            except (OSError, OverflowError) as error:
                if time.monotonic() > until:
                    raise EngineError(
                        f"no Ray cluster answers at {address} within {self.deadline:.0f} s ({error}): {remedy}"
                    ) from None
                time.sleep(0.2)
        command = [sys.executable, "-c", _HEALTH, address]
        try:
            left = max(10.0, until - time.monotonic())
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"something listens at {address}, but it does not answer as a Ray cluster within "
                f"{self.deadline:.0f} s: {remedy}"
            ) from None
        if done.returncode:
            words = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise EngineError(f"the Ray cluster at {address} does not fit: {' '.join(words[-3:])[-500:]}")


# `ray health-check`, whose script need not be on the path: it compares versions too.
_HEALTH = "import sys; from ray.scripts.scripts import healthcheck; healthcheck(['--address', sys.argv[1]])"


def _leave(number: int, frame: object) -> None:
    """Ends the program by way of everything that cleans up, with the exit code that shells give to a signal."""
    sys.exit(128 + number)


def _remove(folder: Path) -> None:
    """Removes a folder whose processes are just ending."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
