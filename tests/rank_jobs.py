"""Jobs of a few gloo processes on this machine, for tests: `run(2, target, ...)` gives what each rank returned.

A rank is forked from a server that has torch and the memories imported already, so a job starts in a blink. What a rank
returns comes by a file, since a rank may be killed at any moment; one that failed raises here with its traceback.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["rank_jobs", "recollect.memory_backends.implementations.exact_ranks"])
GONE = "gone"
"""Stands for the result of a rank that left none: it was killed, or stopped."""
POLL_SECONDS = 0.02


def _child(target: Callable[..., Any], rank: int, size: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        result = target(rank, size, *arguments)
    except BaseException:
        result = traceback.format_exc()
        (folder / f"failed{rank}").touch()
    torch.save(result, folder / f"part{rank}")
    (folder / f"part{rank}").rename(folder / f"result{rank}")


def run(
    size: int, target: Callable[..., Any], *arguments: Any, seconds: float = 120, without: int | None = None
) -> list:
    """What `target(rank, size, *arguments)` returned on each of `size` ranks.

    Args:
        seconds: after which all are killed and the test fails.
        without: a rank that is not waited for, since it will end or stop by itself.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            _CONTEXT.Process(target=_child, args=(target, rank, size, folder, arguments), daemon=True)
            for rank in range(size)
        ]
        try:
            for process in ranks:
                process.start()
            awaited = [rank for rank in range(size) if rank != without]
            until = time.monotonic() + seconds
            while not all((folder / f"result{rank}").exists() for rank in awaited):
                if any((folder / f"failed{rank}").exists() and (folder / f"result{rank}").exists() for rank in awaited):
                    break
                assert time.monotonic() < until, f"the ranks did not end within {seconds} s"
                dead = [rank for rank in awaited if not ranks[rank].is_alive()]
                assert all((folder / f"result{rank}").exists() for rank in dead), f"ranks {dead} died"
                time.sleep(POLL_SECONDS)
            for rank in awaited:
                if (folder / f"failed{rank}").exists() and (folder / f"result{rank}").exists():
                    raise AssertionError(f"rank {rank}: {torch.load(folder / f'result{rank}')}")
            return [
                torch.load(folder / f"result{rank}", weights_only=False)
                if (folder / f"result{rank}").exists()
                else GONE
                for rank in range(size)
            ]
        finally:
            for process in ranks:
                process.kill()
                process.join()
