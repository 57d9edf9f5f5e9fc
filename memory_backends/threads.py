"""The one place that decides how many threads an index library may use.

torch, faiss, hnswlib, ScaNN and numba each bring a thread pool of their own. Left alone they all take every core and
get in each other's way, so here they all follow `torch.get_num_threads()` (of which each process of a job that shares
a machine gets its part, `use_share`):

* several memories or parts are worked on at once, one thread of ours for each, and the library inside uses one
  thread. That keeps builds deterministic: a graph that several threads insert into depends on which came first;
* a single task leaves the threads to the library itself, if the library's answer does not depend on them;
* what is built in the background (`background`) is built on half as many threads of its own, of a lower priority: a
  search that wants every core gets most of it, and the builders get what it leaves.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TypeVar

import torch

Result = TypeVar("Result")

_inside = threading.local()


def library_threads() -> int:
    """How many threads a library call may use here and now: 1 inside `run_all`'s pool, torch's number elsewhere."""
    return 1 if getattr(_inside, "worker", False) else max(1, torch.get_num_threads())


def run_all(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Runs `tasks`, side by side if torch may use several threads, and returns their results in order.

    The first exception of a task is raised. Only worth it for tasks that release the interpreter lock.
    """
    threads = library_threads()
    if threads == 1 or len(tasks) < 2:
        return [task() for task in tasks]
    return list(_pool(threads).map(lambda task: task(), tasks))


def builder_threads() -> int:
    """How many threads may build in the background."""
    return max(1, torch.get_num_threads() // 2)


def enter_worker() -> None:
    """Tells that this thread is one of several at work: a library inside gets one thread."""
    _inside.worker = True


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="recollect", initializer=enter_worker)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # the child has none of its threads


def set_faiss_threads(faiss: ModuleType, threads: int | None = None) -> None:
    """Holds faiss's OpenMP pool to `threads`, or to `library_threads()`; the setting is the calling thread's own."""
    wanted = library_threads() if threads is None else threads
    if getattr(_inside, "faiss", 0) != wanted:
        faiss.omp_set_num_threads(wanted)
        _inside.faiss = wanted


def share_of_cores(mine: Iterable[int], everyone: Iterable[Collection[int]]) -> int:
    """How many threads a process may use among the others of its job on this machine, at least 1.

    Args:
        mine: the numbers of the cores that this process may run on.
        everyone: the same of every process of the job on this machine, this one among them.
    """
    masks = list(everyone)
    return max(1, int(sum(1 / max(1, sum(core in mask for mask in masks)) for core in mine) + 1e-9))


def use_share(share: int) -> None:
    """Lets torch, and with it every library, use `share` threads, unless the user has said how many.

    `OMP_NUM_THREADS=1` says nothing: torchrun sets it where it was not set.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(share)


def numba_threads(numba: ModuleType) -> int:
    """`library_threads()`, but no more than numba was started with (it refuses more)."""
    return min(library_threads(), int(numba.config.NUMBA_NUM_THREADS))
