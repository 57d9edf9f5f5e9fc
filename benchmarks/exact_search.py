"""Exact search against what it is made of and what it replaces, side by side in one run.

    python benchmarks/exact_search.py [--rounds 9] [--threads 1 2] [--size 1x512x65536x64x32 ...] [--trace KEYS.hdf5]

At every size (memories x queries x keys x dimension x k) and number of threads, takes turns between

    matmul          torch.bmm of the queries and keys alone, its result in fresh memory
    matmul in place the same into memory that is there already
    matmul + topk   torch.bmm and torch.topk
    block maxima    block_topk.search_by_score: exact search in plain torch, which machines without the fused pass take
    exact           the backend's public `search`; the first line and the result say which kernel it took
    approx-topk     the backend's public `search`, at its default recall of 0.95
    faiss flat      faiss.IndexFlatIP a memory, where faiss is installed

and prints medians and the ratios that matter, with the bounds that hold for 512 queries of one memory, k 32. Times are
taken in an order drawn anew in every round, and ratios within a round before their median: what else the machine does
then weighs on all alike. On a machine whose cores are busy the clock on the wall measures the neighbours; `--clock cpu`
takes the processor time of the process instead, which is fair for one thread (with several it counts waiting threads as
working). Results are compared with torch's first, and the recall of approx-topk with its formula.

Beside the result stand the floor (the products over this processor's measured rate of 8-bit multiply-adds, or the
keys' bytes over its measured rate of reading, whichever is longer) and a prediction from that rate and the
instructions of the other parts: see docs/exact-search.md.

`--trace` searches the keys of a real model by its own queries: a file of `recollect trace --ann-benchmarks`.
Writes benchmarks/results/exact_search.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from recollect.memory_backends import cpu_search, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.block_topk import search_by_score
from recollect.memory_backends.implementations.approx_topk import buckets_for, expected_recall
from recollect.memory_backends.threads import run_all
from recollect.suites.environment import commit_of, describe_machine, is_changed, library_versions
from recollect.suites.noise import REFERENCE, describe_reference, interleave, ratio_interval

RESULT = Path(__file__).parent / "results" / "exact_search.json"
JUDGED = tuple(f"1x512x{keys}x{dim}x32" for keys in (8192, 65536, 262144) for dim in (64, 128))
SIZES = (*JUDGED, "8x128x8192x64x32", "32x128x2048x64x32", "8x128x32768x64x32", "8x1x8192x64x32")
SECONDS = 14.0
"""A size ends after the first round from LEAST on that is later than this."""
LEAST = 5

ENCODING = 17
"""Vector instructions to bring 16 components of keys into codes."""
LISTING = 60
"""Instructions, a branch foretold wrongly among them, for a key that goes into a query's list."""


def bounds() -> dict[str, tuple[str, str, float | None]]:
    """What is divided by what, and the bound on it: at most for what begins with `exact`, else at least."""
    matmul = 0.75 if has_matrix_units() else 1.15
    return {
        "exact / matmul": ("exact", "matmul", matmul),
        "exact / matmul in place": ("exact", "matmul in place", matmul),
        "matmul + topk / exact": ("matmul + topk", "exact", 2.2),
        "faiss flat / exact": ("faiss flat", "exact", 4.5),
        "block maxima / exact": ("block maxima", "exact", None),
        "exact / approx-topk": ("exact", "approx-topk", None),
    }


def has_matrix_units() -> bool:
    """Whether the processor multiplies whole tiles of bfloat16 (Intel's AMX)."""
    import cpuinfo

    return "amx_bf16" in cpuinfo.get_cpu_info().get("flags", ())


def data(size: str, trace: Path | None) -> tuple[Tensor, Tensor, int]:
    """Queries (M, Q, D), keys (M, n, D) and k: of one size at random, or of a trace."""
    if trace is not None:
        from recollect.model.ann_benchmarks import load_ann_benchmarks

        file = load_ann_benchmarks(trace)
        queries, keys = torch.from_numpy(file.test)[:512], torch.from_numpy(file.train)
        return queries[None].contiguous(), keys[None].contiguous(), 32
    memories, count, length, dim, k = (int(part) for part in size.split("x"))
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(memories, count, dim, generator=generator),
        torch.randn(memories, length, dim, generator=generator),
        k,
    )


