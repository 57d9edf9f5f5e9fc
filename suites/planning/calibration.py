"""Measured costs, and the machine they are of: one JSON file, kept in the user's cache folder.

A plan's figures are worth what its calibration is. One of another machine is refused, unless it is named on purpose;
the one that ships with the package says in every plan which machine it is of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.errors import MemoryBackendError
from recollect.model.token_cache import default_cache_directory

from ..environment import backend_digest, commit_of, describe_machine, library_versions
from .amounts import PlanError

FORMAT = "recollect-calibration"
VERSION = 1
MEASURE = "measure this machine with `recollect plan --measure`"
THE_SAME_MACHINE = ("cpu", "cores")
"""What of a machine's description decides whether costs are its own."""


@dataclass(frozen=True)
class Point:
    """What one memory of one backend cost at one size.

    Attributes:
        spec: canonical registry string.
        keys, dim, queries, k: n, D, queries of a search and keys of an append, neighbours.
        build_seconds: appending n keys to an empty memory, with everything that is built on the way.
        append_us: microseconds for a key while a full memory turns over once, builds included, also in the background.
        longest_append_ms: of the appends of that turnover the longest one; the background had always caught up.
        search_ms: mean over a turnover of one search.
        recall: of the true k nearest keys the share that was found, when the turnover was done.
        index_bytes: beside the raw keys.
        reference_ms: median of the reference operation (see `noise`) in the meantime.
        noisy: that operation varied so much that the figures are rough.
        code: names the backend's code and its library's version.
    """

    spec: str
    keys: int
    dim: int
    queries: int
    k: int
    build_seconds: float
    append_us: float
    longest_append_ms: float
    search_ms: float
    recall: float
    index_bytes: int
    reference_ms: float
    noisy: bool
    code: str

    @property
    def where(self) -> tuple[Any, ...]:
        """What makes a point another one."""
        return (self.spec, self.keys, self.dim, self.queries, self.k)


