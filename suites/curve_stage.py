"""The part of a comparison that measures curves: which builds, at which sizes, in processes, into curves.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json

from .cells import SCHEMA, Cell, fingerprint
from .environment import backend_digest
from .plan import read_json
from .processes import Event, run_task
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
    threads: int,
    timeout: float,
    provenance: Mapping[str, Any],
    reporter: Reporter,
    expect: Callable[[int], object],
) -> str:
    """Fills curves.json, keeping curves that were measured with the same settings.

    Args:
        output: folder of the comparison.
        planned: every curve that belongs to it.
        prepare: gives the prepared workload; called only where something is missing.
        seconds: of searching for each curve.
        timeout: seconds after which one curve is given up.
        provenance: of this run.
        expect: is told how many curves are left.

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
    for backend in dict.fromkeys(curve.backend for curve in missing):
        todo = [curve for curve in missing if curve.backend == backend]
        while todo:
            todo = _run_process(workload, todo, take, seconds, threads, timeout, reporter, len(planned), len(curves))
    return note


def _run_process(
    workload: Path,
    todo: Sequence[PlannedCurve],
    take: Callable[[PlannedCurve, Mapping[str, Any]], None],
    seconds: float,
    threads: int,
    timeout: float,
    reporter: Reporter,
    total: int,
    done_before: int,
) -> list[PlannedCurve]:
    """Measures curves of one backend in a process; returns what is left after a crash."""
    task = {
        "kind": "curves",
        "workload": str(workload),
        "seconds": seconds,
        "curves": [{"specs": list(curve.specs), "memory_size": curve.memory_size} for curve in todo],
    }
    finished = 0

    def hear(event: Event) -> None:
        nonlocal finished
        curve = todo[int(event["index"])]
        if event["event"] in ("start", "progress"):
            inner = event.get("done", 0) / event.get("of", 1)
            reporter.step(f"curve: {label(curve.build, curve.memory_size)}", inner)
            return
        finished += 1
        if event["event"] == "done":
            take(curve, event["curve"])
            points = len(event["curve"]["points"])
            told = f"{points} point{'s' if points != 1 else ''}"
        else:
            take(curve, _without_points(curve, event["reason"]))
            told = f"failed: {event['reason']}"
        reporter.note(f"[curve {done_before + finished}/{total}] {label(curve.build, curve.memory_size)}: {told}")

    log = workload / "logs" / f"curves-{todo[0].backend}.log"
    log.unlink(missing_ok=True)
    last = run_task(task, threads=threads, log=log, timeout=timeout, on_event=hear)
    if last["event"] != "end":
        hear({"event": "failed", "index": finished, "reason": last["reason"]})
    return list(todo[finished:])


def _without_points(curve: PlannedCurve, reason: str) -> dict[str, Any]:
    about = {"build": curve.build, "backend": curve.backend, "memory_size": curve.memory_size}
    return {**about, "points": [], "reason": reason}
