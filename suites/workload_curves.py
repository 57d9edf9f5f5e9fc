"""The curve of one build on the recorded workload: filled as the model fills it, searched with the model's queries.

A build is a backend with everything that no search option changes. It is filled once for each memory size by replaying
what the model's first memory layer appended, and searched at a few segments at which the memories are full, with one
search option after another: a sweep's specs and every other point of the curve over the very same index.

Letters: S segments, B batch rows, M memories, T tokens of a segment, D dimension.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.memory_backends.registry import backend_class
from recollect.memory_backends.spec import format_spec, make_options, options_given, parse_spec
from recollect.model.recording import Recording, record

from .curve_settings import Settings, refined, settings_of, without_waste
from .curves import CurveMeter, Truth
from .measure import spread, steady_segments
from .workload import Workload

BATCHES = 4
"""Segments whose queries are searched, spread over the last ones at which the memories are full."""

WINDOW = 16
"""Those are so many segments, or as many as refill the memories twice: what comes before need not be replayed."""

ROUNDS = 3
"""Timed searches of each setting for each of them."""

REFINEMENTS = 4
"""Settings that are put where the declared ones leave the largest jumps of recall."""

BEATEN = 0.85
"""A setting is left out where another finds as much in less than this share of its time."""

MOST_SETTINGS = 12
"""Of the settings that are left the least beaten are kept, beside the specs' own."""

INSTRUMENTS = ("degraded", "none")
"""Backends that are no index: they have no curve."""

Known = list[tuple[Settings, float, float]]
"""Settings with the recall and the milliseconds of one search of each."""


def curve_build(spec: str) -> str:
    """What the specs of one curve have in common: the spec without the options that the curve varies."""
    name, given = parse_spec(spec)
    cls = backend_class(name)
    options = options_given(make_options(cls.Options, given, name=name))
    return format_spec(name, {key: value for key, value in options.items() if key not in cls.curve})


def curve_setting(spec: str) -> Settings:
    """A spec's own point on its curve."""
    name, given = parse_spec(spec)
    cls = backend_class(name)
    options = make_options(cls.Options, given, name=name)
    return {key: getattr(options, key) for key in cls.curve}


def measure_workload_curve(
    workload: Workload,
    recording: Recording,
    specs: Sequence[str],
    memory_size: int,
    *,
    seconds: float,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fills the build that `specs` share and measures its curve.

    Args:
        workload: prepared for this memory size.
        recording: of its first memory layer.
        specs: of one build; their own points are on the curve.
        memory_size: C.
        seconds: of searching, after which no further segment is begun; the first is always measured.
        on_step: is told how many of how many segments are replayed.

    Returns:
        An entry of curves.json: the build, the workload, and its points by rising time.

    Raises:
        MemoryBackendError: the backend refuses the spec or fails.
    """
    (build,) = {curve_build(spec) for spec in specs}
    text, settings = workload.text, workload.settings
    shape: dict[str, Any] = {
        "num_memories": recording.num_memories,
        "capacity": memory_size,
        "dim": recording.dim,
        "device": settings.device,
        "seed": settings.seed + workload.model.config.memory_layers[0],
    }
    turnover = -(-memory_size // text.segment_length)  # segments that refill a memory
    steady = steady_segments(workload, memory_size)[1].nonzero().flatten().tolist()
    chosen = spread(steady[-max(WINDOW, 2 * turnover) :], BATCHES)
    first, last = _first_needed(recording, min(chosen), 2 * turnover), max(chosen)
    meter = CurveMeter(workload.k, rounds=ROUNDS, rows=text.rows)
    wanted: list[Settings] = []
    spent: float = 0.0
    used: list[int] = []
    with make_backend(build, **shape) as backend, make_backend("exact", **shape) as exact:
        for number in range(first, last + 1):
            starting = recording.document_starts[number].repeat_interleave(recording.heads).nonzero().flatten()
            for memory in (backend, exact):
                memory.reset(starting)
            if number in chosen and (not used or spent < seconds):
                backend.wait()
                queries = recording.queries[number].to(backend.device)
                truth = _truth(workload, recording, memory_size, number)
                start = time.perf_counter()
                if not wanted:
                    wanted = choose_settings(backend, queries, truth, workload.k, specs)
                meter.measure(backend, queries, truth, wanted, exact=exact)
                spent += time.perf_counter() - start
                used.append(number)
            for memory in (backend, exact):
                memory.add(recording.keys[number].to(memory.device))
            if on_step is not None:
                on_step(number + 1 - first, last + 1 - first)
        backend.wait()
        built = backend.stats().build_seconds
    return {
        "build": build,
        "backend": backend.name,
        "memory_size": memory_size,
        "k": workload.k,
        "num_memories": recording.num_memories,
        "queries": int(recording.queries.shape[2]),
        "segments": used,
        "build_seconds": built,
        "points": [point.as_json() for point in meter.points()],
        "reason": "",
    }


def _first_needed(recording: Recording, segment: int, most: int) -> int:
    """Where to begin, that the memories at `segment` hold what they must: with the documents, or `most` before it."""
    begun = recording.document_starts[: segment + 1]  # (S', B)
    numbers = torch.arange(len(begun))[:, None].expand_as(begun)
    return max(int(numbers.masked_fill(~begun, 0).max(0).values.min()), segment - most)


def _truth(workload: Workload, recording: Recording, memory_size: int, number: int) -> Truth:
    """The exact answers to one segment's queries, from the workload's oracle."""
    oracle, text = workload.oracle(memory_size), workload.text
    return Truth(
        threshold=oracle.threshold[number],
        live=oracle.live[number],
        log_sum=oracle.log_sum[number],
        scale=oracle.scale.repeat(text.rows),
        counted=text.is_text[number].repeat_interleave(recording.heads, dim=0),
    )


def choose_settings(
    backend: MemoryBackend, queries: Tensor, truth: Truth, k: int, specs: Iterable[str]
) -> list[Settings]:
    """The settings that are worth timing: the specs' own, and those declared ones that others do not clearly beat.

    Each is searched and timed once; where neighbours' recall lies far apart one is put between them.
    """
    own: list[Settings] = []
    for spec in specs:
        if (setting := curve_setting(spec)) not in own:
            own.append(setting)
    declared = settings_of(type(backend).curve)
    settings = [*declared, *(setting for setting in own if setting not in declared)]
    trial = CurveMeter(k, rounds=1)
    trial.measure(backend, queries, truth, settings)
    added = refined(settings, [trial.figure(setting, "recall_at_k") for setting in settings], most=REFINEMENTS)
    trial.measure(backend, queries, truth, added)
    known = [(dict(point.options), point.recall_at_k, point.search_ms) for point in trial.points()]
    useful = without_waste([setting for setting, _, _ in known], [recall for _, recall, _ in known])
    others = [
        (_share_of_time(recall, milliseconds, known), setting)
        for setting, recall, milliseconds in known
        if setting in useful and setting not in own
    ]
    others = [(share, setting) for share, setting in others if share >= BEATEN]
    others.sort(key=lambda one: -one[0])
    return own + [setting for _, setting in others[:MOST_SETTINGS]]


def _share_of_time(recall: float, milliseconds: float, known: Known) -> float:
    """The time of the quickest setting that finds as much, over this one's; 1 on the front."""
    return min(time_ms for _, other, time_ms in known if other >= recall) / milliseconds


__all__ = ["INSTRUMENTS", "curve_build", "curve_setting", "measure_workload_curve", "record"]
