"""Takes the points of a calibration: a full memory of each size turns over once, searched on the way.

The keys are unit vectors that drift from topic to topic as a text's do, the queries lie near keys; what an index finds
among them is kept as `recall` beside what it cost.

Letters: n keys, D dimension, T keys appended and Q queries searched at a step (T = Q), K neighbours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import BackendUnavailable, MemoryBackend, list_backends, make_backend
from recollect.memory_backends.registry import canonical_spec, capabilities_of, check_available
from recollect.memory_backends.ring_search import search_ring

from ..environment import backend_digest, usable_cores
from ..noise import Clock, clock_of, describe_reference, reference_operation_ms
from .amounts import PlanError
from .calibration import Calibration, Point, read_calibration

SIZES = tuple(4096 * 2**step for step in range(7))
"""4096 to 262144 keys."""

DIM = 64
OTHER_DIM = 128
OTHER_DIM_SIZES = (8192, 32768)
"""Sizes measured at a second dimension as well, for how costs grow with it."""

QUERIES = 512
K = 32

PATIENCE_SECONDS = 40.0
"""A backend that is expected to take longer for the next size is not taken further."""

PHASES = 6
"""Times in a turnover at which a search is timed."""

REPEATS = 2
"""Searches at each of them, of which the quicker counts: a disturbance only ever adds."""

RETRIES = 2

DISTURBED = 1.25
"""A point is taken again if the reference operation took so many times as long beside it as beside the quickest."""

NOT_PLANNED = ("degraded",)
"""Backends that nobody would run at scale: degraded is exact search made worse."""

IDLE_SECONDS = 0.0005
"""Between two looks at whether the background is done."""

TOPICS = 256
TOPIC_KEYS = 48
"""Keys in a row that share a topic."""

TOLERANCE = 1e-5

OnPoint = Callable[[int, int, str], None]
"""Is told how many of how many points are done, and what was done."""


@dataclass(frozen=True)
class Effort:
    """What is measured.

    Attributes:
        specs: canonical registry strings.
        sizes: n, rising.
        dim: D of all sizes.
        other: (n, D) that are measured besides.
        queries, k: Q and K.
        patience: seconds that the next size may be expected to take.
        retries: times that points are taken again at which the machine was busy.
    """

    specs: tuple[str, ...]
    sizes: tuple[int, ...] = SIZES
    dim: int = DIM
    other: tuple[tuple[int, int], ...] = tuple((size, OTHER_DIM) for size in OTHER_DIM_SIZES)
    queries: int = QUERIES
    k: int = K
    patience: float = PATIENCE_SECONDS
    retries: int = RETRIES

    def places(self) -> list[tuple[int, int]]:
        """(n, D), smallest work first."""
        return sorted(
            {*((size, self.dim) for size in self.sizes), *self.other}, key=lambda place: (place[0] * place[1], place)
        )


def default_specs(device: str = "cpu") -> tuple[str, ...]:
    """Every backend whose library is here and that can live on the device, by its default options; exact first."""
    found = []
    for info in list_backends():
        spec = canonical_spec(info.name)
        left_out = info.one_shared or info.name in NOT_PLANNED
        if left_out or torch.device(device).type not in capabilities_of(spec).devices:
            continue
        with contextlib.suppress(BackendUnavailable):
            check_available(spec)
            found.append(spec)
    return tuple(sorted(found, key=lambda spec: (spec != "exact", spec)))


class KeyStream:
    """Keys of a text that drifts from topic to topic, the same for the same seed; nothing of it is kept."""

    def __init__(self, dim: int, seed: int) -> None:
        self.dim, self.seed = dim, seed
        self.topics = torch.randn(TOPICS, dim, generator=torch.Generator().manual_seed(seed))

    def keys(self, first: int, count: int) -> Tensor:
        """Keys number first to first + count - 1: (1, count, D) of unit length."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + 1)
        topics = (torch.arange(first, first + count) // TOPIC_KEYS * 2_654_435_761 % 2**32) % TOPICS
        drawn = self.topics[topics] + torch.randn(count, self.dim, generator=generator)
        return torch.nn.functional.normalize(drawn, dim=-1)[None]

    def queries(self, first: int, count: int) -> Tensor:
        """(1, count, D) near the keys of the same numbers, and of another length."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + 500_009)
        noise = torch.randn(1, count, self.dim, generator=generator) / self.dim**0.5
        return 3 * (self.keys(first, count) + 0.5 * noise)


def measure_point(spec: str, keys: int, dim: int, *, queries: int, k: int, device: str, clock: Clock) -> Point:
    """Fills a memory, turns it over once, and says what that cost.

    Raises:
        MemoryBackendError: the backend refuses the size, or fails.
    """
    stream, step = KeyStream(dim, 0), min(queries, keys)
    now = _clock(clock, device)
    with make_backend(spec, num_memories=1, capacity=keys, dim=dim, device=device) as memory:
        _warm_up(spec, dim, queries, k, device)
        references = [reference_operation_ms(clock)]
        build = sum(whole for _, whole in _appends(memory, stream, 0, keys, step, now))
        appends, searches = [], []
        chunks = [(start, min(step, 2 * keys - start)) for start in range(keys, 2 * keys, step)]
        phases = {len(chunks) * (2 * phase + 1) // (2 * PHASES) for phase in range(PHASES)}
        for place, (start, count) in enumerate(chunks):
            appends += _appends(memory, stream, start, count, step, now)
            if place in phases:
                asked = stream.queries(start, queries).to(device)
                searches.append(min(_timed(lambda asked=asked: memory.search(asked, k), now) for _ in range(REPEATS)))  # type: ignore[misc]
                references.append(reference_operation_ms(clock))
        return Point(
            spec=memory.spec,
            keys=keys,
            dim=dim,
            queries=queries,
            k=k,
            build_seconds=build,
            append_us=1e6 * sum(whole for _, whole in appends) / keys,
            longest_append_ms=1e3 * max(alone for alone, _ in appends),
            search_ms=1e3 * sum(searches) / len(searches),
            recall=_recall(memory, stream.queries(2 * keys - queries, queries), k),
            index_bytes=memory.stats().index_bytes,
            reference_ms=describe_reference(references).p50_ms,
            noisy=describe_reference(references).noisy,
            code=backend_digest(spec),
        )


def _appends(
    memory: MemoryBackend, stream: KeyStream, first: int, count: int, step: int, now: Callable[[], float]
) -> list[tuple[float, float]]:
    """Of each append of `step` keys the seconds that it took, and with what it began in the background."""
    taken = []
    for start in range(first, first + count, step):
        keys = stream.keys(start, min(step, first + count - start)).to(memory.device)
        begun = now()
        memory.add(keys)
        alone = now() - begun
        # Not wait(): that takes in what a stream would take in later.
        while memory.stats().pending_builds:
            time.sleep(IDLE_SECONDS)
        taken.append((alone, now() - begun))
    return taken


def _timed(call: Callable[[], Any], now: Callable[[], float]) -> float:
    start = now()
    call()
    return now() - start


def _clock(clock: Clock, device: str) -> Callable[[], float]:
    plain = clock_of(clock)
    if torch.device(device).type != "cuda":
        return plain

    def when_done() -> float:
        torch.cuda.synchronize()
        return plain()

    return when_done


def _warm_up(spec: str, dim: int, queries: int, k: int, device: str) -> None:
    """What a library compiles or starts at its first use, it does here."""
    stream = KeyStream(dim, 1)
    with make_backend(spec, num_memories=1, capacity=2048, dim=dim, device=device) as memory:
        memory.add(stream.keys(0, 2048))
        memory.wait()
        memory.search(stream.queries(0, queries).to(device), k)


def _recall(memory: MemoryBackend, queries: Tensor, k: int) -> float:
    """Share of the true k nearest keys that are found, judged by score."""
    asked = queries.to(memory.device)
    length = int(memory.lengths[0])
    truth, _ = search_ring(memory.ring, asked, min(k, length), [0], [length], memory.metric)
    found = memory.search(asked, k)
    rows = memory.gather_keys(found.slots)
    scores = torch.einsum("mqkd,mqd->mqk", rows.float(), asked.float())
    scores[found.slots < 0] = -torch.inf
    least = truth[..., -1:] - TOLERANCE * truth[..., -1:].abs().clamp(min=1.0)
    return float((scores >= least).sum() / truth.numel())


@contextlib.contextmanager
def threads_set(number: int) -> Iterator[None]:
    """Lets torch, and with it every library, use so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    effort: Effort,
    path: Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    clock: Clock = "wall",
    on_point: OnPoint | None = None,
) -> tuple[Calibration, list[str]]:
    """Takes the points that a calibration file lacks, and writes it after each of them.

    Args:
        effort: what to measure.
        path: of the file; points that it has of this machine, these libraries and this code are kept.
        threads: of torch and every library; None is the number of cores this process may use.
        device: where the memories live.
        clock: "wall", or "cpu" for the processor time of this process, on a busy machine and with one thread.
        on_point: progress.

    Returns:
        The calibration, and notes of what was left out and why.

    Raises:
        PlanError: there is nothing to measure.
        MemoryBackendError: a spec is wrong or its library missing.
    """
    specs = tuple(dict.fromkeys(map(canonical_spec, effort.specs)))
    if not specs or not effort.sizes:
        raise PlanError("there is nothing to measure: give at least one backend and three sizes")
    for spec in specs:
        check_available(spec)
    codes = {spec: backend_digest(spec) for spec in specs}
    fresh = Calibration.here(threads=threads or usable_cores(), device=device, clock=clock)
    notes: list[str] = []
    if path.is_file():
        known = read_calibration(path)
        if known.same_conditions(fresh):
            fresh.points = [point for point in known.points if codes.get(point.spec, point.code) == point.code]
        else:
            notes.append(f"{path} was of another machine, other libraries or threads, and is measured anew")
    have = {point.where for point in fresh.points}
    todo = [(spec, keys, dim) for keys, dim in effort.places() for spec in specs]

    def take(spec: str, keys: int, dim: int) -> str:
        point = measure_point(spec, keys, dim, queries=effort.queries, k=effort.k, device=device, clock=clock)
        former = [other for other in fresh.points if other.where == point.where]
        if not former or point.reference_ms < former[0].reference_ms:
            fresh.points = [other for other in fresh.points if other.where != point.where] + [point]
        fresh.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        fresh.save(path)
        return f": search {point.search_ms:.3g} ms, append {point.append_us:.3g} µs a key"

    with threads_set(fresh.threads):
        for done, (spec, keys, dim) in enumerate(todo, start=1):
            what = f"{spec}, {keys:,} keys of dimension {dim}"
            if _expected_seconds(fresh.of(spec), keys * dim) > effort.patience:
                notes.append(f"{what}: left out, since it would take more than {effort.patience:.0f} s")
            elif (spec, keys, dim, effort.queries, effort.k) not in have:
                what += take(spec, keys, dim)
            if on_point is not None:
                on_point(done, len(todo), what)
        for _ in range(effort.retries):
            again = [point for point in fresh.points if point.spec in codes and _was_disturbed(point, fresh)]
            for done, point in enumerate(again, start=1):
                what = f"again, the machine was busy: {point.spec}, {point.keys:,} keys of dimension {point.dim}"
                what += take(point.spec, point.keys, point.dim)
                if on_point is not None:
                    on_point(done, len(again), what)
    return fresh, notes


