"""Measures what spreading a memory over processes costs: `recollect plan --measure-cluster`.

Shards are small here, so that their own work is little; it is timed beside them in this process, in turns, and taken
off. Letters as in `answer`; M memories, S shards.
"""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.memory_backends.registry import check_available

from ..environment import usable_cores
from ..noise import REFERENCE, describe_reference, interleave
from .amounts import PlanError
from .cluster_bytes import FLOAT_BYTES, moved_by_step
from .cluster_costs import CallPoint, ClusterCosts, Recovered, conditions
from .measuring import threads_set

ENGINE = "ray"
SHARD_KEYS = 256
"""Of each memory in a shard."""
ROUNDS = 24
APPENDS = 32
"""Appends in a row, of which each takes its share: they are sent and not waited for."""
WORKING_KEYS = 65_536
"""Of the shard whose process' main memory is looked at: enough for whatever a search of many keys loads."""
RECOVERED_KEYS = 200_000
RECOVERED_DIM = 64
DEADLINE_SECONDS = 120.0
OnPoint = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Shape:
    """Of a call: S, M, queries or new keys of each memory, D, neighbours."""

    shards: int
    memories: int = 1
    count: int = 512
    dim: int = 64
    k: int = 32


SHAPES = (
    Shape(1),
    Shape(2),
    Shape(4),
    Shape(2, count=16),
    Shape(4, count=16, k=1),
    Shape(2, count=2048),
    Shape(2, dim=256),
    Shape(2, k=128),
    Shape(2, memories=8),
    Shape(1, memories=8, count=1024),
)


def draw(shape: Shape, count: int, seed: int) -> Tensor:
    """(M, count, D)."""
    return torch.randn(shape.memories, count, shape.dim, generator=torch.Generator().manual_seed(seed))


