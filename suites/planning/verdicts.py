"""What follows from a plan, and what it rests on, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .amounts import bytes_text, seconds_text
from .answer import BackendPlan, Fit, Plan
from .calibration import Calibration
from .laws import Estimate
from .needed_bytes import Placement

SHOWN = 3
"""Ways to fit that are named at most."""


def verdicts_of(plan: Plan) -> Iterator[str]:
    """What a reader wants to know: how much it is, whether it fits and how, what a step and filling it take."""
    asked = plan.question
    keys = {storage: plan.key_bytes[str(Placement(storage))][0] for storage in ("float32", "bfloat16", "int8")}
    yield (
        f"{asked.memories_text} of {asked.keys:,} keys: {asked.all_keys:,} keys of dimension {asked.dim} take "
        f"{', '.join(f'{bytes_text(size)} as {storage}' for storage, size in keys.items())}; "
        f"values beside them {bytes_text(sum(plan.value_bytes))} ({asked.values})"
    )
    yield from _room(plan)
    yield from _times(plan)


def _room(plan: Plan) -> Iterator[str]:
    machine = bytes_text(plan.question.machine_bytes)
    plain = [(one, one.fits[0]) for one in plan.backends if one.fits[0].fits]
    if plain:
        names = ", ".join(f"{one.spec} ({bytes_text(fit.memory_bytes)})" for one, fit in _quickest(plain))
        yield f"fits in {machine} of main memory with {plain[0][1].placement}: {names}"
    too_large = [one for one in plan.backends if not one.fits[0].fits]
    if not too_large:
        return
    first = too_large[0]
    ways = [
        (one, fit) for one in plan.backends for fit in one.fits if fit.fits and fit.placement != one.fits[0].placement
    ]
    sizes = f"{first.spec} with {first.fits[0].placement} takes {bytes_text(first.fits[0].memory_bytes)}"
    if ways:
        named = "; ".join(
            f"{one.spec} with {fit.placement} ({bytes_text(fit.memory_bytes)} of main memory"
            + (f", {bytes_text(fit.file_bytes)} in files)" if fit.file_bytes else ")")
            for one, fit in _quickest(ways)
        )
        yield f"does not fit in {machine}: {sizes}; fits with {named}"
    elif not plain:
        least = min(plan.backends, key=lambda one: one.least.memory_bytes)
        times = least.least.memory_bytes / plan.question.machine_bytes
        yield (
            f"does not fit in {machine}: {sizes}; nothing does, the least is {least.spec} with "
            f"{least.least.placement}, {bytes_text(least.least.memory_bytes)}: {_times_text(times)} as much. Take "
            f"fewer keys (some {_keys_that_fit(plan, least):,} a memory), or {math.ceil(times):,} such machines"
        )
    else:
        yield f"does not fit in {machine}: {', '.join(one.spec for one in too_large)} ({sizes})"


def _keys_that_fit(plan: Plan, least: BackendPlan) -> int:
    return max(1, int(plan.question.keys * plan.question.machine_bytes / least.least.memory_bytes))


def _quickest(ways: list[tuple[BackendPlan, Fit]]) -> list[tuple[BackendPlan, Fit]]:
    """The best way of each backend, quickest step first; those without a time by their bytes, last."""
    best: dict[str, tuple[BackendPlan, Fit]] = {}
    for one, fit in ways:
        # Whole keys in memory before rounded ones, and those before a file: as the placements stand.
        best.setdefault(one.spec, (one, fit))
    order = sorted(
        best.values(), key=lambda way: (way[0].cost.step.value if way[0].cost else math.inf, way[1].memory_bytes)
    )
    return order[:SHOWN]


def _times(plan: Plan) -> Iterator[str]:
    timed = [one for one in plan.backends if one.cost is not None]
    for one in timed:
        if one.spec == "exact" and one.cost is not None:
            yield f"exact needs {_range(one.cost.step)} per step"
    others = sorted(
        (one for one in timed if one.spec != "exact"), key=lambda one: one.cost.step.value if one.cost else 0
    )
    if others and others[0].cost is not None:
        cost = others[0].cost
        yield (
            f"quickest step: {others[0].spec} with {_range(cost.step)}; it found {cost.recall:.3f} of the neighbours "
            f"at {cost.measured[1]:,} keys, and at {plan.question.keys:,} by the same options may find fewer"
        )
    if timed:
        quickest = min(timed, key=lambda one: one.cost.build.value if one.cost else 0)
        slowest = max(timed, key=lambda one: one.cost.build.value if one.cost else 0)
        if quickest.cost is not None and slowest.cost is not None:
            yield (
                f"filling it takes from {_range(quickest.cost.build)} ({quickest.spec}) to "
                f"{_range(slowest.cost.build)} ({slowest.spec})"
            )
        beyond = max(one.cost.step.beyond for one in timed if one.cost is not None)
        if beyond > 1:
            yield (
                f"these times are extrapolated up to {_times_text(beyond)} beyond the largest measured memory: read "
                "the ranges, and measure larger ones with `recollect plan --measure --largest 1Mi` to narrow them"
            )


def _range(estimate: Estimate) -> str:
    text = seconds_text(estimate.value)
    return f"{text} ({seconds_text(estimate.low)} to {seconds_text(estimate.high)})"


def _times_text(times: float) -> str:
    return f"{times:,.0f} times" if times >= 9.95 else f"{times:.2g} times"


def assumptions_of(plan: Plan, calibration: Calibration) -> Iterator[str]:
    """Everything that the figures rest on."""
    asked = plan.question
    queries = sorted({point.queries for point in calibration.points})
    neighbours = sorted({point.k for point in calibration.points})
    yield (
        f"costs are of {plan.calibration}; one memory by itself was measured, on keys that drift from topic to topic "
        "as a text's do"
    )
    yield (
        f"a step asks {asked.queries:,} queries of each memory ({asked.memories_text}, full) and appends as many keys; "
        "memories are taken to cost the same one after another on those threads as one does"
    )
    yield (
        f"a step's time is in proportion to its queries (measured at {', '.join(map(str, queries))}), and does not "
        f"depend on k up to {max(neighbours, default=0)}, beyond which it is in proportion to k"
    )
    yield (
        "each figure is fitted as a sum of the terms shown, by least relative errors; its range is that of all "
        "the laws that the points allow (with fewer or more terms, and without any one point), and their scatter"
    )
    yield (
        "times are those of keys in main memory as float32: for keys in a file or in another type, and for a memory "
        "larger than the machine's, they do not hold"
    )
    in_file = max(size for _, size in plan.key_bytes.values())
    if in_file:
        yield (
            f"exact search of keys in a file reads all of it at every step, here {bytes_text(in_file)} as float32, at "
            "the disk's speed"
        )
    yield "an index's bytes are what its backend plans with at most, also while an index is built beside its former one"
    yield "values have the dimension of keys; the model, its activations and the system are not counted"
    groups: dict[str, list[str]] = {}
    for one in plan.backends:
        groups.setdefault(one.growth, []).append(one.spec)
    for words, specs in groups.items():
        yield f"{', '.join(specs)}: {words}"
    for known_by, words in (("none", "is not known beforehand and not counted"), ("measured", "counts as it stands")):
        named = [
            one.spec
            for one in plan.backends
            if (one.index_known_by if one.index_bytes is not None else "none") == known_by
        ]
        if named:
            yield f"the index of {', '.join(named)} {words}, not what building it takes"
