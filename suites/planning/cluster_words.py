"""What follows from a plan for a cluster, and what it rests on, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from .amounts import bytes_text, rate_text, seconds_text
from .calibration import Calibration
from .cluster import BUSY, ClusterBackend, ClusterPlan
from .cluster_costs import ClusterCosts
from .laws import Estimate

SHOWN = 3
"""Backends that are named at most."""


def cluster_verdicts(plan: ClusterPlan) -> Iterator[str]:
    """How much it is, what does it with how many machines, how long a step takes, and what nobody can know."""
    asked = plan.question.asked
    yield (
        f"{asked.memories_text} of {asked.keys:,} keys, {asked.all_keys:,} in all: their keys take "
        f"{bytes_text(plan.key_bytes)} as float32 where they are asked from, in main memory or in a file "
        f"(keys_in), and their values {bytes_text(sum(plan.value_bytes))} ({asked.values}); shards hold keys besides"
    )
    rate = plan.question.steps_per_second
    if rate is not None:
        yield (
            f"{plan.question.queries_per_second:,.6g} queries a second are {rate:,.3g} steps a second of "
            f"{asked.queries:,} queries of each memory"
        )
    works = sorted(
        (one for one in plan.backends if one.works),
        key=lambda one: (one.all_machines, one.step.value if one.step else 0.0),
    )
    for number, one in enumerate(works[:SHOWN]):
        yield f"{'fewest machines' if not number else 'then'}: {_what_it_takes(one)}"
    if not works:
        yield f"nothing that was measured does it: {'; '.join(_what_lacks(one, plan) for one in plan.backends)}"
    timed = [one for one in works if one.step is not None]
    if timed:
        quickest = min(timed, key=lambda one: one.step.value if one.step else 0.0)
        if quickest is not works[0]:
            yield f"quickest step: {_what_it_takes(quickest)}"
        yield from _where_time_goes(works[0])
    for one in works[:SHOWN]:
        if one.recall is not None and not one.recall.known:
            yield (
                f"CANNOT BE KNOWN: what {one.spec} finds in a shard of {one.shard_keys:,} keys of a memory. It found "
                f"{one.recall.value:.3f} of the neighbours among {one.recall.at_keys:,}, the largest index that was "
                "measured; `recollect plan --measure --largest 4Mi` measures a larger one"
            )


def _what_it_takes(one: ClusterBackend) -> str:
    machines = f"{one.all_machines:,} machine{'s' if one.all_machines > 1 else ''}"
    copies = f" ({one.copies} copies on {one.machines:,} each)" if one.copies > 1 else ""
    step = "" if one.step is None else f", a step in {_range(one.step)}"
    return (
        f"{one.spec} with {one.placement} on {machines}{copies}, "
        f"{one.shards:,} shard{'s' if one.shards > 1 else ''} of {one.shard_keys:,} keys of each memory, "
        f"{bytes_text(one.machine_memory)} of main memory on each machine{step}"
    )


def _what_lacks(one: ClusterBackend, plan: ClusterPlan) -> str:
    if one.reason:
        return f"{one.spec}: {one.reason}"
    if not one.fits:
        return (
            f"{one.spec} takes {bytes_text(one.machine_memory)} on each of {one.machines:,} machines with "
            f"{bytes_text(plan.question.asked.machine_bytes)}"
        )
    if not one.enough:
        return f"{one.spec} takes at most {one.most_steps:,.3g} steps a second on {one.all_machines:,} machines"
    found = "nothing that was measured" if one.recall is None else f"{one.recall.value:.3f}"
    return f"{one.spec} found {found} of the neighbours, and {plan.question.recall} are wanted"


def _where_time_goes(one: ClusterBackend) -> Iterator[str]:
    if one.search is None or one.append is None or one.calls is None or one.moved is None:
        return
    yield (
        f"of a step of {one.spec} a shard's search takes {_range(one.search)}, its appends {_range(one.append)}, "
        f"calling the shards and merging {_range(one.calls)}, and the network {seconds_text(one.network)} for "
        f"{bytes_text(one.moved.sent)} sent and {bytes_text(one.moved.received)} received"
    )
    if one.busy is not None:
        shard, asking = (100 * share for share in one.busy)
        yield (
            f"at that rate a shard is busy for {shard:.0f} % of its time, and the process that asks a copy for "
            f"{asking:.0f} %"
        )
    yield f"a machine that is lost has its keys again on another after {seconds_text(one.refill_seconds)}"


def _range(estimate: Estimate) -> str:
    text = seconds_text(estimate.value)
    return f"{text} ({seconds_text(estimate.low)} to {seconds_text(estimate.high)})"


def cluster_assumptions(plan: ClusterPlan, calibration: Calibration, costs: ClusterCosts) -> Iterator[str]:
    """Everything that the figures rest on."""
    asked, question = plan.question.asked, plan.question
    threads = calibration.threads
    most_shards = max(1, question.machine_cores // threads)
    shards = f"{most_shards} shard{'s' if most_shards > 1 else ''}"
    yield (
        f"a shard works at the speed of {plan.calibration}; a machine of {question.machine_cores} "
        f"core{'s' if question.machine_cores > 1 else ''} has at most {shards}, each "
        f"with {threads} thread{'s' if threads > 1 else ''}, that do not slow each other down, and works as fast as "
        "the one that was measured"
    )
    search, append = costs.law("search"), costs.law("append")
    most = max(point.shards for point in costs.points)
    yield (
        f"sharding costs what it did on {plan.costs}, with at most {most} shards, "
        f"and is taken to grow in proportion: a search {search}; an append {append}; a byte counts once for each shard "
        "that reads it"
    )
    yield (
        "those are costs of processes on one machine. Between machines come the bytes at "
        f"{rate_text(question.network)} of the machine that asks (queries once to each machine, answers from every "
        "shard, new keys once); the network's own delay, and what else it carries, are not counted"
    )
    yield (
        "all shards answer together and none is slower than the others; keys are even over them, as `ray` keeps them"
    )
    yield (
        f"a step asks {asked.queries:,} queries of each memory, all full, and appends as many keys; memories are "
        "searched one after another in a shard"
    )
    yield (
        f"a shard, and the one process that asks a copy, are kept busy for at most {100 * BUSY:.0f} % of their time; "
        "copies of everything share the questions out and each takes all new keys"
    )
    yield (
        f"main memory of a machine is that of its shards' keys and indexes, and {bytes_text(costs.process_bytes)} for "
        "the process of each; an index's bytes are what its backend plans with at most, also while it is built. The "
        "object store of Ray, the system, and the process that asks are not counted"
    )
    unknown = [one.spec for one in plan.backends if one.machines and not one.index_known]
    if unknown:
        yield f"the index of {', '.join(unknown)} is not known beforehand and not counted"
    yield (
        "recall is that of a shard's index, whose options stay as they are: it was measured up to "
        f"{max((point.keys for point in calibration.points), default=0):,} keys and is not known beyond. Keys and "
        "queries of your own may be found more or less often than those of the measurement"
    )
    recovered = costs.recovered
    yield (
        f"a lost shard is noticed and replaced within {recovered.detection_seconds + recovered.away_seconds:.1f} s and "
        f"filled at {recovered.keys_per_second:,.0f} keys of dimension {recovered.dim} a second, as a process killed "
        f"with -9 was ({recovered.lost} of {recovered.keys:,} keys lost), or at the speed of the network if that is "
        "slower; its index is then built anew beside the searches"
    )
    beyond = max((one.step.beyond for one in plan.backends if one.step is not None), default=1.0)
    if beyond > 1:
        times = f"{beyond:,.0f}" if beyond >= 9.95 else f"{beyond:.2g}"
        yield (
            f"shards' times are extrapolated up to {times} times beyond the largest measured memory: read the ranges, "
            "and measure larger ones with `recollect plan --measure --largest 4Mi`"
        )
