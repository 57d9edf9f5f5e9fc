"""The records of a plan. Letters: n = C keys of a full memory, D dimension, Q queries and new keys of a step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .laws import Estimate
from .needed_bytes import Placement
from .question import Question

SCHEMA = 1


@dataclass(frozen=True)
class MemoryCost:
    """Times of one memory of one backend, in seconds.

    Attributes:
        build: appending n keys to an empty memory.
        append: appending a step's Q keys to a full memory, on average over a turnover.
        search: a step's Q queries.
        longest: the longest append of Q keys in a turnover, in which an index may be built.
        recall: found in the calibration at its largest size.
        measured: the smallest and the largest n of the points.
        laws: the law of each figure, in words.
    """

    build: Estimate
    append: Estimate
    search: Estimate
    longest: Estimate
    recall: float
    measured: tuple[int, int]
    laws: dict[str, str]

    @property
    def step(self) -> Estimate:
        """A whole step: search, then append."""
        return self.append + self.search


@dataclass(frozen=True)
class Fit:
    """Bytes of all memories with their keys placed in one way.

    Attributes:
        placement: where keys lie and in which type.
        memory_bytes: main memory of keys, values and index together.
        file_bytes: of files.
        fits: within the machine's main memory.
    """

    placement: Placement
    memory_bytes: int
    file_bytes: int
    fits: bool


@dataclass(frozen=True)
class BackendPlan:
    """One backend for all memories.

    Attributes:
        spec: canonical registry string.
        index_bytes: of main memory at most, also while indexes are built; None where nobody can say.
        index_known_by: "formula" or "measured".
        standing_bytes: of indexes that stand built, by what was measured; None where nothing was.
        fits: every way that the backend can keep its keys, the plain one first.
        cost: times for all memories; None where they were not measured.
        reason: why there are none.
        growth: what is assumed of the backend as its memories grow.
    """

    spec: str
    index_bytes: int | None
    index_known_by: str
    standing_bytes: int | None
    fits: tuple[Fit, ...]
    cost: MemoryCost | None
    reason: str
    growth: str

    @property
    def least(self) -> Fit:
        """The way that takes the least main memory."""
        return min(self.fits, key=lambda fit: fit.memory_bytes)


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        question: what was asked.
        calibration: machine, threads and day of the measured costs, in one line.
        warnings: what must be known of them.
        key_bytes: of all memories, by placement: main memory and file.
        value_bytes: likewise of their values.
        backends: one entry each, exact first.
        verdicts: what follows, in sentences.
        assumptions: what all of it rests on.
    """

    question: Question
    calibration: str
    warnings: tuple[str, ...]
    key_bytes: dict[str, tuple[int, int]]
    value_bytes: tuple[int, int]
    backends: tuple[BackendPlan, ...]
    verdicts: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary; times in seconds, sizes in bytes."""
        content = dataclasses.asdict(self)
        for plan, entry in zip(self.backends, content["backends"], strict=True):
            for fit, one in zip(plan.fits, entry["fits"], strict=True):
                one["placement"] = str(fit.placement)
            if plan.cost is not None:
                entry["cost"]["step"] = dataclasses.asdict(plan.cost.step)
        content["question"] |= {"memories": self.question.memories, "all_keys": self.question.all_keys}
        return {"schema": SCHEMA, **content}