def measure_cluster(
    path: Path, *, threads: int = 1, rounds: int = ROUNDS, shapes: tuple[Shape, ...] = SHAPES,
    recovered_keys: int = RECOVERED_KEYS, on_point: OnPoint | None = None,
) -> ClusterCosts:  # fmt: skip
    """Takes all measurements on Ray embedded in this machine, and writes them.

    Args:
        path: of the file.
        threads: of each shard and of this process.
        rounds: searches of each shape.
        shapes: of the calls.
        recovered_keys: of the memory whose shard is killed.
        on_point: progress.

    Raises:
        BackendUnavailable: Ray is not installed.
        PlanError: a shard that was killed did not come back.
    """
    check_available(ENGINE)
    total = 2 * len(shapes) + 1
    points: list[CallPoint] = []

    def tell(what: str) -> None:
        if on_point is not None:
            on_point(len(points), total, what)

    # One memory stays throughout, so that Ray and the processes of the shards do.
    with threads_set(threads), _sharded(Shape(max(shape.shards for shape in shapes)), SHARD_KEYS):
        process_bytes = _process_bytes()  # first, while the processes are new
        for shape in shapes:
            points.append(_search_point(shape, rounds))
            tell(f"search: {points[-1].beyond_ms:.2f} ms beyond a shard's own, {shape}")
            points.append(_append_point(shape, rounds))
            tell(f"append: {points[-1].beyond_ms:.2f} ms beyond a shard's own, {shape}")
        recovered = _recovered(recovered_keys)
    costs = ClusterCosts(
        **conditions(threads),
        process_bytes=process_bytes,
        recovered=recovered,
        points=points,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    costs.save(path)
    if on_point is not None:
        on_point(total, total, f"a killed shard was back after {recovered.away_seconds:.1f} s")
    return costs


def _sharded(shape: Shape, keys: int) -> MemoryBackend:
    spec = f"{ENGINE}:shards={shape.shards},deadline_seconds={DEADLINE_SECONDS}"
    return make_backend(spec, num_memories=shape.memories, capacity=keys, dim=shape.dim)


def _alone(shape: Shape) -> MemoryBackend:
    """What one shard holds."""
    memory = make_backend("exact", num_memories=shape.memories, capacity=SHARD_KEYS, dim=shape.dim)
    memory.add(draw(shape, SHARD_KEYS, 0))
    return memory


def _waves(shape: Shape) -> int:
    """How often a core has to do a shard's work, where there are fewer cores than shards."""
    return -(-shape.shards // usable_cores())


def _search_point(shape: Shape, rounds: int) -> CallPoint:
    keys = SHARD_KEYS * shape.shards
    queries = draw(shape, shape.count, 1)
    with _sharded(shape, keys) as sharded, _alone(shape) as alone:
        sharded.add(draw(shape, keys, 0))
        calls = {"sharded": lambda: sharded.search(queries, shape.k), "alone": lambda: alone.search(queries, shape.k)}
        for call in calls.values():
            call()
        times = interleave(calls, rounds=rounds)
    moved = moved_by_step(
        memories=shape.memories,
        keys=keys,
        dim=shape.dim,
        queries=shape.count,
        appended=0,
        k=shape.k,
        shards=shape.shards,
        machines=1,
    )
    return _point("search", shape, times, each=moved.queries, once=moved.answers, k=shape.k)


def _append_point(shape: Shape, rounds: int) -> CallPoint:
    keys = SHARD_KEYS * shape.shards
    new, share = draw(shape, shape.count, 2), draw(shape, max(1, shape.count // shape.shards), 2)
    last = draw(shape, 1, 3)
    with _sharded(shape, keys) as sharded, _alone(shape) as alone:
        sharded.add(draw(shape, keys, 0))

        def append(memory: MemoryBackend, some: Tensor) -> Callable[[], Any]:
            def call() -> None:
                for _ in range(APPENDS):
                    memory.add(some)
                memory.search(last, 1)  # which waits for all of them

            return call

        calls = {"sharded": append(sharded, new), "alone": append(alone, share)}
        for call in calls.values():
            call()
        times = interleave(calls, rounds=max(3, rounds // 4))
    size = shape.memories * shape.count * shape.dim * FLOAT_BYTES
    each_call = {name: [milliseconds / APPENDS for milliseconds in of] for name, of in times.items()}
    each_call[REFERENCE] = times[REFERENCE]
    return _point("append", shape, each_call, each=0, once=size, k=0)


def _point(kind: str, shape: Shape, times: dict[str, list[float]], *, each: int, once: int, k: int) -> CallPoint:
    return CallPoint(
        kind=kind,
        shards=shape.shards,
        memories=shape.memories,
        count=shape.count,
        dim=shape.dim,
        k=k,
        each=each,
        once=once,
        sharded_ms=float(np.median(times["sharded"])),
        alone_ms=float(np.median(times["alone"])) * _waves(shape),
        noisy=describe_reference(times[REFERENCE]).noisy,
    )


def _process_bytes() -> int:
    """Main memory of a shard's process at work, less the keys that it holds."""
    shape = Shape(1)
    with _sharded(shape, WORKING_KEYS) as memory:
        memory.add(draw(shape, WORKING_KEYS, 0))
        for seed in range(4):
            memory.search(draw(shape, shape.count, seed), shape.k)
            memory.add(draw(shape, shape.count, seed))
        memory.search(draw(shape, 1, 1), 1)
        held = WORKING_KEYS * shape.dim * FLOAT_BYTES
        return int(psutil.Process(process_of(memory, 0)).memory_full_info().uss) - held


def _recovered(keys: int) -> Recovered:
    """What happens when the process of one shard of two is killed."""
    shape = Shape(2, dim=RECOVERED_DIM)
    queries = draw(shape, 8, 1)
    with _sharded(shape, keys) as memory:
        for start in range(0, keys, 8192):
            memory.add(draw(shape, min(8192, keys - start), start))
        memory.wait()
        before = after = memory.search(queries, 8)
        os.kill(process_of(memory, 0), signal.SIGKILL)
        # A search that comes before the process has ended is still answered by it.
        until = time.monotonic() + DEADLINE_SECONDS
        while not memory.recoveries and time.monotonic() < until:  # type: ignore[attr-defined]
            after = memory.search(queries, 8)
        if not memory.recoveries:  # type: ignore[attr-defined]
            raise PlanError(f"a killed shard was not noticed within {DEADLINE_SECONDS:.0f} s: did it run elsewhere?")
        back = memory.recoveries[0]  # type: ignore[attr-defined]
        if not torch.equal(before.slots, after.slots):
            raise PlanError("a shard that was killed came back with other keys: that is an error of recollect")
        return Recovered(
            keys=back.keys_refilled,
            dim=RECOVERED_DIM,
            detection_seconds=back.detection_seconds,
            away_seconds=back.away_seconds,
            refill_seconds=back.refill_seconds,
            lost=back.keys_lost,
        )


def process_of(memory: Any, shard: int) -> int:
    """The process that holds a shard."""
    import ray

    return int(ray.get(memory.shards.links[shard].host.actor.where.remote())["pid"])
