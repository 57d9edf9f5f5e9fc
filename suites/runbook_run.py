"""Backends replayed through a runbook: what `recollect runbook` does.

Each backend has a process of its own and is kept as soon as it is through: the same call goes on where it was
interrupted. The ground truth of every search is computed once, by exact search over the keys alive then, and shared.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect.memory_backends import make_backend
from recollect.memory_backends.atomic import write_text
from recollect.memory_backends.registry import canonical_spec
from recollect.memory_backends.spec import parse_spec
from recollect.model.documents import CorpusError

from .cells import fingerprint
from .environment import usable_cores
from .noise import describe_reference
from .published_recall import big_ann_recall
from .row_process import OnProgress, measure_rows, progress_events
from .row_store import RowStore
from .runbook import FifoStep, Runbook, as_fifo, load_runbook
from .runbook_data import StreamData, open_data, read_ground_truth
from .runbook_replay import Followed, compute_ground_truth, follow, truth_path

TIMEOUT = 24 * 3600.0
"""Seconds after which a backend that is not through is given up."""


@dataclass(frozen=True)
class RunbookOptions:
    """What to replay.

    Attributes:
        runbook: YAML file of the streaming track's form.
        data: a file of ann-benchmarks or VIBE, or raw keys (.fbin, .u8bin, .i8bin) with `queries` and `distance`.
        backends: registry strings.
        dataset: which of the runbook's data sets; None where it has one.
        k: neighbours.
        batch_size: queries searched at once; 0 is all.
        append_size: keys appended at once; 0 is all of a step.
        ground_truth: folder of the track's stepN.gt100; None computes it.
        output: folder of rows, results and ground truth.
        threads: of torch and the libraries; None is every core that may be used.
        device, seed: of the backends.
    """

    runbook: Path
    data: Path
    backends: Sequence[str]
    queries: Path | None = None
    distance: str | None = None
    dataset: str | None = None
    k: int = 10
    batch_size: int = 0
    append_size: int = 0
    ground_truth: Path | None = None
    output: Path = Path("out/runbook")
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class RunbookRow:
    """One spec through one runbook. Recall as big-ann-benchmarks computes it (`recollect.suites.published_recall`).

    Attributes:
        dataset, distance, runbook: what was replayed; `capacity` keys were alive at most.
        spec, backend, k: what was measured.
        status, reason: ok, skipped (a library is missing) or failed, and why.
        searches, queries: steps that searched, and queries of each.
        mean_recall, least_recall, first_recall, last_recall: over those steps.
        keys_inserted, inserts_per_second: all of them, and their number over the time that appending took.
        append_p50_ms, append_p99_ms, append_max_ms: of the single appends, `keys_an_append` keys each at most.
        queries_per_second: of all searches together.
        key_bytes, index_bytes: at the end.
        reference_ms, noisy: of the fixed reference operation beside the searches (`recollect.suites.noise`).
        steps: for each insert and search step, operation, keys, alive, seconds and, of a search, recall.
    """

    dataset: str
    distance: str
    runbook: str
    capacity: int
    spec: str
    backend: str
    k: int
    status: str = "ok"
    reason: str = ""
    searches: int | None = None
    queries: int | None = None
    mean_recall: float | None = None
    least_recall: float | None = None
    first_recall: float | None = None
    last_recall: float | None = None
    keys_inserted: int | None = None
    inserts_per_second: float | None = None
    keys_an_append: int | None = None
    append_p50_ms: float | None = None
    append_p99_ms: float | None = None
    append_max_ms: float | None = None
    queries_per_second: float | None = None
    key_bytes: int | None = None
    index_bytes: int | None = None
    reference_ms: float | None = None
    noisy: bool | None = None
    seed: int | None = None
    threads: int | None = None
    device: str | None = None
    steps: tuple[dict[str, Any], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunbookRow:
        """What `as_json` described; unknown entries are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in content.items() if name in known}
        return cls(**{**given, "steps": tuple(given.get("steps", ()))})


