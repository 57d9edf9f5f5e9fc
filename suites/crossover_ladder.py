"""Which memory size to measure next, so that little time is spent where nothing can be learnt.

Sizes double from the smallest. The climb ends for an index when every question about it is settled: it has become
quicker than exact search and stayed so at the next size, or it cannot win any more (exact search's time grows at most
with the number of keys, so an index that is four times slower at 8192 keys cannot be quicker below 32768), or it no
longer reaches the recall. Then the sizes between which a ratio crosses 1 are halved until they lie close together.

A question is: at so many queries a step and this recall, searches alone or with the appends of the step?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from recollect.reports.crossing import SizedRatio, bracket, can_still_win

RESOLUTION = 1.3
"""Neighbouring sizes around a crossing that are closer than this are close enough."""

GROWTH = 1.15
"""A doubling of the size raises what a key costs by about so much (the logarithm of a graph, caches)."""

CONFIRMING = 2
"""Sizes in a row at which an index must be quicker, before the climb ends."""


@dataclass(frozen=True)
class Question:
    """One of the questions that a run answers."""

    queries: int
    recall: float
    appends: bool


@dataclass(frozen=True)
class Rung:
    """What was found at one size: seconds that it took, and for each question that was measured the ratio, None below
    the recall."""

    size: int
    memories: int
    seconds: float
    ratios: Mapping[Question, SizedRatio | None]


@dataclass(frozen=True)
class Next:
    """What to measure: so many of the memories at this size."""

    size: int
    memories: int


@dataclass
class Ladder:
    """The measurements of one index so far, and what to measure next.

    Attributes:
        smallest, largest: sizes to begin and end with.
        memories: M that are asked for.
        least_memories: so many must be measured at the least; fewer than M are where all would take too long, since
            an exact search and an index both take M times what one memory takes.
        may_reduce: whether fewer memories than M say enough at a size (see `crossover_run.LEAST_MS`).
        known: sizes that were measured before, which cost nothing.
        fits: whether so many memories of a size fit into the machine and the source.
        stopped: why there is nothing more to measure.
    """

    smallest: int
    largest: int
    memories: int
    least_memories: int
    known: frozenset[int] = frozenset()
    fits: Callable[[int, int], bool] = lambda size, memories: True
    may_reduce: Callable[[int], bool] = lambda size: True
    rungs: list[Rung] = field(default_factory=list)
    stopped: str = ""

    def add(self, rung: Rung) -> None:
        """Takes in what was measured."""
        self.rungs = sorted([*self.rungs, rung], key=lambda one: one.size)

    def next(self, seconds: float) -> Next | None:
        """What to measure next, so that it is done in about so many seconds; None, with `stopped`, for nothing."""
        if not self.rungs:
            self.stopped = "not even the smallest memories fit into the machine, or the source has too few keys"
            return self._affordable(self.smallest, math.inf)
        top = self.rungs[-1].size
        climb = min(2 * top, self.largest)
        gap = self._widest_gap()
        if climb > top and any(self._open(question) for question in self.rungs[-1].ratios):
            # A crossing that is enclosed already has the first claim to what halving will take.
            found = self._affordable(climb, seconds * (0.6 if gap else 1.0))
            if found is not None:
                return found
            self.stopped = f"larger memories than {top:,} keys do not fit into the time or the machine"
        elif climb > top:
            self.stopped = "larger memories would not change the answers"
        else:
            self.stopped = "the largest size is reached"
        return self._affordable(gap, seconds) if gap else None

    def _series(self, question: Question) -> list[SizedRatio]:
        return [ratio for rung in self.rungs if (ratio := rung.ratios.get(question)) is not None]

    def _open(self, question: Question) -> bool:
        """Whether a larger memory may still answer it."""
        last = [rung.ratios[question] for rung in self.rungs if question in rung.ratios][-CONFIRMING:]
        if last[-1] is None:
            return len(last) < CONFIRMING or any(ratio is not None for ratio in last)
        if len(last) == CONFIRMING and all(ratio is not None and ratio.high < 1 for ratio in last):
            return False
        return can_still_win(last[-1].low, self.rungs[-1].size, self.largest)

    def _widest_gap(self) -> int | None:
        """The size in the middle of the widest enclosure of a crossing; None where all are close."""
        widest, middle = RESOLUTION, None
        sizes = {rung.size for rung in self.rungs}
        for question in dict.fromkeys(question for rung in self.rungs for question in rung.ratios):
            ends = bracket(self._series(question))
            measured = [rung.size for rung in self.rungs if question in rung.ratios]
            if ends is None or ends not in set(pairwise(measured)):
                continue
            between = round((ends[0] * ends[1]) ** 0.5 / 64) * 64
            if ends[1] / ends[0] > widest and ends[0] < between < ends[1] and between not in sizes:
                widest, middle = ends[1] / ends[0], between
        return middle

    def _affordable(self, size: int, seconds: float) -> Next | None:
        """The most memories of a size that are done in time and fit."""
        memories = self.memories
        if size in self.known:
            return Next(size, memories)
        while True:
            if self._expected(size, memories) <= seconds and self.fits(size, memories):
                return Next(size, memories)
            if memories <= self.least_memories or not self.may_reduce(size):
                return None
            memories = max(self.least_memories, memories // 2)

    def _expected(self, size: int, memories: int) -> float:
        if not self.rungs:
            return 0.0
        nearest = min(self.rungs, key=lambda rung: abs(math.log(rung.size / size)))
        rate = nearest.seconds / (nearest.size * nearest.memories)
        return rate * size * memories * GROWTH ** max(0.0, math.log2(size / nearest.size))
