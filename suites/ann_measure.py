"""Backends measured on a file of ann-benchmarks or VIBE: one index built over `train`, searched along its whole curve.

What is timed as they time it: building (all keys appended, background work finished), searching all queries in batches,
and single queries, each the best of some runs, as ann-benchmarks takes it. The keys are read in parts, so that a file
need not fit into memory beside its index.

Letters: N keys, Q queries, D dimension, K neighbours.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recollect.memory_backends import BackendUnavailable, MemoryBackend, make_backend
from recollect.memory_backends.registry import backend_class, canonical_spec
from recollect.memory_backends.spec import format_spec, parse_spec
from recollect.model.ann_benchmarks import AnnBenchmarkFile
from recollect.model.distances import pair_distances

from .curves import settings_of
from .noise import describe_reference, reference_operation_ms
from .published_recall import ann_benchmarks_recall, strict_recall
from .sharing import build_key, search_options

BATCH = 0
"""Queries searched at once. 0 is all of them, as in ann-benchmarks' batch mode; a memory is asked some hundreds."""
SINGLE_QUERIES = 1000
"""Queries that are also searched one by one."""
RUNS = 3
"""Searches of all queries, of which the fastest counts."""

OnProgress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it, and how much there is."""


@dataclass(frozen=True)
class AnnSettings:
    """How a file is measured.

    Attributes:
        k: neighbours.
        batch_size: queries searched at once; 0 is all of them.
        single_queries: queries that are searched one by one, the first of the file; 0 is none.
        runs: searches of all queries, of which the fastest counts.
        device: where memory and index live.
        seed: decides everything random.
    """

    k: int = 10
    batch_size: int = BATCH
    single_queries: int = SINGLE_QUERIES
    runs: int = RUNS
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class AnnRow:
    """One spec on one file. Recall by two definitions (`recollect.suites.published_recall`).

    Attributes:
        dataset, distance, keys, queries, dimension: the file.
        spec, backend, k: what was measured.
        status, reason: ok, skipped (a library is missing) or failed, and why.
        recall_ann_benchmarks: by the definition of ann-benchmarks and VIBE.
        recall_strict: distinct keys, no margin.
        truth_error: the most by which a distance in the file differs from the one measured here between the same two
            vectors. Where it is not far below 0.001, `recall_ann_benchmarks` compares two different measures.
        batch_size, batch_queries_per_second: queries at once, and the fastest run's throughput.
        single_queries_per_second: one over the mean time of one query alone, as ann-benchmarks has it outside batches.
        single_p50_ms, single_p95_ms, single_p99_ms: milliseconds of one query alone.
        single_queries: how many were searched alone.
        build_seconds: until all keys were appended and nothing was left to be built.
        key_bytes, index_bytes: of the raw keys, and of the index beside them.
        reference_ms, noisy: of the fixed reference operation beside the searches (`recollect.suites.noise`).
    """

    dataset: str
    distance: str
    keys: int
    queries: int
    dimension: int
    spec: str
    backend: str
    k: int
    status: str = "ok"
    reason: str = ""
    recall_ann_benchmarks: float | None = None
    recall_strict: float | None = None
    truth_error: float | None = None
    batch_size: int | None = None
    batch_queries_per_second: float | None = None
    single_queries: int | None = None
    single_queries_per_second: float | None = None
    single_p50_ms: float | None = None
    single_p95_ms: float | None = None
    single_p99_ms: float | None = None
    build_seconds: float | None = None
    key_bytes: int | None = None
    index_bytes: int | None = None
    reference_ms: float | None = None
    noisy: bool | None = None
    runs: int | None = None
    seed: int | None = None
    threads: int | None = None
    device: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AnnRow:
        """What `as_json` described; unknown entries are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})


@dataclass(frozen=True)
class Answers:
    """What a spec answered: `found` (Q, k) numbers, -1 where missing, their `distances` (Q, k), and its times.

    Attributes:
        batch_seconds: (batches,) of the fastest run; batch i holds `batch_size` queries.
        single_seconds: (queries searched alone,).
        single_found, single_distances: what those found, (queries searched alone, k).
    """

    found: NDArray[np.int64]
    distances: NDArray[np.float64]
    batch_seconds: NDArray[np.float64]
    single_seconds: NDArray[np.float64]
    single_found: NDArray[np.int64]
    single_distances: NDArray[np.float64]


def expand(specs: Sequence[str], *, sweep: bool = True) -> list[str]:
    """Canonical specs to measure, none twice, those of one index side by side.

    With `sweep`, a search option that a spec does not name runs through the values of its backend's `curve`: so
    `hnswlib:M=16` becomes a curve over ef_search, and `hnswlib:M=16,ef_search=64` stays one point.
    """
    made: dict[str, None] = {}
    for spec in specs:
        name, given = parse_spec(spec)
        axes = {option: values for option, values in backend_class(name).curve.items() if option not in given}
        for setting in settings_of(axes) if sweep else [{}]:
            made[canonical_spec(format_spec(name, {**given, **setting}))] = None
    order = {key: place for place, key in enumerate(dict.fromkeys(build_key(spec) for spec in made))}
    return sorted(made, key=lambda spec: order[build_key(spec)])