@dataclass(frozen=True)
class RunbookResult:
    """Rows of this call, in its order; how many it measured and found; rows of other settings in the folder."""

    output: Path
    rows: list[RunbookRow]
    measured: int
    reused: int
    left_out: int


def run_runbook(options: RunbookOptions, on_progress: OnProgress | None = None) -> RunbookResult:
    """Replays the runbook through every backend, but for what the folder holds already.

    Raises:
        CorpusError: the runbook is no sliding window (the step is named), or does not fit the data.
        MemoryBackendError: a registry string is wrong.
        OSError: nothing can be written.
    """
    tell = on_progress or (lambda what, done, total: None)
    specs = list(dict.fromkeys(canonical_spec(spec) for spec in options.backends))
    threads = options.threads or usable_cores()
    runbook = load_runbook(options.runbook, options.dataset)
    capacity, steps = as_fifo(runbook)
    with open_data(options.data, options.queries, options.distance) as data:
        _check(runbook, steps, data, options)
        about = {
            "dataset": data.name,
            "distance": data.distance,
            "shape": [data.keys, data.queries, data.dimension],
            "bytes": options.data.expanduser().stat().st_size,
            "steps": [[step.operation, step.start, step.end] for step in runbook.steps],
        }
        blank = RunbookRow(data.name, data.distance, options.runbook.stem, capacity, "", "", options.k, threads=threads)
    settings = {name: getattr(options, name) for name in ("k", "batch_size", "append_size", "device", "seed")} | {
        "truth": None if options.ground_truth is None else str(options.ground_truth.expanduser().resolve())
    }
    store = RowStore(options.output, "runbook", settings, threads=threads)
    truth = options.ground_truth or options.output / "ground_truth" / f"{options.runbook.stem}-{fingerprint(about)}"
    marks = {spec: store.mark(spec, about) for spec in specs}
    missing = [spec for spec in specs if not store.has(marks[spec])]
    task = {
        "kind": "runbook",
        **{name: _text(getattr(options, name)) for name in ("runbook", "data", "queries", "distance", "dataset")},
        **settings,
        "truth": str(truth),
        "truth_is_given": options.ground_truth is not None,
        "output": str(options.output),
    }
    for spec in missing:
        name = parse_spec(spec)[0]

        def keep(row: RunbookRow, spec: str = spec) -> None:
            store.save(marks[spec], row.as_json())
            _write(store)

        measure_rows(
            {**task, "spec": spec},
            name,
            [dataclasses.replace(blank, spec=spec, backend=name, seed=options.seed, device=options.device)],
            threads=threads,
            log=options.output / "logs" / f"{name}.log",
            timeout=options.timeout,
            keep=keep,
            tell=tell,
        )
    _write(store)
    rows = [RunbookRow.from_json(store.load(marks[spec]) or {}) for spec in specs]
    measured = sum(row.status == "ok" for row in rows if row.spec in missing)
    return RunbookResult(options.output, rows, measured, len(specs) - len(missing), store.left_out)


def _text(value: Any) -> Any:
    return str(value.expanduser().resolve()) if isinstance(value, Path) else value


def _check(runbook: Runbook, steps: Sequence[FifoStep], data: StreamData, options: RunbookOptions) -> None:
    if runbook.last_key > data.keys:
        number = next(step.number for step in runbook.steps if step.end > data.keys)
        raise CorpusError(
            f"step {number} names key {runbook.last_key - 1} and beyond what {options.data} has: {data.keys} keys"
        )
    for step in steps:
        if step.operation == "search":
            if step.alive_keys < options.k:
                raise CorpusError(
                    f"step {step.number} searches {step.alive_keys} keys for k {options.k}: choose a smaller k"
                )
            if options.ground_truth is not None:
                read_ground_truth(truth_path(options.ground_truth, step.number), data.queries)


