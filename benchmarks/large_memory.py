"""Ten million keys in one memory: bytes planned and used, time to append and search, and what was found.

    python benchmarks/large_memory.py [--keys 10000000] [--dim 64] [--budget 16GiB] [--spec SPEC ...]
    python benchmarks/large_memory.py --keys 1000000        a rehearsal, in a minute or two

Each spec runs in a process of its own, so that peaks of memory are its own, one after the other. A memory is filled to
its capacity by appends of `--step` keys, and then some keys more, which evict the oldest. Then `--queries` queries look
for their `--k` nearest keys. Keys are like attention's: of unit length, in clusters that drift as the text goes on;
queries come from another distribution. Both are made from their number alone, some thousand at a time, so that what
makes them takes no memory that counts. Prints, for each spec:

    planned      bytes of main memory that `max_bytes` is held against, at most (while an index is built)
    used         bytes of keys and index as the memory itself counts them
    file         bytes of keys in a memory-mapped file
    peak         what the process took at most beyond what it took before the memory was made: all of it, and what the
                 system cannot drop again (anonymous memory, which pages of a mapped file are not)
    append       microseconds a key, over the first and the last million (or tenth), and the slowest single append
    search       milliseconds for all queries at once, the median of up to three after a first one
    recall       of the k nearest by exact search over float32 keys

Writes benchmarks/results/large_memory.json. The file of keys lies in the system's temporary folder (TMPDIR).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from recollect.memory_backends import make_backend
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.budget import plan_bytes
from recollect.memory_backends.options import parse_bytes
from recollect.memory_backends.out_of_memory import readable
from recollect.memory_backends.registry import class_and_options
from recollect.suites.environment import commit_of, describe_machine, library_versions

RESULT = Path(__file__).parent / "results" / "large_memory.json"
REFERENCE = "exact"
SPECS = (
    REFERENCE,
    "exact:storage=bfloat16",
    "exact:storage=int8",
    "exact:keys_in=temporary,storage=int8",
    "faiss-ivfpq:k_factor=8,keys_in=temporary,nlist=1024,nprobe=32",
    "faiss-ivf:nlist=1024,nprobe=32",
)
CLUSTERS = 1024
DRIFT_KEYS = 1 << 17
"""Keys in which a cluster's centre moves about as far as its keys lie from it."""
EXTRA = 1 << 16
"""Keys appended beyond the capacity."""