def peers(queries: Tensor, keys: Tensor, k: int, threads: int) -> tuple[dict[str, Callable[[], Any]], str]:
    """The functions to time for queries (M, Q, D) and keys (M, n, D), and the kernel that `exact` takes."""
    memories, length, dim = keys.shape
    backend, approximate = (
        make_backend(spec, num_memories=memories, capacity=length, dim=dim) for spec in ("exact", "approx-topk")
    )
    backend.add(keys)
    # One copy of the keys for all but faiss, or whoever comes second finds them out of cache.
    keys = backend.ring.keys
    approximate.ring = backend.ring
    room = torch.empty(memories, queries.shape[1], length)
    functions: dict[str, Callable[[], Any]] = {
        "matmul": lambda: torch.bmm(queries, keys.transpose(1, 2)),
        "matmul in place": lambda: torch.bmm(queries, keys.transpose(1, 2), out=room),
        "matmul + topk": lambda: torch.bmm(queries, keys.transpose(1, 2)).topk(k),
        "block maxima": lambda: search_by_score(queries, keys, [length] * memories, k),
        "exact": lambda: backend.search(queries, k),
        "approx-topk": lambda: approximate.search(queries, k),
    }
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)
        indexes = [faiss.IndexFlatIP(dim) for _ in range(memories)]
        for index, stored in zip(indexes, keys, strict=True):
            index.add(stored.numpy())
        asked = [part.numpy() for part in queries]
        functions["faiss flat"] = lambda: [index.search(part, k) for index, part in zip(indexes, asked, strict=True)]
    taken = cpu_search.worth(queries.shape[1], length, dim, k)
    return functions, backend.kernel if taken else "block maxima in torch (too small for the fused pass)"


def check(functions: dict[str, Callable[[], Any]], keys: int, k: int) -> dict[str, float]:
    """Holds exact search to torch's answer; the share of slots in the same place, and the recall of approx-topk."""
    expected, found, near = functions["matmul + topk"](), functions["exact"](), functions["approx-topk"]()
    torch.testing.assert_close(found.scores, expected.values, rtol=1e-5, atol=1e-4)
    true = expected.indices.flatten(0, 1).numpy()
    hits = [len(np.intersect1d(one, other)) for one, other in zip(true, near.slots.flatten(0, 1).numpy(), strict=True)]
    return {
        "slots_as_torch": float((found.slots == expected.indices).double().mean()),
        "approx_topk_recall": sum(hits) / true.size,
        "approx_topk_expected_recall": expected_recall(buckets_for(0.95, k, keys), k, keys),
    }


