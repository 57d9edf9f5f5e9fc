"""Answers in the layout in which ann-benchmarks keeps its results, so that its plots can show them beside its own.

    results/DATASET/K/ALGORITHM-batch/ARGUMENTS.hdf5     all queries at once, or in batches
    results/DATASET/K/ALGORITHM/ARGUMENTS.hdf5           a query at a time, where all of them were searched so

Copied into a checkout of ann-benchmarks that has the data set (`data/DATASET.hdf5`), `python plot.py --dataset DATASET
--count K` draws them, with `--batch` those of batches. A file holds `times` (Q,) in seconds, `neighbors` (Q, K) with -1
and `distances` (Q, K) with infinity where one is missing, and the attributes that its plots read
(`ann_benchmarks/results.py` and `ann_benchmarks/plotting/metrics.py` there).
"""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from recollect.memory_backends.atomic import atomic_file

from .ann_measure import AnnRow, Answers

PREFIX = "recollect-"
"""Before the name of a backend, so that it is not taken for the run of the same library over there."""


def result_path(output: Path, row: AnnRow, *, batch: bool = True) -> Path:
    """Where the answers of a row stand below `output`."""
    arguments, mode = re.sub(r"\W+", "_", row.spec).strip("_"), "-batch" if batch else ""
    return output / "results" / row.dataset / str(row.k) / f"{PREFIX}{row.backend}{mode}" / f"{arguments}.hdf5"


def write_result(output: Path, row: AnnRow, answers: Answers) -> list[Path]:
    """Writes the answers of a measured row, each file whole or not at all; returns the files.

    They are those of the batches, and those of single queries where every query was searched alone.
    """
    queries, size = len(answers.found), int(row.batch_size or 1)
    # A query's time is its share of its batch's, and the last batch may be smaller.
    batches = np.minimum(size, queries - size * np.arange(len(answers.batch_seconds)))
    times = np.repeat(answers.batch_seconds / batches, batches)
    written = [_write(output, row, times, answers.found, answers.distances, batch=True)]
    if len(answers.single_found) == queries:
        alone = answers.single_seconds, answers.single_found, answers.single_distances
        written.append(_write(output, row, *alone, batch=False))
    return written


def _write(
    output: Path,
    row: AnnRow,
    times: NDArray[np.float64],
    found: NDArray[np.int64],
    distances: NDArray[np.float64],
    *,
    batch: bool,
) -> Path:
    path = result_path(output, row, batch=batch)
    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(
            algo=f"{PREFIX}{row.backend}",
            batch_mode=batch,
            best_search_time=float(times.mean()),
            build_time=row.build_seconds,
            candidates=float((found >= 0).sum(1).mean()),
            count=row.k,
            dataset=row.dataset,
            distance=row.distance,
            expect_extra=False,
            index_size=(int(row.key_bytes or 0) + int(row.index_bytes or 0)) / 1024,
            name=f"{PREFIX}{row.spec}",
            run_count=row.runs if batch else 1,
        )
        file.create_dataset("times", data=times.astype(np.float32))
        file.create_dataset("neighbors", data=found.astype(np.int32))
        file.create_dataset("distances", data=distances.astype(np.float32))
    return path
