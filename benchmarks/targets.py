"""The targets of this project beside what was measured last: `python benchmarks/targets.py [--write]`.

Reads the result files in benchmarks/results/ and judges what they hold against the bounds that stand here.
`--write` puts the same tables into docs/targets.md, which a test holds to the files. Where a benchmark has several rows
for one target, the worst of them is judged and the range of all is shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "targets.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Target:
    """One target and what was measured.

    Attributes:
        name: what is divided by what, and at which size.
        bound: what should not be passed.
        above: whether the measured value should be at least the bound, rather than at most.
        values: every row's figure; the worst is judged.
    """

    name: str
    bound: float
    values: tuple[float, ...]
    above: bool = False

    @property
    def worst(self) -> float:
        """The figure that is judged."""
        return min(self.values) if self.above else max(self.values)

    @property
    def held(self) -> bool:
        """Whether the worst figure lies on the right side."""
        return self.worst >= self.bound if self.above else self.worst <= self.bound

    def cells(self) -> tuple[str, str, str, str]:
        """Name, measured, bound and verdict as text."""
        measured = f"{self.worst:.3g}"
        if len(self.values) > 1:
            measured += f" (all: {min(self.values):.3g} to {max(self.values):.3g})"
        side = "at least" if self.above else "at most"
        return self.name, measured, f"{side} {self.bound:g}", "held" if self.held else "missed"


def exact_search(content: Mapping[str, Any]) -> Iterable[Target]:
    """512 queries of one memory, k 32: the sizes that the bounds are for."""
    rows = [
        row
        for row in content["rows"]
        if row["data"] == "random" and row["size"].startswith("1x512x") and row["size"].endswith(("x64x32", "x128x32"))
    ]
    matmul = 0.75 if content["matrix_units"] else 1.15
    for threads in sorted({row["threads"] for row in rows}):
        some = [row["ratios"] for row in rows if row["threads"] == threads]
        where = f"{len(some)} sizes, {threads} thread{'s' if threads > 1 else ''}"
        for name, bound, above in (
            ("exact / matmul", matmul, False),
            ("matmul + topk / exact", 2.2, True),
            ("faiss flat / exact", 4.5, True),
        ):
            values = tuple(ratios[name]["median"] for ratios in some if name in ratios)
            if values:
                yield Target(f"{name}, {where}", bound, values, above)


def streams(content: Mapping[str, Any]) -> Iterable[Target]:
    """Appending one step, for every backend."""
    for result in content["results"]:
        rows = result["rows"]
        larger = [row for row in rows if row["capacity"] != min(one["capacity"] for one in rows)]
        if larger:
            sizes = " and ".join(f"{row['capacity']:,}" for row in larger)
            smallest = min(row["capacity"] for row in rows)
            yield Target(
                f"`{result['spec']}`: median append at {sizes} keys / at {smallest:,}",
                1.5,
                tuple(row["median_over_smallest"][0] for row in larger),
            )
        yield Target(
            f"`{result['spec']}`: 99th percentile / median of an append",
            3.0,
            tuple(row["p99_over_median"] for row in rows),
        )
        if "turnovers" in result:
            # A drift is a loss that the interval keeps apart from none.
            yield Target(
                f"`{result['spec']}`: recall lost in ten turnovers, at least (95 % interval)",
                0.0,
                (-result["turnovers"]["interval"][1],),
            )


def large_memory(content: Mapping[str, Any]) -> Iterable[Target]:
    """Ten million keys within a byte budget."""
    for one in content["results"]:
        if "reason" in one:
            continue
        yield Target(
            f"`{one['spec']}`: bytes of main memory / budget", 1.0, (one["peak_anonymous_bytes"] / one["budget_bytes"],)
        )
        yield Target(
            f"`{one['spec']}`: append, last million / first", 1.5, (one["append_last_us"] / one["append_first_us"],)
        )


def ray_shards(content: Mapping[str, Any]) -> Iterable[Target]:
    """One memory over two processes of Ray, beside the same index in one."""
    for row in content["rows"]:
        where = f"`{row['backend']}`, {row['capacity']:,} keys"
        bound = {100_000: 1.3, 1_000_000: 1.05}.get(row["capacity"])
        if row["shards"] == 2 and bound is not None:
            yield Target(f"search over two shards / in process, {where}", bound, (row["over_in_process"][0],))
            yield Target(f"keys appended a second, two shards, {where}", 160_000, (row["keys_per_second"],), above=True)
        if row["shards"]:
            lost = tuple(row[what]["keys_lost"] for what in ("process_killed", "node_killed") if what in row)
            yield Target(f"keys lost where a process is killed, {row['where']}, {where}", 0, lost)


def distributed_training(content: Mapping[str, Any]) -> Iterable[Target]:
    """Two processes with a core each, beside one, at one global batch."""
    if content["processes"] == 2:
        name = f"tokens a second of two ranks / of one, `{content['preset']}`, {content['parallel']}"
        yield Target(name, 1.7, (content["ratio"],), above=True)


READERS: dict[str, Callable[[Mapping[str, Any]], Iterable[Target]]] = {
    "exact_search": exact_search,
    "streams": streams,
    "large_memory": large_memory,
    "ray_shards": ray_shards,
    "distributed_training": distributed_training,
}


def machine_of(content: Mapping[str, Any]) -> str:
    """The machine that a result file names."""
    about = content.get("provenance") or content
    machine = about.get("machine")
    if isinstance(machine, Mapping):
        machine = machine.get("accelerator") or machine.get("cpu")
    return str(machine or about.get("cpu") or about.get("processor") or "a machine that is not named")


def collect(folder: Path = RESULTS) -> dict[str, tuple[dict[str, Any], list[Target]]]:
    """What each result file holds and its targets, by the benchmark's name; files that are not there are left out."""
    found = {}
    for name, reader in READERS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            found[name] = (content, list(reader(content)))
    return found


def heading(name: str, content: Mapping[str, Any]) -> str:
    """Where and when a benchmark ran."""
    about = content.get("provenance") or content
    date, commit = str(about.get("date") or "")[:10], str(about.get("commit") or "")[:7]
    parts = [machine_of(content), *([date] if date else []), *([f"commit {commit}"] if commit else [])]
    return f"`benchmarks/{name}.py` on {', '.join(parts)}"


def as_markdown(found: Mapping[str, tuple[Mapping[str, Any], list[Target]]]) -> str:
    """A table for each benchmark."""
    parts = []
    for name, (content, targets) in found.items():
        rows = [" | ".join(target.cells()) for target in targets]
        table = "\n".join(f"| {row} |" for row in rows).replace("| missed |", "| **missed** |")
        parts.append(
            f"{heading(name, content)}:\n\n| target | measured | bound | |\n| --- | --- | --- | --- |\n{table}\n"
        )
    return "\n".join(parts)


def with_tables(page: str, tables: str) -> str:
    """The page with its measured part replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Prints, and writes the page where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/targets.md")
    arguments = parser.parse_args()
    found = collect()
    console = Console()
    for name, (content, targets) in found.items():
        table = Table(title=heading(name, content).replace("`", ""))
        for title in ("target", "measured", "bound", ""):
            table.add_column(title)
        for target in targets:
            table.add_row(*target.cells())
        console.print(table)
    if arguments.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), as_markdown(found)), encoding="utf-8")
        console.print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