def keys_of(number: int, count: int, dim: int, seed: int = 0) -> Tensor:
    """(1, count, dim) float32: keys `number` to `number + count - 1` of the stream; the same whenever they are made."""
    made = torch.Generator().manual_seed(seed * 1_000_003 + number)
    fixed = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(CLUSTERS, dim, generator=fixed), dim=-1)
    ways = torch.nn.functional.normalize(torch.randn(CLUSTERS, dim, generator=fixed), dim=-1)
    # Tokens that follow one another are alike: runs of 16 keys of one cluster.
    which = torch.randint(CLUSTERS, (count // 16 + 1,), generator=made).repeat_interleave(16)[:count]
    angle = number / DRIFT_KEYS
    moved = centres + 0.5 * np.sin(angle) * ways
    noise = torch.randn(count, dim, generator=made) * (0.7 / dim**0.5)
    return torch.nn.functional.normalize(moved[which] + noise, dim=-1)[None]


def queries_of(count: int, keys: int, dim: int, step: int, seed: int = 0) -> Tensor:
    """(1, count, dim) float32 of unit length: near some keys of all ages, with much of their own that no key has."""
    made = torch.Generator().manual_seed(seed + 1)
    starts = torch.randint(max(1, keys // step), (count,), generator=made) * step
    near = torch.stack([keys_of(int(start), 64, dim, seed)[0, 7] for start in starts])
    own = torch.randn(1, dim, generator=made) / dim**0.5
    noise = torch.randn(count, dim, generator=made) / dim**0.5
    return torch.nn.functional.normalize(near + 0.5 * own + 0.5 * noise, dim=-1)[None]


class Peak:
    """The most that this process takes while it runs, beyond what it took at first; sampled, in bytes."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.all = self.anonymous = 0
        self.before = self._now()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _now(self) -> tuple[int, int]:
        status = Path("/proc/self/status")
        if status.exists():
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]
        return (self.process.memory_info().rss,) * 2

    def _watch(self) -> None:
        while not self.stopped.wait(0.02):
            everything, anonymous = self._now()
            self.all = max(self.all, everything - self.before[0])
            self.anonymous = max(self.anonymous, anonymous - self.before[1])

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()


def measure(spec: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One spec, in this process; writes its progress to stdout as JSON lines."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # What libraries take when they are first used is not the memory's.
    warm = make_backend(spec, num_memories=1, capacity=4096, dim=arguments.dim)
    warm.add(keys_of(0, 4096, arguments.dim))
    asked = queries_of(arguments.queries, arguments.keys, arguments.dim, arguments.step)
    warm.search(asked, arguments.k)
    warm.close()
    cls, options = class_and_options(spec)
    planned = plan_bytes(cls, options, num_memories=1, capacity=arguments.keys, dim=arguments.dim)
    budget = parse_bytes(arguments.budget)
    limited = f"{spec}{',' if ':' in spec else ':'}max_bytes={arguments.budget}"
    peak = Peak()
    memory = make_backend(limited, num_memories=1, capacity=arguments.keys, dim=arguments.dim)
    appended: list[float] = []
    counts: list[int] = []
    total = arguments.keys + min(EXTRA, arguments.keys // 10)
    started = time.perf_counter()
    for number in range(0, total, arguments.step):
        keys = keys_of(number, min(arguments.step, total - number), arguments.dim)
        begun = time.perf_counter()
        memory.add(keys)
        appended.append(time.perf_counter() - begun)
        counts.append(keys.shape[1])
        if len(appended) % 50 == 0:
            print(json.dumps({"done": number + keys.shape[1], "of": total}), flush=True)
    begun = time.perf_counter()
    memory.wait()
    waited = time.perf_counter() - begun
    filled = time.perf_counter() - started
    searched = []
    # Three after the first, fewer where one takes long.
    while len(searched) < 2 or (len(searched) < 4 and sum(searched) < 20_000):
        begun = time.perf_counter()
        found = memory.search(asked, arguments.k)
        searched.append(1000 * (time.perf_counter() - begun))
    peak.stop()
    stats = memory.stats()
    window = min(1_000_000, total // 10)
    truth = Path(arguments.truth)
    if spec == REFERENCE:
        np.save(truth, found.slots[0].numpy())
    recall = None
    if truth.exists():
        expected = torch.from_numpy(np.load(truth))
        recall = float((found.slots[0][:, :, None] == expected[:, None, :]).any(2).float().mean())
    return {
        "spec": spec,
        "planned_bytes": planned.total,
        "planned_index_bytes": planned.index,
        "budget_bytes": budget,
        "used_bytes": stats.key_bytes + stats.index_bytes,
        "key_bytes": stats.key_bytes,
        "index_bytes": stats.index_bytes,
        "file_bytes": stats.mapped_bytes,
        "peak_bytes": peak.all,
        "peak_anonymous_bytes": peak.anonymous,
        "append_first_us": _us_per_key(appended, counts, window),
        "append_last_us": _us_per_key(appended[::-1], counts[::-1], window),
        "append_slowest_ms": 1000 * max(appended),
        "append_median_ms": 1000 * statistics.median(appended),
        "fill_seconds": filled,
        "waited_seconds": waited,
        "build_seconds": stats.build_seconds,
        "stalled_seconds": stats.stalled_seconds,
        "search_first_ms": searched[0],
        "search_ms": statistics.median(searched[1:]),
        "recall": recall,
    }


def _us_per_key(seconds: list[float], counts: list[int], keys: int) -> float:
    taken, done = 0.0, 0
    for one, count in zip(seconds, counts, strict=True):
        taken, done = taken + one, done + count
        if done >= keys:
            break
    return 1e6 * taken / done


def in_a_process(spec: str, arguments: argparse.Namespace, truth: Path, progress: Progress) -> dict[str, Any]:
    """Runs one spec in a process of its own; what failed is said in `reason`."""
    command = [sys.executable, __file__, "--child", spec, "--truth", str(truth)]
    for name in ("keys", "dim", "queries", "k", "step", "budget", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    task = progress.add_task(spec, total=arguments.keys)
    last: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            if "done" in last:
                progress.update(task, completed=last["done"], total=last["of"])
        if process.wait():
            errors.seek(0)
            told = errors.read().strip().splitlines()
            return {"spec": spec, "reason": told[-1] if told else f"ended with {process.returncode}"}
    progress.update(task, completed=arguments.keys, total=arguments.keys)
    return last


def show(results: list[dict[str, Any]], arguments: argparse.Namespace, console: Console) -> None:
    """The table."""
    table = Table(title=f"{arguments.keys} keys of dimension {arguments.dim}, budget {arguments.budget}")
    columns = ("spec", "planned", "used", "file", "peak", "of it anonymous", "append first/last µs", "slowest ms")
    for column in (*columns, f"search {arguments.queries} ms", f"recall@{arguments.k}"):
        table.add_column(column, overflow="fold", justify="left" if column == "spec" else "right")
    for one in results:
        if "reason" in one:
            table.add_row(one["spec"], one["reason"])
            continue
        sizes = ("planned_bytes", "used_bytes", "file_bytes", "peak_bytes", "peak_anonymous_bytes")
        table.add_row(
            one["spec"],
            *(readable(one[name]) for name in sizes),
            f"{one['append_first_us']:.2f} / {one['append_last_us']:.2f}",
            f"{one['append_slowest_ms']:.0f}",
            f"{one['search_ms']:.0f}",
            "" if one["recall"] is None else f"{one['recall']:.4f}",
        )
    console.print(table)
    for one in results:
        if "reason" not in one:
            within = "within" if one["peak_anonymous_bytes"] <= one["budget_bytes"] else "BEYOND"
            ratio = one["append_last_us"] / one["append_first_us"]
            console.print(f"{one['spec']}: {within} the budget; last append / first {ratio:.2f}", highlight=False)


def main() -> None:
    """Runs all specs and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=10_000_000, help="capacity of the memory")
    parser.add_argument("--dim", type=int, default=64, help="dimension of a key")
    parser.add_argument("--queries", type=int, default=512, help="queries in one search")
    parser.add_argument("--k", type=int, default=32, help="neighbours of a query")
    parser.add_argument("--step", type=int, default=4096, help="keys in one append")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: its own choice")
    parser.add_argument("--budget", default="16GiB", help="max_bytes of every memory")
    parser.add_argument("--spec", action="append", help="only these; `exact` first, or there is no recall")
    parser.add_argument("--output", type=Path, default=RESULT, help="where the result is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--truth", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments)), flush=True)
        return
    console = Console(width=None if sys.stdout.isatty() else 180)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        for spec in arguments.spec or SPECS:
            results.append(in_a_process(spec, arguments, Path(folder) / "truth.npy", progress))
            write_json(
                arguments.output,
                {
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "machine": describe_machine(),
                    "libraries": library_versions(),
                    "threads": arguments.threads or torch.get_num_threads(),
                    "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                    "commit": commit_of(),
                    **{name: getattr(arguments, name) for name in ("keys", "dim", "queries", "k", "step", "budget")},
                    "results": results,
                },
            )
    show(results, arguments, console)
    console.print(f"written to {arguments.output}", highlight=False)


if __name__ == "__main__":
    main()
