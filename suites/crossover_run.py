"""`recollect crossover`: from which memory size on an index is quicker than exact search, on this machine.

    crossover(CrossoverOptions(memories=8, queries=(512,), k=32, dim=64))

Each index is measured in a process of its own, so that one that crashes or runs out of memory takes no other along.
A point (an index at a memory size) is written as soon as it is measured; the same command again goes on from there.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from recollect._version import __version__
from recollect.memory_backends import canonical_spec, describe_backend, list_backends
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.registry import backend_class
from recollect.memory_backends.spec import parse_spec
from recollect.reports.crossing_page import write_crossing_page
from recollect.reports.crossing_results import FILE, SCHEMA, Case, answers, load_crossover, plural, row_of, sized_ratio

from .cells import fingerprint
from .crossover_keys import KeySource, open_keys
from .crossover_ladder import Ladder, Question, Rung
from .crossover_measure import filled, measure_size, queries_needed, warm_up
from .crossover_options import CrossoverError, CrossoverOptions, CrossoverResult, checked
from .environment import (
    backend_digest,
    commit_of,
    core_digest,
    describe_machine,
    is_changed,
    library_versions,
    usable_cores,
)
from .one_writer import writing_alone
from .plan import read_json
from .processes import Event, run_task
from .progress import Reporter
from .provenance import describe

POINTS = "points"
LOGS = "logs"
UNASKED = ("degraded",)
"""An instrument, which nobody would take: it is measured where it is named."""

STALL_SECONDS = 300.0
"""A size may take this much longer than what is left of an index's time before the index is given up."""

LEAST_MS = 1.0
"""What exact search takes at the least for a step's queries of one memory, where fewer memories than M are measured.

Below that, what a call costs whatever it does decides, and exact search pays it once for all memories where most
indexes pay it for each: an index looks quicker than it is beside fewer memories."""

_CODE = ("crossover_keys", "crossover_measure", "curve_settings", "curves", "noise", "oracle")

Tell = Callable[..., None]


