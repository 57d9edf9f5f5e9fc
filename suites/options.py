"""What a comparison takes and what it gives, without the code that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MEMORY_SIZES: tuple[int, ...] = (512, 2048, 8192)
CROSSOVER_SIZES: tuple[int, ...] = (16384, 32768, 65536)
CURVE_SECONDS = 1.5


class CompareError(ValueError):
    """A comparison that cannot be run as asked; the message names the value and the remedy."""


@dataclass(frozen=True)
class CompareOptions:
    """What `compare` measures.

    Attributes:
        checkpoint: folder of a checkpoint; None is the reference model that ships with the package.
        corpus: 'stdlib' (the source of Python's standard library), or a text file, folder, JSON lines or dataset.
        split: which documents of the corpus: 'test' (never trained on), 'validation', 'train', or 'all'.
        backends: registry strings; empty means the declared sweep of every backend. 'exact' and 'no memory' are
            always measured as well, since every figure is a difference to them.
        memory_sizes: keys that each memory holds at most; 0 stands for no memory, which is measured anyway.
        k: neighbours that each query retrieves; None is the checkpoint's own number.
        max_tokens: tokens that each measurement reads, over all rows.
        rows: documents that are read side by side; M = rows * heads memories.
        curve_seconds: seconds of searching for the curve of each build at each memory size, which tries many search
            options over one index; 0 leaves curves out.
        crossover_sizes: larger memories at which search alone is timed; empty leaves this part out.
        output: folder of the results; a folder with earlier results is resumed. What was measured there with other
            settings (machine, threads, versions, code, seed, text, k) is put aside and never mixed in.
        fresh: measure everything anew, even what is there with the same settings.
        seed: for backends that draw random numbers.
        device: where model and memory live, such as 'cpu' or 'cuda'.
        threads: threads of torch and of every library; None is the number of cores this process may use.
        engine: where measurements run: "local", processes of this machine one after another, or "ray", tasks on the
            machines of a Ray cluster, each with a machine to itself.
        address: of the Ray cluster to join, host:port; None starts Ray on this machine.
        cell_timeout: seconds after which one measurement is given up and recorded as failed.
        report: write the report when the measurements are done.
        progress: show progress bars on the terminal.
        cache_directory: where token streams are cached; None is the user's cache folder.
    """

    checkpoint: str | Path | None = None
    corpus: str = "stdlib"
    split: str = "test"
    backends: tuple[str, ...] = ()
    memory_sizes: tuple[int, ...] = MEMORY_SIZES
    k: int | None = None
    max_tokens: int = 20_480
    rows: int = 2
    curve_seconds: float = CURVE_SECONDS
    crossover_sizes: tuple[int, ...] = CROSSOVER_SIZES
    output: str | Path = "out/compare"
    fresh: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    engine: str = "local"
    address: str | None = None
    cell_timeout: float = 300.0
    report: bool = True
    progress: bool = True
    cache_directory: str | Path | None = None


@dataclass(frozen=True)
class CompareResult:
    """What a comparison left behind.

    Attributes:
        output: folder with run.json, cells/, losses/, curves.json, crossover.json, asv/ and the report.
        report: the HTML page, None where no report was asked for.
        measured: cells measured by this call.
        reused: cells found measured already with the same settings.
        skipped: (spec, reason) for backends whose library is missing.
        failed: (spec, memory size, reason) for cells that raised or crashed.
        notes: what a reader should know, such as 'documents are shorter than the largest memory'.
        seconds: wall time of this call.
    """

    output: Path
    report: Path | None
    measured: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, int, str], ...]
    notes: tuple[str, ...] = field(default=())
    seconds: float = 0.0
