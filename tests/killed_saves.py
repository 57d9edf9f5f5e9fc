"""Run in a process of its own by test_storage.py: saves that are killed, and saves on a full disk.

    python killed_saves.py kill FOLDER SPEC TIMES
    python killed_saves.py full FOLDER SPEC BYTES

It forks, which a process is safe to do only before a library has started threads in it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from recollect.memory_backends import MemoryBackend, load_backend, make_backend
from recollect.memory_backends.errors import DiskFull

LENGTHS = (300, 700)
"""Keys of the two states that are saved in turn."""


def state(spec: str, keys: int) -> MemoryBackend:
    backend = make_backend(spec, num_memories=3, capacity=1000, dim=16)
    backend.add(vectors(3, keys, 16))
    return backend


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def kill(folder: Path, spec: str, times: int) -> None:
    """Kills a saving process at random moments, each time on top of what the kill before left."""
    draw = random.Random(1)
    states = {keys: state(spec, keys) for keys in LENGTHS}
    answers = {keys: one.search(vectors(3, 5, 16), 3).slots.tolist() for keys, one in states.items()}
    states[LENGTHS[0]].save(folder)
    left = 0
    for _ in range(times):
        process = os.fork()
        if not process:
            while True:
                for one in states.values():
                    one.save(folder)
        time.sleep(draw.uniform(0.001, 0.06))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        left += len(list(folder.parent.iterdir())) > 1
        loaded = load_backend(folder)
        lengths = loaded.lengths.tolist()
        assert lengths in ([LENGTHS[0]] * 3, [LENGTHS[1]] * 3), lengths
        assert loaded.search(vectors(3, 5, 16), 3).slots.tolist() == answers[lengths[0]]
    assert left, "no kill fell into a save: nothing was tried"
    states[LENGTHS[0]].save(folder)
    # What the killed ones left half written went with this save.
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]


def full(folder: Path, spec: str, most: int) -> None:
    """Saves where no file may grow beyond `most` bytes, which is told as a full disk is."""
    import resource

    state(spec, LENGTHS[0]).save(folder)
    larger = state(spec, LENGTHS[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        larger.save(folder)
    except DiskFull as error:
        told = str(error)
    assert str(folder) in told, told
    assert "free some space" in told, told
    assert load_backend(folder).lengths.tolist() == [LENGTHS[0]] * 3
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kill": kill, "full": full}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
