"""What durability costs: Lance, Milvus Lite and a Milvus server beside faiss in this process, on the same keys.

    python benchmarks/durability.py [--keys 8192 100000] [--uri http://localhost:19530] [--only lance milvus ...]

One thread (a server has its own), keys of dimension 64, steps of 512 keys, searches for 512 queries, 32 neighbours.
Each is loaded with all keys at once; then all of them append and search in turns, in rounds, so that a disturbance
meets them all. What can be found again is closed, opened and compared: a key that is missing ends the run.

| name | what it is |
|---|---|
| faiss-flat | `faiss-flat`, whose keys are gone with the process: what the others are compared with |
| lance | the same, with every append in a Lance log (`KeyLog`) before it counts |
| milvus-lite | `milvus:uri=keys.db`: exact search by Milvus Lite, in this process |
| faiss-hnsw, milvus-lite-hnsw | a graph in this process, and by Milvus Lite |
| server, server-hnsw | `milvus:uri=http://...`: the same by a server, if `--uri` or RECOLLECT_MILVUS_URI names one |

Printed, for each: keys a second when loaded at once; what it takes to append a step and to search, in milliseconds and
over faiss-flat's (the median of the ratios within rounds, and its 95 % interval); recall; bytes on disk a key; and the
seconds from an address to a memory that answers. Three minutes; writes benchmarks/results/durability.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recollect.memory_backends import MemoryBackend, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.suites.environment import THREAD_VARIABLES
from recollect.suites.noise import describe_reference, interleave, ratio_interval
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "durability.json"
DIM, K, STEP, QUERIES = 64, 32, 512, 512
BASELINE = "faiss-flat"
NAMES = (
    BASELINE, "faiss-hnsw", "lance", "milvus-lite", "milvus-lite-hnsw", "server", "server-hnsw",
)  # fmt: skip
HNSW = "index=HNSW,M=16,ef_construction=100,ef=64"
"""As `faiss-hnsw` builds and searches by default, so that both have the same graph."""
VARIABLE = "RECOLLECT_MILVUS_URI"


@dataclass
class Kept:
    """Something that keeps keys and finds them.

    Attributes:
        make: a memory, given the address; called once to make it, and with True to open it again.
        memory: what is appended to and searched.
        log: what durability needs beside it.
        folder: where its bytes lie; None where nothing lies on this disk.
    """

    make: Callable[[bool], tuple[MemoryBackend, Any]]
    folder: Path | None
    durable: bool
    memory: MemoryBackend = field(init=False)
    log: Any = field(init=False, default=None)

    def open(self, again: bool = False) -> None:
        """Makes it, or opens it again."""
        self.memory, self.log = self.make(again)

    def add(self, keys: torch.Tensor) -> None:
        """Appends keys (1, T, D); durable when it returns, where it is."""
        if self.log is not None:
            self.log.append(keys)
        self.memory.add(keys)

    def close(self) -> None:
        """Closes it; what is durable stays."""
        if self.log is not None:
            self.log.close()
        self.memory.close()

    def nbytes(self) -> int | None:
        """Bytes on this disk."""
        if self.folder is None:
            return None
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


def from_log(log: Any, capacity: int) -> MemoryBackend:
    """A `faiss-flat` with the keys of a Lance log."""
    memory = make_backend(BASELINE, num_memories=1, capacity=capacity, dim=DIM)
    for _, _, keys in log.read(0):
        memory.add(torch.as_tensor(keys)[None])
    return memory


def ways(folder: Path, capacity: int, uri: str) -> dict[str, Kept]:
    """Everything that is compared, by name, none of it made yet."""
    sizes = {"num_memories": 1, "capacity": capacity, "dim": DIM}

    def plain(spec: str) -> Callable[[bool], tuple[MemoryBackend, Any]]:
        return lambda again: (make_backend(spec, **sizes), None)

    def milvus(address: str, index: str) -> Callable[[bool], tuple[MemoryBackend, Any]]:
        spec = f"milvus:uri={address},collection=durability_{'hnsw' if index else 'flat'}" + (index and f",{index}")
        return lambda again: (make_backend(f"{spec},existing={'reuse' if again else 'replace'}", **sizes), None)

    def lance(again: bool) -> tuple[MemoryBackend, Any]:
        from recollect.memory_backends.key_log import KeyLog

        place = folder / "lance"
        if not again:
            return make_backend(BASELINE, **sizes), KeyLog.create(place, **sizes)
        log = KeyLog.open(place)
        return from_log(log, capacity), log

    lite = {name: folder / f"{name}.db" for name in ("flat", "hnsw")}
    found = {
        BASELINE: Kept(plain(BASELINE), None, False),
        "faiss-hnsw": Kept(plain("faiss-hnsw"), None, False),
        "lance": Kept(lance, folder / "lance", True),
        "milvus-lite": Kept(milvus(str(lite["flat"]), ""), lite["flat"], True),
        "milvus-lite-hnsw": Kept(milvus(str(lite["hnsw"]), HNSW), lite["hnsw"], True),
    }
    if uri:
        found["server"] = Kept(milvus(uri, ""), None, True)
        found["server-hnsw"] = Kept(milvus(uri, HNSW), None, True)
    return found


def drawn(count: int, seed: int) -> torch.Tensor:
    """Keys or queries (1, count, D) around 64 centres, as those of a text lie together."""
    centres = torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(64, (count,), generator=generator)
    return (centres[chosen] + torch.randn(count, DIM, generator=generator))[None]


def share_found(mine: torch.Tensor, true: torch.Tensor) -> float:
    """Recall: slots (1, Q, K) both."""
    return float((true[..., :, None] == mine[..., None, :]).any(-1).float().mean())


def measure(keys: int, arguments: argparse.Namespace, folder: Path, progress: Progress) -> dict[str, Any]:
    """All figures at one number of keys."""
    capacity = keys + STEP * arguments.rounds
    compared = {
        name: one
        for name, one in ways(folder, capacity, arguments.uri).items()
        if name == BASELINE or name in arguments.only
    }
    task = progress.add_task(f"{keys} keys", total=3 * len(compared) + 1)
    content = drawn(keys, arguments.seed + 1)
    loaded: dict[str, float] = {}
    for name, one in compared.items():
        progress.update(task, description=f"{keys} keys: loading {name}")
        one.open()
        start = time.perf_counter()
        one.add(content)
        one.memory.wait()
        loaded[name] = time.perf_counter() - start
        progress.advance(task)
    queries = drawn(QUERIES, arguments.seed + 2)
    true = compared[BASELINE].memory.search(queries, K).slots
    recall = {name: share_found(one.memory.search(queries, K).slots, true) for name, one in compared.items()}
    progress.update(task, description=f"{keys} keys: appending in turns")
    steps = [drawn(STEP, 1000 * arguments.seed + 100 + step) for step in range(arguments.rounds)]
    following = {name: iter(steps) for name in compared}  # each appends the same
    appends = interleave(
        {name: (lambda one=one, name=name: one.add(next(following[name]))) for name, one in compared.items()},
        rounds=arguments.rounds,
    )
    for one in compared.values():
        one.memory.wait()
    progress.update(task, description=f"{keys} keys: searching in turns", advance=1)
    searches = interleave(
        {name: (lambda one=one: one.memory.search(queries, K)) for name, one in compared.items()},
        rounds=arguments.rounds,
    )
    rows = []
    for name, one in compared.items():
        progress.update(task, description=f"{keys} keys: opening {name} again", advance=1)
        rows.append(
            {
                "name": name,
                "keys": keys,
                "spec": one.memory.spec,
                "durable": one.durable,
                "load_keys_per_second": round(keys / loaded[name]),
                **compared_with_baseline("append", appends, name),
                **compared_with_baseline("search", searches, name),
                "recall": round(recall[name], 4),
                "disk_bytes_per_key": None,
                "reopen_seconds": None,
            }
        )
        if one.durable:
            rows[-1].update(reopened(one, queries, capacity))
        progress.advance(task)
    for name, one in compared.items():
        if name.startswith("server"):
            one.memory.drop()  # type: ignore[attr-defined]
        one.close()
    progress.update(task, description=f"{keys} keys: done", completed=3 * len(compared) + 1)
    reference = describe_reference([*appends["reference operation"], *searches["reference operation"]])
    return {"keys": keys, "reference_ms": round(reference.p50_ms, 3), "noisy": reference.noisy, "rows": rows}


def compared_with_baseline(what: str, times: dict[str, list[float]], name: str) -> dict[str, Any]:
    """The median time of an operation, and the median of its ratios to the baseline's, with the interval."""
    ratio = ratio_interval(times[name], times[BASELINE])
    return {
        f"{what}_ms": round(float(torch.tensor(times[name]).median()), 3),
        f"{what}_ratio": [round(value, 3) for value in (ratio.value, ratio.low, ratio.high)],
    }


