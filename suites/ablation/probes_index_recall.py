"""Recall of each index on the keys and queries that a model really makes: normalised ones and others.

Maximum inner product over keys of unequal length is not a nearest-neighbour problem: a long key is near to many queries
and no query is near to a short one, which breaks what graphs are built on (hnswlib's issue 74). Each index with its
default options replays the first memory layer's workload causally and is judged against exact search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import BackendUnavailable, list_backends, make_backend
from recollect.memory_backends.spec import parse_spec
from recollect.model.checkpoints import load_checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.evaluation_text import EvaluationText
from recollect.model.recording import Recording, record
from recollect.model.trunk import compute_trunk

from ..oracle import Judge, Oracle, consult
from .probe_types import ProbeResult

VERSION = 1
OPTIONS: dict[str, Any] = {"specs": [], "memory_size": 0, "k": 0, "rows": 2, "segments": 0}
"""specs: registry strings, empty for each installed index with its default options. memory_size, k: 0 is the model's
own. rows: judge the memories of so many rows of the text, 0 for all. segments: read so many of its segments, 0 for
all."""

_NO_INDEX = ("exact", "faiss-flat", "degraded")
"""Exact by definition, or an instrument."""


def probe(checkpoints: Sequence[Path], text: EvaluationText, options: Mapping[str, Any]) -> ProbeResult:
    """Figures of the last checkpoint: recall and softmax mass of each index, and how much the keys differ in length.

    An index whose library is missing has a row with the reason, and no number.

    Raises:
        ConfigurationError: the model has no memory layer, or its documents are too short for anything to be searched.
        MemoryBackendError: a spec is wrong, or a backend fails.
    """
    settings = {**OPTIONS, **options}
    checkpoint = load_checkpoint(checkpoints[-1])
    config = checkpoint.config
    if not config.memory_layers:
        raise ConfigurationError("recall is about the keys of a memory, and this model has no memory layer")
    if settings["segments"]:
        text = text.only(torch.arange(min(int(settings["segments"]), text.segments)))
    size, k = int(settings["memory_size"]) or config.memory_size, int(settings["k"]) or config.k
    recording = record(checkpoint.model.eval(), compute_trunk(checkpoint.model, text))
    rows_judged = min(int(settings["rows"]) or text.rows, text.rows)
    recording, is_text = _first_rows(recording, rows_judged), text.is_text[:, :rows_judged]
    oracle = consult(recording, size, k)
    if int(oracle.live.max()) <= k:
        raise ConfigurationError(
            f"no memory holds more than k={k} keys when it is searched, so all are found: read more text"
        )
    lengths = recording.keys.norm(dim=-1)
    numbers = {"key_length_variation": float(lengths.std() / lengths.mean())}
    rows: list[dict[str, Any]] = []
    for spec in [str(spec) for spec in settings["specs"]] or default_specs():
        row: dict[str, Any] = {"spec": spec, "memory_size": size, "k": k}
        try:
            recall, mass, best = judge(recording, oracle, spec, is_text)
        except BackendUnavailable as error:
            rows.append({**row, "status": "skipped", "reason": str(error)})
            continue
        rows.append({**row, "status": "ok", "recall_at_k": recall, "softmax_mass": mass, "softmax_mass_exact": best})
        numbers[f"recall_{_label(spec)}"] = recall
        numbers[f"mass_share_{_label(spec)}"] = mass / best
    return ProbeResult(numbers, rows)


def default_specs() -> list[str]:
    """Every index with its default options, whether installed or not."""
    return [info.name for info in list_backends() if info.name not in _NO_INDEX and not info.one_shared]


def _label(spec: str) -> str:
    name, _ = parse_spec(spec)
    own = spec.removeprefix(name).lstrip(":")
    return name.replace("-", "_") + (f"_{own.replace('=', '_').replace(',', '_')}" if own else "")


def _first_rows(recording: Recording, rows: int) -> Recording:
    """The workload of the first rows: few long memories tell more of an index than many short ones."""
    kept = rows * recording.heads
    tensors = {name: getattr(recording, name)[:, :kept].contiguous() for name in ("queries", "keys", "values")}
    return dataclasses.replace(recording, document_starts=recording.document_starts[:, :rows], **tensors)


@torch.inference_mode()
def judge(recording: Recording, oracle: Oracle, spec: str, is_text: Tensor) -> tuple[float, float, float]:
    """Recall at k, softmax mass found, and softmax mass of the true best, of one index on a recording.

    is_text: (S, B, T) bool: the queries that count.
    """
    backend = make_backend(
        spec, num_memories=recording.num_memories, capacity=oracle.capacity, dim=recording.dim, seed=0
    )
    watch = Judge(oracle, is_text)
    for number in range(len(is_text)):
        starting = recording.document_starts[number].repeat_interleave(recording.heads).nonzero().flatten()
        if len(starting):
            backend.reset(starting)
        queries = recording.queries[number]
        watch(backend, queries, oracle.k, backend.search(queries, oracle.k))
        backend.add(recording.keys[number])
    return watch.mean(watch.recall), watch.mean(watch.mass), watch.mean(watch.top_mass)
