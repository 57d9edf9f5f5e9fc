"""One backend driven through a runbook: inserts and searches timed, every search judged against its own ground truth.

Letters: Q queries, D dimension, K neighbours, C capacity.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.model.ann_benchmarks import ROWS_AT_ONCE
from recollect.model.distances import METRIC_OF_DISTANCE, pair_distances

from .noise import reference_operation_ms
from .row_process import OnProgress
from .runbook import FifoStep
from .runbook_data import StreamData, write_ground_truth

TRUE_NEIGHBORS = 100
"""That a ground-truth file holds, as the track's do."""


@dataclass(frozen=True)
class Followed:
    """What a memory did at one step.

    Attributes:
        step: the step.
        call_seconds: of each append of an insert, of each batch of a search; empty otherwise.
        reference_ms: the reference operation before a search; None otherwise.
        found: (Q, k) numbers of keys, -1 where missing; None but for a search.
    """

    step: FifoStep
    call_seconds: tuple[float, ...] = ()
    reference_ms: float | None = None
    found: NDArray[np.int64] | None = None


def follow(
    steps: Sequence[FifoStep],
    data: StreamData,
    backend: MemoryBackend,
    k: int,
    *,
    batch_size: int = 0,
    append_size: int = 0,
    tell: OnProgress,
) -> Iterator[Followed]:
    """Drives a backend of one memory through a runbook; deletes take place by themselves, as the oldest keys go.

    Args:
        batch_size: queries searched at once; 0 is all.
        append_size: keys appended at once; 0 is all of a step, as far as memory allows.
        tell: is told how many of how many steps are done.
    """
    numbers = np.full(backend.capacity, -1, dtype=np.int64)
    queries = torch.from_numpy(data.test()).to(backend.device)
    batches = queries.split(batch_size or len(queries))
    for place, step in enumerate(steps, start=1):
        if step.operation == "insert":
            seconds = []
            part = min(append_size or ROWS_AT_ONCE, ROWS_AT_ONCE)
            for start in range(step.start, step.end, part):
                stop = min(start + part, step.end)
                keys = torch.from_numpy(data.train(start, stop))[None].to(backend.device)
                clock = _now(backend)
                slots = backend.add(keys)[0]
                seconds.append(_now(backend) - clock)
                kept = slots.cpu().numpy()
                numbers[kept[kept >= 0]] = np.arange(start, stop)[kept >= 0]
            yield Followed(step, tuple(seconds))
        elif step.operation == "search":
            reference, seconds, parts = reference_operation_ms(), [], []
            for batch in batches:
                clock = _now(backend)
                result = backend.search(batch[None], k)
                seconds.append(_now(backend) - clock)
                parts.append(result.slots[0].cpu().numpy())
            answers = np.concatenate(parts)
            yield Followed(step, tuple(seconds), reference, np.where(answers >= 0, numbers[answers], -1))
        else:
            if step.operation == "reset":
                backend.reset()
            yield Followed(step)
        tell(f"replaying with {backend.spec}", place, len(steps))


def truth_path(folder: str | Path, step: int) -> Path:
    """The ground truth of a search, called as the track calls it."""
    return Path(folder) / f"step{step}.gt{TRUE_NEIGHBORS}"


def compute_ground_truth(
    steps: Sequence[FifoStep], capacity: int, data: StreamData, folder: str | Path, *, device: str, tell: OnProgress
) -> None:
    """Writes the true neighbours at every search into a folder, by exact search; those that are there are kept.

    Distances are squared for euclidean data, as the track's are, and minus the inner product for `ip`.
    """
    missing = {step.number for step in steps if step.operation == "search" and not _is_there(folder, step)}
    if not missing:
        return
    exact = make_backend(
        "exact", num_memories=1, capacity=capacity, dim=data.dimension, metric=data.metric, device=device
    )
    queries = data.test()
    # A search whose truth is there need not be made again.
    wanted = [step for step in steps if step.operation != "search" or step.number in missing]
    shown: OnProgress = lambda what, done, total: tell("true neighbours", done, total)  # noqa: E731
    with exact:
        for done in follow(wanted, data, exact, TRUE_NEIGHBORS, batch_size=ROWS_AT_ONCE // 16, tell=shown):
            if done.found is None:
                continue
            found = done.found[:, : min(TRUE_NEIGHBORS, done.step.alive_keys)]
            distances = pair_distances(data.distance, queries, found, _alive(data, done.step))
            # Exact search computes in float32; the order is that of float64.
            order = np.argsort(distances, axis=1, kind="stable")
            found, distances = np.take_along_axis(found, order, axis=1), np.take_along_axis(distances, order, axis=1)
            if METRIC_OF_DISTANCE[data.distance] == "l2":
                distances = distances**2
            write_ground_truth(truth_path(folder, done.step.number), found, distances)


def _is_there(folder: str | Path, step: FifoStep) -> bool:
    return truth_path(folder, step.number).is_file()


def _alive(data: StreamData, step: FifoStep) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for first, last in step.alive:
        for start in range(first, last, ROWS_AT_ONCE):
            yield start, data.train(start, min(start + ROWS_AT_ONCE, last))


def _now(backend: MemoryBackend) -> float:
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)
    return time.perf_counter()
