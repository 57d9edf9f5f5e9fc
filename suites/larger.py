"""The part of a comparison that looks beyond the model's memory sizes: which specs, at which sizes, in processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json
from recollect.model.token_cache import TokenizedDocuments

from .cells import SCHEMA, Cell, fingerprint
from .crossover import choose_stream_text, keys_in
from .environment import backend_digest
from .options import CompareError
from .plan import read_json
from .processes import Event, run_task
from .progress import Reporter, label
from .provenance import differences, in_words
from .workload import save_text

CROSSOVER = "crossover.json"
STREAM, TEXT = "stream.safetensors", "stream-text.safetensors"

GOOD_RECALL = 0.9
"""An index that finds less at the largest evaluated memory is no rival of exact search."""

PATIENCE_SECONDS = 25.0
"""A spec whose build is expected to take longer at the next size is not taken further."""

NOT_RIVALS = ("degraded", "none", "faiss-flat")
"""Backends that cannot overtake exact search: degraded is exact search, faiss-flat computes the same scores."""


def choose_specs(cells: Iterable[Cell]) -> list[str]:
    """Exact, and of every other backend the fastest spec with good recall at the largest measured memory."""
    measured = [cell for cell in cells if cell.status == "ok" and cell.memory_size]
    if not measured:
        return []
    largest = max(cell.memory_size for cell in measured)
    best: dict[str, Cell] = {}
    for cell in measured:
        rival = cell.memory_size == largest and cell.backend not in NOT_RIVALS and cell.search_ms is not None
        if not rival or (cell.recall_at_k or 0.0) < GOOD_RECALL:
            continue
        if cell.backend not in best or (cell.search_ms or 0.0) < (best[cell.backend].search_ms or 0.0):
            best[cell.backend] = cell
    found = sorted(best.values(), key=lambda cell: (cell.backend != "exact", cell.backend))
    return [cell.spec for cell in found]


def measure_larger(
    output: Path,
    work: Path,
    checkpoint: Path,
    documents: TokenizedDocuments,
    cells: Sequence[Cell],
    *,
    sizes: Sequence[int],
    k: int,
    segment_length: int,
    threads: int,
    timeout: float,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    reporter: Reporter,
) -> str:
    """Fills crossover.json, keeping rows that were measured with the same settings.

    Returns:
        Notes in one text, or '': which rows were of other settings and are measured anew, which sizes are left out.
    """
    path = output / CROSSOVER
    specs = choose_specs(cells)
    backends = {cell.spec: cell.backend for cell in cells}
    marks = {spec: fingerprint({**settings, "spec": spec, "code": backend_digest(spec)}) for spec in specs}
    known = read_json(path) or {}
    former = [row for row in known.get("rows", []) if isinstance(row, dict) and str(row.get("spec")) in marks]
    rows: list[dict[str, Any]] = [row for row in former if row.get("fingerprint") == marks[str(row["spec"])]]
    notes = []
    if len(rows) < len(former):
        what = in_words(differences(known.get("provenance"), provenance)) or "text, code or library"
        notes.append(
            f"{len(former) - len(rows)} search times at larger memories had other settings ({what}): measured anew."
        )
    have = {(row["spec"], row["memory_size"]) for row in rows}
    missing = {spec: [size for size in sizes if (spec, size) not in have] for spec in specs}
    if not any(missing.values()):
        _write(path, rows, provenance)
        return " ".join(notes)
    reporter.step("keys for larger memories", 0.0)
    held = _record(work, checkpoint, documents, max(sizes), segment_length, threads, timeout, str(settings["device"]))
    too_large = [size for size in sizes if size > held]
    for spec in specs:
        todo = [size for size in missing[spec] if size <= held]
        if todo:
            task = {
                "kind": "larger",
                "stream": str(work / STREAM),
                "k": k,
                "seed": settings["seed"],
                "device": str(settings["device"]),
                "patience": PATIENCE_SECONDS,
                "rows": [{"spec": spec, "memory_size": size} for size in todo],
            }
            row = {"spec": spec, "backend": backends[spec], "fingerprint": marks[spec]}
            current = todo[0]

            def hear(event: Event, spec: str = spec, todo: list[int] = todo, row: dict[str, Any] = row) -> None:
                nonlocal current
                current = todo[int(event["index"])]
                if event["event"] == "start":
                    reporter.step(f"larger memories: {label(spec, current)}", specs.index(spec) / len(specs))
                elif event["event"] == "done":
                    rows.append({**event["row"], **row})
                else:
                    rows.append({**row, "memory_size": current, "search_ms": None, "reason": event["reason"]})

            log = work / "logs" / f"larger-{backends[spec]}.log"
            last = run_task(task, threads=threads, log=log, timeout=timeout, on_event=hear)
            if last["event"] != "end":
                rows.append({**row, "memory_size": current, "search_ms": None, "reason": last["reason"]})
            _write(path, rows, provenance)
    if too_large:
        notes.append(
            f"The corpus has {held} tokens for larger memories, so sizes {', '.join(map(str, too_large))} are left out."
        )
    return " ".join(notes)


def _record(
    work: Path,
    checkpoint: Path,
    documents: TokenizedDocuments,
    keys: int,
    segment_length: int,
    threads: int,
    timeout: float,
    device: str,
) -> int:
    """Records the stream of keys into the work folder, in a process; returns how many keys it holds."""
    text = choose_stream_text(documents, segment_length=segment_length, keys=keys)
    save_text(work / TEXT, text)
    task = {
        "kind": "record",
        "checkpoint": str(checkpoint),
        "device": device,
        "stream": str(work / STREAM),
        "text": str(work / TEXT),
    }
    log = work / "logs" / "stream.log"
    last = run_task(task, threads=threads, log=log, timeout=timeout, on_event=lambda event: None)
    if last["event"] != "end":
        raise CompareError(f"the keys for larger memories could not be recorded: {last['reason']}")
    return keys_in(text)


def _write(path: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    ordered = sorted(rows, key=lambda row: (row["spec"] != "exact", row["spec"], row["memory_size"]))
    write_json(path, {"schema": SCHEMA, "provenance": provenance, "rows": ordered})
