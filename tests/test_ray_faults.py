"""Shards whose process is killed, stopped, or stands elsewhere than expected; and what is left at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from recollect.memory_backends import InvalidInput, make_backend
from recollect.memory_backends.errors import ClosedMemory, Unreachable
from recollect.memory_backends.implementations.ray import Ray
from recollect.memory_backends.ray_host import Expected, Failed, Group, Refused, ShardAbout, ShardHost, group_of
from recollect.memory_backends.ray_shards import PartialAnswer
from recollect.memory_backends.testing import skip_unless_available, vectors

D, K = 8, 7


@pytest.fixture(autouse=True)
def _library() -> None:
    skip_unless_available("ray")


def pair(options: str, **changes: Any) -> tuple[Ray, Any]:
    """A memory in shards and an exact one of the same keys."""
    sizes: dict[str, Any] = {"num_memories": 2, "capacity": 200, "dim": D, **changes}
    memory = make_backend(f"ray:{options}", **sizes)
    assert isinstance(memory, Ray)
    return memory, make_backend("exact", **sizes)


def pid_of(memory: Ray, shard: int) -> int:
    import ray

    return int(ray.get(memory.shards.links[shard].host.actor.where.remote(), timeout=60)["pid"])


def assert_same(memory: Ray, exact: Any, seed: int = 50) -> None:
    queries = vectors(2, 9, D, seed=seed)
    mine, true = memory.search(queries, K), exact.search(queries, K)
    assert torch.equal(mine.slots, true.slots)
    torch.testing.assert_close(mine.scores, true.scores)


def search_until_partial(memory: Ray, queries: torch.Tensor) -> Any:
    """The first answer without some shard: the end of its process has to become known here."""
    while True:
        found = memory.search(queries, K)
        if memory.missing_shards:
            return found


# Processes that end ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_running")
def test_a_killed_shard_comes_back_with_all_its_keys_whatever_was_under_way() -> None:
    memory, exact = pair("shards=2,deadline_seconds=60")
    bystander, its_exact = pair("shards=3,deadline_seconds=60", capacity=50)
    for one in (memory, exact, bystander, its_exact):
        one.add(vectors(2, 230, D))
    assert_same(memory, exact)
    os.kill(pid_of(memory, 1), signal.SIGKILL)
    for step in range(1, 6):  # some of these are on their way to a process that is gone
        for one in (memory, exact):
            one.add(vectors(2, 30, D, seed=step))
    for one in (memory, exact):
        one.reset([0])
        one.add(vectors(1, 11, D, seed=9), memories=[0])
    assert_same(memory, exact)
    (recovery,) = memory.recoveries
    assert recovery.shard == 1
    assert recovery.keys_lost == 0
    assert recovery.keys_refilled >= int(memory.lengths.sum()) // 2 - 1
    assert min(recovery.detection_seconds, recovery.away_seconds, recovery.refill_seconds) >= 0
    assert memory.missing_shards == ()
    # A memory that asked for nothing while the process was away finds out as well.
    assert_same(bystander, its_exact)
    assert [one.keys_lost for one in bystander.recoveries] == [0]


@pytest.mark.usefixtures("ray_running")
def test_partial_answers_say_so_and_end_when_the_shard_is_back() -> None:
    memory, exact = pair("shards=2,partial=true")
    for one in (memory, exact):
        one.add(vectors(2, 200, D))
    queries = vectors(2, 9, D, seed=1)
    whole = memory.search(queries, K)
    assert memory.missing_shards == ()
    os.kill(pid_of(memory, 0), signal.SIGKILL)
    with pytest.warns(PartialAnswer, match=r"without shard 0 \(.*\) of 2"):
        partial = search_until_partial(memory, queries)
    assert memory.missing_shards == (0,)
    assert bool((partial.slots % 2 == 1).all()), "the other shard has the odd slots"
    found = [slot for slot in whole.slots.flatten().tolist() if slot % 2]
    assert set(found) <= set(partial.slots.flatten().tolist()), "and answers with its own in full"
    until = time.monotonic() + 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartialAnswer)
        while memory.missing_shards:
            assert time.monotonic() < until
            time.sleep(0.05)
            memory.search(queries, K)
    assert torch.equal(memory.search(queries, K).slots, whole.slots)
    assert [one.keys_lost for one in memory.recoveries] == [0]
    assert memory.shards.partial_answers >= 1


@pytest.mark.usefixtures("ray_running")
def test_a_stopped_shard_is_told_after_the_deadline_and_nothing_is_lost() -> None:
    memory, exact = pair("shards=2,deadline_seconds=2")
    for one in (memory, exact):
        one.add(vectors(2, 150, D))
    process = psutil.Process(pid_of(memory, 1))
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(Unreachable, match=r"shard 1 of 2 .* has not answered for 2 s.*partial=true"):
            memory.search(vectors(2, 3, D), K)
        memory.set_search_options(partial=True)
        with pytest.warns(PartialAnswer, match="without shard 1"):
            found = memory.search(vectors(2, 3, D), K)
        assert bool((found.slots % 2 == 0).all())
        for one in (memory, exact):
            one.add(vectors(2, 20, D, seed=3))
    finally:
        process.send_signal(signal.SIGCONT)
    memory.set_search_options(partial=False, deadline_seconds=60)
    assert_same(memory, exact)
    assert [(one.reason, one.keys_lost) for one in memory.recoveries] == [("it did not answer in time", 0)]


@pytest.mark.usefixtures("ray_running")
def test_a_process_that_ray_gives_up_is_replaced() -> None:
    import ray

    memory, exact = pair("shards=1,deadline_seconds=60,resources='node:__internal_head__=0.001'")
    for one in (memory, exact):
        one.add(vectors(2, 150, D))
    ray.kill(memory.shards.links[0].host.actor, no_restart=True)
    assert_same(memory, exact)
    memory.close()


@pytest.mark.usefixtures("ray_running")
def test_an_append_that_fails_in_a_shard_is_told_at_the_next_call_and_made_good() -> None:
    memory, exact = pair("shards=2,deadline_seconds=60")
    for one in (memory, exact):
        one.add(vectors(2, 150, D))
    link = memory.shards.links[0]
    which = torch.arange(2)
    wrong = group_of(which, link.totals(which), link.totals(which), vectors(2, 3, D + 1))
    link._send([wrong])  # as a shard might run out of memory, or over its budget
    with pytest.raises(InvalidInput, match=r"shard 0 of 2 \('exact'\): keys have shape .* expected .*dim=8"):
        memory.search(vectors(2, 3, D), K)
        memory.search(vectors(2, 3, D), K)
    for one in (memory, exact):
        one.add(vectors(2, 60, D, seed=1))
    assert_same(memory, exact)
    assert [one.keys_lost for one in memory.recoveries] == [0]


# What a host refuses --------------------------------------------------------------------------------------------------


def group(before: int, count: int, start: int | None = None) -> Group:
    numbers = [np.array([value]) for value in (0, before, before if start is None else start)]
    return Group(numbers[0], numbers[1], numbers[2], vectors(1, count, D).numpy())


def test_a_host_refuses_what_was_meant_for_another_state_and_stays_as_it_is() -> None:
    threads = torch.get_num_threads()
    host = ShardHost()
    sizes = {"num_memories": 1, "capacity": 20, "dim": D}
    epoch = host.make("one", ShardAbout("exact", sizes, threads))
    now = Expected(epoch, 0)
    query = (np.array([0]), vectors(1, 2, D).numpy(), 3)
    assert host.add("one", now, group(0, 5)) == 5
    now = Expected(epoch, 1)
    assert isinstance(host.add("other", now, group(5, 5)), Refused), "a memory that it does not hold"
    assert isinstance(host.add("one", Expected("another", 1), group(5, 5)), Refused), "another process"
    assert isinstance(host.add("one", Expected(epoch, 0), group(5, 5)), Refused), "a change was missed"
    refused = host.add("one", now, group(4, 5))
    assert isinstance(refused, Refused), "keys were missed"
    assert refused.why == "it had got [5] keys where [4] were expected"
    assert isinstance(host.search("one", now, query[0], np.array([6]), query[1], 3), Refused)
    assert isinstance(host.search("one", Expected(epoch, 2), query[0], np.array([5]), query[1], 3), Refused)
    assert not isinstance(host.search("one", now, query[0], np.array([5]), query[1], 3), Refused)
    assert host.add("one", now, group(5, 7)) == 12
    # Where keys between are evicted already, it goes on behind them.
    assert host.add("one", Expected(epoch, 2), group(12, 20, start=33)) == 20
    answer = host.search("one", Expected(epoch, 3), query[0], np.array([53]), vectors(1, 20, D).numpy(), 1)
    assert not isinstance(answer, Refused)
    exact = make_backend("exact", **sizes)
    exact.add(torch.zeros(1, 33, D))
    exact.add(vectors(1, 20, D))
    assert answer[1].tolist() == exact.search(vectors(1, 20, D), 1).slots.tolist()


def test_an_append_that_fails_half_way_leaves_no_shard_that_passes_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    host = ShardHost()
    about = ShardAbout("exact", {"num_memories": 2, "capacity": 20, "dim": D}, torch.get_num_threads())
    epoch = host.make("one", about)
    monkeypatch.setattr(host.shards["one"].backend, "_add", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    failed = host.add("one", Expected(epoch, 0), group(0, 5))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, MemoryError)
    assert isinstance(host.add("one", Expected(epoch, 0), group(0, 5)), Refused)


# The end --------------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from recollect.memory_backends import make_backend
from recollect.memory_backends.ray_session import SESSION
memory = make_backend("ray:shards=2", num_memories=1, capacity=1000, dim=8)
memory.add(torch.randn(1, 1500, 8))
memory.search(torch.randn(1, 5, 8), 3)
print(SESSION._folder, flush=True)
while True:
    memory.search(torch.randn(1, 500, 8), 3)
"""


