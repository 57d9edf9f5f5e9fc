"""Run in a process of its own by test_key_log_killed.py and benchmarks/lance_store.py: appends that are killed.

    python killed_appends.py kill FOLDER TIMES
    python killed_appends.py crowd FOLDER APPENDS

In the first a writer appends to a log, resets it and prunes it, and tells each change when it has returned; it is
killed with -9 at a random moment, and the next one goes on. In the end every key that was told must be there. In the
second several writers append at once, some of them to the same memory. It forks before Lance has started any thread,
which is when forking is safe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import torch

warnings.filterwarnings("ignore", message="lance is not fork-safe")
import lance  # noqa: E402

from recollect.memory_backends.errors import WriteConflict  # noqa: E402
from recollect.memory_backends.key_log import KeyLog  # noqa: E402

MEMORIES, CAPACITY, DIM = 2, 3000, 8
MODULES = (lance, pyarrow)
"""Imported before the first fork, so that a child has nothing to load."""


def keys_of(memory: int, generation: int, numbers: range) -> torch.Tensor:
    """(T, D) float32: what a key must be, by its memory, generation and number."""
    base = np.arange(numbers.start, numbers.stop, dtype=np.float32)[:, None] * 3 + memory + 1000 * generation
    return torch.from_numpy(base + np.arange(DIM, dtype=np.float32))


def write(folder: Path, tell: int, seed: int) -> None:
    """Appends until it is killed, and tells each append as a line `memory generation total`."""
    draw = random.Random(seed)
    with KeyLog.open(folder) as log:
        while True:
            memory = draw.randrange(MEMORIES)
            total, generation = log.state.totals[memory], log.state.generations[memory]
            act = draw.random()
            if act < 0.02:
                log.reset([memory])
                total, generation = 0, generation + 1
            elif act < 0.04:
                log.prune(keep_seconds=0.0)
            else:
                new = range(total, total + draw.randrange(1, 64))
                log.append(keys_of(memory, generation, new)[None], [memory], first=total)
                total = new.stop
            os.write(tell, f"{memory} {generation} {total}\n".encode())


def check(folder: Path, acknowledged: dict[int, tuple[int, int]]) -> int:
    """Compares every key alive with what it must be; returns how many there are."""
    found = 0
    with KeyLog.open(folder) as log:
        for memory in range(MEMORIES):
            there = (log.state.generations[memory], log.state.totals[memory])
            assert there >= acknowledged.get(memory, (0, 0)), (memory, there, acknowledged)
            for numbers, _, keys in log.read(memory):
                wanted = keys_of(memory, there[0], range(int(numbers[0]), int(numbers[-1]) + 1))
                assert torch.equal(keys, wanted), (memory, numbers)
                found += len(numbers)
        assert log.verify() == found
    return found


def make(folder: Path) -> None:
    """An empty log, made in a process of its own."""
    made = os.fork()
    if not made:
        KeyLog.create(folder, num_memories=MEMORIES, capacity=CAPACITY, dim=DIM).close()
        os._exit(0)
    assert os.waitpid(made, 0)[1] == 0


def kill(folder: Path, times: int) -> None:
    """Kills a writer `times` times and prints as JSON what was told and what was found."""
    draw = random.Random(0)
    acknowledged: dict[int, tuple[int, int]] = {}
    told = rows = 0
    make(folder)
    for turn in range(times):
        reading, writing = os.pipe()
        process = os.fork()
        if not process:
            os.close(reading)
            write(folder, writing, turn)
        os.close(writing)
        started = os.read(reading, 1)  # the first append is through: what follows is killed in the midst of work
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert started, "the writer ended by itself"
        text = started
        while part := os.read(reading, 1 << 16):
            text += part
        os.close(reading)
        for line in text.decode().splitlines():
            memory, generation, total = map(int, line.split())
            before = acknowledged.get(memory, (0, 0))
            rows += max(0, total - before[1]) if generation == before[0] else total
            acknowledged[memory] = (generation, total)
            told += 1
    found = check(folder, acknowledged)
    print(json.dumps({"kills": times, "changes": told, "rows_acknowledged": rows, "rows_alive": found, "rows_lost": 0}))


def append_many(folder: Path, memory: int, appends: int, tell: int) -> None:
    """Appends to a memory that others append to as well; tells how often it was refused."""
    refused = done = 0
    with KeyLog.open(folder) as log:
        while done < appends:
            total = log.state.totals[memory]
            try:
                log.append(keys_of(memory, 0, range(total, total + 5))[None], [memory], first=total)
                done += 1
            except WriteConflict:
                refused += 1
                log.refresh()
    os.write(tell, f"{refused}\n".encode())


def crowd(folder: Path, appends: int) -> None:
    """Four writers at once: two of memory 0, two of memory 1."""
    make(folder)
    reading, writing = os.pipe()
    processes = []
    for writer in range(4):
        process = os.fork()
        if not process:
            append_many(folder, writer % 2, appends, writing)
            os._exit(0)
        processes.append(process)
    os.close(writing)
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * 4
    refused = [int(line) for line in os.read(reading, 1 << 16).decode().split()]
    found = check(folder, dict.fromkeys(range(MEMORIES), (0, 2 * 5 * appends)))
    with KeyLog.open(folder) as log:
        assert log.totals.tolist() == [10 * appends] * 2
    print(json.dumps({"writers": 4, "appends": 4 * appends, "refused": sum(refused), "rows_alive": found}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kill": kill, "crowd": crowd}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
