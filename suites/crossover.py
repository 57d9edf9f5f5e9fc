"""Search time at memories larger than the model is evaluated with: where an index overtakes exact search here.

Keys and queries are the model's own, of one long stream of text that is not cut at documents. Search alone is timed.

Letters: H memories (one for each head), N keys, Q queries of one segment, D dimension, R rounds, K neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends import make_backend
from recollect.memory_backends.spec import parse_spec
from recollect.model.evaluation_text import EvaluationText, choose_text
from recollect.model.recording import ObservedBackend, record
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import compute_trunk

from .noise import describe_reference, reference_operation_ms
from .oracle import TOLERANCE
from .workload import read_tensors, save_tensors

ROUNDS = 7
"""Segments of queries that are searched in turn; the median counts."""

CHUNK = 512
"""Keys appended at once."""


@dataclass
class KeyStream:
    """What the heads of one row append and ask on a long text.

    Attributes:
        keys: (H, N, D) float32.
        queries: (R, H, Q, D) float32, of the segments after the last key.
    """

    keys: Tensor
    queries: Tensor
    _thresholds: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def thresholds(self, size: int, k: int) -> Tensor:
        """(R, H, Q): the score of each query's k-th best among the newest `size` keys."""
        if (size, k) not in self._thresholds:
            exact = make_backend("exact", num_memories=len(self.keys), capacity=size, dim=self.keys.shape[2])
            exact.add(self.keys[:, -size:])
            found = [exact.search(queries, k).scores[..., min(k, size) - 1] for queries in self.queries]
            self._thresholds[size, k] = torch.stack(found)
        return self._thresholds[size, k]


def choose_stream_text(documents: TokenizedDocuments, *, segment_length: int, keys: int) -> EvaluationText:
    """Text for `keys` keys and the queries after them, or as much as there is."""
    text = choose_text(documents, rows=1, segment_length=segment_length, max_tokens=None)
    # The last segment of a document is padded: only whole ones go into the stream.
    whole = (text.lengths[:, 0] == segment_length).nonzero().flatten()
    return text.only(whole[: math.ceil(keys / segment_length) + ROUNDS])


def keys_in(text: EvaluationText) -> int:
    """How many keys the stream of a text holds."""
    return max(0, text.segments - ROUNDS) * text.segment_length


@torch.no_grad()
def record_stream(path: Path, model: MemorizingTransformer, text: EvaluationText) -> None:
    """Records what the heads append and ask on a text of one row, and writes it."""
    recording = record(model, compute_trunk(model, text))
    held = max(0, text.segments - ROUNDS)
    stream = recording.keys[:held].transpose(0, 1).flatten(1, 2)
    save_tensors(path, {"keys": stream, "queries": recording.queries[held:]})


def load_stream(path: Path) -> KeyStream:
    """Reads what `record_stream` wrote."""
    return KeyStream(**read_tensors(path))


@torch.no_grad()
def measure_crossover(
    stream: KeyStream, spec: str, memory_size: int, *, k: int, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Fills a memory of `memory_size` keys and times searches of one segment's queries.

    Returns:
        One row of crossover.json.

    Raises:
        MemoryBackendError: the backend refuses the spec or fails.
        ValueError: the stream is too short.
    """
    memories, held, dim = stream.keys.shape
    if held < memory_size:
        raise ValueError(f"the stream holds {held} keys, fewer than {memory_size}")
    made = make_backend(spec, num_memories=memories, capacity=memory_size, dim=dim, seed=seed, device=device)
    backend = ObservedBackend(made)
    keys = stream.keys[:, held - memory_size :].to(device)
    for first in range(0, memory_size, CHUNK):
        backend.add(keys[:, first : first + CHUNK])
    made.wait()
    made.search(stream.queries[0].to(device), k)
    recalls, references = [], []
    for queries, threshold in zip(stream.queries, stream.thresholds(memory_size, k), strict=True):
        references.append(reference_operation_ms())
        result = backend.search(queries.to(device), k)
        found = made.gather_keys(result.slots).cpu()
        scores = torch.einsum("mqd,mqkd->mqk", queries, found)
        slack = TOLERANCE * threshold.abs().clamp(min=1.0)
        hits = (result.slots.cpu() >= 0) & (scores >= (threshold - slack)[..., None])
        recalls.append(float((hits.sum(-1) / min(k, memory_size)).clamp(max=1.0).mean()))
    search_ms = 1000 * np.asarray(backend.search_seconds)
    reference = describe_reference(references)
    built = made.stats().build_seconds
    made.close()
    return {
        "spec": made.spec,
        "backend": parse_spec(spec)[0],
        "memory_size": memory_size,
        "num_memories": memories,
        "queries": int(stream.queries.shape[2]),
        "k": k,
        "search_ms": float(np.median(search_ms)),
        "search_ms_low": float(np.percentile(search_ms, 25)),
        "search_ms_high": float(np.percentile(search_ms, 75)),
        "recall_at_k": float(np.mean(recalls)),
        "reference_ms": reference.p50_ms,
        "noisy": reference.noisy,
        "build_seconds": built,
        "append_us_per_key": 1e6 * sum(backend.append_seconds) / sum(backend.appended),
        "seed": seed,
    }