def reopened(one: Kept, queries: torch.Tensor, capacity: int) -> dict[str, Any]:
    """Closes something durable, opens it again, and holds it to what it held."""
    held = int(one.memory.lengths.sum())
    before = one.memory.search(queries, K).slots
    one.close()
    size = one.nbytes()
    start = time.perf_counter()
    one.open(again=True)
    after = one.memory.search(queries[:, :1], 1).slots
    seconds = time.perf_counter() - start
    if int(one.memory.lengths.sum()) != held:
        raise SystemExit(f"{one.memory.spec}: {held} keys were there, and {int(one.memory.lengths.sum())} are found")
    if one.memory.capabilities.exact and not torch.equal(after, before[:, :1, :1]):
        raise SystemExit(f"{one.memory.spec}: it answers otherwise than before it was closed")
    return {
        "reopen_seconds": round(seconds, 3),
        "disk_bytes_per_key": None if size is None else round(size / held, 1),
    }


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Prints the table."""
    table = Table(title=f"steps of {STEP} keys, {QUERIES} queries, k {K}, dimension {DIM}; ratios are to {BASELINE}")
    for heading in (
        "name", "keys", "loads keys/s", "append ms", "ratio", "search ms", "ratio", "recall", "disk B/key", "reopens s",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for result in results:
        for row in result["rows"]:
            ratios = [
                "{:.2f} ({:.2f} to {:.2f})".format(*row[f"{what}_ratio"]) if row["name"] != BASELINE else "1"
                for what in ("append", "search")
            ]
            table.add_row(
                row["name"], str(row["keys"]),
                str(row["load_keys_per_second"]), f"{row['append_ms']:.2f}", ratios[0], f"{row['search_ms']:.1f}",
                ratios[1], f"{row['recall']:.3f}",
                "" if row["disk_bytes_per_key"] is None else f"{row['disk_bytes_per_key']:.0f}",
                "" if row["reopen_seconds"] is None else f"{row['reopen_seconds']:.2f}",
            )  # fmt: skip
    console.print(table)
    for result in results:
        if result["noisy"]:
            console.print(f"{result['keys']} keys: the machine was noisy; small differences mean nothing")


def on_one_thread() -> None:
    """Starts this program anew with one thread in every library, which they read when they are loaded."""
    if any(os.environ.get(name) != "1" for name in THREAD_VARIABLES):
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[8192, 100_000], help="keys to load")
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=NAMES, help="what to compare (all)")
    parser.add_argument("--uri", default=os.environ.get(VARIABLE, ""), help=f"a Milvus server (${VARIABLE})")
    parser.add_argument("--rounds", type=int, default=7, help="appends and searches of each, in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result file instead of a table")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    on_one_thread()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*many for Milvus Lite")
    results = []
    with Progress(console=Console(stderr=True)) as progress:
        for keys in arguments.keys:
            folder = Path(tempfile.mkdtemp(prefix="recollect-durability-"))
            try:
                results.append(measure(keys, arguments, folder, progress))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    left_out = [name for name in NAMES if name.startswith("server") and not arguments.uri]
    content = {
        "schema": 1,
        "provenance": describe(threads=1, seed=arguments.seed),
        "dim": DIM,
        "k": K,
        "step": STEP,
        "queries": QUERIES,
        "rounds": arguments.rounds,
        "skipped": dict.fromkeys(left_out, f"no --uri, and {VARIABLE} names no server"),
        "results": results,
    }
    write_json(arguments.output, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        show(results, Console(width=160))
        for name, reason in content["skipped"].items():
            print(f"{name}: skipped: {reason}")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