def measure_specs(
    file: AnnBenchmarkFile, specs: Sequence[str], settings: AnnSettings, on_progress: OnProgress | None = None
) -> Iterator[tuple[AnnRow, Answers | None]]:
    """Measures specs that differ in search options alone over one index, each yielded as soon as it is measured.

    A missing library gives rows of status 'skipped' and no answers.

    Raises:
        CorpusError: the file does not know the k nearest, or cannot be read.
        MemoryBackendError: the backend refuses the spec or fails.
    """
    tell = on_progress or (lambda what, done, total: None)
    file.check_k(settings.k)
    blanks = [blank_row(file, spec, settings) for spec in specs]
    try:
        made = make_backend(
            specs[0],
            num_memories=1,
            capacity=file.keys,
            dim=file.dimension,
            metric=file.metric,
            device=settings.device,
            seed=settings.seed,
        )
    except BackendUnavailable as error:
        for blank in blanks:
            yield dataclasses.replace(blank, status="skipped", reason=str(error)), None
        return
    with made as backend:
        build_seconds = _build(file, backend, tell)
        queries = torch.from_numpy(file.test()).to(settings.device)
        neighbors, distances = file.truth(settings.k)
        remeasured = pair_distances(file.distance, file.test(), neighbors, file.train_chunks())
        truth_error = float(np.abs(remeasured - distances).max())
        for blank in blanks:
            if len(specs) > 1:
                backend.set_search_options(**search_options(blank.spec))
            answers, references = _search(file, backend, queries, settings, blank.spec, tell)
            stats = backend.stats()
            single, reference = 1000 * answers.single_seconds, describe_reference(references)
            p50, p95, p99 = np.percentile(single, (50, 95, 99)).tolist() if len(single) else (None, None, None)
            yield (
                dataclasses.replace(
                    blank,
                    recall_ann_benchmarks=ann_benchmarks_recall(distances, answers.distances, settings.k),
                    recall_strict=strict_recall(remeasured, answers.found, answers.distances, settings.k),
                    truth_error=truth_error,
                    batch_size=settings.batch_size or file.queries,
                    batch_queries_per_second=file.queries / float(answers.batch_seconds.sum()),
                    single_queries=len(single),
                    single_queries_per_second=1000 / float(single.mean()) if len(single) else None,
                    single_p50_ms=p50,
                    single_p95_ms=p95,
                    single_p99_ms=p99,
                    build_seconds=build_seconds,
                    key_bytes=stats.key_bytes,
                    index_bytes=stats.index_bytes,
                    reference_ms=reference.p50_ms,
                    noisy=reference.noisy,
                ),
                answers,
            )


def blank_row(file: AnnBenchmarkFile, spec: str, settings: AnnSettings) -> AnnRow:
    """The row of a spec before anything is measured."""
    return AnnRow(
        dataset=file.name,
        distance=file.distance,
        keys=file.keys,
        queries=file.queries,
        dimension=file.dimension,
        spec=spec,
        backend=parse_spec(spec)[0],
        k=settings.k,
        runs=settings.runs,
        seed=settings.seed,
        threads=torch.get_num_threads(),
        device=settings.device,
    )


def _build(file: AnnBenchmarkFile, backend: MemoryBackend, tell: OnProgress) -> float:
    """Seconds until the backend holds every key and has nothing left to build; reading the file is not counted."""
    taken = 0.0
    for start, keys in file.train_chunks():
        part = torch.from_numpy(keys)[None].to(backend.device)
        clock = _now(backend)
        backend.add(part)
        taken += _now(backend) - clock
        tell(f"building {build_key(backend.spec)}", start + len(keys), file.keys)
    clock = _now(backend)
    backend.wait()
    return taken + _now(backend) - clock


def _search(
    file: AnnBenchmarkFile,
    backend: MemoryBackend,
    queries: torch.Tensor,
    settings: AnnSettings,
    spec: str,
    tell: OnProgress,
) -> tuple[Answers, list[float]]:
    """Searches all queries `runs` times in batches, and some of them alone; the reference operation runs between."""
    size = settings.batch_size or len(queries)
    batches = queries.split(size)
    backend.search(batches[0][None], settings.k)  # starts thread pools and compilers
    best: list[float] = []
    references = []
    for run in range(settings.runs):
        seconds, parts = [], []
        references.append(reference_operation_ms())
        for batch in batches:
            clock = _now(backend)
            result = backend.search(batch[None], settings.k)
            seconds.append(_now(backend) - clock)
            parts.append(result.slots[0].cpu())
        best = seconds if not best or sum(seconds) < sum(best) else best
        tell(f"searching {spec}", run + 1, settings.runs)
    single, alone = [], [torch.zeros(0, settings.k, dtype=torch.int64)]
    for query in queries[: settings.single_queries].split(1) if settings.single_queries else ():
        clock = _now(backend)
        result = backend.search(query[None], settings.k)
        single.append(_now(backend) - clock)
        alone.append(result.slots[0].cpu())
    references.append(reference_operation_ms())
    # One memory that was never emptied and holds as many keys as came: the slot is the key's number.
    found, found_alone = torch.cat(parts).numpy(), torch.cat(alone).numpy()
    everything = np.concatenate([found, found_alone])
    asked = np.concatenate([file.test(), file.test()[: len(found_alone)]])
    reached = pair_distances(file.distance, asked, everything, file.train_chunks())
    distances, distances_alone = reached[: len(found)], reached[len(found) :]
    times = np.asarray(best), np.asarray(single)
    return Answers(found, distances, *times, found_alone, distances_alone), references


def _now(backend: MemoryBackend) -> float:
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)
    return time.perf_counter()
