"""Answers in the layout in which ann-benchmarks keeps its results, so that its plots can show them beside its own.

    results/DATASET/K/ALGORITHM-batch/ARGUMENTS.hdf5

Copied into a checkout of ann-benchmarks that has the data set (`data/DATASET.hdf5`), `python plot.py --dataset DATASET
--count K --batch` draws them. A file holds `times` (Q,) in seconds, `neighbors` (Q, K) with -1 and `distances` (Q, K)
with infinity where one is missing, and the attributes that its plots read (`ann_benchmarks/results.py` and
`ann_benchmarks/plotting/metrics.py` there).
"""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np

from recollect.memory_backends.atomic import atomic_file

from .ann_measure import AnnRow, Answers

PREFIX = "recollect-"
"""Before the name of a backend, so that it is not taken for the run of the same library over there."""


def result_path(output: Path, row: AnnRow) -> Path:
    """Where the answers of a row stand below `output`."""
    arguments = re.sub(r"\W+", "_", row.spec).strip("_")
    return output / "results" / row.dataset / str(row.k) / f"{PREFIX}{row.backend}-batch" / f"{arguments}.hdf5"


def write_result(output: Path, row: AnnRow, answers: Answers) -> Path:
    """Writes the answers of a measured row; whole or not at all."""
    path = result_path(output, row)
    queries, size = len(answers.found), int(row.batch_size or 1)
    # A query's time is its share of its batch's, and the last batch may be smaller.
    batches = np.minimum(size, queries - size * np.arange(len(answers.batch_seconds)))
    times = np.repeat(answers.batch_seconds / batches, batches)
    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(
            algo=f"{PREFIX}{row.backend}",
            batch_mode=True,
            best_search_time=float(answers.batch_seconds.sum()) / queries,
            build_time=row.build_seconds,
            candidates=float((answers.found >= 0).sum(1).mean()),
            count=row.k,
            dataset=row.dataset,
            distance=row.distance,
            expect_extra=False,
            index_size=(int(row.key_bytes or 0) + int(row.index_bytes or 0)) / 1024,
            name=f"{PREFIX}{row.spec}",
            run_count=row.runs,
        )
        file.create_dataset("times", data=times.astype(np.float32))
        file.create_dataset("neighbors", data=answers.found.astype(np.int32))
        file.create_dataset("distances", data=answers.distances.astype(np.float32))
    return path
