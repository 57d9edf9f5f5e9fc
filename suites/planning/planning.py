"""The plan itself: bytes and times of M memories on one machine, what fits, what is quickest, what was assumed.

`cost_of_memory` knows one memory and no machine; `plan_on_one_machine` adds memories up and holds them to one machine's
main memory. Letters: n = C keys of a full memory, D dimension, Q queries and new keys of a step, K neighbours.
"""

from __future__ import annotations

import dataclasses

from .amounts import PlanError
from .answer import BackendPlan, Fit, MemoryCost, Plan
from .calibration import Calibration, Point
from .growth import KEYS, SQRT, growth_of
from .laws import Law, fit_law
from .needed_bytes import bytes_of, placements_of
from .question import Question
from .verdicts import assumptions_of, verdicts_of


def laws_of(spec: str, calibration: Calibration) -> dict[str, Law]:
    """How each figure of a backend's points grows.

    Raises:
        PlanError: there are too few points; the message names the command that takes them.
    """
    points = calibration.of(spec)
    if not points:
        raise PlanError(f'not measured: `recollect plan --measure --backend "{spec}"`')
    growth = growth_of(spec)
    try:
        return {
            figure: fit_law([(point.keys, point.dim, getattr(point, figure)) for point in points], terms)
            for figure, terms in growth.figures.items()
        }
    except PlanError as error:
        raise PlanError(f'too little was measured ({error}): `recollect plan --measure --backend "{spec}"`') from error


def cost_of_memory(
    spec: str,
    calibration: Calibration,
    *,
    keys: int,
    dim: int,
    queries: int,
    k: int,
    laws: dict[str, Law] | None = None,
) -> MemoryCost:
    """Times of one memory of n = `keys` keys, from measured points of the same registry string.

    Args:
        laws: as `laws_of` gives them, where they are at hand.

    Raises:
        PlanError: as `laws_of`.
    """
    laws = laws_of(spec, calibration) if laws is None else laws
    points = calibration.of(spec)
    at = {figure: law.at(keys, dim) for figure, law in laws.items()}
    asked = points[0].queries
    largest = max(points, key=lambda point: (point.keys, -point.dim))
    return MemoryCost(
        build=at["build_seconds"],
        append=at["append_us"] * (1e-6 * min(queries, keys)),
        longest=at["longest_append_ms"] * 1e-3,
        # Answers of more neighbours than were measured are taken to cost in proportion.
        search=at["search_ms"] * (1e-3 * queries / asked * max(1.0, k / points[0].k)),
        recall=largest.recall,
        measured=(min(point.keys for point in points), largest.keys),
        laws={figure: _law_in_words(law) for figure, law in laws.items()},
    )


def _law_in_words(law: Law) -> str:
    fitted = "fitted" if law.dims > 1 else "assumed"
    return f"{law}; dimension to the power {law.power:.2f} ({fitted}); points within {100 * law.spread:.0f} %"


def plan_on_one_machine(question: Question, calibration: Calibration, warnings: list[str]) -> Plan:
    """The plan for one machine that holds all memories.

    Args:
        question: what is asked.
        calibration: measured costs.
        warnings: what must be known of them, as `find_calibration` says it.
    """
    specs = question.backends or calibration.specs
    every = sorted(dict.fromkeys(specs), key=lambda spec: (spec != "exact", spec))
    plain = {str(place): _times(place.key_bytes(question.dim), question.all_keys) for place in placements_of("exact")}
    plan = Plan(
        question=question,
        calibration=calibration.described(),
        warnings=tuple(warnings),
        key_bytes=plain,
        value_bytes=_value_bytes(question),
        backends=tuple(_plan_backend(spec, question, calibration) for spec in every),
    )
    return dataclasses.replace(
        plan, verdicts=tuple(verdicts_of(plan)), assumptions=tuple(assumptions_of(plan, calibration))
    )


def _plan_backend(spec: str, question: Question, calibration: Calibration) -> BackendPlan:
    try:
        one = cost_of_memory(
            spec, calibration, keys=question.keys, dim=question.dim, queries=question.queries, k=question.k
        )
        cost, reason = _for_all(one, question.memories), ""
    except PlanError as error:
        cost, reason = None, str(error)
    values = _value_bytes(question)
    standing = standing_index(calibration.of(spec), question)
    fits, known_by, index = [], "formula", None
    for placement in placements_of(spec):
        planned = bytes_of(spec, placement, memories=question.memories, keys=question.keys, dim=question.dim)
        index = planned.index
        if index is None:
            index, known_by = standing, "measured"
        memory = planned.keys + values[0] + (index or 0)
        fits.append(Fit(placement, memory, planned.mapped + values[1], memory <= question.machine_bytes))
    return BackendPlan(spec, index, known_by, standing, tuple(fits), cost, reason, growth_of(spec).words)


def _for_all(one: MemoryCost, memories: int) -> MemoryCost:
    """All memories, one after another on the threads that one was measured with; the longest append is of one."""
    return dataclasses.replace(
        one, build=one.build * memories, append=one.append * memories, search=one.search * memories
    )


def standing_index(points: list[Point], question: Question) -> int | None:
    """Bytes of the indexes of all memories as they stand, by what was measured; None where nothing was."""
    if points and not any(point.index_bytes for point in points):
        return 0
    try:
        law = fit_law([(point.keys, point.dim, float(point.index_bytes)) for point in points], (KEYS, SQRT))
    except PlanError:
        return None
    return round(law.value(question.keys, question.dim)) * question.memories


def _value_bytes(question: Question) -> tuple[int, int]:
    size = question.all_keys * question.dim
    return {"float32": (4 * size, 0), "bfloat16": (2 * size, 0), "file": (0, 4 * size), "none": (0, 0)}[question.values]


def _times(pair: tuple[int, int], factor: int) -> tuple[int, int]:
    return pair[0] * factor, pair[1] * factor
