"""What `recollect crossover` takes and what it gives, without the code that runs it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALLEST, LARGEST = 512, 131_072
"""Memory sizes at which the search for a crossing begins and ends, in keys of a memory."""


class CrossoverError(ValueError):
    """A measurement that cannot be made as asked; the message names the value and the remedy."""


@dataclass(frozen=True)
class CrossoverOptions:
    """What is measured.

    Attributes:
        memories: M, one for each batch row and head.
        queries: Q, queries that each memory gets in one step; several are measured over the same indexes.
        recalls: recall that an index must reach to count; several likewise.
        k: neighbours of a query.
        dim: D; None is the dimension of the source of keys.
        backends: names or registry strings of indexes that may overtake exact search; empty means every approximate
            one whose library is installed.
        keys: 'model', 'synthetic', or a trace or a file of ann-benchmarks (see `crossover_keys`).
        checkpoint, corpus: of the model and text whose keys are taken; only for 'model'.
        min_keys, max_keys: memory sizes to begin and end with.
        minutes: to be spent at most, roughly; what is left out for lack of time is said so.
        output: folder of the results; an earlier run in it is resumed.
        threads: of torch and every library; None is the number of cores this process may use.
        seed: for backends and generators that draw random numbers.
        device: where memories live.
        progress: show what is being measured.
    """

    memories: int = 8
    queries: tuple[int, ...] = (512,)
    recalls: tuple[float, ...] = (0.95,)
    k: int = 32
    dim: int | None = None
    backends: tuple[str, ...] = ()
    keys: str = "model"
    checkpoint: str | Path | None = None
    corpus: str = "stdlib"
    min_keys: int = SMALLEST
    max_keys: int = LARGEST
    minutes: float = 10.0
    output: str | Path = "out/crossover"
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"
    progress: bool = True


@dataclass(frozen=True)
class CrossoverResult:
    """What a measurement left behind.

    Attributes:
        output: folder with crossover.json, crossover.csv and the page.
        page: the page.
        answers: plain sentences, one for each Q and recall.
        crossings: for each Q, recall, backend, and search alone or with appends: the outcome, size and interval.
        measured, reused: (backend, size) pairs measured now, and found measured already.
        failed: (backend, reason).
        seconds: wall time of this call.
    """

    output: Path
    page: Path
    answers: tuple[str, ...]
    crossings: tuple[dict[str, Any], ...] = field(repr=False)
    measured: int = 0
    reused: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


def checked(options: CrossoverOptions) -> CrossoverOptions:
    """The options, numbers sorted and without repeats.

    Raises:
        CrossoverError: a number is out of range.
    """
    for name in ("memories", "k", "min_keys", "max_keys", *(["dim"] if options.dim is not None else [])):
        if getattr(options, name) < 1:
            raise CrossoverError(f"{name} is {getattr(options, name)}: want 1 or more")
    if not options.queries or min(options.queries) < 1:
        raise CrossoverError(f"queries are {options.queries}: want one number or more, each 1 or more")
    if not options.recalls or not all(0 < recall <= 1 for recall in options.recalls):
        raise CrossoverError(f"recalls are {options.recalls}: want one or more, each above 0 and at most 1")
    if options.max_keys < options.min_keys:
        raise CrossoverError(f"max_keys is {options.max_keys}, below min_keys {options.min_keys}")
    if options.max_keys < options.k:
        raise CrossoverError(f"max_keys is {options.max_keys}, below k {options.k}: there would be nothing to choose")
    if options.minutes <= 0:
        raise CrossoverError(f"minutes is {options.minutes}: want more than 0")
    if options.threads is not None and options.threads < 1:
        raise CrossoverError(f"threads is {options.threads}: want 1 or more")
    return dataclasses.replace(
        options,
        queries=tuple(sorted(set(options.queries))),
        recalls=tuple(sorted(set(options.recalls))),
        min_keys=max(options.min_keys, options.k),
    )
