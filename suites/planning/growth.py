"""How the cost of a backend grows with a memory's keys: which terms it has, and what that assumes of its options.

Told by the class that a backend is built on, so that a third party's is told as well:

    trained in place   cells of a k-means (`TrainedBackend`)
    sealed parts       indexes over runs of keys, merged by a policy (`SegmentedBackend`), and a tail searched exactly
    any other          a pass over all keys
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recollect.memory_backends.merging import MergePolicy
from recollect.memory_backends.registry import class_and_options
from recollect.memory_backends.segments import PartOptions, SegmentedBackend
from recollect.memory_backends.trained import TrainedBackend

from .laws import Term

CELLS = ("nlist", "num_leaves")
"""Options that set the number of cells; 0 is the square root of the keys."""

PHASES = 16
"""Moments of a turnover over which the state of sealed parts is averaged."""

ONE = Term("1", lambda n: 1.0)
SQRT = Term("sqrt n", math.sqrt)
KEYS = Term("n", lambda n: n)
KEYS_SQRT = Term("n sqrt n", lambda n: n * math.sqrt(n))


def _needed(term: Term) -> Term:
    return Term(term.name, term.of, needed=True)


@dataclass(frozen=True)
class Growth:
    """The terms of each figure of a calibration's points, and the assumption behind them in words."""

    figures: Mapping[str, tuple[Term, ...]]
    words: str


PASS = Growth(
    {
        "build_seconds": (_needed(KEYS),),
        "append_us": (_needed(ONE),),
        "longest_append_ms": (_needed(ONE),),
        "search_ms": (_needed(KEYS), ONE),
    },
    "a search passes over all keys: in proportion to their number",
)
CELLS_GROW = Growth(
    {
        # Each key is compared with every cell; codebooks cost the same whatever the keys.
        "build_seconds": (_needed(KEYS_SQRT), KEYS, ONE),
        "append_us": (_needed(SQRT), ONE),
        "longest_append_ms": (_needed(ONE), SQRT),
        "search_ms": (_needed(SQRT), ONE),
    },
    "as many cells as the square root of the keys, of which as many are searched as the options say: a search grows "
    "with the square root of the keys, and the share of the keys that it sees, and so its recall, falls; for the same "
    "share it would grow in proportion to the keys. Training anew takes place in the background, "
    "counts as the appends' work and is taken to keep up",
)
CELLS_FIXED = Growth(
    {
        "build_seconds": (_needed(KEYS), ONE),
        "append_us": (_needed(ONE),),
        "longest_append_ms": (_needed(ONE), SQRT),
        "search_ms": (_needed(KEYS), ONE),
    },
    "the number of cells stays as the options say: a search looks at the same share of the keys, in proportion to "
    "them. Training anew takes place in the background, counts as the appends' work and is taken to keep up",
)


def growth_of(spec: str) -> Growth:
    """How the backend of a registry string grows; of one that is made of another (`rerank`), as that one."""
    cls, options = class_and_options(spec)
    for source in cls.sources_with(options):
        return growth_of(source)
    if issubclass(cls, TrainedBackend):
        growth = CELLS_FIXED if any(getattr(options, name, 0) for name in CELLS) else CELLS_GROW
        return growth if getattr(options, "background", False) else _trained_at_once(growth)
    if issubclass(cls, SegmentedBackend):
        return _parts(cls, options)
    return PASS


def _trained_at_once(growth: Growth) -> Growth:
    """The same with the option that the append trains at which it is due."""
    longest = (_needed(KEYS_SQRT), KEYS, ONE)
    words = "the longest append is the one that trains the index anew"
    return Growth({**growth.figures, "longest_append_ms": longest}, f"{growth.words.partition('. ')[0]}; {words}")


def _parts(cls: type[SegmentedBackend], options: Any) -> Growth:
    assert isinstance(options, PartOptions)
    background_from = cls.background_from if options.background else None
    shape = (options.part_size, options.run_size, options.fan_out, background_from)
    levels = Term("indexing each key once a level", lambda n: _levels(int(n), shape), needed=True)
    # A graph that outgrows the caches takes longer a step: with the square of the logarithm, where the points say so.
    slower = Term("the same in slower memory", lambda n: _levels(int(n), shape, power=2))
    return Growth(
        {
            "build_seconds": (_times_n(levels), _times_n(slower), KEYS),
            "append_us": (levels, slower, ONE),
            "longest_append_ms": (_needed(ONE),),
            "search_ms": (
                Term("searching each part", lambda n: _state(int(n), shape)[0], needed=True),
                Term("keys in no part", lambda n: _state(int(n), shape)[1], needed=True),
                ONE,
            ),
        },
        "sealed parts as the backend's own policy of merging has them at that size: each is searched with the "
        "logarithm of its keys, and keys that are in none exactly; a key is indexed once a level, in the background, "
        "whose work counts as its append's and which is taken to keep up",
    )


Shape = tuple[int, int, int, int | None]


@functools.lru_cache(maxsize=4096)
def _policy(keys: int, shape: Shape) -> MergePolicy:
    part_size, run_size, fan_out, background_from = shape
    return MergePolicy.make(
        keys, part_size=part_size, run_size=run_size, fan_out=fan_out, background_from=background_from
    )


def _levels(keys: int, shape: Shape, power: int = 1) -> float:
    """Work of indexing a key: the logarithms of the sizes of the parts that it is in, one after another."""
    return sum(math.log2(size) ** power for size in _policy(keys, shape).sizes) or 1.0


def _times_n(term: Term) -> Term:
    return Term(f"n x {term.name}", lambda n: n * term.of(n), term.needed)


@functools.lru_cache(maxsize=4096)
def _state(keys: int, shape: Shape) -> tuple[float, float]:
    """Sum of the logarithms of the parts that serve, and keys that are in none, on average over a turnover."""
    policy = _policy(keys, shape)
    parts, rest = 0.0, 0.0
    for phase in range(PHASES):
        serving = policy.serving(4 * keys + keys * (2 * phase + 1) // (2 * PHASES))
        parts += sum(math.log2(max(2, len(run))) for run in serving)
        rest += keys - sum(len(run) for run in serving)
    return parts / PHASES, max(1.0, rest / PHASES)
