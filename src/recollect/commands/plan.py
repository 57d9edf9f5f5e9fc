"""`recollect plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recollect.commands._options import JsonOption
from recollect.commands._printing import print_json, progress_of

if TYPE_CHECKING:
    from rich.console import Console

    from recollect.suites.planning.answer import Plan
    from recollect.suites.planning.cluster import ClusterPlan
    from recollect.suites.planning.question import Question

WIDTH = 180
"""Columns of a text file."""

CLUSTER = "Memories over several machines"


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
    machines: Annotated[
        str | None,
        typer.Option(
            "--machines",
            help="Plan for a cluster of so many machines, each with --machine-memory; auto: as few as will do.",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    machine_cores: Annotated[
        str | None,
        typer.Option("--machine-cores", help="Cores of each machine. Default: this one's.", rich_help_panel=CLUSTER),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            "--network", help="Of each machine, such as 10Gbit (the default) or 1.25GB/s.", rich_help_panel=CLUSTER
        ),
    ] = None,
    queries_per_second: Annotated[
        str | None,
        typer.Option(
            "--queries-per-second",
            help="Of all memories together, which decides how many machines and copies there must be.",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(
            "--recall", help="Share of the true neighbours that must be found, such as 0.95.", rich_help_panel=CLUSTER
        ),
    ] = None,
    measure_cluster: Annotated[
        bool,
        typer.Option(
            "--measure-cluster",
            help="Measure first what sharding costs, with Ray on this machine: a minute or two.",
            rich_help_panel=CLUSTER,
        ),
    ] = False,
    cluster_costs: Annotated[
        Path | None,
        typer.Option(
            "--cluster-costs",
            help="File of measured costs of sharding; with --measure-cluster, where to write them. Default: this "
            "machine's own in the cache folder, else those that ship with recollect.",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the plan to a file: .json, or text by any other name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Says on paper what a memory needs: bytes, time to fill it and time a step, on each backend.

    Bytes are exact. Times are extrapolated from costs that were measured on this machine (`--measure`), with their
    range, how far beyond the measurement they are, and everything that is assumed.

    With `--machines` (or any other option of a cluster) the memories are spread over shards, as `ray` spreads them: how
    many machines and shards it takes, their main memory, bytes and time on the network, the time of a step, and what
    recall is known of.

    **Examples**

        recollect plan --measure

        recollect plan --keys 1e9 --dim 128 --heads 8

        recollect plan --keys 10M --heads 1 --machine-memory 24GiB --values file --backend exact --backend faiss-ivfpq

        recollect plan --keys 64Ki --heads 8 --layers 2 --batch 4 --json

        recollect plan --keys 1e9 --dim 128 --heads 1 --machines auto --machine-memory 256GiB --machine-cores 32

        recollect plan --keys 1e9 --heads 1 --queries-per-second 20000 --recall 0.95 --network 25Gbit
    """
    from recollect.suites.planning.amounts import PlanError

    if keys is None and not (measure or measure_cluster):
        raise PlanError(
            "give --keys for a plan, such as --keys 1e9, or --measure (--measure-cluster) to measure this machine"
        )
    if measure:
        _measure(calibration, backend, largest=largest, threads=threads, clock=clock, device=device)
    if measure_cluster:
        _measure_cluster(cluster_costs, threads=threads)
    if keys is None:
        return
    counts = {"keys": keys, "dim": dim, "heads": heads, "layers": layers, "batch": batch, "queries": queries, "k": k}
    question = _question(counts, values, backend, machine_memory)
    cluster = {
        "machines": machines,
        "machine_cores": machine_cores,
        "network": network,
        "queries_per_second": queries_per_second,
        "recall": recall,
    }
    found: Plan | ClusterPlan
    if any(value is not None for value in cluster.values()):
        found = _plan_cluster(question, cluster, calibration, cluster_costs, device)
    else:
        from recollect.suites.planning.calibration import find_calibration
        from recollect.suites.planning.planning import plan_on_one_machine

        found = plan_on_one_machine(question, *find_calibration(calibration, device=device))
    if output is not None:
        _write(found, output)
    if as_json:
        print_json(found.as_json())
        return
    from rich.console import Console

    _show(found, Console())


def _question(counts: dict[str, str], values: str, backend: list[str] | None, machine_memory: str | None) -> Question:
    import psutil

    from recollect.suites.planning.amounts import parse_bytes, parse_count
    from recollect.suites.planning.question import Question

    sizes: dict[str, Any] = {name: parse_count(text, f"--{name}") for name, text in counts.items()}
    if machine_memory is None:
        machine = int(psutil.virtual_memory().total)
    else:
        machine = parse_bytes(machine_memory, "--machine-memory")
    return Question(**sizes, values=values, backends=tuple(backend or ()), machine_bytes=machine)  # type: ignore[arg-type]


def _plan_cluster(
    question: Question,
    given: dict[str, Any],
    calibration: Path | None,
    cluster_costs: Path | None,
    device: str,
) -> ClusterPlan:
    from recollect.suites.environment import usable_cores
    from recollect.suites.planning.amounts import parse_count, parse_per_second, parse_rate
    from recollect.suites.planning.calibration import find_calibration
    from recollect.suites.planning.cluster import DEFAULT_NETWORK, ClusterQuestion, plan_on_cluster
    from recollect.suites.planning.cluster_costs import find_costs

    machines, cores = given["machines"], given["machine_cores"]
    rate, network = given["queries_per_second"], given["network"]
    asked = ClusterQuestion(
        question,
        machines=None if machines in (None, "auto") else parse_count(machines, "--machines"),
        machine_cores=usable_cores() if cores is None else parse_count(cores, "--machine-cores"),
        network=DEFAULT_NETWORK if network is None else parse_rate(network, "--network"),
        queries_per_second=None if rate is None else parse_per_second(rate, "--queries-per-second"),
        recall=given["recall"],
    )
    costs, of_sharding = find_costs(cluster_costs)
    measured, words = find_calibration(calibration, device=device)
    return plan_on_cluster(asked, measured, costs, [*words, *of_sharding])


def _measure_cluster(path: Path | None, *, threads: int | None) -> None:
    from rich.console import Console

    from recollect.suites.planning.cluster_costs import costs_path
    from recollect.suites.planning.cluster_measuring import measure_cluster

    where = path or costs_path()
    console = Console(stderr=True, highlight=False)
    with progress_of("measuring what sharding costs") as advance:

        def tell(done: int, total: int, what: str) -> None:
            advance(done, total)
            if not console.is_terminal:
                console.print(f"[{done}/{total}] {what}", markup=False, soft_wrap=True)

        measure_cluster(where, threads=threads or 1, on_point=tell)
    console.print(f"written: {where}", markup=False, soft_wrap=True)


def _show(found: Plan | ClusterPlan, console: Console) -> None:
    from recollect.commands._plan_cluster import show_cluster_plan
    from recollect.commands._plan_tables import show_plan
    from recollect.suites.planning.cluster import ClusterPlan

    if isinstance(found, ClusterPlan):
        show_cluster_plan(found, console)
    else:
        show_plan(found, console)


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


def _write(found: Plan | ClusterPlan, output: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from recollect.memory_backends.atomic import write_json, write_text

    if output.suffix.lower() == ".json":
        write_json(output, found.as_json())
        return
    text = StringIO()
    _show(found, Console(file=text, width=WIDTH, color_system=None))
    write_text(output, text.getvalue())
