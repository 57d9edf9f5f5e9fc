"""A process that is killed while indexes are built leaves the last memory that it saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recollect.memory_backends import load_backend

pytest.importorskip("hnswlib")
KILLS = 3

WORK = """
import os, random, signal, sys, time
import torch
from recollect.memory_backends import make_backend

torch.set_num_threads(1)
folder, kills = sys.argv[1], int(sys.argv[2])
for kill in range(kills):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        # 1024 keys to a run and 4096 to a merged one: something is being built all the time.
        memory = make_backend(
            "hnswlib:run_size=1024,part_size=4096,fan_out=4,M=4,ef_construction=20",
            num_memories=1, capacity=10_000, dim=8,
        )
        number = 0
        while True:
            keys = torch.arange(number, number + 256, dtype=torch.float32)[None, :, None].expand(1, 256, 8)
            memory.add(keys)
            number += 256
            if number % 1024 == 256:
                memory.save(folder)
                if memory.stats().pending_builds:
                    os.write(told, b"!")
    os.close(told)
    os.read(ready, 1)  # saved while builds were pending
    time.sleep(random.Random(kill).uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no forks and no SIGKILL here")
def test_a_process_killed_while_it_builds_leaves_the_last_saved_memory(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with subprocess.Popen(
        [sys.executable, "-c", WORK, str(folder), str(KILLS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(KILLS):
            assert process.stdout.readline() == "killed\n"
            with load_backend(folder) as memory:
                total = int(memory.ring.totals[0])
                assert total % 1024 == 256
                length = int(memory.lengths[0])
                assert length == min(total, 10_000)
                slots = torch.arange(total - length, total) % 10_000
                keys = memory.gather_keys(slots[None, None])[0, 0, :, 0]
                assert torch.equal(keys, torch.arange(total - length, total, dtype=torch.float32))
                newest = memory.search(torch.ones(1, 1, 8), 1)
                assert newest.slots.item() == (total - 1) % 10_000
            process.stdin.write("go on\n")
            process.stdin.flush()
        assert process.wait(60) == 0
