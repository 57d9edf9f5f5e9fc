"""What spreading a memory over processes costs, as measured: one JSON file with the machine that it is of.

Costs of searching a shard are the calibration's (`calibration`); these are of what comes on top: calling all shards,
carrying queries, answers and keys, merging, and filling a shard again that was lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from recollect.memory_backends.atomic import write_json
from recollect.model.token_cache import default_cache_directory

from ..environment import commit_of, describe_machine, library_versions
from .amounts import PlanError
from .calibration import THE_SAME_MACHINE, read_measured
from .laws import LEAST_SPREAD, Estimate

FORMAT = "recollect-cluster-costs"
VERSION = 1
MEASURE = "measure this machine with `recollect plan --measure-cluster`"
FEWEST_POINTS = 5
"""Points that the costs of a call are fitted to at least."""


@dataclass(frozen=True)
class CallPoint:
    """What calls of a memory in shards took beyond the work of a shard.

    Attributes:
        kind: "search" or "append".
        shards, memories, count, dim, k: S, M, queries or new keys of each memory, D, neighbours (0 for an append).
        each: bytes that every shard reads; 0 for an append.
        once: bytes of all shards together: answers of a search, keys of an append.
        sharded_ms: of the call over shards: the median.
        alone_ms: of what one shard does for it, in this process: the median.
        noisy: the machine was busy.
    """

    kind: str
    shards: int
    memories: int
    count: int
    dim: int
    k: int
    each: int
    once: int
    sharded_ms: float
    alone_ms: float
    noisy: bool

    @property
    def beyond_ms(self) -> float:
        """Milliseconds that sharding costs; never below a hundredth of the whole, which noise may hide."""
        return max(self.sharded_ms - self.alone_ms, 0.01 * self.sharded_ms)


@dataclass(frozen=True)
class CallLaw:
    """Seconds of a call as a sum: so much for the call, for each shard, and for each byte.

    Attributes:
        call, shard: seconds.
        byte: seconds of a byte, whichever way it goes.
        spread: scatter of the points about the law, as the standard deviation of the natural logarithm.
    """

    call: float
    shard: float
    byte: float
    spread: float

    def at(self, shards: int, moved: int) -> Estimate:
        """Seconds of one call to `shards` shards that moves so many bytes to and from all of them."""
        value = self.call + self.shard * shards + self.byte * moved
        scatter = math.exp(2 * max(self.spread, LEAST_SPREAD))
        return Estimate(value, value / scatter, value * scatter, 1.0)

    def __str__(self) -> str:
        return (
            f"{1e6 * self.call:.0f} µs, {1e6 * self.shard:.0f} µs a shard and {1e9 * self.byte:.2f} ns a byte "
            f"(points within {100 * self.spread:.0f} %)"
        )


@dataclass(frozen=True)
class Recovered:
    """A shard's process was killed with -9.

    Attributes:
        keys, dim: what it held.
        detection_seconds, away_seconds, refill_seconds: until it was noticed, until a process was there again, and
            until that had every key.
        lost: keys that it did not get back.
    """

    keys: int
    dim: int
    detection_seconds: float
    away_seconds: float
    refill_seconds: float
    lost: int

    @property
    def keys_per_second(self) -> float:
        """The rate of filling it again."""
        return self.keys / self.refill_seconds


@dataclass
class ClusterCosts:
    """The measurements, and under which conditions they were taken.

    Attributes:
        machine, libraries, threads, commit, date: as of a calibration.
        process_bytes: main memory of a shard's process at work, without the keys.
        points: calls.
        recovered: a killed shard.
        shipped: whether they came with the package.
    """

    machine: dict[str, Any]
    libraries: dict[str, str]
    threads: int
    process_bytes: int
    recovered: Recovered
    points: list[CallPoint] = field(default_factory=list)
    commit: str | None = None
    date: str = ""
    shipped: bool = False

    def law(self, kind: str) -> CallLaw:
        """What a "search" or an "append" costs.

        Raises:
            PlanError: there are too few points.
        """
        return fit_calls([point for point in self.points if point.kind == kind])

    def differences(self, machine: Mapping[str, Any]) -> list[str]:
        """What of a machine is not as it was at the measurement, as sentences."""
        return [
            f"{name} is {machine.get(name)!r} here and was {self.machine.get(name)!r} there"
            for name in THE_SAME_MACHINE
            if machine.get(name) != self.machine.get(name)
        ]

    def described(self) -> str:
        """Machine, engine and day in one line."""
        ray = self.libraries.get("ray", "of an unknown version")
        return f"{self.machine.get('cpu')}, {self.machine.get('cores')} cores, Ray {ray} on it alone, {self.date[:10]}"

    def save(self, path: Path) -> None:
        """Writes them, whole or not at all."""
        content = dataclasses.asdict(self)
        content.pop("shipped")
        write_json(path, {"format": FORMAT, "version": VERSION, **content})


def fit_calls(points: Sequence[CallPoint]) -> CallLaw:
    """The law of some calls by least relative errors, no term below zero.

    Raises:
        PlanError: fewer than five points, or all of one number of shards or bytes.
    """
    rows = np.array([[1.0, one.shards, one.each * one.shards + one.once] for one in points]).reshape(-1, 3)
    if len(points) < FEWEST_POINTS or np.linalg.matrix_rank(rows) < rows.shape[1]:
        raise PlanError(f"costs of calls need {FEWEST_POINTS} points of different shards and bytes: {MEASURE} again")
    costs = np.array([one.beyond_ms / 1e3 for one in points])
    relative = rows / costs[:, None]
    scale = relative.max(axis=0)
    weights = nnls(relative / scale, np.ones(len(costs)))[0] / scale
    free = max(1, len(costs) - int((weights > 0).sum()))
    spread = float(np.sqrt((np.log(relative @ weights) ** 2).sum() / free))
    call, shard, byte = (float(weight) for weight in weights)
    return CallLaw(call, shard, byte, spread)


def costs_path() -> Path:
    """Where this user's measured costs lie: beside the calibration."""
    return default_cache_directory() / "cluster.json"


