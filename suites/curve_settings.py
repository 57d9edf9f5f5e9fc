"""Which search options to measure: grids, what lies between two settings, what a curve lacks and what is waste."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from recollect.memory_backends import InvalidSpec, canonical_spec
from recollect.memory_backends.registry import backend_class
from recollect.memory_backends.spec import format_spec, parse_spec

Settings = dict[str, Any]
"""Search options by name."""

Axes = Mapping[str, Sequence[Any]]
"""Search options by name with the values to try, coarse to thorough."""

JUMP = 0.08
"""Neighbouring settings whose recall differs by more get one between them."""

COMPLETE = 0.9995
"""Recall from which on a more thorough setting can only cost more."""


def settings_of(axes: Axes) -> list[Settings]:
    """Every combination, the first option varying slowest; one empty setting where there is no option."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def open_axes(spec: str) -> Axes:
    """The search options that a spec does not name, with the values that its backend declares to try."""
    name, given = parse_spec(spec)
    return {option: values for option, values in backend_class(name).curve.items() if option not in given}


def open_builds(spec: str) -> list[str]:
    """Specs of every build that a spec leaves open, as its backend declares them; its own values come first.

    A combination that the backend refuses is left out, unless it is the spec itself.
    """
    name, given = parse_spec(spec)
    axes = {option: values for option, values in backend_class(name).builds.items() if option not in given}
    found = {canonical_spec(spec): format_spec(name, given)}
    for setting in settings_of(axes):
        build = format_spec(name, {**given, **setting})
        with contextlib.suppress(InvalidSpec):
            found.setdefault(canonical_spec(build), build)
    return list(found.values())


def between(low: Any, high: Any) -> Any:
    """A value between two of an option: the geometric middle of whole numbers, the middle of others; None if none."""
    if isinstance(low, bool) or not isinstance(low, int | float) or not isinstance(high, int | float):
        return None
    if isinstance(low, int) and isinstance(high, int):
        low, high = sorted((low, high))
        middle = round((max(low, 1) * max(high, 1)) ** 0.5)
        return middle if low < middle < high else None
    middle = round((low + high) / 2, 4)
    return middle if min(low, high) < middle < max(low, high) else None


def neighbours(settings: Sequence[Settings]) -> list[tuple[int, int]]:
    """Places of settings that differ in one option alone and have nothing measured between them, low value first."""
    pairs = []
    for name in settings[0] if settings else ():
        lines: dict[tuple[Any, ...], list[int]] = {}
        for place, setting in enumerate(settings):
            lines.setdefault(tuple((other, setting[other]) for other in setting if other != name), []).append(place)
        for line in lines.values():
            line.sort(key=lambda place: settings[place][name])
            pairs += list(itertools.pairwise(line))
    return pairs


def middle_setting(one: Settings, other: Settings) -> Settings | None:
    """The setting between two neighbours; None where their values leave no room."""
    (name,) = (name for name in one if one[name] != other[name])
    value = between(one[name], other[name])
    return None if value is None else {**one, name: value}


def refined(
    settings: Sequence[Settings],
    found: Sequence[float],
    *,
    jump: float = JUMP,
    target: float | None = None,
    most: int = 8,
) -> list[Settings]:
    """Settings to measure as well: between neighbours whose figures lie far apart, or on both sides of a target.

    Args:
        settings: measured ones.
        found: the figure of each (recall, or mass).
        jump: a larger difference asks for a setting between.
        target: neighbours on both sides of it come first, whatever their difference.
        most: at most so many.
    """
    wanted = []
    for one, other in neighbours(settings):
        gap = abs(found[one] - found[other])
        brackets = target is not None and min(found[one], found[other]) < target <= max(found[one], found[other])
        if gap > jump or brackets:
            wanted.append((not brackets, -gap, one, other))
    made: list[Settings] = []
    for _, _, one, other in sorted(wanted):
        setting = middle_setting(settings[one], settings[other])
        if setting is not None and setting not in settings and setting not in made:
            made.append(setting)
    return made[:most]


def without_waste(settings: Sequence[Settings], recall: Sequence[float]) -> list[Settings]:
    """The settings without those that are more thorough than a neighbour which finds everything already."""
    wasteful: set[int] = set()
    for one, other in neighbours(settings):
        if recall[one] >= COMPLETE and recall[other] >= COMPLETE:
            wasteful.add(other)
    return [setting for place, setting in enumerate(settings) if place not in wasteful]
