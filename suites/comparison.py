"""`recollect compare`: every spec at every memory size, measured in this environment, resumable, with a report.

    compare(CompareOptions(output="out/compare"))
    compare(backends=("hnswlib:M=16",), memory_sizes=(2048,))

What lies in the output folder is described in `CompareResult`. Every file is written whole or not at all, a cell as
soon as it is measured; whatever ends a comparison, running it again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recollect._version import __version__
from recollect.memory_backends.atomic import write_json
from recollect.model.checkpoints import Checkpoint, load_checkpoint, reference_checkpoint
from recollect.model.evaluation_text import EvaluationText, choose_text, load_documents
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.twin import TwinLosses

from .cells import SCHEMA, Cell, fingerprint, save_cell
from .curve_stage import CURVES, EXPECTED_SECONDS, measure_curves, plan_curves
from .engines import Bench, Losses, make_engine
from .environment import commit_of, core_digest
from .larger import CROSSOVER, measure_larger
from .one_writer import writing_alone
from .options import CompareError, CompareOptions, CompareResult
from .plan import (
    EARLIER,
    PlannedCell,
    cell_machine,
    checked_options,
    find_measured,
    make_plan,
    put_in_order,
    read_json,
    start_afresh,
    unmeasured_cell,
)
from .processes import Event, run_task
from .progress import Estimate, Reporter, label
from .provenance import describe, differences, in_words
from .sharing import build_key
from .workload import WorkloadSettings, begin_workload
from .workload_curves import curve_build

WORK = ".workload"
"""Folder in the output for what the measuring processes share; removed when everything is measured."""

LARGER_SECONDS, REPORT_SECONDS = 6.0, 15.0
"""What a backend takes at larger memories and what the report takes, for the estimate of the time left."""

PREPARE_TIMEOUT = 1800.0
"""Seconds without a sign of life after which the preparation is given up."""


def compare(options: CompareOptions | None = None, **changes: Any) -> CompareResult:
    """Measures every planned cell that is not measured yet, then writes results and report.

    Args:
        options: what to measure; the defaults of `CompareOptions` where None.
        changes: single options by name.

    Raises:
        CompareError: an option is out of range, or another comparison is writing to the folder.
        CheckpointError, CorpusError, MemoryBackendError: what was asked for cannot be had.
        OSError: the output cannot be written; what was there before is as it was.
    """
    return _Comparison(dataclasses.replace(options or CompareOptions(), **changes)).run()


class _Comparison:
    def __init__(self, options: CompareOptions) -> None:
        self.options = checked_options(options)
        self.folder = Path(options.output)
        self.losses = Losses()
        self.started = time.perf_counter()
        self.notes: list[str] = []
        self.cells: dict[str, Cell] = {}
        self.measured = 0
        self.workload: Path | None = None
        self.estimate = Estimate()

    def run(self) -> CompareResult:
        if self.folder.exists() and not self.folder.is_dir():
            raise CompareError(f"output {self.folder} is a file: give a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            writing_alone(self.folder, "comparison", CompareError),
            Reporter(self.options.progress) as self.reporter,
            make_engine(
                self.options.engine,
                output=self.folder,
                threads=self.options.threads,
                note=self.reporter.note,
                address=self.options.address,
                device=self.options.device,
            ) as self.engine,
        ):
            self._choose_machine()
            self._load()
            plan = make_plan(self.options, self.shared)
            if self.options.fresh:
                start_afresh(self.folder, plan)
            self._put_aside(plan)
            self.cells = find_measured(self.folder, plan)
            reused = len(self.cells)
            if reused:
                self.reporter.note(f"{reused} of {len(plan)} measurements are there already.")
            self._write_run(plan, finished=False)
            self._measure(plan)
            self._curves()
            self._larger_memories()
            self._write_run(plan, finished=True)
            self._write_asv(plan)
            report = self._report() if self.options.report else None
            done = [self.cells[cell.identity] for cell in plan]
            if all(cell.status != "failed" for cell in done):
                shutil.rmtree(self.folder / WORK, ignore_errors=True)
        skipped = dict.fromkeys((cell.spec, cell.reason) for cell in done if cell.status == "skipped")
        return CompareResult(
            output=self.folder,
            report=report,
            measured=self.measured,
            reused=reused,
            skipped=tuple(skipped),
            failed=tuple((cell.spec, cell.memory_size, cell.reason) for cell in done if cell.status == "failed"),
            notes=tuple(self.notes),
            seconds=time.perf_counter() - self.started,
        )

    def _put_aside(self, plan: Sequence[PlannedCell]) -> None:
        """Keeps measurements of other settings out of this run, and says which settings those are."""
        others, unasked = put_in_order(self.folder, plan)
        kept = f"they are kept in {self.folder / EARLIER} and are not part of this report"
        if others:
            found = differences(self.former, self.provenance)
            what = in_words(found) or f"the code or library of {', '.join(sorted(set(others)))}"
            self._note(
                f"{len(others)} earlier measurements had other settings ({what}): {kept}; what is asked for now is "
                "measured anew. To have both, give another output folder."
            )
        for name, asked in (
            (CURVES, bool(self.options.curve_seconds)),
            (CROSSOVER, bool(self.options.crossover_sizes)),
        ):
            # What is asked for is looked through, curve by curve and row by row, when it is measured.
            found = differences((read_json(self.folder / name) or {}).get("provenance"), self.provenance)
            if found and not asked:
                (self.folder / EARLIER).mkdir(exist_ok=True)
                os.replace(self.folder / name, self.folder / EARLIER / name)
                self._note(f"{name} had other settings ({in_words(found)}): it is kept in {self.folder / EARLIER}.")
        if unasked:
            self._note(f"{unasked} earlier measurements are of specs or memory sizes not asked for now: {kept}.")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.reporter.note(text)

    # Preparation

    def _choose_machine(self) -> None:
        """Settles on the machine, or the machines that are alike, whose figures stand in this comparison."""
        self.former = read_json(self.folder / "run.json")
        former = self.former.get("machine") if isinstance(self.former, dict) else None
        self.machine = self.engine.settle(former)
        self.threads = self.options.threads or self.engine.threads or int(self.machine["cores"])
        self.bench = Bench(
            self.engine, self.folder.resolve(), self.threads, self.options.cell_timeout, self.options.device
        )

    def _load(self) -> None:
        """Loads model and text, and works out what all cells have in common."""
        options = self.options
        self.reporter.step("loading the model", 0.0)
        path = reference_checkpoint() if options.checkpoint is None else Path(options.checkpoint)
        self.checkpoint: Checkpoint = load_checkpoint(path, device=options.device)
        self.checkpoint_path = path.expanduser().resolve()
        config = self.checkpoint.config
        if not config.memory_layers:
            raise CompareError(f"the model in {path} has no memory layer, so there is nothing to compare")
        self.k = config.k if options.k is None else options.k
        self.reporter.step("reading the corpus", 0.0)
        self.documents: TokenizedDocuments = load_documents(
            options.corpus, options.split, self.checkpoint.tokenizer, options.cache_directory
        )
        self.text: EvaluationText = choose_text(
            self.documents, rows=options.rows, segment_length=config.segment_length, max_tokens=options.max_tokens
        )
        self._look_at_text()
        described = describe(threads=self.threads, device=options.device, seed=options.seed)
        machine, libraries = {**described["machine"], **self.machine}, described["libraries"]
        described["machine"] = machine
        self.shared: dict[str, Any] = {
            "checkpoint": self.checkpoint.digest,
            "text": self.text.digest,
            "k": self.k,
            "seed": options.seed,
            "device": options.device,
            "threads": self.threads,
            "torch": libraries.get("torch"),
            "numpy": libraries.get("numpy"),
            **{name: machine.get(name) for name in ("cpu", "cores", "accelerator", "python")},
        }
        # Of a cell of its own: what `differences` compares, and no more.
        self.provenance: dict[str, Any] = {
            **{name: value for name, value in described.items() if name not in ("recollect", "date")},
            "k": self.k,
            "checkpoint": {"digest": self.checkpoint.digest},
            "text": self.text.digest,
        }

    def _look_at_text(self) -> None:
        longest = int(self.text.lengths.sum(0).max())
        too_large = [size for size in self.options.memory_sizes if size > longest]
        if too_large:
            self.notes.append(
                f"No row of text is longer than {longest} tokens, so memories of {', '.join(map(str, too_large))} keys "
                "never fill; give longer documents or more tokens."
            )
            self.reporter.note(self.notes[-1])

    def _prepare(self) -> Path:
        """The workload folder, prepared once."""
        if self.workload is not None:
            return self.workload
        options = self.options
        folder = (self.folder / WORK).resolve()
        settings = WorkloadSettings(
            checkpoint=str(self.checkpoint_path),
            corpus=str(options.corpus),
            split=options.split,
            rows=options.rows,
            max_tokens=options.max_tokens,
            memory_sizes=options.memory_sizes,
            k=options.k,
            device=options.device,
            seed=options.seed,
            cache_directory=None if options.cache_directory is None else str(options.cache_directory),
        )
        begin_workload(folder, settings, self.checkpoint, self.text)
        last = run_task(
            {"kind": "prepare", "workload": str(folder)},
            threads=self.threads,
            log=folder / "logs" / "prepare.log",
            timeout=PREPARE_TIMEOUT,
            on_event=lambda event: self.reporter.step(event["what"], event["share"]),
        )
        if last["event"] != "end":
            raise CompareError(f"the model's trunk and the exact answers could not be computed: {last['reason']}")
        self.workload = folder
        return folder

    # Measurement

    def _measure(self, plan: Sequence[PlannedCell]) -> None:
        """Measures what is not there yet: a process for each backend, and for each size where machines share them."""
        for cell in plan:
            if cell.skip:
                self._take(plan, cell, self._unmeasured(cell, "skipped", cell.skip), save=True)
        missing = [cell for cell in plan if cell.identity not in self.cells]
        if not missing:
            return
        self._expect(plan)
        workload = self._prepare()
        apart = self.engine.places(alone=True, threads=self.threads) > 1
        units: dict[tuple[str, int], list[PlannedCell]] = {}
        for cell in missing:
            units.setdefault((cell.backend, cell.memory_size if apart else 0), []).append(cell)

        def measure(todo: list[PlannedCell]) -> None:
            # Neighbours that differ in search options alone are measured over one index.
            todo.sort(key=lambda cell: (cell.memory_size, build_key(cell.spec) if cell.memory_size else ""))
            while todo:
                todo = self._run_process(plan, workload, todo)

        self.engine.each(units.values(), measure)

    def _run_process(self, plan: Sequence[PlannedCell], workload: Path, todo: list[PlannedCell]) -> list[PlannedCell]:
        """Runs one process over `todo`; returns what is left after a crash."""
        task = {
            "kind": "cells",
            "workload": str(workload),
            "output": str(self.folder.resolve()),
            "settings": fingerprint(self.shared),
            "provenance": {**self.provenance, "host": platform.node()},
            "cells": [
                {"spec": cell.spec, "memory_size": cell.memory_size, "fingerprint": cell.fingerprint} for cell in todo
            ],
        }
        finished = 0

        def hear(event: Event) -> None:
            nonlocal finished
            planned = todo[int(event["index"])]
            if event["event"] in ("start", "progress"):
                self.reporter.running(
                    label(planned.spec, planned.memory_size), event.get("done", 0) / event.get("of", 1)
                )
            elif event["event"] == "done":
                cell = Cell.from_json(event["cell"])
                if cell.seconds is not None:
                    self.estimate.learn(planned, cell.seconds)
                self.measured += cell.status == "ok"
                self._take(plan, planned, cell)
                finished += 1

        alone = bool(todo[0].memory_size)
        size = f"-{todo[0].memory_size}" if alone and self.engine.places(alone=True, threads=self.threads) > 1 else ""
        log = workload / "logs" / f"{todo[0].backend}{size}.log"
        log.unlink(missing_ok=True)
        last = self.bench.run(
            task,
            hear,
            log=log,
            alone=alone,
            needs=(workload, self.checkpoint_path),
            rewritten=("workload.json",),
            label=label(todo[0].spec, todo[0].memory_size),
        )
        with self.engine.turn:
            if last["event"] != "end" and finished < len(todo):
                guilty = todo[finished]
                if last["event"] == "lost" and self.losses.again(guilty.identity):
                    self._note(f"{label(guilty.spec, guilty.memory_size)}: {last['reason']}: it was measured again")
                else:
                    reason = self.losses.told(guilty.identity, last["reason"])
                    self._take(plan, guilty, self._unmeasured(guilty, "failed", reason), save=True)
                    finished += 1
        return todo[finished:]

    def _unmeasured(self, planned: PlannedCell, status: str, reason: str) -> Cell:
        return unmeasured_cell(planned, self.k, status, reason, self.provenance)

    def _take(self, plan: Sequence[PlannedCell], planned: PlannedCell, cell: Cell, *, save: bool = False) -> None:
        """Notes a finished cell."""
        if save:
            save_cell(self.folder, cell)
        self.reporter.ended(label(planned.spec, planned.memory_size))
        self.cells[planned.identity] = cell
        left = self._expect(plan)
        self.reporter.cell(len(self.cells), len(plan), cell, left)

    def _expect(self, plan: Sequence[PlannedCell]) -> float:
        """How many seconds the rest will take; tells the bar."""
        left = sum(self.estimate.expected(cell) for cell in plan if cell.identity not in self.cells)
        if seconds := self.options.curve_seconds:
            builds = {(curve_build(cell.spec), cell.memory_size) for cell in plan if cell.memory_size and not cell.skip}
            left += len(builds) * (seconds + EXPECTED_SECONDS)
        left += self._after_curves()
        self.reporter.expect(left)
        return left

    def _curves(self) -> None:
        """The whole curve of each build, whose points the sweep's specs are."""
        seconds = self.options.curve_seconds
        if not seconds:
            return
        planned = plan_curves(list(self.cells.values()), {**self.shared, "core": core_digest()}, seconds=seconds)
        note = measure_curves(
            self.folder,
            planned,
            self._prepare,
            seconds=seconds,
            provenance=self.provenance,
            reporter=self.reporter,
            bench=self.bench,
            checkpoint=self.checkpoint_path,
            expect=lambda left: self.reporter.expect(left * (seconds + EXPECTED_SECONDS) + self._after_curves()),
        )
        if note:
            self._note(note)

    def _after_curves(self) -> float:
        left = 0.0
        if self.options.crossover_sizes:
            left += LARGER_SECONDS * len({cell.backend for cell in self.cells.values()})
        if self.options.report:
            left += REPORT_SECONDS
        return left

    def _larger_memories(self) -> None:
        """Search times at larger memories."""
        if not self.options.crossover_sizes:
            return
        note = measure_larger(
            self.folder,
            (self.folder / WORK).resolve(),
            self.checkpoint_path,
            self.documents,
            list(self.cells.values()),
            sizes=tuple(sorted({*self.options.memory_sizes, *self.options.crossover_sizes})),
            k=self.k,
            segment_length=self.checkpoint.config.segment_length,
            bench=self.bench,
            settings={**self.shared, "core": core_digest(), "documents": self.documents.digest},
            provenance=self.provenance,
            reporter=self.reporter,
        )
        if note:
            self._note(note)

    # Results

    def _write_run(self, plan: Sequence[PlannedCell], *, finished: bool) -> None:
        checkpoint, text = self.checkpoint, self.text
        write_json(
            self.folder / "run.json",
            {
                "schema": SCHEMA,
                "recollect_version": __version__,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "finished": finished,
                **self.provenance,
                "corpus": {
                    "name": text.corpus,
                    "digest": self.documents.digest,
                    "split": text.split,
                    "documents": len(text.document_names),
                    "tokens": sum(text.document_tokens),
                    "document_names": list(text.document_names),
                },
                "checkpoint": {
                    "name": self.checkpoint_path.name,
                    "digest": checkpoint.digest,
                    "parameters": checkpoint.model.count_parameters(),
                    "config": checkpoint.config.to_dict(),
                },
                "settings": fingerprint(self.shared),
                "segment_length": text.segment_length,
                "rows": text.rows,
                "num_memories": text.rows * checkpoint.config.heads,
                "max_tokens": self.options.max_tokens,
                "memory_sizes": list(self.options.memory_sizes),
                "specs": list(dict.fromkeys(cell.spec for cell in plan)),
                "twin": self._twin(),
                "engine": self.engine.name,
                "machines": dict(Counter(filter(None, map(cell_machine, self.cells.values())))),
                "notes": self.notes,
            },
        )

    def _twin(self) -> dict[str, Any] | None:
        """The perplexity of the checkpoint's twin on exactly this text, where its losses lie beside the checkpoint."""
        twin, text = TwinLosses.load(self.checkpoint_path), self.text
        if twin is None:
            return None
        found = twin.perplexity(self.documents.digest, text.document_names, text.document_tokens)
        return None if found is None else {"name": "trained without memory on the same tokens", "perplexity": found}

    def _write_asv(self, plan: Sequence[PlannedCell]) -> None:
        """The figures in asv's format, if there is a commit to file them under."""
        commit = commit_of()
        if commit is None:
            self._note("This is no git checkout of recollect, so no asv results are written: asv files them by commit.")
            return
        from .asv_results import write_asv_results

        self.reporter.step("writing asv results", 0.0)
        specs = list(dict.fromkeys(cell.spec for cell in plan if cell.memory_size))
        if specs and self.options.memory_sizes:
            write_asv_results(
                self.folder / "asv",
                list(self.cells.values()),
                commit=commit,
                specs=specs,
                memory_sizes=self.options.memory_sizes,
                seconds=sum(cell.seconds or 0.0 for cell in self.cells.values()),
            )

    def _report(self) -> Path:
        self.reporter.step("writing the report", 0.0)
        from recollect.reports import write_report

        write_report(self.folder)
        return self.folder / "report.html"


__all__ = ["CompareError", "CompareOptions", "CompareResult", "compare"]
