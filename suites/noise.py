"""How long something takes, as a distribution, with the machine's own noise measured beside it.

Every timing here stands beside timings of one fixed operation, a matrix product of 640 x 640 float32 numbers. It does
the same work each time, so what changes in it is the machine: another program, a lower clock, a neighbour on the same
host. Things that are compared are timed in turns (`interleave`), one call of each to a round, so that a disturbance
meets all of them, and the ratio within a round is steadier than the ratio of two medians.

Words: warm, called again and again with nothing in between; first, the first call after building; cold, a call after
the caches were filled with other data (`flush_caches`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Clock = Literal["wall", "cpu"]

SIDE = 640
"""Of the reference operation's matrices: 0.52 GFLOP, some milliseconds on one core of any machine."""

NOISY_SPREAD = 0.15
"""A machine is called noisy when the quartiles of the reference operation lie further apart, over its median."""

NOISY_SLOWDOWN = 1.5
"""... or when its median is this many times its fastest call: then most calls were disturbed."""

RESAMPLES = 1000
"""Of the bootstrap."""

FLUSH_BYTES = 512 * 2**20
"""The most that `flush_caches` touches; a last-level cache shared by a whole host may be larger still."""

CACHE_LINE = 64


def clock_of(clock: Clock) -> Callable[[], float]:
    """The function that tells the time in seconds: elapsed time, or the CPU time of this process over all threads."""
    if clock not in ("wall", "cpu"):
        raise ValueError(f"clock is {clock!r}; it is 'wall' or 'cpu'")
    return time.perf_counter if clock == "wall" else time.process_time


@functools.cache
def _matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, SIDE, generator=generator) for _ in range(2))
    torch.mm(left, right)  # the first call starts thread pools
    return left, right, torch.empty(SIDE, SIDE)


def reference_operation() -> None:
    """A product of two fixed 640 x 640 float32 matrices on the CPU, by as many threads as torch uses."""
    left, right, out = _matrices()
    with torch.no_grad():
        torch.mm(left, right, out=out)


def reference_operation_ms(clock: Clock = "wall", repeats: int = 1) -> float:
    """Milliseconds that the reference operation takes now; the median of `repeats` calls."""
    _matrices()
    now = clock_of(clock)
    return float(np.median([timed_ms(reference_operation, now) for _ in range(repeats)]))


def timed_ms(call: Callable[[], Any], now: Callable[[], float]) -> float:
    """Milliseconds that one call takes by the given clock."""
    start = now()
    call()
    return 1000.0 * (now() - start)


