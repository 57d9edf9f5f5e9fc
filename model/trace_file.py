"""Traces in a file: HDF5, a format with a version, which numpy and h5py alone can read.

    attributes          format 'recollect trace', version 2, metric 'inner_product', memory_size C, k K, metadata (JSON)
    document_starts     (S, B) bool    row b begins a document with step s: its memories are emptied before the search
    lengths             (S, B) int64   how many of the T tokens of the step are text; the rest pads a document's end
    first_key           (S, B) int64   the oldest key that the memories of row b hold when step s searches
    layers/NUMBER/      a group for each memory layer, with the attributes layer and heads
        queries         (S, M, T, D) float32, searched at step s
        keys, values    (S, M, T, D) float32, appended after the search of step s
        scale           (H,) float32   times an inner product gives the layer's logit
        neighbors       (S, M, T, K) int32   numbers of the true nearest keys, nearest first; -1 where there are fewer
        scores          (S, M, T, K) float32 their inner products; -inf where there are fewer

Memory m belongs to row m // H and head m % H. Key number n of a memory is the n-th that came, from 0, over the whole
trace: it came with step n // T and is `keys[n // T, m, n % T]`. The truth is causal: a query of step s finds keys from
`first_key[s, row]` to before s * T. Resets and evictions (the oldest key beyond C) are in `first_key` both.

Version 1 had one layer, its arrays at the root, and no truth; it is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends import make_backend
from recollect.memory_backends.atomic import atomic_file
from recollect.model.documents import CorpusError
from recollect.model.trace import NEIGHBORS, Trace, replay

FORMAT = "recollect trace"
VERSION = 2
READABLE = (1, 2)
VECTORS = ("queries", "keys", "values")
SHARED = ("document_starts", "lengths")


def causal_neighbors(trace: Trace, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The true neighbours of every step's queries, by exact search through the trace.

    Yields for each step the numbers of the keys (M, T, k) int64 and their scores (M, T, k) float32, best first; where a
    memory holds fewer keys than k, number -1 and score -inf.
    """
    tokens, capacity = int(trace.queries.shape[2]), trace.capacity
    backend = make_backend("exact", num_memories=trace.num_memories, capacity=capacity, dim=trace.dim)
    begun = torch.zeros(trace.rows, dtype=torch.int64)
    for step, found in replay(trace, backend, k):
        begun[step.document_starts] = step.number
        since = ((step.number - begun) * tokens).repeat_interleave(trace.heads)[:, None, None]
        # Of the keys since the reset with this slot, the newest is alive.
        newest = since - 1 - (since - 1 - found.slots) % capacity
        number = newest + (begun * tokens).repeat_interleave(trace.heads)[:, None, None]
        yield torch.where(found.slots >= 0, number, -1), found.scores


def save_traces(
    path: str | Path,
    traces: Sequence[Trace],
    *,
    k: int = NEIGHBORS,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the layers of one recording to one file, whole or not at all, with the k true neighbours of each query.

    on_step: told for how many of how many steps, over all layers, the neighbours are known.

    Raises CorpusError for no trace, two of the same layer, or some that are not of the same text and memory size.
    """
    if not traces:
        raise CorpusError("there is no trace to save")
    one = traces[0]
    for trace in traces:
        same = torch.equal(trace.document_starts, one.document_starts) and torch.equal(
            trace.text_lengths, one.text_lengths
        )
        if not same or (trace.capacity, trace.queries.shape[2]) != (one.capacity, one.queries.shape[2]):
            raise CorpusError("layers in one file are of one recording: the same text, segments and memory size")
    names = [_name(trace) for trace in traces]
    if len(set(names)) < len(names):
        raise CorpusError(f"layers {', '.join(names)}: each can stand in a file only once")
    if k < 1:
        raise CorpusError(f"k is {k}: want at least 1 neighbour")
    done, total = 0, sum(len(trace) for trace in traces)
    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(format=FORMAT, version=VERSION, metric="inner_product", memory_size=one.capacity, k=k)
        file.attrs["metadata"] = json.dumps(dict(one.metadata))
        file.create_dataset("document_starts", data=one.document_starts.numpy())
        file.create_dataset("lengths", data=one.text_lengths.numpy())
        file.create_dataset("first_key", data=one.first_keys.numpy())
        for name, trace in zip(names, traces, strict=True):
            group = file.create_group(f"layers/{name}")
            group.attrs.update(layer=int(name), heads=trace.heads)
            for vectors in VECTORS:
                group.create_dataset(vectors, data=getattr(trace, vectors).detach().float().cpu().numpy())
            group.create_dataset("scale", data=trace.logit_scale.detach().cpu().numpy())
            shape = (len(trace), trace.num_memories, trace.queries.shape[2], k)
            neighbors = group.create_dataset("neighbors", shape, dtype="i4")
            scores = group.create_dataset("scores", shape, dtype="f4")
            for step, (numbers, products) in enumerate(causal_neighbors(trace, k)):
                neighbors[step], scores[step] = numbers.numpy(), products.numpy()
                done += 1
                if on_step is not None:
                    on_step(done, total)


def _name(trace: Trace) -> str:
    return str(0 if trace.layer is None else trace.layer)


def load_trace(path: str | Path, layer: int | None = None) -> Trace:
    """Reads one layer of a trace, the lowest where none is named.

    Raises CorpusError for a missing, damaged or foreign file, one of an unknown version, or a layer it lacks.
    """
    return _read(path, lambda file: [_layer(file, layer, path)])[0]


def load_traces(path: str | Path) -> list[Trace]:
    """Reads every layer of a trace, the lowest first. Raises as `load_trace`."""
    return _read(path, lambda file: [_layer(file, layer, path) for layer in _layers(file)])


def _read(path: str | Path, read: Callable[[Any], list[Trace]]) -> list[Trace]:
    path = Path(path).expanduser()
    if not path.is_file():
        raise CorpusError(f"no such trace: {str(path)!r}")
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise CorpusError(
                    f"{path} is HDF5, but no trace of recollect; load_ann_benchmarks reads ann-benchmarks'"
                )
            version = file.attrs.get("version")
            if version not in READABLE:
                raise CorpusError(
                    f"{path} is a trace of version {version}; this reads {' and '.join(map(str, READABLE))}: "
                    "use the recollect that wrote it, or record it anew with `recollect trace`"
                )
            return read(file)
    except CorpusError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorpusError(
            f"{path} cannot be read as a trace ({error}): is it cut short, or another kind of file?"
        ) from error


def _layers(file: Any) -> list[int | None]:
    if file.attrs["version"] == 1:
        return [None]
    return [*sorted(int(name) for name in file["layers"])]


def _layer(file: Any, layer: int | None, path: str | Path) -> Trace:
    def tensor(group: Any, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(group[name]))

    known = _layers(file)
    if layer is not None and layer not in known:
        has = "one layer without a number" if known == [None] else f"layers {', '.join(map(str, known))}"
        raise CorpusError(f"{path} has {has}, and no layer {layer}")
    chosen = known[0] if layer is None else layer
    group = file if chosen is None else file[f"layers/{chosen}"]
    queries, keys, values = (tensor(group, name) for name in VECTORS)
    document_starts, lengths = (tensor(file, name) for name in SHARED)
    metadata = json.loads(file.attrs["metadata"])
    size = None if chosen is None else int(file.attrs["memory_size"])
    about: dict[str, Any] = {"metadata": metadata, "layer": chosen, "memory_size": size}
    return Trace(queries, keys, values, document_starts, lengths, tensor(group, "scale"), **about)
