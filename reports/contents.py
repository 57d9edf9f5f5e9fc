"""The words and small tables of the report, as plain data that the page and the Markdown both show."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from recollect.reports.advice import FOOTPRINT_RULE, LADDER_RULE, SIZE_RULE, Choice, plain
from recollect.reports.analysis import Analysis
from recollect.reports.crossover import RECALL_FLOOR, Crossover, find_crossovers
from recollect.reports.findings import describe, outcome
from recollect.reports.latency_tables import latency, noise_note, reaching
from recollect.reports.machines import machine_notes
from recollect.reports.rows import Row, shown
from recollect.reports.statistics import RESAMPLES
from recollect.reports.tables import Heading, Table

RULES = {"size": SIZE_RULE, "ladder": LADDER_RULE, "footprint": FOOTPRINT_RULE}
CURVES = (
    "Curves: each build is filled by replaying what the model appended, and searched at a few segments at which the "
    "memories are full. Its settings are timed in turns in changing order, with exact search over the same keys and a "
    "fixed reference operation (a matrix product) in every round; a ratio to exact is the median of the ratios within "
    "rounds, with a bootstrap interval. Times there are of repeated searches, so they may be lower than in the table "
    "of the model's own pass, where each search follows an append."
)
LATENCY = (
    "Latency: percentiles are of the searches of single segments while the memories are full, each after the append of "
    "the segment before; cold is a search after the caches were filled with other data; first is the first search of "
    "full memories. A machine is called noisy where the quartiles of the reference operation lie further apart than "
    "15 % of its median, or its median is 1.5 times its fastest call."
)
UNKNOWN = "not stated"
UNSTEADY = 0.8  # of exact's time


def text(run: Mapping[str, Any], *path: str) -> str:
    """An entry of run.json as text."""
    value: Any = run
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None or value == "":
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def tables(analysis: Analysis) -> dict[str, Table]:
    """The small tables by name; one without lines is left out. What is named '<kind>:<figure>' stands by a figure."""
    made = {"advice": _advice(analysis), "ladder": _ladder(analysis), "smallest": _smallest(analysis)}
    for number, (workload, crossovers) in enumerate(analysis.crossovers):
        if len(workload.memory_sizes) > 1:
            name = "latency-memory" if number == 0 else f"latency-larger-{number}"
            where = f"{workload.title}: {describe(workload)}"
            whole = analysis.with_appends if number == 0 else None
            paid = {c.backend: outcome(c) for c in find_crossovers(whole)} if whole else {}
            lines = tuple(_crossing(c, paid) for c in crossovers)
            headings = (
                Heading("Index"),
                Heading("Search overtakes exact", f"recall {RECALL_FLOOR} or more"),
                *((Heading("Search and append do", f"recall {RECALL_FLOOR} or more"),) if paid else ()),
                Heading("Quickest spec", "at the largest size"),
                Heading("Its speed", "search, exact = 1", True),
            )
            made[f"crossover:{name}"] = Table(f"Where an index overtakes exact. {where}.", headings, lines)
    made["reaching:curves"] = reaching(analysis)
    made["latency"] = latency(analysis)
    made["missing"] = _missing(analysis)
    return {name: table for name, table in made.items() if table.lines}


def _code(spec: str) -> str:
    return f"`{plain(spec)}`"


def _difference(row: Row) -> str:
    """The difference to exact with its interval, short enough for a table."""
    if row.difference_point is None:
        return ""
    if row.difference is None:
        return shown(row.difference_point, 3)
    return f"{shown(row.difference_point, 3)} ({shown(row.difference.low, 3)} to {shown(row.difference.high, 3)})"


def _advice(analysis: Analysis) -> Table:
    lines = []
    for group in _same_choice(analysis.advice.by_size):
        choice = group[0]
        cell = choice.row.cell
        accepted = choice.accepted if len(group) == 1 else f"{choice.accepted} or more"
        lines.append(
            (
                f"{choice.memory_size:,}",
                accepted,
                _code(cell.spec),
                shown(choice.cost_ms, 2),
                "" if choice.speedup is None else f"{choice.speedup:.2f}",
                shown(cell.perplexity, 3),
                _difference(choice.row),
                shown(cell.recall_at_k, 3),
                shown(cell.bytes_per_key, 0),
                choice.because,
            )
        )
    headings = (
        Heading("Memory size", "keys", True),
        Heading("Accepted loss", "of perplexity"),
        Heading("Take"),
        Heading("Time", "ms per segment", True),
        Heading("Speed", "exact = 1", True),
        Heading("Perplexity", "", True),
        Heading("Difference to exact", "95 % interval", True),
        Heading("Recall", "", True),
        Heading("Footprint", "bytes per key", True),
        Heading("Why", prose=True),
    )
    return Table("Which index to take at each memory size", headings, tuple(lines))


def _same_choice(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Joins what a size gets at neighbouring tolerances when it is the same."""
    groups: list[list[Choice]] = []
    for choice in choices:
        last = groups[-1][-1] if groups else None
        if last and last.memory_size == choice.memory_size and last.row is choice.row:
            groups[-1].append(choice)
        else:
            groups.append([choice])
    return groups


