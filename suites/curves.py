"""Whole curves of recall against search time: one built index, searched with one search option after another.

    points = measure_curve(backend, queries, truth, k, {"nprobe": (1, 4, 16, 64)})

Every setting searches the very keys and queries that the others search. Times are taken in rounds: in each round every
setting is timed once, in another order, beside exact search, so that what else the machine does falls on all of them;
the ratio to exact search is that of the same round.

Letters: R batches of queries, M memories, Q queries of a batch, N keys in memory, D dimension, K neighbours.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend

from .curve_settings import JUMP, Axes, Settings, refined, settings_of, without_waste
from .noise import Clock, clock_of, describe_reference, ratio_interval, reference_operation, timed_ms
from .oracle import shares_found

ROUNDS = 3
"""Timed searches of a setting for each batch of queries."""


@dataclass(frozen=True)
class Truth:
    """What exact search answers to one batch of queries, in the form that judging needs.

    Attributes:
        threshold: (M, Q) float32, score of the K-th best key (of the last key where fewer live).
        live: (M,) int64, keys in each memory.
        log_sum: (M, Q) float32, logarithm of the softmax denominator over all live keys; None where no mass is wanted.
        scale: (M,) float32, multiplies inner products to give logits; None likewise.
        counted: (M, Q) bool, queries that the means are over; None is all of them.
    """

    threshold: Tensor
    live: Tensor
    log_sum: Tensor | None = None
    scale: Tensor | None = None
    counted: Tensor | None = None


@dataclass(frozen=True)
class CurvePoint:
    """One setting of one index.

    Attributes:
        spec: canonical registry string with the setting in it.
        backend: its name.
        memory_size: C.
        k: neighbours.
        options: the search options that were set.
        recall_at_k: share of the true k nearest keys that were found, judged by score.
        softmax_mass: share of the softmax over all keys in memory that the found keys hold; None where not asked.
        search_ms: median milliseconds of one batch's search over all memories.
        search_ms_p95, search_ms_p99: percentiles of the same.
        search_ms_low, search_ms_high: quartiles of the same.
        samples: searches that were timed.
        exact_ratio: median over the rounds of its time over exact search's in the same round, with its 95 % interval
            `exact_ratio_low` to `exact_ratio_high`; None without exact.
        reference_ms: median of the reference operation in the same rounds (see `noise`).
        noisy: it varied so much that small differences mean nothing.
        blocks: recall, mass and queries counted of each batch and row, for intervals; mass is None where not asked.
    """

    spec: str
    backend: str
    memory_size: int
    k: int
    options: Settings
    recall_at_k: float
    softmax_mass: float | None
    search_ms: float
    search_ms_p95: float
    search_ms_p99: float
    search_ms_low: float
    search_ms_high: float
    samples: int
    exact_ratio: float | None = None
    exact_ratio_low: float | None = None
    exact_ratio_high: float | None = None
    reference_ms: float | None = None
    noisy: bool = False
    blocks: tuple[tuple[float, float | None, int], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary, as written to disk."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CurvePoint:
        """What `as_json` described."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        values["blocks"] = tuple(
            (float(recall), None if mass is None else float(mass), int(number))
            for recall, mass, number in values.get("blocks") or ()
        )
        return cls(**values)


OnStep = Callable[[int, int], None]


# Truth -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_truth(exact: MemoryBackend, queries: Tensor, k: int, *, scale: Tensor | None = None) -> Truth:
    """What an `exact` backend of the same keys answers to queries (M, Q, D).

    Args:
        exact: holds what the judged backend holds; its answers are taken as right.
        queries: one batch.
        k: neighbours.
        scale: (M,) multiplies inner products to give logits; without it no softmax mass is judged.
    """
    live = exact.lengths.clone()
    best = exact.search(queries, k)
    last = (live.clamp(max=k) - 1).clamp(min=0)[:, None, None].expand(-1, queries.shape[1], 1)
    threshold = best.scores.cpu().gather(2, last)[..., 0]
    if scale is None:
        return Truth(threshold, live)
    log_sum = torch.full(queries.shape[:2], -torch.inf)
    for memory in range(len(queries)):
        keys = exact.ring.keys[memory, : int(live[memory])]
        if len(keys):
            log_sum[memory] = (queries[memory].to(keys.device) * float(scale[memory]) @ keys.T).logsumexp(-1).cpu()
    return Truth(threshold, live, log_sum, scale)


# Measurement -------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What is known of one setting so far."""

    blocks: list[tuple[float, float | None, int]] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    exact: list[float] = dataclasses.field(default_factory=list)
    reference: list[float] = dataclasses.field(default_factory=list)

    def mean(self, place: int) -> float:
        """The mean of recall (0) or mass (1) over all queries."""
        total = sum(block[2] for block in self.blocks)
        if not total or any(block[place] is None for block in self.blocks):
            return float("nan")
        return sum(float(block[place] or 0.0) * block[2] for block in self.blocks) / total