def crossover(options: CrossoverOptions | None = None, **changes: Any) -> CrossoverResult:
    """Measures what is not measured yet, then writes results and page.

    Args:
        options: what to measure; the defaults of `CrossoverOptions` where None.
        changes: single options by name.

    Raises:
        CrossoverError: an option is out of range, or another run is writing to the folder.
        CheckpointError, CorpusError, MemoryBackendError: what was asked for cannot be had.
        OSError: the output cannot be written.
    """
    options = checked(dataclasses.replace(options or CrossoverOptions(), **changes))
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise CrossoverError(f"output {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with writing_alone(folder, "run", CrossoverError), Reporter(options.progress) as reporter:
        return _Run(options, folder, reporter).run()


class _Run:
    def __init__(self, options: CrossoverOptions, folder: Path, reporter: Reporter) -> None:
        self.options, self.folder, self.reporter = options, folder, reporter
        self.threads = options.threads or usable_cores()
        self.started = time.perf_counter()
        self.points: dict[tuple[str, int], dict[str, Any]] = {}
        self.measured = self.reused = 0
        self.failed: list[tuple[str, str]] = []
        self.stopped: dict[str, str] = {}

    def run(self) -> CrossoverResult:
        options = self.options
        self.reporter.step("reading the source of keys", 0.0)
        self.indexes, missing = chosen_indexes(options.backends)
        source = open_source(options, self.folder)
        self.dim = source.dim if options.dim is None else options.dim
        self.about = source.description
        shared = shared_settings(options, source.digest, self.dim, self.threads)
        for place, index in enumerate(self.indexes):
            share = (60 * options.minutes - (time.perf_counter() - self.started)) / (len(self.indexes) - place)
            self._measure(index, shared, max(share, 1.0))
        if not self.points:
            reasons = "; ".join(f"{index}: {reason}" for index, reason in self.failed)
            raise CrossoverError(f"nothing could be measured ({reasons}); the logs are in {self.folder / LOGS}")
        self._write(missing)
        results = load_crossover(self.folder)
        page = write_crossing_page(self.folder)
        return CrossoverResult(
            output=self.folder,
            page=page,
            answers=answers(results),
            crossings=tuple(one.as_json() for case in results.cases for one in results.crossings(case)),
            measured=self.measured,
            reused=self.reused,
            failed=tuple(self.failed),
            seconds=time.perf_counter() - self.started,
        )

    def _measure(self, index: str, shared: Mapping[str, Any], seconds: float) -> None:
        """One index, in a process."""
        mark = fingerprint({**shared, "index": index, "code": backend_digest(parse_spec(index)[0])})
        task = {
            "kind": "crossover",
            "index": index,
            "output": str(self.folder.resolve()),
            "options": options_as_json(self.options),
            "fingerprint": mark,
            "seconds": seconds,
        }

        def hear(event: Event) -> None:
            if event["event"] in ("step", "start"):
                self.reporter.step(str(event["what"]), float(event.get("share", 0.0)))
            elif event["event"] == "done":
                self._take(event["point"], reused=bool(event["reused"]))
            elif event["event"] == "failed":
                self.failed.append((index, str(event["reason"])))
                self.stopped[index] = str(event["reason"])
                self.reporter.note(f"{index}: {event['reason']}")
            elif event["event"] == "stopped":
                self.stopped.setdefault(index, str(event["reason"]))

        name = parse_spec(index)[0]
        log = self.folder / LOGS / f"{name}.log"
        last = run_task(task, threads=self.threads, log=log, timeout=seconds + STALL_SECONDS, on_event=hear)
        if last["event"] != "end":
            self.failed.append((index, str(last["reason"])))
            self.stopped[index] = str(last["reason"])
            self.reporter.note(f"{index}: {last['reason']}")

    def _take(self, point: dict[str, Any], *, reused: bool) -> None:
        self.points[str(point["index"]), int(point["size"])] = point
        self.reused += reused
        self.measured += not reused
        if not reused:
            self.reporter.note(describe_point(point))

    def _write(self, missing: Mapping[str, str]) -> None:
        options = self.options
        run = {
            "recollect_version": __version__,
            "provenance": describe(threads=self.threads, device=options.device, seed=options.seed),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "libraries": library_versions(),
            "threads": self.threads,
            "device": options.device,
            "seed": options.seed,
            "commit": commit_of(),
            "uncommitted_changes": is_changed() if commit_of() else None,
            "memories": options.memories,
            "queries": list(options.queries),
            "recalls": list(options.recalls),
            "k": options.k,
            "dim": self.dim,
            "keys": self.about,
            "keys_option": options.keys,
            "backends": list(options.backends),
            "min_keys": options.min_keys,
            "max_keys": options.max_keys,
            "minutes": options.minutes,
            "stopped": self.stopped,
            "failed": [list(one) for one in self.failed],
            "not_installed": dict(missing),
        }
        points = sorted(self.points.values(), key=lambda point: (point["index"], point["size"]))
        write_json(self.folder / FILE, {"schema": SCHEMA, "run": run, "points": points})


def describe_point(point: Mapping[str, Any]) -> str:
    """A line of progress."""
    found = [
        f"{plural(row['queries'], 'query', 'queries')}, recall {row['recall_wanted']:g}: "
        + (f"{row['ratio']:.2f} times exact" if row["spec"] is not None else f"not reached ({row['recall']:.3f})")
        for row in point["rows"]
    ]
    return f"{point['index']}, {point['size']:,} keys: {'; '.join(found)} ({point['seconds']:.0f} s)"


def options_as_json(options: CrossoverOptions) -> dict[str, Any]:
    """The options as a process is given them."""
    values = dataclasses.asdict(options)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def open_source(options: CrossoverOptions, folder: Path) -> KeySource:
    """Where keys come from."""
    return open_keys(
        options.keys,
        folder / "keys",
        dim=options.dim,
        checkpoint=options.checkpoint,
        corpus=options.corpus,
        seed=options.seed,
    )


def chosen_indexes(backends: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """The canonical specs to measure, and by name the backends that are left out since their library is missing.

    Raises:
        UnknownBackend, InvalidSpec, BackendUnavailable: one that was named cannot be had.
        CrossoverError: there is none.
    """
    if backends:
        # As they were given: an option that is named is kept, even where it is the default.
        found = list({canonical_spec(spec): spec.strip() for spec in backends}.values())
        for spec in found:
            backend_class(parse_spec(spec)[0]).check_available()
        found = [spec for spec in found if canonical_spec(spec) != "exact"]
        if not found:
            raise CrossoverError("backends name exact search alone, which everything is measured beside: name an index")
        return found, {}
    infos = [
        info
        for info in list_backends()
        if not info.capabilities.exact and not info.one_shared and info.name not in UNASKED
    ]
    found = [info.name for info in infos if info.available]
    if not found:
        commands = ", ".join(describe_backend(info.name).pip_command for info in infos)
        raise CrossoverError(f"no library of an approximate index is installed; any of these brings one: {commands}")
    return found, {info.name: info.reason for info in infos if not info.available}


def shared_settings(options: CrossoverOptions, keys: str, dim: int, threads: int) -> dict[str, Any]:
    """What every point depends on."""
    code = hashlib.sha256()
    for name in _CODE:
        code.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return {
        "keys": keys,
        "memories": options.memories,
        "queries": options.queries,
        "recalls": options.recalls,
        "k": options.k,
        "dim": dim,
        "seed": options.seed,
        "device": options.device,
        "threads": threads,
        "torch": library_versions().get("torch"),
        "cpu": describe_machine()["cpu"],
        "core": core_digest(),
        "code": code.hexdigest(),
    }


# In the process of one index -----------------------------------------------------------------------------------------


def climb(task: Mapping[str, Any], tell: Tell) -> None:
    """Measures one index at one size after another, as long as there is something to learn and time.

    Args:
        task: as `_Run` makes it.
        tell: is told 'start' (what), 'done' (point, reused), 'stopped' (reason) and 'failed' (reason).
    """
    values = task["options"]
    options = CrossoverOptions(
        **{**values, **{name: tuple(values[name]) for name in ("queries", "recalls", "backends")}}
    )
    folder, index = Path(task["output"]), str(task["index"])
    source = open_source(options, folder)
    dim = source.dim if options.dim is None else options.dim
    questions = [Question(queries, recall, appends) for queries in options.queries for recall in options.recalls
                 for appends in (False, True)]  # fmt: skip
    asked = queries_needed(options.queries)
    points: list[Mapping[str, Any]] = []
    known = known_points(folder, index, str(task["fingerprint"]))
    ladder = Ladder(
        options.min_keys,
        largest_of(source, options.max_keys, asked),
        options.memories,
        min(options.memories, max(1, torch.get_num_threads())),
        known=frozenset(known),
        fits=lambda size, memories: fits(size, memories, dim, asked),
        may_reduce=lambda size: bool(weighty_queries(points, size, options.queries)),
    )
    warm = False
    deadline = time.perf_counter() + float(task["seconds"])
    while (wanted := ladder.next(deadline - time.perf_counter())) is not None:
        point = known.get(wanted.size)
        if point is None:
            if not warm:
                warm = True
                tell("start", what=f"{index}: warming up")
                warm_up(index, dim, min(options.queries), options.k, options.device)
            tell("start", what=f"{index}, {plural(wanted.memories, 'memory', 'memories')} of {wanted.size:,} keys")
            try:
                point = measure_size(
                    source,
                    index,
                    wanted.size,
                    memories=wanted.memories,
                    queries=options.queries
                    if wanted.memories == options.memories
                    else weighty_queries(points, wanted.size, options.queries),
                    recalls=options.recalls,
                    k=options.k,
                    dim=options.dim,
                    seed=options.seed,
                    device=options.device,
                )
            except Exception as error:
                tell("failed", reason=f"at {wanted.size:,} keys: {type(error).__name__}: {error}")
                return
            point |= {"index": index, "fingerprint": task["fingerprint"], "commit": commit_of()}
            write_json(point_path(folder, index, wanted.size, str(task["fingerprint"])), point)
        tell("done", point=point, reused=wanted.size in known)
        points.append(point)
        ladder.add(rung_of(point, questions))
    tell("stopped", reason=ladder.stopped)


def rung_of(point: Mapping[str, Any], questions: list[Question]) -> Rung:
    """A point as the ladder wants it."""
    ratios = {}
    for question in questions:
        row = row_of(point, Case(question.queries, question.recall, question.appends))
        if row is not None:
            ratios[question] = sized_ratio(point["size"], row, appends=question.appends)
    return Rung(int(point["size"]), int(point["memories"]), float(point["seconds"]), ratios)


def weighty_queries(points: Sequence[Mapping[str, Any]], size: int, queries: Sequence[int]) -> tuple[int, ...]:
    """The numbers of queries that fewer memories than M can be measured with at a size, from the points so far.

    Exact search's time grows with the number of keys; what it took at the largest measured size foretells it.
    """
    found = []
    for number in queries:
        took = [
            (int(point["size"]), row["exact_ms"] / point["memories"])
            for point in points
            for row in point["rows"]
            if row["queries"] == number
        ]
        largest, each_ms = max(took, default=(1, 0.0))
        if each_ms * size / largest >= LEAST_MS:
            found.append(number)
    return tuple(found)


def largest_of(source: KeySource, wanted: int, queries: int) -> int:
    """The largest memory, `wanted` at most, that the source has keys for."""
    held = source.longest(filled(wanted), queries)
    return wanted if held >= filled(wanted) else int(held * wanted / filled(wanted))


def fits(size: int, memories: int, dim: int, queries: int) -> bool:
    """Whether so many memories of a size fit into what the machine has free now."""
    # The keys in the source (twice while they are turned), in exact search, and in the index about twice.
    numbers = memories * dim * (2 * (filled(size) + queries) + 4 * size)
    return 4 * numbers < 0.8 * float(psutil.virtual_memory().available)


def point_path(folder: Path, index: str, size: int, mark: str) -> Path:
    """The file of a point."""
    return folder / POINTS / f"{parse_spec(index)[0]}-{size}-{mark}.json"


def known_points(folder: Path, index: str, mark: str) -> dict[int, dict[str, Any]]:
    """Points that were measured with the same settings, by size."""
    found = {}
    for path in (folder / POINTS).glob(f"{parse_spec(index)[0]}-*-{mark}.json"):
        point = read_json(path)
        if isinstance(point, dict) and point.get("fingerprint") == mark:
            found[int(point["size"])] = point
    return found


__all__ = ["CrossoverError", "CrossoverOptions", "CrossoverResult", "climb", "crossover"]
