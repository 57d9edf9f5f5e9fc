"""The part of a comparison that measures curves: which builds, at which sizes, in processes, into curves.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json

from .cells import SCHEMA, Cell, fingerprint
from .engines import Bench, Engine, Losses
from .environment import backend_digest
from .plan import read_json
from .processes import Event
from .progress import Reporter, label
from .provenance import differences, in_words
from .workload_curves import INSTRUMENTS, curve_build

CURVES = "curves.json"

EXPECTED_SECONDS = 3.0
"""What filling a build takes beside its searches, for the estimate of the time left."""


@dataclass(frozen=True)
class PlannedCurve:
    """One curve to measure or to find: a build at one memory size, with the specs whose points must be on it."""

    build: str
    backend: str
    memory_size: int
    specs: tuple[str, ...]
    fingerprint: str

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the others of a run."""
        return self.build, self.memory_size


def plan_curves(cells: Sequence[Cell], settings: Mapping[str, Any], *, seconds: float) -> list[PlannedCurve]:
    """The curves of every build that was measured, exact first: none for instruments, nor for what failed."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if cell.status == "ok" and cell.memory_size and cell.backend not in INSTRUMENTS:
            groups.setdefault((curve_build(cell.spec), cell.memory_size), []).append(cell)
    planned = []
    for (build, size), members in groups.items():
        specs = tuple(sorted(cell.spec for cell in members))
        mark = fingerprint(
            {**settings, "specs": specs, "size": size, "seconds": seconds, "code": backend_digest(specs[0])}
        )
        planned.append(PlannedCurve(build, members[0].backend, size, specs, mark))
    return sorted(planned, key=lambda one: (one.backend != "exact", one.backend, one.build, one.memory_size))


def measure_curves(
    output: Path,
    planned: Sequence[PlannedCurve],
    prepare: Callable[[], Path],
    *,
    seconds: float,
    provenance: Mapping[str, Any],
    reporter: Reporter,
    expect: Callable[[int], object],
    bench: Bench,
    checkpoint: Path,
) -> str:
    """Fills curves.json, keeping curves that were measured with the same settings.

    Args:
        output: folder of the comparison.
        planned: every curve that belongs to it.
        prepare: gives the prepared workload; called only where something is missing.
        seconds: of searching for each curve.
        provenance: of this run.
        expect: is told how many curves are left.
        bench: runs the processes.
        checkpoint: folder of the model, which they read.

    Returns:
        A note, or ''.
    """
    path = output / CURVES
    known = read_json(path) or {}
    wanted = {curve.key: curve for curve in planned}
    former = [curve for curve in known.get("curves", []) if isinstance(curve, dict)]
    former = [curve for curve in former if (curve.get("build"), curve.get("memory_size")) in wanted]
    curves = {
        curve.key: entry
        for entry in former
        if (curve := wanted[entry["build"], entry["memory_size"]]).fingerprint == entry.get("fingerprint")
        and not entry.get("reason")
    }
    others = sum(
        entry.get("fingerprint") != wanted[entry["build"], entry["memory_size"]].fingerprint for entry in former
    )
    note = ""
    if others:
        what = in_words(differences(known.get("provenance"), provenance)) or "specs, seconds, code or library"
        note = f"{others} curves had other settings ({what}): measured anew."
    missing = [curve for curve in planned if curve.key not in curves]

    def take(curve: PlannedCurve, entry: Mapping[str, Any]) -> None:
        curves[curve.key] = {**entry, "fingerprint": curve.fingerprint}
        ordered = [curves[one.key] for one in planned if one.key in curves]
        write_json(path, {"schema": SCHEMA, "provenance": provenance, "curves": ordered})
        expect(len(planned) - len(curves))

    if not missing:
        if len(former) != len(known.get("curves", [])) and curves:
            take(planned[0], curves[planned[0].key])  # what was not asked for is left out
        return note
    workload = prepare()
    stage = _Stage(workload, checkpoint, bench, reporter, take, seconds, len(planned), done=len(curves))
    bench.engine.each(units_of(missing, bench.engine), stage.measure)
    return note


def units_of(missing: Sequence[PlannedCurve], engine: Engine) -> list[list[PlannedCurve]]:
    """What a process measures together: a backend's curves, of one size each where several machines share them."""
    apart = engine.places(alone=True, threads=1) > 1
    units: dict[tuple[str, int], list[PlannedCurve]] = {}
    for curve in missing:
        units.setdefault((curve.backend, curve.memory_size if apart else 0), []).append(curve)
    return list(units.values())


@dataclass
class _Stage:
    """What the processes of all units share; `done` counts the curves that are finished."""

    workload: Path
    checkpoint: Path
    bench: Bench
    reporter: Reporter
    take: Callable[[PlannedCurve, Mapping[str, Any]], None]
    seconds: float
    total: int
    done: int = 0
    losses: Losses = field(default_factory=Losses)

    def measure(self, todo: list[PlannedCurve]) -> None:
        """Measures curves of one backend, a crash at one of them notwithstanding."""
        while todo:
            todo = self._run_process(todo)

    def _run_process(self, todo: list[PlannedCurve]) -> list[PlannedCurve]:
        """Measures curves in a process; returns what is left after a crash."""
        log = self.workload / "logs" / f"curves-{todo[0].backend}-{todo[0].memory_size}.log"
        log.unlink(missing_ok=True)
        task = {
            "kind": "curves",
            "workload": str(self.workload),
            "seconds": self.seconds,
            "curves": [{"specs": list(curve.specs), "memory_size": curve.memory_size} for curve in todo],
        }
        finished = 0

        def hear(event: Event) -> None:
            nonlocal finished
            curve = todo[int(event["index"])]
            if event["event"] in ("start", "progress"):
                inner = event.get("done", 0) / event.get("of", 1)
                self.reporter.running(f"curve: {label(curve.build, curve.memory_size)}", inner)
                return
            finished += 1
            self._finish(curve, event)

        last = self.bench.run(
            task,
            hear,
            log=log,
            alone=True,
            needs=(self.workload, self.checkpoint),
            rewritten=("workload.json",),
            label=f"curves of {todo[0].backend}",
        )
        with self.bench.engine.turn:
            if last["event"] != "end" and finished < len(todo):
                curve = todo[finished]
                if last["event"] == "lost" and self.losses.again(curve.key):
                    self.reporter.note(f"curve: {label(*curve.key)}: {last['reason']}: it is measured again")
                else:
                    hear({"event": "failed", "index": finished, "reason": self.losses.told(curve.key, last["reason"])})
        return list(todo[finished:])

    def _finish(self, curve: PlannedCurve, event: Event) -> None:
        """Takes a curve that is measured or failed."""
        self.done += 1
        name = label(curve.build, curve.memory_size)
        self.reporter.ended(f"curve: {name}")
        if event["event"] == "done":
            self.take(curve, {**event["curve"], "machine": event["machine"]})
            points = len(event["curve"]["points"])
            told = f"{points} point{'s' if points != 1 else ''}"
        else:
            self.take(curve, _without_points(curve, event["reason"]))
            told = f"failed: {event['reason']}"
        self.reporter.note(f"[curve {self.done}/{self.total}] {name}: {told}")


def _without_points(curve: PlannedCurve, reason: str) -> dict[str, Any]:
    about = {"build": curve.build, "backend": curve.backend, "memory_size": curve.memory_size}
    return {**about, "points": [], "reason": reason}