def shipped_costs_path() -> Path:
    """Those that come with the package."""
    return Path(str(files("recollect.suites.planning") / "cluster.json"))


def conditions(threads: int) -> dict[str, Any]:
    """What of this machine stands in a file of costs."""
    return {
        "machine": describe_machine(),
        "libraries": library_versions(),
        "threads": threads,
        "commit": commit_of(),
    }


def read_costs(path: Path) -> ClusterCosts:
    """The costs in a file.

    Raises:
        PlanError: it is missing, or holds none of this version.
    """
    content = read_measured(
        path,
        FORMAT,
        VERSION,
        missing="there are no cluster costs",
        other="holds no cluster costs of recollect",
        measure=MEASURE,
    )
    try:
        values = {item.name: content[item.name] for item in dataclasses.fields(ClusterCosts) if item.name != "shipped"}
        values["points"] = [CallPoint(**point) for point in values["points"]]
        values["recovered"] = Recovered(**values["recovered"])
        return ClusterCosts(**values)
    except (KeyError, TypeError) as error:
        raise PlanError(f"{path} is incomplete ({error}): {MEASURE}") from None


def find_costs(path: Path | None = None) -> tuple[ClusterCosts, list[str]]:
    """The costs to plan by, and what must be said of them.

    Args:
        path: a file that was named on purpose; without one this user's own, and without that the shipped ones.

    Raises:
        PlanError: there are none, or the user's own are of another machine.
    """
    own = costs_path()
    shipped = path is None and not own.is_file()
    found = read_costs(path or (shipped_costs_path() if shipped else own))
    found.shipped = shipped
    differences = found.differences(describe_machine())
    if path is None and not shipped and differences:
        raise PlanError(
            f"the cluster costs {own} are of another machine ({'; '.join(differences)}): {MEASURE}, or name them with "
            f"`--cluster-costs {own}` to plan for that machine"
        )
    words = []
    if shipped:
        words.append(
            f"NOT THIS MACHINE: costs of sharding ship with the package and are of {found.described()}; {MEASURE}"
        )
    elif differences:
        words.append(f"NOT THIS MACHINE: costs of sharding are of {found.described()}; {'; '.join(differences)}")
    noisy = sum(point.noisy for point in found.points)
    if noisy:
        words.append(f"the machine was busy at {noisy} of {len(found.points)} measured costs of sharding")
    return found, words
