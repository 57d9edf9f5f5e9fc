"""The process that measures one backend's cells, started by `compare` so that a crash takes no other backend along.

    python -m recollect.suites.worker      a task in JSON on standard input, events in JSON lines on standard output

What a library prints goes to standard error, which `compare` keeps as a log. Cells are written here, as soon as they
are measured. When `compare` itself is killed, this process ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from recollect.model.evaluation_types import EvaluationResult

    from .cells import Cell
    from .workload import Workload

Tell = Callable[..., None]


def main() -> int:
    """Runs the task on standard input."""
    # Libraries that print to file descriptor 1 must not get between the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    task = json.loads(sys.stdin.read())
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _set_threads(int(task["threads"]))
    tell = _teller(events)
    kinds = {
        "prepare": _prepare,
        "record": _record,
        "cells": _measure_cells,
        "curves": _measure_curves,
        "larger": _measure_larger,
        "ablation": _ablate,
        "ann": _ann,
        "runbook": _runbook,
        "crossover": _climb,
    }
    kinds[task["kind"]](task, tell)
    tell("end")
    return 0


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, whatever a library is doing at that time."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _teller(events: TextIO) -> Tell:
    def tell(event: str, **content: Any) -> None:
        try:
            events.write(json.dumps({"event": event, **content}, allow_nan=False) + "\n")
            events.flush()
        except BrokenPipeError:
            os._exit(1)  # nobody is listening any more

    return tell


def _set_threads(threads: int) -> None:
    # Environment variables were set before this process began; torch decides for every library (see `threads`).
    import torch

    torch.set_num_threads(threads)


def _prepare(task: dict[str, Any], tell: Tell) -> None:
    from .workload import complete_workload

    report = _throttled(lambda what, share: tell("step", what=what, share=share))
    with _writing(tell, task["workload"]):
        complete_workload(task["workload"], on_step=report)


def _record(task: dict[str, Any], tell: Tell) -> None:
    from recollect.model.checkpoints import load_checkpoint

    from .crossover import record_stream
    from .workload import load_text

    model = load_checkpoint(task["checkpoint"], device=task["device"]).model.eval()
    with _writing(tell, task["stream"]):
        record_stream(Path(task["stream"]), model, load_text(Path(task["text"])))


def _measure_cells(task: dict[str, Any], tell: Tell) -> None:
    from .cells import save_cell, save_losses
    from .measure import failed_cell, measure_group
    from .workload import load_workload

    folder = Path(task["output"])
    workload = load_workload(task["workload"])
    wanted = task["cells"]
    for group in _groups(workload, wanted):
        tell("start", index=group[0])
        report = _throttled(lambda done, of, index=group[0]: tell("progress", index=index, done=done, of=of))
        specs, size = [str(wanted[index]["spec"]) for index in group], int(wanted[group[0]]["memory_size"])
        try:
            measured = measure_group(workload, specs, size, on_segment=report)
        except Exception as error:
            if len(specs) > 1:  # one of them may be at fault, so each gets a trial of its own
                measured = [_measure_alone(workload, spec, size) for spec in specs]
            else:
                measured = [(failed_cell(workload, specs[0], size, f"{type(error).__name__}: {error}", ""), None)]
        for index, (cell, result) in zip(group, measured, strict=True):
            cell = dataclasses.replace(
                cell,
                settings=str(task["settings"]),
                fingerprint=str(wanted[index]["fingerprint"]),
                provenance=task["provenance"],
            )
            with _writing(tell, task["output"]):
                if result is not None:
                    losses = result.losses
                    path = save_losses(folder, cell.identity, losses.loss, losses.document, losses.position)
                    cell = dataclasses.replace(cell, losses=path)
                save_cell(folder, cell)
            tell("done", index=index, cell=cell.as_json())


def _groups(workload: Workload, wanted: list[dict[str, Any]]) -> list[list[int]]:
    """Neighbouring cells that can be measured over one index."""
    from .measure import can_share

    groups: list[list[int]] = []
    for index, cell in enumerate(wanted):
        if groups and wanted[groups[-1][0]]["memory_size"] == cell["memory_size"]:
            specs = [str(wanted[place]["spec"]) for place in (*groups[-1], index)]
            if can_share(workload, specs):
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups


def _measure_alone(workload: Workload, spec: str, size: int) -> tuple[Cell, EvaluationResult | None]:
    from .measure import failed_cell, measure_cell

    try:
        return measure_cell(workload, spec, size)
    except Exception as error:
        return failed_cell(workload, spec, size, f"{type(error).__name__}: {error}", ""), None


def _measure_curves(task: dict[str, Any], tell: Tell) -> None:
    from .workload import load_workload
    from .workload_curves import measure_workload_curve, record

    workload = load_workload(task["workload"])
    recording = record(workload.model, workload.trunk)
    for index, wanted in enumerate(task["curves"]):
        tell("start", index=index)
        report = _throttled(lambda done, of, index=index: tell("progress", index=index, done=done, of=of))
        specs, size = [str(spec) for spec in wanted["specs"]], int(wanted["memory_size"])
        try:
            curve = measure_workload_curve(
                workload, recording, specs, size, seconds=float(task["seconds"]), on_step=report
            )
        except Exception as error:
            tell("failed", index=index, reason=f"{type(error).__name__}: {error}")
        else:
            tell("done", index=index, curve=curve)


def _measure_larger(task: dict[str, Any], tell: Tell) -> None:
    from .crossover import load_stream, measure_crossover

    stream = load_stream(Path(task["stream"]))
    seconds_per_key, patience = 0.0, float(task["patience"])
    for index, wanted in enumerate(task["rows"]):
        tell("start", index=index)
        spec, size = str(wanted["spec"]), int(wanted["memory_size"])
        expected = seconds_per_key * size
        if expected > patience:
            tell("failed", index=index, reason=f"filling it would take about {expected:.0f} s: left out")
            continue
        start = time.perf_counter()
        try:
            row = measure_crossover(
                stream, spec, size, k=int(task["k"]), seed=int(task["seed"]), device=str(task["device"])
            )
        except Exception as error:
            tell("failed", index=index, reason=f"{type(error).__name__}: {error}")
            continue
        # The first rows hold what a library does once; the rate of a larger memory is a better guess.
        seconds_per_key = (time.perf_counter() - start) / size if size >= 4096 else 0.0
        tell("done", index=index, row=row)


def _ablate(task: dict[str, Any], tell: Tell) -> None:
    from .ablation.process import run

    with _writing(tell, task["output"]):
        run(task, tell)


def _ann(task: dict[str, Any], tell: Tell) -> None:
    from .ann_run import work

    with _writing(tell, task["output"]):
        work(task, tell)


def _runbook(task: dict[str, Any], tell: Tell) -> None:
    from .runbook_run import work

    with _writing(tell, task["output"]):
        work(task, tell)


def _climb(task: dict[str, Any], tell: Tell) -> None:
    from .crossover_run import climb

    with _writing(tell, task["output"]):
        climb(task, tell)


@contextlib.contextmanager
def _writing(tell: Tell, place: str) -> Iterator[None]:
    """Ends the process with its reason where the block cannot write to `place`."""
    try:
        yield
    except OSError as error:
        tell("cannot-write", reason=str(error.strerror or error), path=str(error.filename or place))
        sys.exit(1)


def _throttled(report: Callable[..., None]) -> Callable[..., None]:
    """`report`, called at most a few times a second."""
    last = 0.0

    def sometimes(*arguments: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.2:
            last = now
            report(*arguments)

    return sometimes


if __name__ == "__main__":
    sys.exit(main())
