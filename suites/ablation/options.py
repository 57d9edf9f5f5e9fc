"""What `ablate` takes and what it gives, without the code that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCALES = ("small", "gpu")
"""The scales of the shipped grids; a grid of one's own may name others."""


class AblateError(ValueError):
    """A grid that cannot be run as asked; the message names the file, the key or value, and the remedy."""


@dataclass(frozen=True)
class AblateOptions:
    """Which grids `ablate` runs, on what text, and how.

    Attributes:
        grids: names of shipped grids, or paths of TOML files.
        scale: which of a grid's scales: 'small' or 'gpu' for the shipped ones.
        corpora: 'stdlib', a path, or 'name=path'; each is a section of its own in every grid.
        seeds: how many seeds (0, 1, ...), or None for each grid's own number.
        variants: run these alone (and what they need); empty is all.
        output: folder that grids share: what one has trained or evaluated, another finds.
        mix: go on in a folder whose results come from another machine, thread count, version or code; with Ray, use
            machines that are not alike.
        jobs: processes at a time; None is one here, and with Ray as many as the machines have room for.
        engine: where they run: "local", on this machine, or "ray", as tasks on the machines of a Ray cluster.
        address: of the Ray cluster to join, host:port; None starts Ray on this machine.
        threads: threads of each process. Weights are equal between runs only with equal threads.
        device: where models live; None is the scale's own.
        timeout: seconds without any progress after which a process is given up.
        timing: time training steps, one process at a time, when everything else is done.
        report: write tables and pages at the end.
        progress: tell what is happening on standard error.
        cache_directory: where token streams are cached; None is the user's cache folder.
    """

    grids: tuple[str, ...]
    scale: str = "small"
    corpora: tuple[str, ...] = ("stdlib",)
    seeds: int | None = None
    variants: tuple[str, ...] = ()
    output: str | Path = "out/ablate"
    mix: bool = False
    jobs: int | None = None
    engine: str = "local"
    address: str | None = None
    threads: int = 1
    device: str | None = None
    timeout: float = 1800.0
    timing: bool = True
    report: bool = True
    progress: bool = True
    cache_directory: str | Path | None = None

    def __post_init__(self) -> None:
        for name, smallest in (("jobs", 1), ("threads", 1), ("seeds", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise AblateError(f"{name} is {value}: want {smallest} or more")
        if not self.grids:
            raise AblateError("no grid is named: give the name of a shipped grid or the path of a TOML file")
        if not self.corpora:
            raise AblateError("no corpus is named: give 'stdlib' or a path")
        if not self.timeout > 0:
            raise AblateError(f"timeout is {self.timeout}: want a number of seconds above 0")


@dataclass(frozen=True)
class AblateResult:
    """What a call of `ablate` left behind.

    Attributes:
        output: the folder.
        report: the page over all its grids, None where none was asked for.
        folders: one for each grid, with run.json, rows.jsonl and the tables.
        trained, evaluated: how many trainings and evaluations this call ran.
        reused: how many it found done.
        diverged: (grid, section, variant, seed, reason).
        failed: likewise, for what raised or crashed; running the command again tries it again.
        notes: what a reader should know.
        seconds: wall time of this call.
    """

    output: Path
    report: Path | None
    folders: tuple[Path, ...]
    trained: int
    evaluated: int
    reused: int
    diverged: tuple[tuple[str, str, str, int, str], ...]
    failed: tuple[tuple[str, str, str, int, str], ...]
    notes: tuple[str, ...]
    seconds: float