@dataclass
class Calibration:
    """Points, and under which conditions they were taken.

    Attributes:
        machine: as `describe_machine` tells it.
        libraries: versions.
        threads: of torch and every library.
        device: where memories lived.
        clock: "wall", or "cpu" for the processor time of the process.
        points: the measurements.
        commit, date: of the code, and when the last point was taken.
        shipped: whether it came with the package.
    """

    machine: dict[str, Any]
    libraries: dict[str, str]
    threads: int
    device: str
    clock: str
    points: list[Point] = field(default_factory=list)
    commit: str | None = None
    date: str = ""
    shipped: bool = False

    @classmethod
    def here(cls, *, threads: int, device: str, clock: str) -> Calibration:
        """An empty one of this machine as it is now."""
        return cls(describe_machine(), library_versions(), threads, device, clock, commit=commit_of())

    @property
    def specs(self) -> tuple[str, ...]:
        """Registry strings that there are points of, in the order of measuring."""
        return tuple(dict.fromkeys(point.spec for point in self.points))

    def of(self, spec: str) -> list[Point]:
        """The points of one canonical registry string."""
        return [point for point in self.points if point.spec == spec]

    def same_conditions(self, other: Calibration) -> bool:
        """Whether points of both may stand in one file."""
        names = ("libraries", "threads", "device", "clock")
        alike = all(getattr(self, name) == getattr(other, name) for name in names)
        return alike and not self.differences(other.machine)

    def differences(self, machine: Mapping[str, Any]) -> list[str]:
        """What of a machine is not as it was at the measurement, as sentences."""
        return [
            f"{name} is {machine.get(name)!r} here and was {self.machine.get(name)!r} there"
            for name in THE_SAME_MACHINE
            if machine.get(name) != self.machine.get(name)
        ]

    def described(self) -> str:
        """Machine, threads and day in one line."""
        machine = self.machine
        clock = ", processor time" if self.clock == "cpu" else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        day = self.date[:10]
        return f"{machine.get('cpu')}, {machine.get('cores')} cores, {threads}{clock}, on {self.device}, {day}"

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary, as written to disk."""
        about = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        about.pop("shipped")
        points = [dataclasses.asdict(point) for point in about.pop("points")]
        return {"format": FORMAT, "version": VERSION, **about, "points": points}

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        write_json(path, self.as_json())


def calibration_path(device: str = "cpu") -> Path:
    """Where this user's calibration for a kind of device lies: under RECOLLECT_CACHE or the user's cache folder."""
    return default_cache_directory() / f"calibration-{device.partition(':')[0]}.json"


def shipped_path() -> Path:
    """The calibration that comes with the package."""
    return Path(str(files("recollect.suites.planning") / "calibration.json"))


def read_measured(path: Path, kind: str, version: int, *, missing: str, other: str, measure: str) -> dict[str, Any]:
    """What a file of measured costs holds.

    Args:
        path: the file.
        kind, version: the `format` and `version` that it must name.
        missing: what is said, before its path, where there is none.
        other: what is said, after its path, where it is something else.
        measure: how to get one.

    Raises:
        PlanError: it is missing, unreadable, or of another format or version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{missing} {path}: {measure}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not readable JSON ({error}): remove it, or {measure}") from None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise PlanError(f"{path} {other}: name another file, or {measure}")
    if content.get("version") != version:
        raise PlanError(f"{path} has version {content.get('version')!r}, and this release reads {version}: {measure}")
    return content


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file.

    Raises:
        PlanError: it is missing, or no calibration of this version.
    """
    content = read_measured(
        path,
        FORMAT,
        VERSION,
        missing="there is no calibration",
        other="is no calibration of recollect",
        measure=MEASURE,
    )
    try:
        values = {item.name: content[item.name] for item in dataclasses.fields(Calibration) if item.name != "shipped"}
        values["points"] = [Point(**point) for point in values["points"]]
        return Calibration(**values)
    except (KeyError, TypeError) as error:
        raise PlanError(f"{path} is an incomplete calibration ({error}): {MEASURE}") from None


def find_calibration(path: Path | None = None, *, device: str = "cpu") -> tuple[Calibration, list[str]]:
    """The calibration to plan by, and what must be said of it.

    Args:
        path: a file that was named on purpose; without one this user's own, and without that the shipped one.
        device: whose costs are wanted.

    Raises:
        PlanError: the user's own is of another machine, or there is none for the device.
    """
    if path is not None:
        return _with_words(read_calibration(path), str(path))
    own = calibration_path(device)
    if own.is_file():
        found = read_calibration(own)
        differences = found.differences(describe_machine())
        if differences:
            raise PlanError(
                f"the calibration {own} is of another machine ({'; '.join(differences)}): {MEASURE}, or name it with "
                f"`--calibration {own}` to plan for that machine"
            )
        return _with_words(found, str(own))
    if device.partition(":")[0] != "cpu":
        raise PlanError(f"there is no calibration for {device}: `recollect plan --measure --device {device}`")
    found = read_calibration(shipped_path())
    found.shipped = True
    return _with_words(found, "the package")


def _with_words(calibration: Calibration, where: str) -> tuple[Calibration, list[str]]:
    words = []
    if calibration.shipped:
        words.append(
            f"NOT THIS MACHINE: no costs were measured here, these ship with the package and are of "
            f"{calibration.described()}; {MEASURE}"
        )
    else:
        differences = calibration.differences(describe_machine())
        if differences:
            words.append(f"NOT THIS MACHINE: {where} is of {calibration.described()}; {'; '.join(differences)}")
    here = library_versions()
    other = [
        f"{name} {version} (here {here.get(name, 'missing')})"
        for name, version in calibration.libraries.items()
        if here.get(name) != version
    ]
    if other:
        words.append(f"measured with other libraries: {', '.join(other)}")
    changed = [spec for spec in calibration.specs if _digest(spec) not in {p.code for p in calibration.of(spec)}]
    if changed:
        words.append(f"the code has changed since the measurement of {', '.join(changed)}: {MEASURE} again")
    noisy = sum(point.noisy for point in calibration.points)
    if noisy:
        words.append(f"the machine was busy at {noisy} of {len(calibration.points)} measured points")
    return calibration, words


def _digest(spec: str) -> str:
    try:
        return backend_digest(spec)
    except MemoryBackendError:  # a third party's backend that is not installed here
        return ""
