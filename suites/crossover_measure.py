"""One index beside exact search at one memory size: recall of its search options, and times taken in turns.

The memories are measured as a stream leaves them: full, and three eighths of a turnover further. An index made of
parts is then met with its newest keys not sealed yet and its oldest part half overwritten, as it is nearly always, and
not at the one moment when all parts are whole.

Letters: M memories, N keys, Q queries of a step, D dimension, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.memory_backends.spec import parse_spec
from recollect.reports.crossing import SizedRatio, with_appends

from .crossover_keys import KeySource
from .curve_settings import Settings, open_axes, settings_of
from .curves import CurveMeter, CurvePoint, exact_truth, scout
from .noise import REFERENCE, describe_reference, interleave, ratio_interval

CHUNK = 512
"""Keys of a memory that are appended at once."""

TURNOVER = 3 / 8
"""Of a memory that is full, the share of the capacity that is appended on top."""

JUDGED = 256
"""Queries of each memory whose recall is judged, for choosing options and once more for the figure."""

BATCHES = 3
"""Steps of queries that are searched in turn."""

NEAR = 0.05
"""Options that find less than the least recall wanted by more than this are not looked at further."""

CANDIDATES = 3
"""Options that are timed for each recall; which of them is quickest is decided on other rounds than the ratio's."""

WARM_UP_KEYS = 1024

LEAST_ROUNDS, ROUNDS = 10, 80


def filled(size: int) -> int:
    """Keys that go through a memory of a size."""
    return size + round(size * TURNOVER)


def queries_needed(queries: Sequence[int]) -> int:
    """Queries that each memory is asked."""
    return max(2 * JUDGED, BATCHES * max(queries))


@torch.no_grad()
def measure_size(
    source: KeySource,
    spec: str,
    size: int,
    *,
    memories: int,
    queries: Sequence[int],
    recalls: Sequence[float],
    k: int,
    dim: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    timing_seconds: float = 1.5,
) -> dict[str, Any]:
    """Measures an index and exact search over the same keys.

    Args:
        source: of keys and queries.
        spec: registry string; search options that it does not name are varied.
        size: C.
        memories: M.
        queries: numbers of queries of a step.
        recalls: that the index is to reach.
        k: K.
        dim: D; None is the source's own.
        seed, device: as for `make_backend`.
        timing_seconds: for each number of queries, roughly.

    Returns:
        What stands in a file of the results: see `docs/crossover.md`.

    Raises:
        CorpusError: the source holds too few keys.
        MemoryBackendError: the backend refuses the spec or fails.
    """
    start = time.perf_counter()
    keys, asked = source.take(memories, filled(size), queries_needed(queries), dim)
    made: dict[str, Any] = {
        "capacity": size,
        "num_memories": memories,
        "dim": keys.shape[2],
        "seed": seed,
        "device": device,
    }
    with make_backend(spec, **made) as backend, make_backend("exact", **made) as exact:
        append_us, exact_append_us = (_fill(one, keys) for one in (backend, exact))
        del keys
        curve = _curve(backend, exact, asked, recalls, k, spec)
        stats = backend.stats()
        rows = []
        for number in queries:
            batches = [asked[:, place * number : (place + 1) * number].to(device) for place in range(BATCHES)]
            timed = _timed(backend, exact, batches, curve, recalls, k, timing_seconds)
            # A token is a query and a key: what a step asks it appends as well.
            step = number * memories / 1000
            for row in timed:
                rows.append({"queries": number, **row, **_counted(row, append_us * step, exact_append_us * step)})
    return {
        "backend": parse_spec(spec)[0],
        "spec": backend.spec,
        "size": size,
        "memories": memories,
        "dim": backend.dim,
        "k": k,
        "append_us_per_key": append_us,
        "exact_append_us_per_key": exact_append_us,
        "build_seconds": stats.build_seconds,
        "bytes_per_key": stats.bytes_per_key,
        "curve": [{"spec": point.spec, "recall": point.recall_at_k, "search_ms": point.search_ms} for point in curve],
        "curve_queries": JUDGED,
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }


def _fill(backend: MemoryBackend, keys: Tensor) -> float:
    """Appends all keys (M, N, D), waits until they are indexed, and returns microseconds for each."""
    start = time.perf_counter()
    for first in range(0, keys.shape[1], CHUNK):
        backend.add(keys[:, first : first + CHUNK])
    backend.wait()
    _synchronise(backend)
    return 1e6 * (time.perf_counter() - start) / (keys.shape[0] * keys.shape[1])