def _ladder(analysis: Analysis) -> Table:
    lines = []
    rungs = analysis.advice.ladder
    for i, rung in enumerate(rungs):
        cell = rung.row.cell
        lower = ""
        if i:
            before = rungs[i - 1].row.cell.perplexity or 0.0
            lower = f"{100 * (1 - (cell.perplexity or 0.0) / before):.1f}"
        take = "no memory" if cell.is_none else _code(cell.spec)
        size = "0" if cell.is_none else f"{cell.memory_size:,}"
        lines.append((shown(rung.cost_ms, 2), take, size, shown(cell.perplexity, 3), lower, shown(cell.recall_at_k, 3)))
    headings = (
        Heading("From", "ms per segment", True),
        Heading("Take"),
        Heading("Memory size", "keys", True),
        Heading("Perplexity", "", True),
        Heading("Lower than the row above", "per cent", True),
        Heading("Recall", "", True),
    )
    return Table("What each further millisecond buys", headings, tuple(lines))


def _smallest(analysis: Analysis) -> Table:
    lines = []
    for size, row in analysis.advice.smallest:
        cell = row.cell
        exact = analysis.exact(size)
        whole = exact.cell.bytes_per_key if exact else None
        lines.append(
            (
                f"{size:,}",
                _code(cell.spec),
                shown(cell.bytes_per_key, 0),
                shown(whole, 0),
                _difference(row),
                shown(analysis.cost(row), 2),
            )
        )
    headings = (
        Heading("Memory size", "keys", True),
        Heading("Take"),
        Heading("Footprint", "bytes per key", True),
        Heading("Exact's", "bytes per key", True),
        Heading("Difference to exact", "95 % interval", True),
        Heading("Time", "ms per segment", True),
    )
    return Table("The smallest footprint with at most 1 % loss of perplexity", headings, tuple(lines))


def _crossing(crossover: Crossover, paid: Mapping[str, str]) -> tuple[str, ...]:
    spec = _code(crossover.spec) if crossover.spec else ""
    ratio = f"{crossover.ratio:.2f}" if crossover.ratio is not None else ""
    whole = (paid.get(crossover.backend, ""),) if paid else ()
    return (crossover.backend, outcome(crossover), *whole, spec, ratio)


def _missing(analysis: Analysis) -> Table:
    grouped: dict[tuple[str, str, str], list[int]] = {}
    for cell in analysis.results.not_measured:
        grouped.setdefault((cell.spec, cell.status, cell.reason or "no reason given"), []).append(cell.memory_size)
    for spec, size in analysis.results.absent:
        grouped.setdefault((spec, "absent", "no result yet: the run was not finished"), []).append(size)
    lines = tuple(
        (_code(spec), ", ".join(f"{n:,}" for n in sorted(sizes)), status, plain(reason))
        for (spec, status, reason), sizes in sorted(grouped.items())
    )
    headings = (
        Heading("Spec"),
        Heading("Memory sizes", "keys", prose=True),
        Heading("Status"),
        Heading("Reason", prose=True),
    )
    return Table("What was skipped or failed, and why", headings, lines)


