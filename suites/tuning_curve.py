"""The curve of one build on the workload of a text: every search option judged at every step, timed when full.

The recorded keys and queries of the first memory layer are replayed in the order in which the model reads: at each step
every setting searches the same index and is judged against the exact answers, and then the step's keys are appended.
Times are taken at steps where the memories are full, in rounds beside exact search over the same keys.

Letters: S segments, B batch rows, H heads, M memories (M = B*H), T tokens, C capacity.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.model.recording import Recording
from recollect.reports.crossing import SizedRatio, with_appends

from .crossover_measure import warm_up
from .curve_settings import JUMP, Settings
from .curves import CurveMeter, CurvePoint, Truth, scout
from .oracle import Oracle
from .tuning_choice import Figure, Point, weighted_interval
from .tuning_options import Cost
from .workload import Workload

FULL = 0.95
"""Times are taken while the memories are filled to this share of the fullest they get."""

TIMED_SEGMENTS, ROUNDS = 6, 3
"""Segments at which times are taken, and how often for each setting."""

RUN = 4
"""Consecutive segments of a row that make one block for intervals: neighbours depend on each other."""

CROWDED = 12
"""A grid of more settings than this is refined around the target alone."""

OnSegment = Callable[[int, int], None]


class Replayed:
    """A workload replayed at one memory size.

    Args:
        workload: prepared for the memory size.
        recording: what its first memory layer asks and appends.
        memory_size: C.
    """

    def __init__(self, workload: Workload, recording: Recording, memory_size: int) -> None:
        self.workload, self.recording, self.memory_size = workload, recording, memory_size
        self.oracle: Oracle = workload.oracle(memory_size)
        self.rows = workload.text.rows
        self._is_text = workload.text.is_text.repeat_interleave(recording.heads, dim=1)  # (S, M, T)
        self.scale = self.oracle.scale.repeat(self.rows)
        live = self.oracle.live.double().mean(1)
        reading = (workload.text.lengths > 0).sum(1)
        steady = (live >= FULL * live.max()) & (reading == reading.max()) & (live > 0)
        self.steady: list[int] = steady.nonzero().flatten().tolist()
        if not self.steady:
            raise ValueError("no segment is ever searched: every document is one segment long; give longer documents")
        places = np.linspace(0, len(self.steady) - 1, min(TIMED_SEGMENTS, len(self.steady))).round().astype(int)
        self.timed = {self.steady[place] for place in places}

    def truth(self, segment: int) -> Truth:
        """The exact answers to a segment's queries."""
        oracle = self.oracle
        return Truth(
            oracle.threshold[segment],
            oracle.live[segment],
            oracle.log_sum[segment],
            self.scale,
            self._is_text[segment],
        )

    def make(self, spec: str) -> MemoryBackend:
        """An empty backend for the first memory layer."""
        config, settings = self.workload.model.config, self.workload.settings
        return make_backend(
            spec,
            num_memories=self.recording.num_memories,
            capacity=self.memory_size,
            dim=self.recording.dim,
            device=settings.device,
            seed=settings.seed + config.memory_layers[0],
        )

    def begin(self, segment: int, backends: Sequence[MemoryBackend]) -> Tensor:
        """Empties what starts a document with this segment; returns its queries (M, T, D)."""
        starts = self.recording.document_starts[segment].repeat_interleave(self.recording.heads)
        starting = starts.nonzero().flatten()
        for backend in backends:
            if len(starting):
                backend.reset(starting)
        return self.recording.queries[segment].to(backends[0].device)

    def append(self, segment: int, backend: MemoryBackend) -> float:
        """Appends a segment's keys; returns the seconds that it took."""
        keys = self.recording.keys[segment].to(backend.device)
        start = time.perf_counter()
        backend.add(keys)
        return time.perf_counter() - start

    def entries(self) -> list[tuple[int, float]]:
        """For each entry of a point's `blocks`, in the order in which `CurveMeter` makes them: the block that it
        belongs to for intervals, and the softmax mass of the true k nearest keys."""
        found = []
        for segment in range(self.workload.text.segments):
            counted = (self._is_text[segment] & (self.oracle.live[segment] > 0)[:, None]).view(self.rows, -1)
            mass = self.oracle.top_mass[segment].reshape(self.rows, -1)
            for row in counted.any(1).nonzero().flatten().tolist():
                held = float(mass[row][counted[row]].double().mean())
                found.append((row * self.workload.text.segments + segment // RUN, held))
        return found

    def mass_of_best(self, segment: int) -> float:
        """The softmax mass of the true k nearest keys at one segment."""
        counted = self._is_text[segment] & (self.oracle.live[segment] > 0)[:, None]
        return float(self.oracle.top_mass[segment][counted].double().mean())


@torch.no_grad()
def scouted(
    replayed: Replayed, spec: str, settings: Sequence[Settings], targets: Sequence[tuple[str, float]]
) -> list[Settings]:
    """The settings, refined at the first segment with full memories."""
    if len(settings) < 2:
        return list(settings)
    last = replayed.steady[0]
    with replayed.make(spec) as backend:
        for segment in range(last):
            replayed.begin(segment, [backend])
            replayed.append(segment, backend)
        queries = replayed.begin(last, [backend])
        backend.wait()
        # A point's mass is a share of what can be found; a single search is judged by the whole softmax.
        targets = [
            (name, value * replayed.mass_of_best(last) if name == "softmax_mass" else value) for name, value in targets
        ]
        jump = JUMP if len(settings) <= CROWDED else 1.0
        meter = CurveMeter(replayed.workload.k)
        return scout(meter, backend, queries, replayed.truth(last), settings, jump=jump, targets=targets)


@torch.no_grad()
def measure_build(
    replayed: Replayed,
    spec: str,
    settings: Sequence[Settings],
    *,
    cost: Cost,
    on_segment: OnSegment | None = None,
) -> list[Point]:
    """A point for every setting of one build, cheapest first.

    Args:
        replayed: what is searched.
        spec: registry string of the build.
        settings: search options.
        cost: what a point's cost is of.
        on_segment: is told how many of how many segments are done.

    Raises:
        MemoryBackendError: the backend refuses the spec or fails.
    """
    workload = replayed.workload
    device, segments = workload.settings.device, workload.text.segments
    warm_up(spec, replayed.recording.dim, workload.text.segment_length, workload.k, device)
    meter = CurveMeter(workload.k, rounds=ROUNDS, rows=replayed.rows)
    seconds = {"index": 0.0, "exact": 0.0}
    with replayed.make(spec) as backend, replayed.make("exact") as exact:
        for segment in range(segments):
            queries = replayed.begin(segment, [backend, exact])
            if int(backend.lengths.max()):
                timed = segment in replayed.timed
                if timed:
                    start = time.perf_counter()
                    backend.wait()
                    seconds["index"] += time.perf_counter() - start
                beside = exact if timed else None
                meter.measure(backend, queries, replayed.truth(segment), settings, exact=beside, timed=timed)
            seconds["index"] += replayed.append(segment, backend)
            seconds["exact"] += replayed.append(segment, exact)
            if on_segment is not None:
                on_segment(segment + 1, segments)
        start = time.perf_counter()
        backend.wait()
        seconds["index"] += time.perf_counter() - start
    per_segment = {name: 1000 * value / segments for name, value in seconds.items()}
    entries = replayed.entries()
    points = [_point(point, entries, per_segment, cost) for point in meter.points()]
    return sorted(points, key=lambda point: point.cost)


def _point(found: CurvePoint, entries: Sequence[tuple[int, float]], append_ms: dict[str, float], cost: Cost) -> Point:
    assert found.exact_ratio is not None
    assert found.exact_ratio_low is not None
    assert found.exact_ratio_high is not None
    recall, mass, weights = (np.asarray(column, dtype=np.float64) for column in zip(*found.blocks, strict=True))
    labels, best = (np.asarray(column) for column in zip(*entries, strict=True))
    search = SizedRatio(found.memory_size, found.exact_ratio, found.exact_ratio_low, found.exact_ratio_high)
    exact_ms = found.search_ms / found.exact_ratio
    whole = with_appends(search, exact_ms, append_ms["exact"], append_ms["index"])
    figures: dict[str, Any] = {
        "recall": weighted_interval(recall, weights, labels),
        "mass": weighted_interval(mass / best, weights * best, labels),
    }
    return Point(
        spec=found.spec,
        cost=whole.value if cost == "step" else search.value,
        search_ratio=Figure(search.value, search.low, search.high),
        search_ms=found.search_ms,
        append_ms=append_ms["index"],
        noisy=found.noisy,
        **figures,
    )
