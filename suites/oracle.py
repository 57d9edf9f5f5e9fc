"""What exact search would have found at every step, and how near a backend's answers come to it.

Letters: S segments, B batch rows, H heads, M memories (M = B*H), T tokens of a segment, K neighbours, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, SearchResult, make_backend
from recollect.model.recording import Recording

TOLERANCE = 1e-5
"""Two computations of one inner product of vectors of length 1 differ by less; larger vectors scale it."""


@dataclass(frozen=True)
class Oracle:
    """The exact answers to a recording's queries at one memory size, in the form that judging needs.

    Attributes:
        capacity: C.
        k: K.
        scale: (H,) the layer's learned logit scale.
        live: (S, M) int64, keys in each memory when the segment is searched.
        threshold: (S, M, T) float32, score of the K-th best key (of the last key where fewer live).
        log_sum: (S, M, T) float32, logarithm of the softmax denominator over all live keys.
        top_mass: (S, M, T) float32, share of the softmax that the K best keys hold; 0 where the memory is empty.
    """

    capacity: int
    k: int
    scale: Tensor
    live: Tensor
    threshold: Tensor
    log_sum: Tensor
    top_mass: Tensor

    def as_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        return {name: getattr(self, name) for name in ("scale", "live", "threshold", "log_sum", "top_mass")}


@torch.inference_mode()
def consult(
    recording: Recording, capacity: int, k: int, *, device: str = "cpu", on_segment: Callable[[int], None] | None = None
) -> Oracle:
    """Replays a recording causally against exact search."""
    segments, memories, tokens, dim = recording.queries.shape
    heads = recording.heads
    exact = make_backend("exact", num_memories=memories, capacity=capacity, dim=dim, device=device)
    scale = recording.scale.repeat(memories // heads).to(exact.device)
    live = torch.zeros(segments, memories, dtype=torch.int64)
    threshold = torch.full((segments, memories, tokens), -torch.inf)
    log_sum = torch.full((segments, memories, tokens), -torch.inf)
    top_mass = torch.zeros(segments, memories, tokens)
    for number in range(segments):
        starting = recording.document_starts[number].repeat_interleave(heads).nonzero().flatten()
        if len(starting):
            exact.reset(starting)
        queries = recording.queries[number].to(exact.device)
        live[number] = exact.lengths
        if int(exact.lengths.max()):
            best = exact.search(queries, k)
            last = (live[number].clamp(max=k) - 1).clamp(min=0)[:, None, None].expand(-1, tokens, 1)
            threshold[number] = best.scores.cpu().gather(2, last)[..., 0]
            best_sum = (best.scores * scale[:, None, None]).logsumexp(-1)
            for memory in range(memories):
                keys = exact.ring.keys[memory, : int(live[number, memory])]
                if len(keys):
                    log_sum[number, memory] = (queries[memory] * scale[memory] @ keys.T).logsumexp(-1).cpu()
            # An empty memory gives -inf minus -inf.
            top_mass[number] = (best_sum.cpu() - log_sum[number]).exp().nan_to_num(0.0).clamp(max=1.0)
        exact.add(recording.keys[number].to(exact.device))
        if on_segment is not None:
            on_segment(number + 1)
    return Oracle(capacity, k, recording.scale, live, threshold, log_sum, top_mass)


def shares_found(
    backend: MemoryBackend,
    queries: Tensor,
    slots: Tensor,
    k: int,
    threshold: Tensor,
    live: Tensor,
    log_sum: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Judges one search: the share of the true neighbours, and of the exact softmax, that was found.

    Args:
        backend: what was searched, unchanged since.
        queries: (M, T, D).
        slots: (M, T, K) its answer.
        k: K.
        threshold: (M, T) score of the K-th best key.
        live: (M,) keys in each memory.
        log_sum: (M, T) logarithm of the softmax denominator; None where no mass is wanted.
        scale: (M,) of the logits; None likewise.

    Returns:
        Recall (M, T) and softmax mass (M, T) float64, meaningless where a memory is empty.
    """
    keys = backend.gather_keys(slots)
    scores = torch.einsum("mqd,mqkd->mqk", queries.float(), keys.float().to(queries.device)).cpu()
    slots = slots.cpu()
    # A key counts once, however often it is returned.
    ordered, order = slots.sort(dim=-1)
    repeated = torch.zeros_like(slots, dtype=torch.bool)
    repeated.scatter_(2, order[..., 1:], ordered[..., 1:] == ordered[..., :-1])
    valid = (slots >= 0) & ~repeated
    slack = TOLERANCE * threshold.abs().clamp(min=1.0)
    wanted = live.clamp(max=k)[:, None]
    hits = (valid & (scores >= (threshold - slack)[..., None])).sum(-1).minimum(wanted)
    recall = hits.double() / wanted.clamp(min=1)
    if log_sum is None or scale is None:
        return recall, None
    found = (scores * scale[:, None, None]).masked_fill(~valid, -torch.inf).logsumexp(-1)
    return recall, (found - log_sum).double().exp().clamp(max=1.0)


class Judge:
    """Watches a backend's searches, segment after segment, and compares what it finds with the oracle.

    Given to `ObservedBackend(on_search=judge)`: it is called between search and append, so that slots still answer with
    the keys that were searched, and outside the time that is taken.

    Attributes:
        recall: (S, B) float64, mean recall at k of the row's queries; NaN where there is nothing to find.
        mass: (S, B) float64, mean share of the exact softmax that the found keys hold.
        top_mass: (S, B) float64, the same for the true best keys.
        weight: (S, B) int64, queries that the means are over: those of text, with a memory that holds something.
    """

    def __init__(self, oracle: Oracle, is_text: Tensor) -> None:
        self.oracle = oracle
        self.is_text = is_text
        segments, rows, _ = is_text.shape
        self.recall = torch.full((segments, rows), torch.nan, dtype=torch.float64)
        self.mass = self.recall.clone()
        self.top_mass = self.recall.clone()
        self.weight = torch.zeros(segments, rows, dtype=torch.int64)
        self.segment = 0

    def __call__(self, backend: MemoryBackend, queries: Tensor, k: int, result: SearchResult) -> None:
        """Judges one search of queries (M, T, D)."""
        number, self.segment = self.segment, self.segment + 1
        oracle = self.oracle
        live = oracle.live[number]
        if not bool((backend.lengths == live).all()):
            held = backend.lengths.tolist()
            raise RuntimeError(f"the memory holds {held} keys where the recording says {live.tolist()}")
        if not int(live.max()):
            return
        rows = self.is_text.shape[1]
        heads = len(live) // rows
        recall, mass = shares_found(
            backend,
            queries,
            result.slots,
            k,
            oracle.threshold[number],
            live,
            oracle.log_sum[number],
            oracle.scale.repeat(rows),
        )
        assert mass is not None
        counted = self.is_text[number].repeat_interleave(heads, dim=0) & (live > 0)[:, None]
        self.weight[number] = counted.view(rows, -1).sum(-1)
        best = oracle.top_mass[number].double()
        for target, values in ((self.recall, recall), (self.mass, mass), (self.top_mass, best)):
            sums = values.masked_fill(~counted, 0.0).view(rows, -1).sum(-1)
            target[number] = sums / self.weight[number]

    def mean(self, figure: Tensor, where: Tensor | None = None) -> float:
        """The mean of `recall`, `mass` or `top_mass` over queries, all or those marked in `where` (S, B) bool."""
        weight = self.weight if where is None else self.weight * where
        total = int(weight.sum())
        if not total:
            return float("nan")
        return float((figure.nan_to_num(0.0) * weight).sum()) / total