def rates(threads: int) -> dict[str, float] | None:
    """8-bit multiply-adds and bytes read a second, by so many threads; None where the fused pass does not run."""
    if cpu_search.why_not() is not None:
        return None
    import numba

    from recollect.memory_backends import cpu_kernels

    @numba.njit(nogil=True)
    def multiply(codes: Any, room: Any, lists: Any, tiles: int) -> None:
        for _ in range(tiles):
            for group in range(len(codes)):
                q = group * cpu_kernels.GROUP
                cpu_kernels.scan_tile(
                    room.panel.ctypes.data,
                    codes[group].ctypes.data,
                    codes.shape[1],
                    room.starts[q:].ctypes.data,
                    np.float32(1),
                    room.shifts[q:].ctypes.data,
                    np.int32(0),
                    lists.counts[q:].ctypes.data,
                    lists.lows[q].ctypes.data,
                    lists.slots[q].ctypes.data,
                    4 * lists.lows.shape[1],
                )

    groups, width, tiles = 86, 128, 1600
    queries = groups * cpu_kernels.GROUP
    tasks = []
    for part in range(threads):
        room = cpu_search._room(width, queries)
        room.starts[:] = -(1 << 29)  # No score reaches zero: nothing but products.
        lists = cpu_kernels.Lists(*cpu_search._lists(queries, 1, part), np.zeros(queries, np.float32))
        codes = np.zeros((groups, width // 4, cpu_kernels.GROUP), np.int32)
        tasks.append(partial(multiply, codes, room, lists, tiles))
    found = {"multiply_adds": 0.0, "bytes": 0.0}
    products = threads * tiles * queries * cpu_kernels.TILE * width
    # torch's threads spin for milliseconds after they have worked: products first.
    for _ in range(5):
        started = time.perf_counter()
        run_all(tasks)
        found["multiply_adds"] = max(found["multiply_adds"], products / (time.perf_counter() - started))
    numbers = torch.zeros(1 << 26)
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        found["bytes"] = max(found["bytes"], numbers.nbytes / (time.perf_counter() - started))
    return found


def floor_and_prediction(queries: Tensor, keys: Tensor, k: int, rate: dict[str, float]) -> dict[str, float]:
    """Milliseconds: the floor of the fused pass, and what it should take with its other parts."""
    memories, length, dim = keys.shape
    width = -(-dim // 16) * 16
    products = 1000 * memories * queries.shape[1] * length * width / rate["multiply_adds"]
    reading = 1000 * keys.nbytes / rate["bytes"]
    # An instruction makes 64 multiply-adds; others run at about its rate.
    instruction = 1000 * 64 / rate["multiply_adds"]
    encoding = memories * length * width / 16 * ENCODING * instruction
    sample = max(256, 8 * k)
    listed = memories * queries.shape[1] * (sample + 2 * k * max(0.0, math.log2(length / sample)))
    return {
        "products_ms": products,
        "reading_ms": reading,
        "floor_ms": max(products, reading),
        "prediction_ms": max(products + encoding, reading) + listed * LISTING * instruction,
    }


def measure(size: str, threads: int, rounds: int, clock: Any, trace: Path | None) -> dict[str, Any]:
    """One row of the result: one size at one number of threads."""
    torch.set_num_threads(threads)
    queries, keys, k = data(size, trace)
    functions, kernel = peers(queries, keys, k, threads)
    checked = check(functions, keys.shape[1], k)
    for function in functions.values():
        function()
    taken = interleave(functions, rounds=rounds, clock=clock, least=LEAST, seconds=SECONDS)
    rate = rates(threads)
    reference = describe_reference(taken.pop(REFERENCE))
    ratios = {}
    for name, (above, below, _) in bounds().items():
        if above in taken and below in taken:
            found = ratio_interval(taken[above], taken[below])
            ratios[name] = {"median": found.value, "low": found.low, "high": found.high}
    memories, count, dim = queries.shape
    return {
        "size": f"{memories}x{count}x{keys.shape[1]}x{dim}x{k}",
        "data": "random" if trace is None else trace.name,
        "threads": threads,
        "kernel": kernel,
        "rounds": len(taken["exact"]),
        "clock": clock,
        **checked,
        "rates": rate,
        **({} if rate is None else floor_and_prediction(queries, keys, k, rate)),
        "median_ms": {name: statistics.median(values) for name, values in taken.items()},
        "fastest_ms": {name: min(values) for name, values in taken.items()},
        "ratios": ratios,
        "reference_ms": reference.p50_ms,
        "noisy": reference.noisy,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the times, then the ratios with their bounds judged."""
    console = Console(width=180)
    times = Table(title="exact search: medians in ms")
    names = list(dict.fromkeys(name for row in rows for name in row["median_ms"]))
    for heading in ("size", "data", "threads", *names, "floor", "prediction", "approx-topk recall (formula)"):
        times.add_column(heading, justify="right")
    ratios = Table(title="medians of ratios within a round")
    for heading in ("size", "data", "threads", *bounds(), "noisy"):
        ratios.add_column(heading, justify="right")
    for row in rows:
        first = (row["size"], row["data"], str(row["threads"]))
        known = [f"{row['median_ms'][name]:.2f}" if name in row["median_ms"] else "" for name in names]
        floors = [f"{row[name]:.2f}" if name in row else "" for name in ("floor_ms", "prediction_ms")]
        recall = f"{row['approx_topk_recall']:.4f} ({row['approx_topk_expected_recall']:.4f})"
        times.add_row(*first, *known, *floors, recall)
        cells = []
        for name, (_, _, bound) in bounds().items():
            found = row["ratios"].get(name)
            if found is None:
                cells.append("")
                continue
            text = f"{found['median']:.2f}"
            if bound is not None and (row["size"] in JUDGED or row["data"] != "random"):
                held = found["median"] <= bound if name.startswith("exact") else found["median"] >= bound
                text += f" ({'held' if held else 'MISSED'}: {bound})"
            cells.append(text)
        ratios.add_row(*first, *cells, "yes" if row["noisy"] else "")
    console.print(times)
    console.print(ratios)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        console.print(f"exact took: {kernel} ({sum(row['kernel'] == kernel for row in rows)} rows)")


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help=f"at most; a size ends after {SECONDS:.0f} seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", nargs="+", default=list(SIZES), help="memories x queries x keys x dimension x k")
    parser.add_argument("--trace", type=Path, default=None, help="keys and queries of a model in place of random ones")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    print(f"this machine: {cpu_search.describe()}")
    sizes = ["trace"] if arguments.trace is not None else arguments.size
    cases = [(size, threads) for threads in arguments.threads for size in sizes]
    rows = [
        measure(size, threads, arguments.rounds, arguments.clock, arguments.trace)
        for size, threads in track(cases, description="sizes and threads")
    ]
    show(rows)
    write_json(
        arguments.output,
        {
            "schema": 2,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "matrix_units": has_matrix_units(),
            "kernel": cpu_search.describe(),
            "libraries": library_versions(),
            "commit": commit_of(),
            "changed": is_changed(),
            "rows": rows,
        },
    )
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
