"""What Lance costs and holds: the store of documents beside its former self, and the durable log of keys.

    python benchmarks/lance_store.py [--vectors 1000000] [--documents 60] [--kills 60] [--rounds 5]

The store of documents, in turns with the former one (a safetensors file a document), on the same drawn keys in float32
and bfloat16: writing every document, opening with and without its checksums, reading a layer; CPU and elapsed time,
each as the median of the ratios Lance / former within rounds with its 95 % interval, and bytes on disk.

The log of keys, of dimension 64: appends of 512, opening, reading all vectors back, and building `faiss-ivf` over
them; then writers that are killed with -9 at random moments (rows acknowledged, and found again), and four writers at
once, two to a memory.

One thread. Three to five minutes; writes benchmarks/results/lance_store.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from former_store import FormerStore
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from recollect.memory_backends import make_backend
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.key_log import KeyLog
from recollect.pretrained.store import MemoryStore, StoreIdentity, digest_text
from recollect.suites.environment import THREAD_VARIABLES
from recollect.suites.noise import describe_reference, ratio_interval, reference_operation_ms
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "lance_store.json"
KILLER = Path(__file__).parents[1] / "tests" / "killed_appends.py"
HEADS, HEAD_DIM, LAYERS, TOKENS = 8, 64, (3, 7), 1500
DIM, STEP, LOADED, ROWS_AT_ONCE = 64, 512, 16384, 131072
SPEC = "faiss-ivf:nlist=256,nprobe=16"
OPENINGS = 20

Timed = dict[str, list[float]]


def documents(count: int, kind: torch.dtype, seed: int) -> list[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Keys and values (H, n, D) of each layer; a few drawn ones, used again and again."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        {layer: tuple(torch.randn(2, HEADS, TOKENS, HEAD_DIM, generator=generator).to(kind)) for layer in LAYERS}
        for _ in range(min(count, 4))
    ]
    return [drawn[number % len(drawn)] for number in range(count)]  # type: ignore[misc]


def fill_lance(path: Path, content: list[Any]) -> None:
    identity = StoreIdentity("drawn", "m", "t", LAYERS, HEADS, HEAD_DIM, "drawn")
    store = MemoryStore.create(path, identity)
    with store.writing():
        for number, layers in enumerate(content):
            store.add(f"{number}.txt", digest_text(str(number)), torch.arange(TOKENS), layers)


def fill_former(path: Path, content: list[Any]) -> None:
    store = FormerStore(path)
    for number, layers in enumerate(content):
        store.add(f"{number}.txt", digest_text(str(number)), torch.arange(TOKENS), layers)
    store.flush()


@contextmanager
def timing(times: Timed, name: str) -> Iterator[None]:
    """Adds the milliseconds of CPU and of elapsed time that a block takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    times.setdefault(f"{name}_cpu", []).append(1000 * (time.process_time() - cpu))
    times.setdefault(f"{name}_wall", []).append(1000 * (time.perf_counter() - wall))


def repeated(call: Callable[[], Any]) -> Callable[[], None]:
    """A call often enough to be timed."""

    def many() -> None:
        for _ in range(OPENINGS):
            call()

    return many


def compare_stores(kind: torch.dtype, arguments: argparse.Namespace, folder: Path, advance: Callable[[], None]) -> Any:
    """Both stores in turns, round by round."""
    content = documents(arguments.documents, kind, arguments.seed)
    times: dict[str, Timed] = {"lance": {}, "former": {}}
    sizes, references = {}, []
    for turn in range(arguments.rounds):
        for name in ("lance", "former") if turn % 2 else ("former", "lance"):
            path = folder / name
            shutil.rmtree(path, ignore_errors=True)
            lance = name == "lance"
            with timing(times[name], "write"):
                (fill_lance if lance else fill_former)(path, content)
            sizes[name] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            opened: Callable[[bool], Any] = (
                (lambda verify, path=path: MemoryStore.open(path, verify=verify))
                if lance
                else (lambda verify, path=path: FormerStore.open(path, verify=verify))
            )
            with timing(times[name], "open"):
                repeated(lambda opened=opened: opened(False))()  # type: ignore[misc]
            with timing(times[name], "open_verified"):
                store = opened(True)
            with timing(times[name], "read_layer"):
                keys = store.layer_keys(LAYERS[0]) if lance else store.layer("keys", LAYERS[0])
            if not torch.equal(keys[:, :TOKENS], content[0][LAYERS[0]][0]) or keys.dtype != kind:
                raise SystemExit(f"{name}: other keys came back than were written")
            references.append(reference_operation_ms())
            advance()
    row: dict[str, Any] = {"dtype": str(kind).removeprefix("torch."), "documents": arguments.documents}
    row["bytes"] = sizes
    row["raw_bytes"] = sum(t.nbytes for layers in content for pair in layers.values() for t in pair)
    row["noisy"] = describe_reference(references).noisy
    for what in times["lance"]:
        ratio = ratio_interval(times["lance"][what], times["former"][what])
        count = OPENINGS if what.startswith("open_") and "verified" not in what else 1
        row[what] = {
            "lance_ms": round(median(times["lance"][what]) / count, 3),
            "former_ms": round(median(times["former"][what]) / count, 3),
            "ratio": [round(value, 3) for value in (ratio.value, ratio.low, ratio.high)],
        }
    return row