def _expected_seconds(points: Sequence[Point], work: int) -> float:
    """What n * D = `work` would take, from the largest point there is; 0 where there is none."""
    if not points:
        return 0.0
    largest = max(points, key=lambda point: point.keys * point.dim)
    searches = PHASES * REPEATS * largest.search_ms / 1e3
    seconds = largest.build_seconds + largest.append_us * largest.keys / 1e6 + searches
    return float(seconds * (work / (largest.keys * largest.dim)) ** 1.2)


def _was_disturbed(point: Point, calibration: Calibration) -> bool:
    """Whether the reference operation was much slower at a point than at its quickest."""
    return point.reference_ms > DISTURBED * min(other.reference_ms for other in calibration.points)


def without_larger(effort: Effort, largest: int) -> Effort:
    """The same with no size above `largest`, which is then measured itself.

    Raises:
        PlanError: that leaves fewer than three sizes.
    """
    sizes: Sequence[int] = sorted({*(size for size in effort.sizes if size < largest), largest})
    if len(sizes) < 3:
        raise PlanError(
            f"the largest size is {largest}: costs are measured from {SIZES[0]} keys on, take 16384 or more"
        )
    other = tuple((size, dim) for size, dim in effort.other if size <= largest)
    return dataclasses.replace(effort, sizes=tuple(sizes), other=other)
