"""A plan as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from recollect.suites.planning.answer import Plan
    from recollect.suites.planning.laws import Estimate


def show_plan(plan: Plan, console: Console) -> None:
    """Prints warnings, the tables, what follows and what was assumed."""
    from recollect.suites.planning.amounts import bytes_text

    for warning in plan.warnings:
        console.print(f"[bold yellow]{escape(warning)}[/]", highlight=False)
    asked = plan.question
    title = (
        f"{asked.memories_text} of {asked.keys:,} keys, dimension {asked.dim}, "
        f"{asked.queries:,} queries and new keys a step, k {asked.k}"
    )
    console.print(f"\n[bold]{title}[/]\n", highlight=False)
    table = Table(title="Raw keys and values, all memories")
    for heading in ("", "main memory", "file"):
        table.add_column(heading, justify="right" if heading else "left")
    values = {f"values ({asked.values})": plan.value_bytes}
    for name, (memory, file) in {**plan.key_bytes, **values}.items():
        table.add_row(name, bytes_text(memory), bytes_text(file) if file else "")
    console.print(table)
    console.print(_bytes(plan))
    console.print(_times(plan))
    for one in plan.backends:
        if one.cost is None:
            console.print(f"{escape(one.spec)}: {escape(one.reason)}", highlight=False, soft_wrap=True)
    console.print("\n[bold]What follows[/]", highlight=False)
    for verdict in plan.verdicts:
        console.print(f"- {escape(verdict)}", highlight=False, soft_wrap=True)
    console.print("\n[bold]What is assumed[/]", highlight=False)
    for assumption in plan.assumptions:
        console.print(f"- {escape(assumption)}", highlight=False, soft_wrap=True)


def _bytes(plan: Plan) -> Table:
    from recollect.suites.planning.amounts import bytes_text

    table = Table(title=f"Main memory of each backend, of {bytes_text(plan.question.machine_bytes)} that there are")
    for heading in ("backend", "index", "while it is built", "keys, values, index", "at least", "by"):
        table.add_column(heading, justify="left" if heading in ("backend", "by") else "right", overflow="fold")
    for one in plan.backends:
        plain, least = one.fits[0], one.least
        known = one.index_known_by == "formula" and one.index_bytes is not None
        table.add_row(
            escape(one.spec),
            "not measured" if one.standing_bytes is None else bytes_text(one.standing_bytes),
            f"at most {bytes_text(one.index_bytes or 0)}" if known else "unknown",
            f"{bytes_text(plain.memory_bytes)}{'' if plain.fits else ', too much'}",
            f"{bytes_text(least.memory_bytes)}{'' if least.fits else ', too much'}",
            str(least.placement),
        )
    return table


def _times(plan: Plan) -> Table:
    table = Table(
        title="Time of each backend: value (range)",
        caption="beyond: so many times larger than the largest measured memory; recall: what was found there",
    )
    for heading in ("backend", "filling", "append a step", "search a step", "longest append", "beyond", "recall"):
        table.add_column(heading, justify="left" if heading == "backend" else "right", overflow="fold")
    for one in plan.backends:
        if one.cost is None:
            table.add_row(escape(one.spec), "not measured", *[""] * 5)
            continue
        cost = one.cost
        times = [_range(estimate) for estimate in (cost.build, cost.append, cost.search, cost.longest)]
        beyond = cost.step.beyond
        shown = "within" if beyond <= 1 else f"{beyond:,.0f} x" if beyond >= 9.95 else f"{beyond:.2g} x"
        table.add_row(escape(one.spec), *times, shown, f"{cost.recall:.3f}")
    return table


def _range(estimate: Estimate) -> str:
    from recollect.suites.planning.amounts import seconds_text

    return f"{seconds_text(estimate.value)}\n({seconds_text(estimate.low)} to {seconds_text(estimate.high)})"
