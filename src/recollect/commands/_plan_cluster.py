"""A plan for a cluster as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from recollect.suites.planning.cluster import ClusterBackend, ClusterPlan
    from recollect.suites.planning.laws import Estimate


def show_cluster_plan(plan: ClusterPlan, console: Console) -> None:
    """Prints warnings, the tables, what follows and what was assumed."""
    from recollect.suites.planning.amounts import bytes_text, rate_text

    for warning in plan.warnings:
        console.print(f"[bold yellow]{escape(warning)}[/]", highlight=False)
    question, asked = plan.question, plan.question.asked
    machines = "as few machines as will do" if question.machines is None else f"{question.machines:,} machines"
    console.print(
        f"\n[bold]{asked.memories_text} of {asked.keys:,} keys, dimension {asked.dim}, "
        f"{asked.queries:,} queries and new keys a step, k {asked.k}[/]\n{machines} with "
        f"{bytes_text(asked.machine_bytes)} of main memory, {question.machine_cores} cores and a network of "
        f"{rate_text(question.network)}\n",
        highlight=False,
    )
    console.print(_machines(plan))
    console.print(_times(plan))
    for one in plan.backends:
        if one.reason:
            console.print(f"{escape(one.spec)}: {escape(one.reason)}", highlight=False, soft_wrap=True)
    for title, sentences in (("What follows", plan.verdicts), ("What is assumed", plan.assumptions)):
        console.print(f"\n[bold]{title}[/]", highlight=False)
        for sentence in sentences:
            console.print(f"- {escape(sentence)}", highlight=False, soft_wrap=True)


def _machines(plan: ClusterPlan) -> Table:
    from recollect.suites.planning.amounts import bytes_text, seconds_text

    table = Table(title="What each backend takes in its shards")
    headings = (
        "backend", "machines", "copies", "shards of a copy", "keys of a memory in each", "RAM of a machine",
        "bytes sent a step", "received", "refilling a machine",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "backend" else "right", overflow="fold")
    for one in plan.backends:
        if one.moved is None:
            table.add_row(escape(one.spec), "not planned", *[""] * (len(headings) - 2))
            continue
        table.add_row(
            escape(one.spec), f"{one.all_machines:,}", f"{one.copies:,}", f"{one.shards:,}", f"{one.shard_keys:,}",
            f"{bytes_text(one.machine_memory)}{'' if one.fits else ', too much'}", bytes_text(one.moved.sent),
            bytes_text(one.moved.received), seconds_text(one.refill_seconds),
        )  # fmt: skip
    return table


def _times(plan: ClusterPlan) -> Table:
    from recollect.suites.planning.amounts import seconds_text

    table = Table(
        title="Time of a step: value (range)",
        caption="beyond: so many times larger a shard's memory is than the largest that was measured",
    )
    headings = (
        "backend", "searching a shard", "appending", "calling shards", "network", "a step", "beyond", "most steps/s",
        "recall",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "backend" else "right", overflow="fold")
    for one in plan.backends:
        if one.step is None:
            table.add_row(escape(one.spec), *[""] * (len(headings) - 1))
            continue
        beyond = one.step.beyond
        table.add_row(
            escape(one.spec), *(_range(estimate) for estimate in (one.search, one.append, one.calls)),
            seconds_text(one.network), _range(one.step),
            "within" if beyond <= 1 else f"{beyond:,.0f} x" if beyond >= 9.95 else f"{beyond:.2g} x",
            f"{one.most_steps:,.3g}{'' if one.enough else ', too few'}", _recall(one),
        )  # fmt: skip
    return table


def _recall(one: ClusterBackend) -> str:
    if one.recall is None:
        return "not measured"
    text = f"{one.recall.value:.3f}"
    if not one.recall.known:
        text += f" at {one.recall.at_keys:,}, unknown here"
    return text + ("" if one.meets else ", too low")


def _range(estimate: Estimate | None) -> str:
    from recollect.suites.planning.amounts import seconds_text

    if estimate is None:
        return ""
    return f"{seconds_text(estimate.value)}\n({seconds_text(estimate.low)} to {seconds_text(estimate.high)})"