class CurveMeter:
    """Measures settings of one index over any number of batches, the index being in another state at each if need be.

    Args:
        k: neighbours.
        rounds: timed searches of each setting for each batch.
        rows: memories are counted in so many groups of equal size, one for each batch row.
        clock: 'wall', or 'cpu' for the time of this process alone, where it runs one thread on a busy machine.
    """

    def __init__(self, k: int, *, rounds: int = ROUNDS, rows: int = 1, clock: Clock = "wall") -> None:
        self.k = k
        self.rounds = rounds
        self.rows = rows
        self._now = clock_of(clock)
        self._random = random.Random(0)
        self._tallies: dict[tuple[tuple[str, Any], ...], _Tally] = {}
        self._specs: dict[tuple[tuple[str, Any], ...], str] = {}
        self._size = 0

    @torch.no_grad()
    def measure(
        self,
        backend: MemoryBackend,
        queries: Tensor,
        truth: Truth,
        settings: Sequence[Settings],
        *,
        exact: MemoryBackend | None = None,
        timed: bool = True,
    ) -> None:
        """Judges and times settings on one batch of queries (M, Q, D); the backend's own options are restored.

        Args:
            backend: built and filled.
            queries: one batch.
            truth: its exact answers.
            settings: to be searched with.
            exact: an exact backend of the same keys, timed beside.
            timed: False judges alone.
        """
        before = {name: getattr(backend.options, name) for name in backend.search_options}
        self._size = backend.capacity
        try:
            for setting in settings:
                self._set(backend, setting)
                # The first search of a setting warms caches and is not timed.
                self._judge(backend, queries, truth, setting)
            for _ in range(self.rounds if timed else 0):
                self._time_round(backend, queries, settings, exact)
        finally:
            self._set(backend, before)

    def _set(self, backend: MemoryBackend, setting: Settings) -> None:
        if setting:
            backend.set_search_options(**setting)

    def _judge(self, backend: MemoryBackend, queries: Tensor, truth: Truth, setting: Settings) -> None:
        key = _key(setting)
        self._specs[key] = backend.spec
        result = backend.search(queries, self.k)
        recall, mass = shares_found(
            backend, queries, result.slots, self.k, truth.threshold, truth.live, truth.log_sum, truth.scale
        )
        counted = torch.ones(recall.shape, dtype=torch.bool) if truth.counted is None else truth.counted.clone()
        counted &= (truth.live > 0)[:, None]
        tally = self._tallies.setdefault(key, _Tally())
        for row in range(self.rows):
            part = slice(row * len(recall) // self.rows, (row + 1) * len(recall) // self.rows)
            here = counted[part]
            number = int(here.sum())
            if number:
                held = None if mass is None else float(mass[part][here].mean())
                tally.blocks.append((float(recall[part][here].mean()), held, number))

    def _time_round(
        self, backend: MemoryBackend, queries: Tensor, settings: Sequence[Settings], exact: MemoryBackend | None
    ) -> None:
        calls: list[Settings | str] = [*settings, "reference", *(["exact"] if exact is not None else [])]
        self._random.shuffle(calls)
        beside = {"exact": 0.0, "reference": 0.0}
        taken: dict[tuple[tuple[str, Any], ...], float] = {}
        for call in calls:
            if call == "reference":
                beside[call] = timed_ms(reference_operation, self._now)
            elif isinstance(call, str):
                assert exact is not None
                beside[call] = self._timed_search(exact, queries)
            else:
                self._set(backend, call)
                taken[_key(call)] = self._timed_search(backend, queries)
        for key, milliseconds in taken.items():
            tally = self._tallies[key]
            tally.times.append(milliseconds)
            tally.reference.append(beside["reference"])
            if exact is not None:
                tally.exact.append(beside["exact"])

    def _timed_search(self, backend: MemoryBackend, queries: Tensor) -> float:
        if backend.device.type == "cuda":
            torch.cuda.synchronize(backend.device)

        def search() -> None:
            backend.search(queries, self.k)
            if backend.device.type == "cuda":
                torch.cuda.synchronize(backend.device)

        return timed_ms(search, self._now)

    def figure(self, setting: Settings, name: str) -> float:
        """Recall ('recall_at_k') or mass ('softmax_mass') of a setting so far."""
        return self._tallies[_key(setting)].mean(0 if name == "recall_at_k" else 1)

    def points(self) -> list[CurvePoint]:
        """A point for every setting that was timed, by rising median time."""
        found = []
        for key, tally in self._tallies.items():
            if not tally.times:
                continue
            low, median, high, p95, p99 = (float(value) for value in np.percentile(tally.times, (25, 50, 75, 95, 99)))
            ratio = ratio_interval(tally.times, tally.exact) if tally.exact else None
            reference = describe_reference(tally.reference)
            mass = tally.mean(1)
            found.append(
                CurvePoint(
                    spec=self._specs[key],
                    backend=self._specs[key].partition(":")[0],
                    memory_size=self._size,
                    k=self.k,
                    options=dict(key),
                    recall_at_k=tally.mean(0),
                    softmax_mass=None if mass != mass else mass,
                    search_ms=median,
                    search_ms_p95=p95,
                    search_ms_p99=p99,
                    search_ms_low=low,
                    search_ms_high=high,
                    samples=len(tally.times),
                    exact_ratio=ratio.value if ratio else None,
                    exact_ratio_low=ratio.low if ratio else None,
                    exact_ratio_high=ratio.high if ratio else None,
                    reference_ms=reference.p50_ms,
                    noisy=reference.noisy,
                    blocks=tuple(tally.blocks),
                )
            )
        return sorted(found, key=lambda point: point.search_ms)


def _key(setting: Settings) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(setting.items()))


