"""What the conformance suite judges by: a memory in plain NumPy, a fair recall, and a hypothesis state machine.

Nothing here shares code with `KeyRing` or with a backend: it is the contract written a second time, for reading rather
than for speed. Letters as in `base`: M memories, C capacity, T new keys, Q queries, D dimension, K neighbours.

Only `recollect.memory_backends.testing` imports this file; it needs hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from numpy.typing import NDArray
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend, SearchResult

Floats = NDArray[np.float64]
TOLERANCE = 1e-4
"""By how much, relative to the largest score of a query (at least 1), float32 may differ from the oracle's float64."""


class OracleMemory:
    """M first-in first-out memories as dictionaries from slot to key, searched by brute force in float64.

    Args:
        num_memories, capacity, metric: as the backend's.
        rounding: what storing does to a key (..., D), or to its unit vector under the cosine; None where nothing.
    """

    def __init__(
        self, num_memories: int, capacity: int, metric: str, rounding: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.capacity = capacity
        self.metric = metric
        self.rounding = rounding
        self.keys: list[dict[int, Floats]] = [{} for _ in range(num_memories)]
        self.totals = [0] * num_memories

    def add(self, keys: Tensor, memories: Sequence[int]) -> NDArray[np.int64]:
        """Adds keys (M', T, D), and returns the slots (M', T) that the contract gives them."""
        if self.rounding is not None:
            keys = self.rounding(torch.nn.functional.normalize(keys, dim=-1) if self.metric == "cosine" else keys)
        slots = np.full(keys.shape[:2], -1)
        for row, memory in enumerate(memories):
            for position, key in enumerate(keys[row].double().cpu().numpy()):
                slot = self.totals[memory] % self.capacity
                self.keys[memory][slot] = key
                self.totals[memory] += 1
                if position >= keys.shape[1] - self.capacity:
                    slots[row, position] = slot
        return slots

    def reset(self, memories: Sequence[int]) -> None:
        """Empties memories."""
        for memory in memories:
            self.keys[memory] = {}
            self.totals[memory] = 0

    def length(self, memory: int) -> int:
        """How many keys a memory holds."""
        return len(self.keys[memory])

    def scores(self, queries: Tensor, memory: int) -> Floats:
        """(Q, C) true scores of queries (Q, D) against one memory by slot; -inf where a slot is empty."""
        result = np.full((len(queries), self.capacity), -np.inf)
        asked = queries.double().cpu().numpy()
        for slot, key in self.keys[memory].items():
            if self.metric == "l2":
                result[:, slot] = -((asked - key) ** 2).sum(-1)
            else:
                result[:, slot] = asked @ key
                if self.metric == "cosine":
                    # What is stored of a unit vector counts as one.
                    norms = np.linalg.norm(asked, axis=-1) * (1.0 if self.rounding else np.linalg.norm(key))
                    result[:, slot] /= np.where(norms > 0, norms, 1)
        return result


class Recall:
    """Counts true neighbours found, by score: a key as good as the k-th best true one is a true neighbour."""

    def __init__(self) -> None:
        self.found = 0
        self.wanted = 0

    def count(self, slots: NDArray[np.int64], truth: Floats, k: int) -> None:
        """Counts the answer (Q, K) of one memory with true scores (Q, C)."""
        for row, scores in zip(slots, truth, strict=True):
            alive = np.sort(scores[scores > -np.inf])[::-1][:k]
            if len(alive):
                least = alive[-1] - TOLERANCE * max(1.0, np.abs(alive).max())
                self.found += int((scores[row[row >= 0]] >= least).sum())
                self.wanted += len(alive)

    @property
    def value(self) -> float:
        """Recall so far; 1.0 before anything was asked."""
        return self.found / self.wanted if self.wanted else 1.0


def check_answer(
    result: SearchResult,
    queries: Tensor,
    k: int,
    oracle: OracleMemory,
    memories: Sequence[int],
    *,
    exact: bool,
    exact_scores: bool = True,
) -> Recall:
    """Holds an answer against the contract, and returns its recall.

    Args:
        result: what `search(queries, k, memories=memories)` returned.
        queries: (M', Q, D).
        k: neighbours asked for.
        oracle: holds the same keys.
        memories: the M' memories searched.
        exact: whether the k best must be found, all of them.
        exact_scores: whether scores must be the true ones.
    """
    recall = Recall()
    assert result.scores.shape == result.slots.shape == (*queries.shape[:2], k)
    assert result.scores.dtype == torch.float32
    assert result.slots.dtype == torch.int64
    scores, slots = result.scores.double().cpu().numpy(), result.slots.cpu().numpy()
    assert not np.isnan(scores).any(), "a score is NaN"
    assert ((slots == -1) == (scores == -np.inf)).all(), "slot -1 and score -inf must come together"
    assert (scores[..., :-1] >= scores[..., 1:]).all(), "scores must fall along k, with missing neighbours last"
    for row, memory in enumerate(memories):
        truth = oracle.scores(queries[row], memory)
        found = slots[row] >= 0
        true = np.take_along_axis(truth, np.where(found, slots[row], 0), axis=1)
        assert (true[found] > -np.inf).all(), f"memory {memory} answered with a slot that holds no key"
        for one in slots[row]:
            real = one[one >= 0]
            assert len(set(real)) == len(real), f"memory {memory} answered with a slot twice: {one}"
        # A float32 product errs by the sizes of what it sums, of which the largest score is a measure.
        largest = np.where(np.isfinite(truth), np.abs(truth), 0).max(axis=1, initial=1.0)[:, None]
        if exact_scores:
            error = np.where(found, np.abs(np.where(found, scores[row], 0) - np.where(found, true, 0)), 0) / largest
            assert (error <= TOLERANCE).all(), f"scores are off by {error.max():.3g} of the largest"
        if exact:
            assert (found.sum(1) == min(k, oracle.length(memory))).all(), "exact search left out keys"
            best = -np.sort(-truth, axis=1)[:, :k]
            best = np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-np.inf)
            same = np.where(np.isfinite(best), np.abs(np.where(found, true, 0) - np.where(found, best, 0)), 0)
            assert (same <= TOLERANCE * largest).all(), "exact search missed a better key"
        recall.count(slots[row], truth, k)
    return recall