def measure_log(arguments: argparse.Namespace, folder: Path, progress: Progress, task: TaskID) -> dict[str, Any]:
    """Appends, opening, reading and building an index over what was read."""
    path, vectors = folder / "keys", arguments.vectors
    generator = torch.Generator().manual_seed(arguments.seed)
    step = torch.randn(1, STEP, DIM, generator=generator)
    large = torch.randn(1, LOADED, DIM, generator=generator)
    times: Timed = {}
    with KeyLog.create(path, num_memories=1, capacity=vectors, dim=DIM) as log:
        for _ in range(arguments.appends):
            with timing(times, "append"):
                log.append(step)
        start = time.perf_counter()
        while (left := vectors - int(log.totals[0])) > 0:
            log.append(large[:, :left])
            progress.update(task, description=f"log: {int(log.totals[0])} of {vectors} keys")
        loading = time.perf_counter() - start
    for _ in range(OPENINGS):
        with timing(times, "open"):
            KeyLog.open(path).close()
    backend = make_backend(SPEC, num_memories=1, capacity=vectors, dim=DIM)
    progress.update(task, description="log: reading, and building an index", advance=1)
    start, found, reading = time.perf_counter(), 0, 0.0
    with KeyLog.open(path) as log:
        begun = time.perf_counter()
        for _, _, keys in log.read(0, batch_rows=ROWS_AT_ONCE):
            reading += time.perf_counter() - begun
            backend.add(keys[None])
            found += len(keys)
            begun = time.perf_counter()
    backend.wait()
    whole = time.perf_counter() - start
    with KeyLog.open(path) as log:
        log.prune(keep_seconds=0.0, alone=True)
    files = len(list((path / "data").iterdir()))
    if found != vectors:
        raise SystemExit(f"{vectors} keys were appended, and {found} are found")
    return {
        "vectors": vectors,
        "append_ms": {name: round(median(times[f"append_{name}"]), 3) for name in ("cpu", "wall")},
        "append_keys_per_second": round(1000 * STEP / median(times["append_wall"])),
        "load_keys_per_second": round((vectors - arguments.appends * STEP) / max(loading, 1e-9)),
        "open_ms": round(median(times["open_wall"]), 3),
        "read_seconds": round(reading, 3),
        "read_and_build_seconds": round(whole, 3),
        "spec": SPEC,
        "data_files_pruned": files,
        "bytes_per_key_pruned": round(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / vectors, 1),
    }


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def run_killer(*words: str) -> dict[str, int]:
    """What tests/killed_appends.py prints; it ends with an error where a key is missing."""
    answer = subprocess.run([sys.executable, str(KILLER), *words], capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    found: dict[str, int] = json.loads(answer.stdout.splitlines()[-1])
    return found


def show(content: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    for row in content["stores"]:
        title = f"{row['documents']} documents, {row['dtype']}{' (noisy)' if row['noisy'] else ''}"
        table = Table("what", "lance ms", "former ms", "ratio", title=title)
        for what, found in row.items():
            if isinstance(found, dict) and "ratio" in found:
                ratio = "{:.2f} ({:.2f} to {:.2f})".format(*found["ratio"])
                table.add_row(what, f"{found['lance_ms']:.2f}", f"{found['former_ms']:.2f}", ratio)
        sizes = row["bytes"]
        table.add_row("MiB on disk", *(f"{sizes[name] / 2**20:.1f}" for name in ("lance", "former")),
                      f"{sizes['lance'] / sizes['former']:.3f}")  # fmt: skip
        console.print(table)
    for title in ("log", "kills", "writers"):
        table = Table(title, "")
        for name, value in content[title].items():
            table.add_row(name, str(value))
        console.print(table)


def on_one_thread() -> None:
    """Starts this program anew with one thread in every library, which they read when they are loaded."""
    if any(os.environ.get(name) != "1" for name in THREAD_VARIABLES):
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="keys in the log that is read back")
    parser.add_argument("--appends", type=int, default=200, help="timed appends of 512 keys")
    parser.add_argument("--documents", type=int, default=60, help=f"documents of {TOKENS} tokens in the stores")
    parser.add_argument("--kills", type=int, default=60, help="writers that are killed")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the comparison of stores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result file instead of tables")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.vectors < STEP * arguments.appends:
        parser.error(f"--vectors {arguments.vectors} must hold --appends {arguments.appends} of {STEP} keys")
    on_one_thread()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="recollect-lance-"))
    content: dict[str, Any] = {"schema": 1, "provenance": describe(threads=1, seed=arguments.seed)}
    content |= {"appends": arguments.appends, "rounds": arguments.rounds, "step": STEP, "dim": DIM}
    kinds = (torch.float32, torch.bfloat16)
    try:
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("stores", total=2 * arguments.rounds * len(kinds) + 4)
            content["stores"] = [
                compare_stores(kind, arguments, folder, lambda: progress.advance(task)) for kind in kinds
            ]
            content["log"] = measure_log(arguments, folder, progress, task)
            progress.update(task, description=f"killing {arguments.kills} writers", advance=1)
            content["kills"] = run_killer("kill", str(folder / "killed"), str(arguments.kills))
            progress.update(task, description="four writers at once", advance=1)
            content["writers"] = run_killer("crowd", str(folder / "crowd"), "50")
            progress.advance(task)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(arguments.output, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        show(content, Console(width=120))
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