def work(task: dict[str, Any], tell: Callable[..., None]) -> None:
    """The part that runs in a process of its own: one spec, and the ground truth where it is not there yet."""
    progress = progress_events(tell)
    try:
        capacity, steps = as_fifo(load_runbook(task["runbook"], task["dataset"]))
        with open_data(task["data"], task["queries"], task["distance"]) as data:
            if not task["truth_is_given"]:
                compute_ground_truth(steps, capacity, data, task["truth"], device=task["device"], tell=progress)
            tell("done", row=replay_spec(task, capacity, steps, data, progress).as_json())
    except OSError:
        raise
    except Exception as error:
        tell("failed", reason=f"{type(error).__name__}: {error}")


def replay_spec(
    task: Mapping[str, Any], capacity: int, steps: Sequence[FifoStep], data: StreamData, tell: OnProgress
) -> RunbookRow:
    """Replays one spec and judges its searches."""
    spec, k = str(task["spec"]), int(task["k"])
    backend = make_backend(
        spec,
        num_memories=1,
        capacity=capacity,
        dim=data.dimension,
        metric=data.metric,
        device=task["device"],
        seed=int(task["seed"]),
    )
    followed: list[Followed] = []
    described: list[dict[str, Any]] = []
    with backend:
        sizes = {"batch_size": int(task["batch_size"]), "append_size": int(task["append_size"])}
        for done in follow(steps, data, backend, k, **sizes, tell=tell):
            followed.append(done)
            described += _describe(done, task, data, k)
        stats = backend.stats()
    inserts = [one for one in described if one["operation"] == "insert"]
    searches = [one for one in described if one["operation"] == "search"]
    appends = 1000 * np.array([s for one in followed if one.step.operation == "insert" for s in one.call_seconds])
    keys, recall = sum(one["keys"] for one in inserts), [one["recall"] for one in searches]
    reference = describe_reference([one.reference_ms for one in followed if one.reference_ms is not None])
    p50, p99 = np.percentile(appends, (50, 99)).tolist()
    return RunbookRow(
        dataset=data.name,
        distance=data.distance,
        runbook=Path(task["runbook"]).stem,
        capacity=capacity,
        spec=spec,
        backend=parse_spec(spec)[0],
        k=k,
        searches=len(searches),
        queries=data.queries,
        mean_recall=float(np.mean(recall)),
        least_recall=min(recall),
        first_recall=recall[0],
        last_recall=recall[-1],
        keys_inserted=keys,
        inserts_per_second=keys / sum(one["seconds"] for one in inserts),
        keys_an_append=int(task["append_size"]) or max(one["keys"] for one in inserts),
        append_p50_ms=p50,
        append_p99_ms=p99,
        append_max_ms=float(appends.max()),
        queries_per_second=len(searches) * data.queries / sum(one["seconds"] for one in searches),
        key_bytes=stats.key_bytes,
        index_bytes=stats.index_bytes,
        reference_ms=reference.p50_ms,
        noisy=reference.noisy,
        seed=int(task["seed"]),
        threads=torch.get_num_threads(),
        device=str(task["device"]),
        steps=tuple(described),
    )


def _describe(done: Followed, task: Mapping[str, Any], data: StreamData, k: int) -> list[dict[str, Any]]:
    step = done.step
    if step.operation not in ("insert", "search"):
        return []
    about: dict[str, Any] = {
        "step": step.number,
        "operation": step.operation,
        "keys": step.end - step.start,
        "alive": step.alive_keys,
        "seconds": sum(done.call_seconds),
        "recall": None,
    }
    if done.found is not None:
        numbers, distances = read_ground_truth(truth_path(task["truth"], step.number), data.queries)
        about["recall"] = big_ann_recall(numbers, distances, done.found, k)
    return [about]


def _write(store: RowStore) -> None:
    """Writes results.json and results.csv, a row for each spec, and steps.csv, a row for each step of each spec."""
    rows = sorted(store.rows(), key=lambda row: (row["dataset"], row["runbook"], row["backend"], row["spec"]))
    store.write_results(rows, [{name: value for name, value in row.items() if name != "steps"} for row in rows])
    named = ("dataset", "runbook", "spec", "k")
    table = [{**{name: row[name] for name in named}, **step} for row in rows for step in row["steps"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, [*named, "step", "operation", "keys", "alive", "seconds", "recall"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(table)
    write_text(store.output / "steps.csv", text.getvalue())
