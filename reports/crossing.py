"""Where one search overtakes another as memories grow: from ratios of times at measured sizes to a size.

A ratio is the index's time over exact search's in the same rounds; below 1 the index is the quicker one. Between two
sizes it is interpolated on log-log axes, where search times are close to straight lines. Beyond the largest measured
size nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Outcome = Literal["from the start", "at", "not lasting", "never", "recall not reached", "not measured"]

OUTCOMES: dict[str, str] = {
    "from the start": "quicker at every measured size",
    "at": "overtakes at the given size and stays quicker up to the largest measured one",
    "not lasting": "quicker somewhere, but not at the largest measured size",
    "never": "slower at every measured size",
    "recall not reached": "no measured search option reaches the recall",
    "not measured": "nothing was measured",
}


@dataclass(frozen=True)
class SizedRatio:
    """A ratio of times at one memory size, with the ends of its interval. `spec` names the options that gave it."""

    size: int
    value: float
    low: float
    high: float
    spec: str = ""


@dataclass(frozen=True)
class Crossing:
    """Whether and from which size on an index is quicker than exact search.

    Attributes:
        outcome: see `OUTCOMES`.
        size: where the ratio crosses 1, interpolated; the smallest measured size for 'from the start'.
        low: where the lower ends of the intervals cross: the crossing is hardly at a smaller size. None: below the
            smallest measured size, or no crossing.
        high: where the upper ends cross: from there on it is quicker for certain. None: that is not reached within
            the measured sizes, or no crossing.
        smallest, largest: the measured sizes that this rests on.
        ratio: at the largest of them, with its interval.
        spec: the registry string that was quickest there.
    """

    outcome: Outcome
    size: float | None = None
    low: float | None = None
    high: float | None = None
    smallest: int | None = None
    largest: int | None = None
    ratio: SizedRatio | None = None

    @property
    def overtakes(self) -> bool:
        """It is quicker from some size on, up to the largest measured one."""
        return self.outcome in ("from the start", "at")

    @property
    def clear(self) -> bool:
        """At the largest size the whole interval lies on one side."""
        return self.ratio is not None and (self.ratio.high < 1.0 or self.ratio.low > 1.0)

    @property
    def spec(self) -> str:
        """As in the class's text."""
        return self.ratio.spec if self.ratio else ""


def find_crossing(ratios: Sequence[SizedRatio]) -> Crossing:
    """The size from which on the ratio stays below 1.

    Args:
        ratios: at distinct sizes, any order; all positive.
    """
    if not ratios:
        return Crossing("not measured")
    ordered = sorted(ratios, key=lambda one: one.size)
    common = (ordered[0].size, ordered[-1].size, ordered[-1])
    sizes = [one.size for one in ordered]
    values = [math.log(one.value) for one in ordered]
    if values[-1] >= 0:
        return Crossing("not lasting" if min(values) < 0 else "never", None, None, None, *common)
    size = _last_fall(sizes, values)
    low = _last_fall(sizes, [math.log(one.low) for one in ordered])
    high = _last_fall(sizes, [math.log(one.high) for one in ordered])
    if size is None:  # below 1 from the first size on
        return Crossing("from the start", float(sizes[0]), None, _or_first(high, ordered), *common)
    return Crossing("at", size, low, _or_first(high, ordered), *common)


def _or_first(high: float | None, ordered: Sequence[SizedRatio]) -> float | None:
    """Where the upper ends fall below 1 for good: the first size where they are below everywhere."""
    if high is None and all(one.high < 1 for one in ordered):
        return float(ordered[0].size)
    return high


def _last_fall(sizes: Sequence[int], logs: Sequence[float]) -> float | None:
    """The size at which the logarithm falls below 0 for the last time; None if it never does or always is below."""
    if logs[-1] >= 0:
        return None
    above = [place for place, value in enumerate(logs) if value >= 0]
    if not above:
        return None
    before = above[-1]
    left, right = math.log(sizes[before]), math.log(sizes[before + 1])
    share = logs[before] / (logs[before] - logs[before + 1])
    return math.exp(left + share * (right - left))


def bracket(ratios: Sequence[SizedRatio]) -> tuple[int, int] | None:
    """The neighbouring sizes between which the crossing lies; None where there is none to look for."""
    ordered = sorted(ratios, key=lambda one: one.size)
    if not ordered or ordered[-1].value >= 1:
        return None
    found = None
    for left, right in pairwise(ordered):
        if left.value >= 1 > right.value:
            found = (left.size, right.size)
    return found


def can_still_win(ratio_low: float, size: int, largest: int) -> bool:
    """Whether an index that takes `ratio_low` times exact's time at `size` may be quicker at `largest`.

    The most that can happen: exact's time grows with the number of keys, the index's does not grow at all.
    """
    return ratio_low * size / largest < 1.0


def with_appends(
    ratio: SizedRatio, exact_ms: float, exact_append_ms: float, append_ms: float, *, steps: float = 1.0
) -> SizedRatio:
    """The ratio of a whole step, search and appends, from that of the search alone.

    Args:
        exact_ms: exact search's time, which the ratio is over.
        exact_append_ms, append_ms: what appending one step's keys takes, to exact search and to the index.
        steps: appends to one search.
    """
    whole = exact_ms + steps * exact_append_ms
    value, low, high = (
        (share * exact_ms + steps * append_ms) / whole for share in (ratio.value, ratio.low, ratio.high)
    )
    return SizedRatio(ratio.size, value, low, high, ratio.spec)
