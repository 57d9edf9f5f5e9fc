"""Measures cells: a causal evaluation pass with the backend watched, so that one pass gives every figure."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends import BackendUnavailable, MemoryBackend, MemoryStats, SearchResult, make_backend
from recollect.memory_backends.spec import parse_spec
from recollect.model.evaluation import Replay
from recollect.model.evaluation_types import EvaluationResult
from recollect.model.recording import ObservedBackend

from .cells import NO_MEMORY, Cell, CellError, Streaming
from .noise import flush_caches, reference_operation_ms, summarise
from .oracle import Judge
from .sharing import SharedBackend, build_key, search_options
from .workload import Workload

FULL = 0.95
"""Searches count for the search time while the memories are filled to this share of the fullest they get."""

STRETCHES = 12
"""Into so many stretches of turnover the streaming figures are cut."""

REFERENCES = 24
"""Segments beside whose search the reference operation is timed, spread likewise."""

COLD_SEARCHES = 3
"""Searches with flushed caches, spread over the segments whose searches count."""

WARM_UP_KEYS = 1024
"""Keys that a throw-away memory gets first, so that compilers and thread pools have started before time is taken."""

OnSegment = Callable[[int, int], None]
"""Is told how many of how many segments are done."""


def measure_cell(
    workload: Workload, spec: str, memory_size: int, *, fingerprint: str = "", on_segment: OnSegment | None = None
) -> tuple[Cell, EvaluationResult | None]:
    """Measures a spec at one memory size.

    Args:
        workload: prepared for this memory size.
        spec: canonical registry string, or 'none' for no memory.
        memory_size: C; 0 for no memory.
        fingerprint: of the settings, kept with the cell.
        on_segment: progress.

    Returns:
        The cell, and the evaluation with its per-token losses. A missing library gives a cell of status 'skipped' and
        no evaluation. Losses are the caller's to store.

    Raises:
        CellError: a figure is not finite or impossible.
        MemoryBackendError: the backend refuses the spec or fails.
    """
    ((cell, result),) = measure_group(workload, [spec], memory_size, fingerprint=fingerprint, on_segment=on_segment)
    return cell, result


def can_share(workload: Workload, specs: Sequence[str]) -> bool:
    """Whether `measure_group` can measure these specs together."""
    # Keys of a second memory layer depend on what the first one found: then each spec has keys of its own.
    one_layer = len(workload.model.config.memory_layers) == 1
    return len(specs) == 1 or (one_layer and len({build_key(spec) for spec in specs}) == 1)


def measure_group(
    workload: Workload,
    specs: Sequence[str],
    memory_size: int,
    *,
    fingerprint: str = "",
    on_segment: OnSegment | None = None,
) -> list[tuple[Cell, EvaluationResult | None]]:
    """Measures specs that differ in search options alone over one index; arguments and errors as `measure_cell`."""
    if not can_share(workload, specs):
        raise ValueError(f"specs {', '.join(specs)} cannot share an index")
    seed = workload.settings.seed
    blanks = [
        Cell(spec, _name(spec), memory_size, workload.k, "ok", seed=seed, fingerprint=fingerprint) for spec in specs
    ]
    watched: list[_Watched] = []
    made: list[MemoryBackend] = []
    try:
        if specs[0] != NO_MEMORY:
            made = _make_backends(workload, specs[0], memory_size)
            _warm_up(workload, specs[0], memory_size)
            watched = [_Watched(workload, spec, made, appends=spec == specs[-1]) for spec in specs]
        return _measure_blanks(workload, blanks, watched, on_segment)
    except BackendUnavailable as error:
        return [(dataclasses.replace(blank, status="skipped", reason=str(error)), None) for blank in blanks]
    finally:
        for backend in made:
            backend.close()


def _measure_blanks(
    workload: Workload, blanks: Sequence[Cell], watched: Sequence[_Watched], on_segment: OnSegment | None
) -> list[tuple[Cell, EvaluationResult | None]]:
    """Runs the evaluations side by side and fills in the cells."""
    start, steps = time.perf_counter(), workload.text.segments
    memories: list[Any] = [one.backends for one in watched] or [NO_MEMORY]
    runs = [Replay(workload.model, workload.trunk, backend=memory, k=workload.k) for memory in memories]
    for step in range(steps):
        for place, run in enumerate(runs):
            if watched:
                watched[place].prepare(step)
            run.step()
        if on_segment is not None:
            on_segment(step + 1, steps)
    cells: list[tuple[Cell, EvaluationResult | None]] = []
    for place, (blank, run) in enumerate(zip(blanks, runs, strict=True)):
        result = run.result()
        cell = dataclasses.replace(blank, perplexity=result.perplexity, accuracy=result.accuracy, tokens=result.tokens)
        if watched:
            cell = watched[place].figures(cell, appended=watched[-1].observed)
        cell = dataclasses.replace(cell, seconds=round((time.perf_counter() - start) / len(blanks), 3))
        cell.check()
        cells.append((cell, result))
    return cells


def _name(spec: str) -> str:
    return NO_MEMORY if spec == NO_MEMORY else parse_spec(spec)[0]


def _make_backends(workload: Workload, spec: str, memory_size: int) -> list[MemoryBackend]:
    """Empty backends, one for each memory layer."""
    config, settings = workload.model.config, workload.settings
    return [
        make_backend(
            spec,
            num_memories=workload.text.rows * config.heads,
            capacity=memory_size,
            dim=config.head_dim,
            device=settings.device,
            seed=settings.seed + layer,
        )
        for layer in config.memory_layers
    ]


def _warm_up(workload: Workload, spec: str, memory_size: int) -> None:
    """Fills and searches a throw-away memory, so that compilers and thread pools have started."""
    keys, dim = min(memory_size, WARM_UP_KEYS), workload.model.config.head_dim
    generator = torch.Generator().manual_seed(0)
    device, step = workload.settings.device, workload.text.segment_length
    with make_backend(spec, num_memories=1, capacity=keys, dim=dim, device=device, seed=0) as trial:
        for _ in range(0, keys + step, step):
            vectors = torch.nn.functional.normalize(torch.randn(1, step, dim, generator=generator), dim=-1)
            trial.search(vectors, workload.k)
            trial.add(vectors)


def spread(segments: Sequence[int], number: int) -> set[int]:
    """At most so many of the segments, evenly spread over them."""
    return {segments[round(place)] for place in np.linspace(0, len(segments) - 1, number)}


def steady_segments(workload: Workload, memory_size: int) -> tuple[Tensor, Tensor]:
    """(S,) bool twice: segments that all rows read, and among them those at which the memories are full.

    Raises:
        CellError: no segment is ever searched.
    """
    config, text = workload.model.config, workload.text
    reading = text.lengths > 0  # (S, B)
    by_row = workload.oracle(memory_size).live.view(text.segments, text.rows, config.heads)[:, :, 0].double()
    everyone = reading.sum(1) == int(reading.sum(1).max())
    fill = (by_row * reading).sum(1) / reading.sum(1).clamp(min=1)
    fullest = float(fill[everyone].max())
    if not fullest:
        raise CellError("no segment is ever searched: every document is one segment long; give longer documents")
    return everyone, everyone & (fill >= FULL * fullest)


class _Watched:
    """Backends for every memory layer, the first of them watched and judged for one spec."""

    def __init__(self, workload: Workload, spec: str, made: list[MemoryBackend], *, appends: bool) -> None:
        self.workload = workload
        self.made = made
        self.memory_size = made[0].capacity
        self.judge = Judge(workload.oracle(self.memory_size), workload.text.is_text)
        options = search_options(spec)
        self.observed = SharedBackend(made[0], options=options, appends=appends, on_search=self._on_search)
        self.backends: list[Any] = [self.observed, *made[1:]]
        self.stats: MemoryStats | None = None
        self.references: list[float] = []
        self.cold: list[float] = []
        self.everyone, self.steady = steady_segments(workload, self.memory_size)
        steady = self.steady.nonzero().flatten().tolist()
        self.stats_at = steady[-1]
        self.reference_at = spread(steady, REFERENCES)
        # The first search of full memories has a figure of its own, so it is not repeated cold.
        self.cold_at = spread(steady[1:] or steady, COLD_SEARCHES) if made[0].device.type == "cpu" else set()

    def prepare(self, segment: int) -> None:
        """What comes before a segment and is not timed: search options, and builds that are on their way."""
        if self.steady[segment]:
            for backend in self.made:
                backend.wait()
        self.observed.prepare()

    def _on_search(self, backend: MemoryBackend, queries: Tensor, k: int, result: SearchResult) -> None:
        segment = self.judge.segment
        if segment == self.stats_at:
            self.stats = backend.stats()
        self.judge(backend, queries, k, result)
        if segment in self.reference_at:
            self.references.append(reference_operation_ms())
        if segment in self.cold_at:
            flush_caches()
            start = time.perf_counter()
            backend.search(queries, k)
            self.cold.append(1000 * (time.perf_counter() - start))

    def figures(self, cell: Cell, *, appended: ObservedBackend) -> Cell:
        """The cell with every figure of search, append and memory; `appended` is the one that did the appending."""
        observed, judge = self.observed, self.judge
        search_ms = 1000 * np.asarray(observed.search_seconds)
        steady = search_ms[self.steady.numpy()]
        low, high = (float(value) for value in np.percentile(steady, (25, 75)))
        latency = summarise(steady, references_ms=self.references, first_ms=float(steady[0]), cold_ms=self.cold)
        append_ms = 1000 * np.asarray(appended.append_seconds)[self.everyone.numpy()]
        append_p50, append_p95, append_p99 = (float(value) for value in np.percentile(append_ms, (50, 95, 99)))
        assert self.stats is not None, "the fullest segment was never searched"
        observed.backend.wait()
        work = observed.backend.stats()
        return dataclasses.replace(
            cell,
            recall_at_k=judge.mean(judge.recall),
            softmax_mass=judge.mean(judge.mass),
            softmax_mass_exact=judge.mean(judge.top_mass),
            search_ms=latency.p50_ms,
            search_ms_low=low,
            search_ms_high=high,
            search_ms_p50=latency.p50_ms,
            search_ms_p95=latency.p95_ms,
            search_ms_p99=latency.p99_ms,
            search_ms_cold=latency.cold_ms,
            search_first_ms=latency.first_ms,
            searches=latency.count,
            append_us_per_key=1e6 * sum(appended.append_seconds) / sum(appended.appended),
            append_ms_p50=append_p50,
            append_ms_p95=append_p95,
            append_ms_p99=append_p99,
            reference_ms=latency.reference_ms,
            noisy=latency.noisy,
            build_seconds=work.build_seconds,
            stalled_seconds=work.stalled_seconds,
            index_bytes=self.stats.index_bytes,
            key_bytes=self.stats.key_bytes,
            bytes_per_key=self.stats.bytes_per_key,
            streaming=self._streaming(
                search_ms, 1e6 * np.asarray(appended.append_seconds) / np.asarray(appended.appended)
            ),
        )

    def _streaming(self, search_ms: np.ndarray, append_us: np.ndarray) -> Streaming:
        """Figures in stretches of equal turnover, from those of each segment (S,)."""
        judge, text = self.judge, self.workload.text
        reading = text.lengths > 0
        ages = self._ages()
        age = (ages * reading).sum(1) / reading.sum(1).clamp(min=1)  # (S,) keys appended before, mean over rows
        turnover = (age / self.memory_size).numpy()
        edges = np.linspace(0.0, float(turnover.max()) + 1e-9, STRETCHES + 1)
        rows: list[tuple[float, float, float, float]] = []
        for lower, upper in itertools.pairwise(edges):
            inside = (turnover >= lower) & (turnover < upper) & judge.weight.sum(1).bool().numpy()
            if inside.any():
                recall = judge.mean(judge.recall, torch.from_numpy(inside)[:, None])
                middle = float(turnover[inside].mean())
                rows.append((middle, recall, float(append_us[inside].mean()), float(np.median(search_ms[inside]))))
        columns = [tuple(round(value, 6) for value in column) for column in zip(*rows, strict=True)] or [()] * 4
        return Streaming(*columns)

    def _ages(self) -> Tensor:
        """(S, B) float64: keys appended since the row's document began."""
        starts, tokens = self.workload.text.document_starts, self.workload.text.segment_length
        ages = torch.zeros(starts.shape, dtype=torch.float64)
        for number in range(1, len(starts)):
            ages[number] = (ages[number - 1] + tokens).masked_fill(starts[number], 0.0)
        return ages


def failed_cell(workload: Workload, spec: str, memory_size: int, reason: str, fingerprint: str) -> Cell:
    """The cell of a measurement that gave no figures."""
    seed = workload.settings.seed
    return Cell(spec, _name(spec), memory_size, workload.k, "failed", reason=reason, seed=seed, fingerprint=fingerprint)