def scout(
    meter: CurveMeter,
    backend: MemoryBackend,
    queries: Tensor,
    truth: Truth,
    settings: Sequence[Settings],
    *,
    jump: float = JUMP,
    targets: Sequence[tuple[str, float]] = (),
    least: float = 0.0,
    passes: int = 2,
) -> list[Settings]:
    """Judges settings on one batch, adds what the curve lacks and leaves out what is waste; returns what to measure.

    Args:
        meter: only lends its judgement: what is judged here is not counted.
        settings: to begin with.
        jump: of recall between neighbours, above which one is put between them.
        targets: figures ('recall_at_k' or 'softmax_mass') with the values around which neighbours are refined.
        least: settings whose recall is below are left out, but for the one that finds most.
        passes: refinements, one upon the other.
    """
    trial = CurveMeter(meter.k, rows=1)
    found = list(settings)
    todo = list(settings)
    for number in range(passes + 1):
        trial.measure(backend, queries, truth, todo, timed=False)
        if number == passes or not found or not found[0]:
            break
        recall = [trial.figure(setting, "recall_at_k") for setting in found]
        todo = refined(found, recall, jump=jump)
        for name, value in targets:
            figures = [trial.figure(setting, name) for setting in found]
            todo = refined(found, figures, jump=1.0, target=value) + todo
        todo = [setting for place, setting in enumerate(todo) if setting not in todo[:place]]
        if not todo:
            break
        found += todo
    recall = [trial.figure(setting, "recall_at_k") for setting in found]
    floor = min(least, max(recall))
    kept = [place for place, value in enumerate(recall) if value >= floor]
    return without_waste([found[place] for place in kept], [recall[place] for place in kept])


def measure_curve(
    backend: MemoryBackend,
    queries: Tensor,
    truth: Sequence[Truth] | None,
    k: int,
    axes: Axes | None = None,
    rounds: int = ROUNDS,
    *,
    exact: MemoryBackend | None = None,
    scale: Tensor | None = None,
    jump: float = JUMP,
    targets: Sequence[tuple[str, float]] = (),
    clock: Clock = "wall",
    on_step: OnStep | None = None,
) -> list[CurvePoint]:
    """The curve of one built and filled index, without a rebuild.

    Args:
        backend: what is searched; its search options are as before afterwards.
        queries: (R, M, Q, D) batches.
        truth: exact answers to each batch; None asks `exact`.
        k: neighbours.
        axes: search options and values; None is what the backend declares as its `curve`.
        rounds: timed searches of each setting for each batch.
        exact: an exact backend that holds the same keys: timed beside, for `exact_ratio`.
        scale: (M,) for the softmax mass, where `exact` is asked for the truth.
        jump, targets: as for `scout`, which refines the settings on the first batch.
        clock: 'wall', or 'cpu' for the time of this process alone.
        on_step: is told how many of how many batches are done.

    Returns:
        A point for each setting, by rising time. The same recall may come at several times, and a more thorough
        setting need not find more: nothing here assumes that it does.

    Raises:
        ValueError: there is no truth and no exact backend to ask, or no batch.
    """
    if queries.dim() != 4 or not len(queries):
        raise ValueError(f"queries are (batches, memories, queries, dimension), got {tuple(queries.shape)}")
    if truth is None:
        if exact is None:
            raise ValueError("without the exact answers (truth) an exact backend of the same keys is needed")
        truth = [exact_truth(exact, batch, k, scale=scale) for batch in queries]
    meter = CurveMeter(k, rounds=rounds, clock=clock)
    settings = settings_of(type(backend).curve if axes is None else axes)
    settings = scout(meter, backend, queries[0], truth[0], settings, jump=jump, targets=targets)
    for number, (batch, right) in enumerate(zip(queries, truth, strict=True)):
        meter.measure(backend, batch, right, settings, exact=exact)
        if on_step is not None:
            on_step(number + 1, len(queries))
    return meter.points()