def rounding_of(backend: MemoryBackend) -> Callable[[Tensor], Tensor] | None:
    """What a backend's storage does to a key; None where keys are kept as they are."""
    return None if backend.ring.rounded(one := torch.ones(1, backend.dim)) is one else backend.ring.rounded


def make_machine(
    make: Callable[[], MemoryBackend], *, recall_floor: float, exact_scores: bool = True
) -> type[RuleBasedStateMachine]:
    """A state machine class that adds, searches and resets at random, and compares a backend with the oracle.

    Every history begins with a backend of its own, made by `make`. Keys of an exact backend lie on a coarse grid, so
    that ties are the rule.
    """
    model = make()
    exact = model.capabilities.exact
    every = range(model.num_memories)
    some = st.lists(st.sampled_from(every), min_size=1, max_size=model.num_memories, unique=True)
    seeds = st.integers(0, 2**20)

    def vectors(seed: int, rows: int, count: int) -> Tensor:
        drawn = torch.randn(rows, count, model.dim, generator=torch.Generator().manual_seed(seed))
        return (drawn * 2).round() / 2 if exact else drawn

    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.backend = make()
            self.oracle = OracleMemory(model.num_memories, model.capacity, model.metric, rounding_of(self.backend))
            self.recall = Recall()

        # Few keys as often as many, so that memories are seen short as well as turning over.
        @rule(memories=some, count=st.integers(1, 6) | st.integers(7, model.capacity + 7), seed=seeds)
        def add(self, memories: list[int], count: int, seed: int) -> None:
            keys = vectors(seed, len(memories), count)
            slots = self.backend.add(keys, memories=memories)
            assert (slots.numpy() == self.oracle.add(keys, memories)).all()

        @rule(memories=some, count=st.integers(1, 5), k=st.integers(1, 20), seed=seeds)
        def search(self, memories: list[int], count: int, k: int, seed: int) -> None:
            queries = vectors(seed + 1, len(memories), count)
            result = self.backend.search(queries, k, memories=memories)
            recall = check_answer(result, queries, k, self.oracle, memories, exact=exact, exact_scores=exact_scores)
            self.recall.found += recall.found
            self.recall.wanted += recall.wanted

        @rule(memories=some)
        def reset(self, memories: list[int]) -> None:
            self.backend.reset(memories)
            self.oracle.reset(memories)

        def teardown(self) -> None:
            if hasattr(self, "oracle"):
                assert self.backend.lengths.tolist() == [self.oracle.length(memory) for memory in every]
                # Recall of a handful of neighbours says nothing about an approximate index.
                if self.recall.wanted >= 200:
                    assert self.recall.value >= recall_floor, f"recall {self.recall.value:.3f} in a random history"

    return Machine