def _curve(
    backend: MemoryBackend, exact: MemoryBackend, asked: Tensor, recalls: Sequence[float], k: int, spec: str
) -> list[CurvePoint]:
    """Search options with their recall, refined around the wanted ones, by rising time of one step of `JUDGED`."""
    first, second = (asked[:, place * JUDGED : (place + 1) * JUDGED].to(backend.device) for place in range(2))
    meter = CurveMeter(k, rounds=1)
    settings = scout(
        meter,
        backend,
        first,
        exact_truth(exact, first, k),
        settings_of(open_axes(spec)),
        jump=1.0,  # the rest of the curve is not asked for
        targets=[("recall_at_k", recall) for recall in recalls],
        least=min(recalls) - NEAR,
    )
    # The options were chosen on the first queries, so their recall is that on others.
    meter.measure(backend, second, exact_truth(exact, second, k), settings)
    return meter.points()


def _timed(
    backend: MemoryBackend,
    exact: MemoryBackend,
    batches: Sequence[Tensor],
    curve: Sequence[CurvePoint],
    recalls: Sequence[float],
    k: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """A row for each recall: the quickest options that reach it, timed beside exact search."""
    chosen = {recall: [one for one in curve if one.recall_at_k >= recall][:CANDIDATES] for recall in recalls}
    points = {point.spec: point for candidates in chosen.values() for point in candidates}
    calls: dict[str, Callable[[], Any]] = {"exact": _search(exact, batches, k)}
    prepare: dict[str, Callable[[], Any]] = {}
    for name, point in points.items():
        calls[name] = _search(backend, batches, k)
        prepare[name] = _set(backend, point.options)
    for name, call in calls.items():  # the first call of a number of queries makes workspaces
        prepare.get(name, lambda: None)()
        call()
    times = interleave(calls, rounds=ROUNDS, least=LEAST_ROUNDS, seconds=seconds, prepare=prepare)
    reference = describe_reference(times[REFERENCE])
    rows = []
    for recall, candidates in chosen.items():
        exact_ms = _median(times["exact"])
        row: dict[str, Any] = {
            "recall_wanted": recall,
            "exact_ms": exact_ms,
            "rounds": len(times["exact"]),
            "reference_ms": reference.p50_ms,
            "noisy": reference.noisy,
            "spec": None,
            "recall": max(point.recall_at_k for point in curve),
        }
        if candidates:
            # Odd rounds say which is quickest, and even ones by how much: the quickest of several by the same
            # rounds would look quicker than it is.
            quickest = min(candidates, key=lambda point: _median(times[point.spec][1::2])).spec
            used = slice(None) if len(candidates) == 1 else slice(None, None, 2)
            ratio = ratio_interval(times[quickest][used], times["exact"][used])
            row |= {
                "spec": quickest,
                "recall": points[quickest].recall_at_k,
                "search_ms": _median(times[quickest][used]),
                "ratio": ratio.value,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
            }
        rows.append(row)
    return rows


def _counted(row: Mapping[str, Any], append_ms: float, exact_append_ms: float) -> dict[str, float]:
    """The appends of one step, and the ratio with them."""
    found = {"append_ms": append_ms, "exact_append_ms": exact_append_ms}
    if row["spec"] is None:
        return found
    ratio = SizedRatio(0, row["ratio"], row["ratio_low"], row["ratio_high"])
    whole = with_appends(ratio, row["exact_ms"], exact_append_ms, append_ms)
    return {**found, "step_ratio": whole.value, "step_ratio_low": whole.low, "step_ratio_high": whole.high}


def _search(backend: MemoryBackend, batches: Sequence[Tensor], k: int) -> Callable[[], Any]:
    """A call that searches the next batch, and is done when the answer is there."""
    calls = 0

    def search() -> None:
        nonlocal calls
        backend.search(batches[calls % len(batches)], k)
        calls += 1
        _synchronise(backend)

    return search


def _set(backend: MemoryBackend, setting: Settings) -> Callable[[], Any]:
    return (lambda: backend.set_search_options(**setting)) if setting else (lambda: None)


def _synchronise(backend: MemoryBackend) -> None:
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)


def _median(times: Sequence[float]) -> float:
    ordered = sorted(times)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def warm_up(spec: str, dim: int, queries: int, k: int, device: str) -> None:
    """Fills and searches throw-away memories of a spec and of exact search, so that compilers and thread pools have
    started before time is taken."""
    vectors = torch.randn(1, WARM_UP_KEYS, dim, generator=torch.Generator().manual_seed(0))
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    for one in (spec, "exact"):
        # A part size in the spec may exceed a small memory; the ring need not be full.
        capacity = max(WARM_UP_KEYS, int(parse_spec(one)[1].get("part_size", 0) or 0))
        with make_backend(one, num_memories=1, capacity=capacity, dim=dim, device=device) as trial:
            trial.add(vectors)
            trial.wait()
            trial.search(vectors[:, :queries], k)