@functools.cache
def _flush_buffer() -> np.ndarray[Any, Any]:
    return np.zeros(_flush_bytes() // 8, dtype=np.int64)


def _flush_bytes() -> int:
    """Twice the last-level cache where the system tells it, within 64 MiB and `FLUSH_BYTES`."""
    try:
        import cpuinfo

        known = cpuinfo.get_cpu_info().get("l3_cache_size")
        largest = int(known) if known else 0
    except Exception:  # the package reads what each system offers, and raises what that raises
        largest = 0
    return min(max(2 * largest, 64 * 2**20), FLUSH_BYTES)


def flush_caches() -> int:
    """Fills the caches with other data by writing to every cache line of a large buffer; returns its bytes."""
    buffer = _flush_buffer()
    buffer[:: CACHE_LINE // 8] += 1
    return buffer.nbytes


@dataclass(frozen=True)
class Reference:
    """The reference operation's times during a measurement.

    Attributes:
        p50_ms: median.
        spread: distance of the quartiles over the median.
        noisy: the spread or the slowdown against the fastest call is too large to trust small differences.
    """

    p50_ms: float
    spread: float
    noisy: bool


def describe_reference(references_ms: Sequence[float]) -> Reference:
    """What the reference operation's times say of the machine.

    Raises:
        ValueError: there are none.
    """
    times = _checked(references_ms, "times of the reference operation")
    low, median, high = np.percentile(times, (25, 50, 75))
    spread = float((high - low) / median)
    noisy = spread > NOISY_SPREAD or median > NOISY_SLOWDOWN * times.min()
    return Reference(float(median), spread, bool(noisy))


@dataclass(frozen=True)
class Latency:
    """How long one operation takes. Milliseconds, of warm calls unless said otherwise.

    Attributes:
        count: warm calls that the figures are of.
        p50_ms, p95_ms, p99_ms: percentiles. With fewer than 100 calls p99 is close to the slowest call.
        low_ms, high_ms: 95 % bootstrap interval of the median.
        first_ms: the first call after building; None where it was not timed.
        cold_ms: median of calls with flushed caches; None where there were none.
        reference_ms: median of the reference operation beside it.
        reference_spread: distance of its quartiles over its median.
        ratio: p50_ms over reference_ms: comparable between runs at other clock speeds, not between machines.
        noisy: the reference operation varied so much that small differences mean nothing.
    """

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    low_ms: float
    high_ms: float
    reference_ms: float
    reference_spread: float
    ratio: float
    noisy: bool
    first_ms: float | None = None
    cold_ms: float | None = None

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Latency:
        """What `as_json` described; unknown entries are left out.

        Raises:
            ValueError: something is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in content.items() if name in known})
        except TypeError as error:
            raise ValueError(f"no latency: {error}") from None


def summarise(
    samples_ms: Sequence[float],
    *,
    references_ms: Sequence[float],
    first_ms: float | None = None,
    cold_ms: Sequence[float] = (),
) -> Latency:
    """The record of a measurement from its single times.

    Args:
        samples_ms: warm calls, at least one.
        references_ms: the reference operation in the same rounds, at least one.
        first_ms: the first call after building.
        cold_ms: calls with flushed caches.

    Raises:
        ValueError: no times, or one that is not finite or below zero.
    """
    times = _checked(samples_ms, "times")
    p50, p95, p99 = (float(value) for value in np.percentile(times, (50, 95, 99)))
    low, high = median_interval(times)
    reference = describe_reference(references_ms)
    return Latency(
        count=len(times),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        low_ms=low,
        high_ms=high,
        reference_ms=reference.p50_ms,
        reference_spread=reference.spread,
        ratio=p50 / reference.p50_ms,
        noisy=reference.noisy,
        first_ms=first_ms,
        cold_ms=float(np.median(_checked(cold_ms, "cold times"))) if len(cold_ms) else None,
    )


def median_interval(samples: Any, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the median: (low, high). One sample has an interval of no width."""
    values = np.asarray(samples, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one sample")
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    medians = np.median(values[drawn], axis=1)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(medians, (tail, 100.0 - tail))
    return float(low), float(high)


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times with its 95 % interval. Below 1: the first is the quicker one."""

    value: float
    low: float
    high: float

    @property
    def clearly_below(self) -> bool:
        """The whole interval lies below 1."""
        return self.high < 1.0

    @property
    def clearly_above(self) -> bool:
        """The whole interval lies above 1."""
        return self.low > 1.0


def ratio_interval(mine_ms: Sequence[float], other_ms: Sequence[float]) -> Ratio:
    """The median of the ratios within each round, with its bootstrap interval. Entry i of both is of round i.

    Raises:
        ValueError: the two have different lengths, or times that are not above zero.
    """
    mine, other = _checked(mine_ms, "times"), _checked(other_ms, "times to compare with")
    if len(mine) != len(other):
        raise ValueError(f"ratios are of rounds: {len(mine)} times against {len(other)}")
    if not (mine > 0).all() or not (other > 0).all():
        raise ValueError("a time is zero: the clock is too coarse for the operation")
    # On a logarithmic scale a ratio and its inverse have the same interval.
    ratios = np.log(mine / other)
    low, high = median_interval(ratios)
    return Ratio(float(np.exp(np.median(ratios))), float(np.exp(low)), float(np.exp(high)))


REFERENCE = "reference operation"
"""The name under which `interleave` gives the reference operation's times."""


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    clock: Clock = "wall",
    least: int = 1,
    seconds: float | None = None,
    before: Callable[[], Any] | None = None,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Times several operations in turns, with the reference operation in every round.

    The order within a round is drawn anew each time, so that none always follows the same other one.

    Args:
        calls: by name. Each must wait for its own result (an accelerator is synchronised by the caller's function).
        rounds: calls of each.
        clock: which time.
        least: rounds that are made however long they take.
        seconds: stops after the first round from `least` on that ends later than this; None never does.
        before: is called before each timed call, untimed, such as `flush_caches`.
        prepare: by name, what is called untimed before each call of that name (and before `before`).

    Returns:
        Milliseconds by name, entry i of round i, those of the reference operation under `REFERENCE`.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one is needed")
    if REFERENCE in calls:
        raise ValueError(f"{REFERENCE!r} is the name of the reference operation")
    _matrices()
    now, order = clock_of(clock), np.random.default_rng(0)
    everything = {**calls, REFERENCE: reference_operation}
    names = list(everything)
    found: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    preparations = prepare or {}
    for done in range(1, rounds + 1):
        for place in order.permutation(len(names)):
            if names[place] in preparations:
                preparations[names[place]]()
            if before is not None:
                before()
            found[names[place]].append(timed_ms(everything[names[place]], now))
        if seconds is not None and done >= least and time.perf_counter() - started > seconds:
            break
    return found


def _checked(samples: Sequence[float], what: str) -> np.ndarray[Any, Any]:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"there are no {what}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{what} are finite and not negative; got {values.tolist()[:5]}")
    return values