def subtitle(analysis: Analysis) -> str:
    """One line under the title: what was compared, on what."""
    results = analysis.results
    run = results.run
    specs = len({r.cell.spec for r in analysis.measured})
    sizes = ", ".join(f"{n:,}" for n in results.memory_sizes)
    return (
        f"{specs} specs of {len(results.backends)} backends, memories of {sizes} keys, "
        f"{text(run, 'corpus', 'tokens')} tokens of {text(run, 'corpus', 'name')} ({text(run, 'corpus', 'split')}), "
        f"on {text(run, 'machine', 'cpu')}."
    )


def segment(analysis: Analysis) -> str:
    """One segment's queries in words."""
    length, memories = text(analysis.results.run, "segment_length"), analysis.results.num_memories
    return f"{length} queries for each of {memories} memories" if memories else f"{length} tokens"


def notes(analysis: Analysis) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = []
    if analysis.blocks is None:
        found.append("Per-token losses were not kept, so differences carry no interval: they may be noise.")
    elif analysis.blocks.effective < 20:
        found.append(
            f"The text is short ({len(analysis.blocks.labels):,} tokens, {analysis.blocks.count} blocks): "
            "the intervals are rough."
        )
    without = [n for n in analysis.results.memory_sizes if analysis.exact(n) is None]
    if without:
        sizes = ", ".join(f"{n:,}" for n in without)
        found.append(f"Exact search was not measured at {sizes} keys, so nothing can be judged against it there.")
    found += _part_full(analysis)
    found += _unsteady(analysis)
    found += [note] if (note := noise_note(analysis)) else []
    found += machine_notes(analysis.results.machines)
    found += [str(note) for note in analysis.results.run.get("notes") or []]
    if analysis.results.absent:
        found.append(f"The run is not finished: {len(analysis.results.absent)} combinations have no result yet.")
    return found


def _unsteady(analysis: Analysis) -> list[str]:
    """`degraded` does all that exact does and then drops neighbours: where it seems quicker, the machine was busy."""
    doubtful = []
    for size in analysis.results.memory_sizes:
        exact = analysis.exact(size)
        times = [r.cell.search_ms for r in analysis.at(size) if r.cell.backend == "degraded" and r.cell.search_ms]
        if exact is not None and exact.cell.search_ms and times and min(times) < UNSTEADY * exact.cell.search_ms:
            doubtful.append(f"{size:,}")
    if not doubtful:
        return []
    return [
        f"The times are doubtful at {', '.join(doubtful)} keys: `degraded`, which does all that `exact` does and more, "
        "was quicker there, so something else kept the machine busy. Recall and perplexity stand. For "
        "times to go by, compare again on an idle machine, into a new folder."
    ]


def _part_full(analysis: Analysis) -> list[str]:
    fills = {size: analysis.results.fill(size) for size in analysis.results.memory_sizes}
    part = [f"{size:,} keys {100 * fill:.0f} %" for size, fill in fills.items() if fill is not None and fill < 0.9]
    if not part:
        return []
    return [
        "The documents did not fill the larger memories: at the fullest they were, of "
        + ", of ".join(part)
        + ". Times and bytes there are those of what they held."
    ]


