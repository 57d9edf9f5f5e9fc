"""`recollect plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recollect.commands._options import JsonOption
from recollect.commands._printing import print_json, progress_of

if TYPE_CHECKING:
    from recollect.suites.planning.answer import Plan

WIDTH = 180
"""Columns of a text file."""


def plan(
    keys: Annotated[
        str | None,
        typer.Option("--keys", help="Keys each memory holds: 1e9, 10M, 64k (64,000), 64Ki (65,536) or a whole number."),
    ] = None,
    dim: Annotated[str, typer.Option("--dim", help="Dimension of a key and of a value.")] = "64",
    heads: Annotated[str, typer.Option("--heads", help="Heads with a memory of their own.")] = "8",
    layers: Annotated[str, typer.Option("--layers", help="Layers with memory.")] = "1",
    batch: Annotated[str, typer.Option("--batch", help="Rows of a batch, each with memories of its own.")] = "1",
    queries: Annotated[
        str, typer.Option("--queries", help="Tokens of a step: queries of each memory, and keys appended to it.")
    ] = "512",
    k: Annotated[str, typer.Option("--k", help="Neighbours each query retrieves.")] = "32",
    values: Annotated[
        str, typer.Option("--values", help="How values are kept: float32, bfloat16, file or none.")
    ] = "float32",
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", help="Registry string; repeatable. Default: all that were measured."),
    ] = None,
    machine_memory: Annotated[
        str | None,
        typer.Option("--machine-memory", help="Main memory to fit into, such as 24GiB. Default: this one's."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="File of measured costs, of whatever machine; with --measure, where to write them. "
            "Default: this machine's own in the cache folder, else those that ship with recollect.",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's costs first: some minutes, resumable.")
    ] = False,
    largest: Annotated[str, typer.Option("--largest", help="With --measure: keys of the largest memory.")] = "256Ki",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="With --measure: threads of every library. Default: all cores."),
    ] = None,
    clock: Annotated[
        str, typer.Option("--clock", help="With --measure: wall, or cpu for processor time on a busy machine.")
    ] = "wall",
    device: Annotated[str, typer.Option("--device", help="Whose costs: cpu, cuda ...")] = "cpu",
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the plan to a file: .json, or text by any other name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Says on paper what a memory needs: bytes, time to fill it and time a step, on each backend.

    Bytes are exact. Times are extrapolated from costs that were measured on this machine (`--measure`), with their
    range, how far beyond the measurement they are, and everything that is assumed.

    **Examples**

        recollect plan --measure

        recollect plan --keys 1e9 --dim 128 --heads 8

        recollect plan --keys 10M --heads 1 --machine-memory 24GiB --values file --backend exact --backend faiss-ivfpq

        recollect plan --keys 64Ki --heads 8 --layers 2 --batch 4 --json
    """
    from recollect.suites.planning.amounts import PlanError

    if keys is None and not measure:
        raise PlanError("give --keys for a plan, such as --keys 1e9, or --measure to measure this machine")
    if measure:
        _measure(calibration, backend, largest=largest, threads=threads, clock=clock, device=device)
    if keys is None:
        return
    counts = {"keys": keys, "dim": dim, "heads": heads, "layers": layers, "batch": batch, "queries": queries, "k": k}
    found = _make(counts, values, backend, machine_memory, calibration, device)
    if output is not None:
        _write(found, output)
    if as_json:
        print_json(found.as_json())
        return
    from rich.console import Console

    from recollect.commands._plan_tables import show_plan

    show_plan(found, Console())


def _make(
    counts: dict[str, str],
    values: str,
    backend: list[str] | None,
    machine_memory: str | None,
    calibration: Path | None,
    device: str,
) -> Plan:
    import psutil

    from recollect.suites.planning.amounts import parse_bytes, parse_count
    from recollect.suites.planning.calibration import find_calibration
    from recollect.suites.planning.planning import plan_on_one_machine
    from recollect.suites.planning.question import Question

    sizes: dict[str, Any] = {name: parse_count(text, f"--{name}") for name, text in counts.items()}
    if machine_memory is None:
        machine = int(psutil.virtual_memory().total)
    else:
        machine = parse_bytes(machine_memory, "--machine-memory")
    question = Question(**sizes, values=values, backends=tuple(backend or ()), machine_bytes=machine)  # type: ignore[arg-type]
    return plan_on_one_machine(question, *find_calibration(calibration, device=device))


def _measure(
    path: Path | None, backend: list[str] | None, *, largest: str, threads: int | None, clock: str, device: str
) -> None:
    from rich.console import Console

    from recollect.memory_backends.registry import canonical_spec
    from recollect.suites.planning.amounts import PlanError, parse_count
    from recollect.suites.planning.calibration import calibration_path
    from recollect.suites.planning.measuring import Effort, default_specs, measure, without_larger

    if clock not in ("wall", "cpu"):
        raise PlanError(f"--clock is {clock!r}; it is wall or cpu")
    specs = tuple(map(canonical_spec, backend)) if backend else default_specs(device)
    effort = without_larger(Effort(specs), parse_count(largest, "--largest"))
    where = path or calibration_path(device)
    console = Console(stderr=True, highlight=False)
    with progress_of("measuring costs") as advance:

        def tell(done: int, total: int, what: str) -> None:
            advance(done, total)
            if not console.is_terminal:
                console.print(f"[{done}/{total}] {what}", markup=False, soft_wrap=True)

        _, notes = measure(effort, where, threads=threads, device=device, clock=clock, on_point=tell)  # type: ignore[arg-type]
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"written: {where}", markup=False, soft_wrap=True)


def _write(found: Plan, output: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from recollect.commands._plan_tables import show_plan
    from recollect.memory_backends.atomic import write_json, write_text

    if output.suffix.lower() == ".json":
        write_json(output, found.as_json())
        return
    text = StringIO()
    show_plan(found, Console(file=text, width=WIDTH, color_system=None))
    write_text(output, text.getvalue())
