"""Backends run on files of ann-benchmarks and VIBE: what `recollect ann-benchmarks` does.

Each index is built and searched in a process of its own, so that one library's crash takes no other along and memory
is given back. A row is kept as soon as it is measured: the same call goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recollect.model.ann_benchmarks import AnnBenchmarkFile
from recollect.model.documents import CorpusError

from .ann_measure import AnnRow, AnnSettings, blank_row, expand, measure_specs
from .ann_results import result_path, write_result
from .environment import usable_cores
from .row_process import OnProgress, measure_rows, progress_events
from .row_store import RowStore
from .sharing import build_key

TIMEOUT = 6 * 3600.0
"""Seconds without a finished row after which an index is given up."""


@dataclass(frozen=True)
class AnnRunOptions:
    """What to run.

    Attributes:
        files: HDF5 files of ann-benchmarks or VIBE.
        backends: registry strings; search options that one leaves open run through its backend's curve.
        sweep: False measures the strings as they are.
        output: folder of rows, results and answers.
        settings: how each is measured.
        threads: of torch and the libraries; None is every core that may be used.
        timeout: seconds without a finished row.
    """

    files: Sequence[Path]
    backends: Sequence[str]
    sweep: bool = True
    output: Path = Path("out/ann-benchmarks")
    settings: AnnSettings = field(default_factory=AnnSettings)
    threads: int | None = None
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class AnnRunResult:
    """What a run left behind.

    Attributes:
        output: the folder.
        rows: of every file and spec of this call, in its order.
        measured, reused: how many of them this call measured, and found measured.
        others: further rows of the same settings in the folder, which stand in its results too.
        left_out: rows in the folder of other settings, another machine or other code, which do not.
    """

    output: Path
    rows: list[AnnRow]
    measured: int
    reused: int
    others: int
    left_out: int


def run_ann_benchmarks(options: AnnRunOptions, on_progress: OnProgress | None = None) -> AnnRunResult:
    """Measures every spec on every file, but for what the folder holds already.

    Args:
        on_progress: is told what is done, how much of it, and how much there is.

    Raises:
        CorpusError: a file cannot be used, or two have the same name.
        MemoryBackendError: a registry string is wrong.
        OSError: nothing can be written.
    """
    tell = on_progress or (lambda what, done, total: None)
    specs = expand(options.backends, sweep=options.sweep)
    _check_names(options.files)
    threads = options.threads or usable_cores()
    store = RowStore(options.output, "ann-benchmarks", dataclasses.asdict(options.settings), threads=threads)
    marks: list[str] = []
    measured = 0
    for path in options.files:
        blanks, about = _describe(path, specs, options, threads)
        of = {spec: store.mark(spec, about) for spec in specs}
        marks += of.values()
        for _, group in itertools.groupby(specs, key=build_key):
            # Answers that were removed or never written are wanted again.
            missing = [
                spec
                for spec in group
                if not store.has(of[spec]) or not result_path(options.output, blanks[spec]).is_file()
            ]

            def keep(row: AnnRow, of: dict[str, str] = of) -> None:
                nonlocal measured
                measured += row.status == "ok"
                store.save(of[row.spec], row.as_json())
                _write(store)

            if missing:
                task = {
                    "kind": "ann",
                    "file": str(path.expanduser().resolve()),
                    "output": str(options.output),
                    "settings": dataclasses.asdict(options.settings),
                    "specs": missing,
                }
                one = blanks[missing[0]]
                measure_rows(
                    task,
                    one.backend,
                    [blanks[spec] for spec in missing],
                    threads=threads,
                    log=options.output / "logs" / f"{one.dataset}-{one.backend}.log",
                    timeout=options.timeout,
                    keep=keep,
                    tell=tell,
                )
    everything = _write(store)
    rows = [AnnRow.from_json(store.load(mark) or {}) for mark in marks]
    reused = sum(row.status == "ok" for row in rows) - measured
    return AnnRunResult(options.output, rows, measured, reused, everything - len(set(marks)), store.left_out)


def on_front(rows: Sequence[AnnRow]) -> list[AnnRow]:
    """Of each backend the measured rows that no other of it beats in both speed and recall, by rising recall."""
    front: list[AnnRow] = []
    for backend in dict.fromkeys(row.backend for row in rows):
        best = -1.0
        points = [row for row in rows if row.backend == backend and row.status == "ok"]
        points.sort(key=lambda row: (row.batch_queries_per_second or 0.0, row.recall_ann_benchmarks or 0.0))
        for row in reversed(points):
            if (row.recall_ann_benchmarks or 0.0) > best:
                best = row.recall_ann_benchmarks or 0.0
                front.append(row)
    return front


def _check_names(files: Sequence[Path]) -> None:
    names = [path.stem for path in files]
    for name in names:
        if names.count(name) > 1:
            raise CorpusError(f"two files are called {name!r}, and results go by the name: rename one")


def _describe(
    path: Path, specs: Sequence[str], options: AnnRunOptions, threads: int
) -> tuple[dict[str, AnnRow], dict[str, Any]]:
    """Rows before anything is measured, by spec, and what identifies the file."""
    with AnnBenchmarkFile(path) as file:
        file.check_k(options.settings.k)
        blanks = {spec: dataclasses.replace(blank_row(file, spec, options.settings), threads=threads) for spec in specs}
        about = {
            "dataset": file.name,
            "distance": file.distance,
            "shape": [file.keys, file.queries, file.dimension, file.neighbors_known],
            "bytes": file.path.stat().st_size,
        }
    return blanks, about


def work(task: dict[str, Any], tell: Callable[..., None]) -> None:
    """The part that runs in a process of its own: one file, specs of one index."""
    output = Path(task["output"])
    try:
        with AnnBenchmarkFile(task["file"]) as file:
            for row, answers in measure_specs(
                file, task["specs"], AnnSettings(**task["settings"]), progress_events(tell)
            ):
                if answers is not None:
                    write_result(output, row, answers)
                tell("done", row=row.as_json())
    except OSError:
        raise
    except Exception as error:
        tell("failed", reason=f"{type(error).__name__}: {error}")


def _write(store: RowStore) -> int:
    """Writes the results of all rows of these settings; returns how many they are."""
    rows = sorted(store.rows(), key=lambda row: (row["dataset"], row["backend"], row["recall_ann_benchmarks"] or 0.0))
    store.write_results(rows, rows)
    return len(rows)
