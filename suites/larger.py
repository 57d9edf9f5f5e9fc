"""The part of a comparison that looks beyond the model's memory sizes: which specs, at which sizes, in processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json
from recollect.model.token_cache import TokenizedDocuments

from .cells import SCHEMA, Cell, fingerprint
from .crossover import choose_stream_text, keys_in
from .engines import Bench, Losses
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
    bench: Bench,
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
    held = _record(work, checkpoint, documents, max(sizes), segment_length, bench)
    too_large = [size for size in sizes if size > held]
    todo = [(spec, fitting) for spec in specs if (fitting := [size for size in missing[spec] if size <= held])]
    climb = _Climb(path, work, bench, reporter, rows, specs, k, settings, provenance)
    climb.heads = {spec: {"spec": spec, "backend": backends[spec], "fingerprint": marks[spec]} for spec in specs}
    bench.engine.each(todo, climb.measure)
    if too_large:
        notes.append(
            f"The corpus has {held} tokens for larger memories, so sizes {', '.join(map(str, too_large))} are left out."
        )
    return " ".join(notes)


@dataclass
class _Climb:
    """What the processes of all specs share. heads: what all rows of a spec have."""

    path: Path
    work: Path
    bench: Bench
    reporter: Reporter
    rows: list[dict[str, Any]]
    specs: Sequence[str]
    k: int
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: Losses = field(default_factory=Losses)

    def measure(self, wanted: tuple[str, list[int]]) -> None:
        """Measures a spec at rising sizes in one process; where that is lost, what is left in another."""
        spec, todo = wanted
        while todo:
            todo = self._run_process(spec, todo)

    def _run_process(self, spec: str, todo: list[int]) -> list[int]:
        task = {
            "kind": "larger",
            "stream": str(self.work / STREAM),
            "k": self.k,
            "seed": self.settings["seed"],
            "device": str(self.settings["device"]),
            "patience": PATIENCE_SECONDS,
            "rows": [{"spec": spec, "memory_size": size} for size in todo],
        }
        head = self.heads[spec]
        finished = 0

        def hear(event: Event) -> None:
            nonlocal finished
            size = todo[int(event["index"])]
            if event["event"] == "start":
                share = self.specs.index(spec) / len(self.specs)
                self.reporter.running(f"larger memories: {label(spec, size)}", share)
                return
            finished += 1
            self.reporter.ended(f"larger memories: {label(spec, size)}")
            if event["event"] == "done":
                self.rows.append({**event["row"], **head, "machine": event["machine"]})
            else:
                self.rows.append({**head, "memory_size": size, "search_ms": None, "reason": event["reason"]})

        log = self.work / "logs" / f"larger-{head['backend']}.log"
        last = self.bench.run(
            task, hear, log=log, alone=True, needs=(self.work / STREAM,), label=f"larger memories of {spec}"
        )
        with self.bench.engine.turn:
            again = False
            if last["event"] != "end" and finished < len(todo):
                size = todo[finished]
                self.reporter.ended(f"larger memories: {label(spec, size)}")
                again = last["event"] == "lost" and self.losses.again((spec, size))
                if again:
                    self.reporter.note(f"larger memories: {label(spec, size)}: {last['reason']}: it is measured again")
                else:
                    reason = self.losses.told((spec, size), last["reason"])
                    self.rows.append({**head, "memory_size": size, "search_ms": None, "reason": reason})
            _write(self.path, self.rows, self.provenance)
        return todo[finished:] if again else []


def _record(
    work: Path,
    checkpoint: Path,
    documents: TokenizedDocuments,
    keys: int,
    segment_length: int,
    bench: Bench,
) -> int:
    """Records the stream of keys into the work folder, in a process; returns how many keys it holds."""
    text = choose_stream_text(documents, segment_length=segment_length, keys=keys)
    save_text(work / TEXT, text)
    task = {
        "kind": "record",
        "checkpoint": str(checkpoint),
        "device": bench.device,
        "stream": str(work / STREAM),
        "text": str(work / TEXT),
    }
    log = work / "logs" / "stream.log"
    last = run_task(task, threads=bench.threads, log=log, timeout=bench.timeout, on_event=lambda event: None)
    if last["event"] != "end":
        raise CompareError(f"the keys for larger memories could not be recorded: {last['reason']}")
    return keys_in(text)


def _write(path: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    ordered = sorted(rows, key=lambda row: (row["spec"] != "exact", row["spec"], row["memory_size"]))
    write_json(path, {"schema": SCHEMA, "provenance": provenance, "rows": ordered})