def method(analysis: Analysis) -> list[str]:
    """How the figures came about, in paragraphs."""
    blocks = analysis.blocks
    paragraphs = []
    if blocks is not None:
        scope = (
            "The interval speaks of such documents in general."
            if blocks.kind == "documents"
            else "There were too few documents to draw from, so the interval speaks of these documents, not of others."
        )
        paragraphs.append(
            f"Intervals: a bootstrap of {RESAMPLES:,} resamples over blocks, since neighbouring losses depend on each "
            f"other. {blocks.description[0].upper()}{blocks.description[1:]}; both losses of a token, the index's and "
            "exact's, are drawn together (paired); perplexity is the exponential of the mean loss of each resample. "
            "The interval runs between the percentiles of the differences, widened for the number of blocks "
            f"(Hesterberg 2015). {scope} Each interval is taken by itself: of twenty true zeros one may seem otherwise."
        )
    paragraphs.append(
        "Recall, softmax mass and times are measured on the queries and keys of the model itself, replayed in order: a "
        "query finds only keys from before its segment. Search is the median time while the memories are full, its "
        "bars are quartiles. Search and append together is search plus the append time per key times the keys that a "
        "segment adds."
    )
    if analysis.results.curves:
        paragraphs.append(CURVES)
    paragraphs.append(LATENCY)
    paragraphs.append(
        "Crossover: a backend's quickest spec that reaches the recall floor at a size is compared with exact at that "
        "size; the crossing is interpolated on logarithmic axes, and counts only if the backend stays ahead up to the "
        "largest size. Times hold for this machine and its number of threads; on another, or on a GPU, measure again. "
        "Quartiles show the spread within one measurement, not what else the machine did between two of them."
    )
    paragraphs.append(
        "`degraded` is an instrument, not an index: it drops true neighbours at a stated rate. It is never advised and "
        "stands in no comparison of times."
    )
    return paragraphs


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the figures come from, in pairs of name and value."""
    libraries = run.get("libraries")
    listed = ", ".join(f"{k} {v}" for k, v in sorted(libraries.items())) if isinstance(libraries, Mapping) else UNKNOWN
    configuration = run.get("checkpoint", {}).get("config") if isinstance(run.get("checkpoint"), Mapping) else None
    settings = (
        ", ".join(f"{k} {v}" for k, v in configuration.items()) if isinstance(configuration, Mapping) else UNKNOWN
    )
    sizes = run.get("memory_sizes")
    machine = f"{text(run, 'machine', 'cpu')}, {text(run, 'machine', 'cores')} cores, "
    machine += f"{text(run, 'machine', 'ram_gib')} GiB memory, {text(run, 'machine', 'os')}"
    return [
        ("Machine", machine),
        *_machines(run),
        ("Threads and device", f"{text(run, 'threads')} threads, {text(run, 'device')}"),
        ("Python", text(run, "machine", "python")),
        (
            "recollect",
            f"{text(run, 'recollect_version')}, commit {text(run, 'commit')}"
            + (" with changes on top" if run.get("uncommitted_changes") else ""),
        ),
        ("Libraries", listed),
        ("Date", text(run, "created")),
        ("Seed", text(run, "seed")),
        (
            "Text",
            f"{text(run, 'corpus', 'name')}, {text(run, 'corpus', 'split')} documents: "
            f"{text(run, 'corpus', 'documents')} documents, {text(run, 'corpus', 'tokens')} tokens; "
            f"digest {text(run, 'corpus', 'digest')}",
        ),
        (
            "Model",
            f"{text(run, 'checkpoint', 'name')}, {text(run, 'checkpoint', 'parameters')} parameters; "
            f"digest {text(run, 'checkpoint', 'digest')}",
        ),
        ("Its configuration", settings),
        (
            "Settings",
            f"k {text(run, 'k')}, segments of {text(run, 'segment_length')} tokens, {text(run, 'rows')} batch rows, "
            f"at most {text(run, 'max_tokens')} tokens, memory sizes "
            + (", ".join(f"{n:,}" for n in sizes) if isinstance(sizes, list) else UNKNOWN),
        ),
    ]


def _machines(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machines by name and how many cells each measured, where there were several."""
    found = run.get("machines")
    if not isinstance(found, Mapping) or len(found) < 2:
        return []
    listed = ", ".join(f"{name} ({count} cells)" for name, count in found.items())
    return [("Machines", f"{listed}, all of this kind")]


def repeat(run: Mapping[str, Any]) -> str:
    """The command that measures this again."""
    if isinstance(run.get("command"), str):
        return str(run["command"])
    parts = ["recollect", "compare"]
    for option, path in (
        ("--checkpoint", ("checkpoint", "path")),
        ("--corpus", ("corpus", "source")),
        ("--max-tokens", ("max_tokens",)),
        ("--seed", ("seed",)),
    ):
        value = text(run, *path).replace(",", "")
        if value != UNKNOWN:
            parts += [option, value]
    for size in run.get("memory_sizes") or []:
        parts += ["--memory-size", str(size)]
    return shlex.join([*parts, "--output", "out/again"])


def document_names(run: Mapping[str, Any]) -> list[str]:
    """The names of the documents that were read, at most 500."""
    names = run.get("corpus", {}).get("document_names") if isinstance(run.get("corpus"), Mapping) else None
    return [str(n) for n in names[:500]] if isinstance(names, list) else []
