"""A memory of a trace at one moment as a file of ann-benchmarks, so that any index can be tried on attention's keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.model.ann_benchmarks import AnnBenchmark, write_ann_benchmarks
from recollect.model.documents import CorpusError
from recollect.model.trace import Trace


def export_ann_benchmarks(
    trace: Trace,
    path: str | Path,
    memory: int,
    k: int = 100,
    *,
    memory_size: int | None = None,
    query_steps: int = 4,
    metric: str = "inner_product",
    augment: bool = True,
) -> AnnBenchmark:
    """Writes one memory at one moment as a file of ann-benchmarks, with the ground truth by brute force.

    The moment is `query_steps` steps before the end of the row's longest document. `train` are the memory's keys of
    that document up to then, in the order in which they came (the newest `memory_size` of them), `test` the queries of
    the steps that follow: every query comes after every key, as in the model. Padding is left out.

    Raises CorpusError for a memory that is not there, and for a document too short for k keys and a query.
    """
    if not 0 <= memory < trace.num_memories:
        raise CorpusError(f"memory is {memory}: the trace has memories 0 to {trace.num_memories - 1}")
    row = memory // trace.heads
    first, last = _longest_document(trace, row)
    moment = max(last - query_steps, first)
    memory_size = trace.memory_size if memory_size is None else memory_size
    train, test = (
        _vectors(trace, trace.keys, memory, first, moment),
        _vectors(trace, trace.queries, memory, moment, last),
    )
    train = train[-memory_size:] if memory_size else train
    if len(train) < max(k, 1) or not len(test):
        raise CorpusError(
            f"memory {memory} holds {len(train)} keys before its last {query_steps} steps of text: too few for k {k}; "
            "record longer documents or ask for a smaller k"
        )
    place = {"memory": memory, "first_step": first, "first_query_step": moment, "last_step": last, **trace.metadata}
    place |= {"layer": trace.layer, "row": row, "head": memory % trace.heads}
    steps = {
        "train_steps": _steps(trace, memory, first, moment)[-len(train) :],
        "test_steps": _steps(trace, memory, moment, last),
    }
    return write_ann_benchmarks(path, train, test, k, metric=metric, augment=augment, metadata=place, beside=steps)


def export_every_memory(
    traces: Sequence[Trace],
    folder: str | Path,
    k: int = 100,
    *,
    memory_size: int | None = None,
    query_steps: int = 4,
    augment: bool = True,
    on_memory: Callable[[int, int], None] | None = None,
) -> tuple[list[Path], list[str]]:
    """Writes every memory of every layer into a folder, one file of ann-benchmarks each.

    Arguments as for `export_ann_benchmarks`. on_memory: told how many of how many are done.

    Returns the files, and for every memory that could not be written the reason.
    """
    files, reasons = [], []
    total = sum(trace.num_memories for trace in traces)
    done = 0
    for trace in traces:
        for memory in range(trace.num_memories):
            row, head = divmod(memory, trace.heads)
            kind = f"{trace.dim + 1}-angular" if augment else f"{trace.dim}-ip"
            path = Path(folder) / f"attention-layer{trace.layer or 0}-row{row}-head{head}-{kind}.hdf5"
            try:
                export_ann_benchmarks(
                    trace, path, memory, k, memory_size=memory_size, query_steps=query_steps, augment=augment
                )
                files.append(path)
            except CorpusError as error:
                reasons.append(f"layer {trace.layer or 0}: {error}")
            done += 1
            if on_memory is not None:
                on_memory(done, total)
    return files, reasons


def _longest_document(trace: Trace, row: int) -> tuple[int, int]:
    """First step and end of the row's longest run of text without a document start in it."""
    starts, lengths = trace.document_starts[:, row].tolist(), trace.text_lengths[:, row].tolist()
    best, first = (0, 0), 0
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if start:
            first = number
        if length and number + 1 - first > best[1] - best[0]:
            best = (first, number + 1)
    return best


def _vectors(trace: Trace, vectors: Tensor, memory: int, first: int, last: int) -> NDArray[np.float32]:
    """(N, D): the vectors of one memory in the steps from `first` to before `last`, padding left out."""
    found: NDArray[np.float32] = vectors[first:last, memory][_is_text(trace, memory, first, last)].float().numpy()
    return found


def _steps(trace: Trace, memory: int, first: int, last: int) -> NDArray[np.int64]:
    """(N,): the step of each of those vectors."""
    text = _is_text(trace, memory, first, last)
    found: NDArray[np.int64] = torch.arange(first, last)[:, None].expand_as(text)[text].numpy()
    return found


def _is_text(trace: Trace, memory: int, first: int, last: int) -> Tensor:
    lengths = trace.text_lengths[first:last, memory // trace.heads]
    return torch.arange(trace.keys.shape[2]) < lengths[:, None]