def started(code: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A program, and the lines that it printed until the one that names the folder of its Ray."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": "10.9.8.7:6379"},  # of a cluster that is no more
    )
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("/"):
        lines.append(process.stdout.readline().strip())
        assert lines[-1], process.communicate()[1]
    return process, lines


def test_a_program_that_is_killed_leaves_no_process_and_no_file() -> None:
    process, lines = started(SCRIPT)
    folder = Path(lines[-1])
    assert folder.is_dir()
    assert processes_in(folder)
    process.kill()
    process.communicate(timeout=60)
    assert_gone(folder)


def assert_gone(folder: Path) -> None:
    until = time.monotonic() + 30
    while folder.exists() or processes_in(folder):
        assert time.monotonic() < until, [one.cmdline() for one in processes_in(folder)]
        time.sleep(0.1)


def processes_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


OWN = """
import ray, signal, subprocess, sys, torch
from recollect.memory_backends import make_backend
from recollect.memory_backends.ray_session import SESSION
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
mine = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir={folder!r})
with make_backend("ray:shards=1", num_memories=1, capacity=100, dim=8) as memory:
    memory.add(torch.randn(1, 15, 8))
    memory.search(torch.randn(1, 5, 8), 3)
assert ray.is_initialized(), "the program's own connection is its own"
memory = make_backend("ray:shards=1", num_memories=1, capacity=100, dim=8)
memory.add(torch.randn(1, 15, 8))
ray.shutdown()
try:
    memory.search(torch.randn(1, 5, 8), 3)
except ConnectionError as error:
    print(error)
memory.close()
memory = make_backend("ray:shards=1", num_memories=1, capacity=10, dim=8)
memory.add(torch.randn(1, 15, 8))
assert memory.search(torch.randn(1, 5, 8), 3).slots.min() >= 0
try:
    print(SESSION._folder, flush=True)
    while True:
        memory.search(torch.randn(1, 500, 8), 3)
except KeyboardInterrupt:
    assert mine.poll() is None, "a process of the program's own goes on"
    mine.communicate(b"\\n")
    print("interrupted")
"""


def test_a_connection_of_the_program_s_own_is_left_and_one_of_ours_ends_after_an_interrupt() -> None:
    with tempfile.TemporaryDirectory(prefix="own-", dir="/tmp") as folder:
        process, (ended, of_ours) = started(OWN.format(folder=folder))
        assert "the connection to Ray was ended by ray.shutdown()" in ended
        assert processes_in(Path(of_ours))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output == "interrupted\n"
    assert_gone(Path(of_ours))


@pytest.mark.usefixtures("ray_running")
def test_a_closed_memory_is_closed() -> None:
    memory, _ = pair("shards=2")
    memory.close()
    memory.close()
    with pytest.raises(ClosedMemory):
        memory.search(vectors(2, 3, D), K)
