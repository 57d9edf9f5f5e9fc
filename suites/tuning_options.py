"""What `recollect tune` takes and what it gives, without the code that runs it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["recall", "mass", "loss"]
Cost = Literal["step", "search"]

KINDS: dict[str, str] = {
    "recall": "share of the true k nearest keys that are found",
    "mass": "softmax mass of the found keys, as a share of what the true k nearest hold",
    "loss": "relative increase of perplexity over exact search's",
}


class TuneError(ValueError):
    """A tuning that cannot be run as asked; the message names the value and the remedy."""


@dataclass(frozen=True)
class TuneOptions:
    """What is tuned, for what, on what.

    Attributes:
        backends: names or registry strings; options that one names are kept, the other search options are tuned. Of
            several the cheapest is chosen.
        target: what is to be reached: a recall, a softmax mass as a share of what the true k nearest keys hold (both 0
            to 1, at least), or a loss (a relative increase of perplexity over exact search at the same memory size, at
            most).
        kind: which of the three.
        builds: try the options fixed at building as well, as the backend declares them.
        cost: what is to be cheap: 'step', searches and appends of a segment, or 'search' alone.
        memory_size: C; None is the checkpoint's own.
        k: neighbours; None is the checkpoint's own.
        checkpoint: of the model; None is the shipped one.
        corpus: as for `load_corpus`.
        split, verify_split: the documents that options are chosen on, and the others that they are verified on.
        max_tokens: that each of the two reads.
        rows: documents read side by side; M = rows * heads memories.
        output: folder of the results; an earlier run in it is resumed.
        threads: of torch and every library; None is the number of cores this process may use.
        seed: for backends that draw random numbers.
        device: where model and memory live.
        progress: show what is being measured.
        cache_directory: where token streams are cached; None is the user's cache folder.
    """

    backends: tuple[str, ...]
    target: float
    kind: Kind = "mass"
    builds: bool = False
    cost: Cost = "step"
    memory_size: int | None = None
    k: int | None = None
    checkpoint: str | Path | None = None
    corpus: str = "stdlib"
    split: str = "validation"
    verify_split: str = "test"
    max_tokens: int = 20_480
    rows: int = 2
    output: str | Path = "out/tune"
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"
    progress: bool = True
    cache_directory: str | Path | None = None


Outcome = Literal["held", "held within noise", "missed", "not reached"]

OUTCOMES: dict[str, str] = {
    "held": "on the other documents the whole interval reaches the target",
    "held within noise": "on the other documents the estimate reaches the target, its interval does not",
    "missed": "on the other documents the estimate does not reach the target",
    "not reached": "no options reach the target on the tuning documents",
}


@dataclass(frozen=True)
class TuneResult:
    """What a tuning found.

    Attributes:
        outcome: see `OUTCOMES`.
        spec: the chosen registry string; with 'not reached', the one that came nearest.
        tuning: its figures on the documents that it was chosen on.
        verified: its figures on the others; None with 'not reached'.
        points: every point that was measured, cheapest first.
        message: the finding as sentences.
        output: folder with tuning.json.
        seconds: wall time of this call.
    """

    outcome: Outcome
    spec: str
    tuning: dict[str, Any]
    verified: dict[str, Any] | None
    points: tuple[dict[str, Any], ...] = field(repr=False)
    message: str
    output: Path
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """The target was reached on the documents that had no part in the choice."""
        return self.outcome in ("held", "held within noise")


def checked(options: TuneOptions) -> TuneOptions:
    """The options themselves.

    Raises:
        TuneError: one of them is out of range.
    """
    if not options.backends:
        raise TuneError("no backend to tune: name one, such as 'hnswlib'")
    if options.kind not in KINDS:
        raise TuneError(f"kind is {options.kind!r}: want one of {', '.join(KINDS)}")
    if options.cost not in ("step", "search"):
        raise TuneError(f"cost is {options.cost!r}: want 'step' or 'search'")
    if options.kind == "loss" and options.target <= 0:
        raise TuneError(f"target loss is {options.target}: want more than 0, such as 0.01 for 1 % of perplexity")
    if options.kind != "loss" and not 0 < options.target <= 1:
        raise TuneError(f"target {options.kind} is {options.target}: want more than 0 and at most 1")
    if options.split == options.verify_split or "all" in (options.split, options.verify_split):
        raise TuneError(
            f"tuning on {options.split!r} documents and verifying on {options.verify_split!r} would report what was "
            "tuned on: give two splits that share no document"
        )
    for name in ("max_tokens", "rows", "k", "threads", "memory_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise TuneError(f"{name} is {value}: want 1 or more")
    return dataclasses.replace(options, backends=tuple(dict.fromkeys(options.backends)))
