"""What a comparison will measure: cells with the settings they depend on, and what of them is there already."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.memory_backends import canonical_spec, describe_backend
from recollect.memory_backends.spec import parse_spec

from .cells import NO_MEMORY, Cell, cell_identity, fingerprint, load_cell
from .environment import backend_digest, core_digest
from .options import CompareError, CompareOptions
from .parameters import declared_specs

EARLIER = "earlier"
"""Folder in the output for cells of other settings: kept, out of the report's sight, and taken back when they fit."""


@dataclass(frozen=True)
class PlannedCell:
    """One measurement to make or to find.

    Attributes:
        spec: canonical registry string, or 'none'.
        backend: its name.
        memory_size: C, 0 for no memory.
        fingerprint: digest of everything its figures depend on.
        settings: digest of what all cells of the run share.
        skip: why it can't be measured here (a missing library), empty where it can.
    """

    spec: str
    backend: str
    memory_size: int
    fingerprint: str
    settings: str
    skip: str = ""

    @property
    def identity(self) -> str:
        """The name of its files."""
        return cell_identity(self.spec, self.memory_size, self.fingerprint)


def checked_options(options: CompareOptions) -> CompareOptions:
    """The options with specs made canonical and sizes sorted.

    Raises:
        CompareError: a number is out of range.
        UnknownBackend, InvalidSpec: a spec is wrong.
    """
    for name, smallest in (("rows", 1), ("max_tokens", 1), ("k", 1), ("threads", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise CompareError(f"{name} is {value}: want {smallest} or more")
    for size in (*options.memory_sizes, *options.crossover_sizes):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise CompareError(f"memory size {size!r} must be a whole number of keys, or 0 for no memory")
    if not 0 <= options.curve_seconds < float("inf"):
        raise CompareError(f"curve_seconds is {options.curve_seconds}: want a number of seconds, or 0 for no curves")
    if options.cell_timeout <= 0:
        raise CompareError(f"cell_timeout is {options.cell_timeout}: want a number of seconds above 0")
    specs = tuple(dict.fromkeys(_canonical(spec) for spec in options.backends))
    sizes = tuple(sorted({size for size in options.memory_sizes if size}))
    crossover = tuple(sorted({size for size in options.crossover_sizes if size}))
    return dataclasses.replace(options, backends=specs, memory_sizes=sizes, crossover_sizes=crossover)


def _canonical(spec: str) -> str:
    return NO_MEMORY if spec.strip() == NO_MEMORY else canonical_spec(spec)


def make_plan(options: CompareOptions, shared: Mapping[str, Any]) -> list[PlannedCell]:
    """All cells of a run: no memory first, then exact, then the others by backend.

    Args:
        options: checked.
        shared: the settings that all cells have in common.
    """
    run = fingerprint(shared)
    asked = [spec for spec in options.backends if spec != NO_MEMORY]
    specs = list(dict.fromkeys(["exact", *(asked if options.backends else declared_specs())]))
    planned = [PlannedCell(NO_MEMORY, NO_MEMORY, 0, fingerprint({**shared, "core": core_digest()}), run)]
    for backend in dict.fromkeys(parse_spec(spec)[0] for spec in specs):
        info = describe_backend(backend)
        for spec in specs:
            if parse_spec(spec)[0] == backend:
                own = fingerprint({**shared, "core": core_digest(), "backend": backend_digest(spec)})
                planned += [
                    PlannedCell(spec, backend, size, own, run, "" if info.available else info.reason)
                    for size in options.memory_sizes
                ]
    return planned


def unmeasured_cell(planned: PlannedCell, k: int, status: str, reason: str, provenance: Mapping[str, Any]) -> Cell:
    """The cell of a backend whose library is missing ('skipped'), or of a process that died ('failed')."""
    return Cell(
        planned.spec,
        planned.backend,
        planned.memory_size,
        k,
        status,
        reason=reason,
        seed=int(provenance["seed"]),
        settings=planned.settings,
        fingerprint=planned.fingerprint,
        provenance=provenance,
    )


def cell_machine(cell: Cell) -> str:
    """The name of the machine that measured a cell; "" where it was not measured, or does not say."""
    return str((cell.provenance or {}).get("host", "")) if cell.status == "ok" else ""


def start_afresh(folder: Path, planned: Iterable[PlannedCell]) -> None:
    """Removes what was measured for this very plan, so that all of it is measured anew."""
    for cell in planned:
        for place in (folder, folder / EARLIER):
            for name in (f"cells/{cell.identity}.json", f"losses/{cell.identity}.npz"):
                (place / name).unlink(missing_ok=True)
    for name in ("crossover.json", "curves.json"):
        (folder / name).unlink(missing_ok=True)


def put_in_order(folder: Path, planned: Iterable[PlannedCell]) -> tuple[list[str], int]:
    """Leaves in `folder`/cells just what belongs to the plan.

    Cells of other settings go to `folder`/earlier, and come back from there when a plan asks for them.

    Returns:
        The backends of cells that were put aside because their settings are others now, one entry for each cell, and
        how many were put aside because nobody asks for their spec or size.
    """
    planned = list(planned)
    wanted = {cell.identity for cell in planned}
    asked = {(cell.spec, cell.memory_size) for cell in planned}
    others: list[str] = []
    unasked = 0
    for path in sorted((folder / "cells").glob("*.json")):
        if path.stem not in wanted:
            content = read_json(path)
            known = content if isinstance(content, dict) else {}
            _move(folder, folder / EARLIER, path.stem)
            if (known.get("spec"), known.get("memory_size")) in asked:
                others.append(str(known.get("backend")))
            else:
                unasked += 1
    for identity in sorted(wanted):
        there = folder / EARLIER / "cells" / f"{identity}.json"
        if there.is_file() and not (folder / "cells" / there.name).exists():
            _move(folder / EARLIER, folder, identity)
    return others, unasked


def _move(source: Path, target: Path, identity: str) -> None:
    # The losses go first: a cell is never without the losses that it names.
    for name in (f"losses/{identity}.npz", f"cells/{identity}.json"):
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, target / name)


def find_measured(folder: Path, planned: Iterable[PlannedCell]) -> dict[str, Cell]:
    """The planned cells that are measured already, by identity; failed and skipped ones are tried again."""
    found = {}
    for wanted in planned:
        cell = load_cell(folder, wanted.spec, wanted.memory_size, wanted.fingerprint)
        if cell is not None and cell.status == "ok":
            found[wanted.identity] = cell
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
