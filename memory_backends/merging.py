"""Which runs of keys have an index of their own, as a function of how many keys have come: the policy of merging.

Keys are counted from the last reset. A run of level 0 is `sizes[0]` keys beginning at a multiple of that number; a run
of level i holds a whole number of runs of level i - 1 and begins at a multiple of its own size. An index over a run is
begun when its last key has come and *taken in* when `lags[level]` more keys have come, ready or not: whoever needs it
then waits. So what serves a search depends on the keys that have come alone, never on a clock, and can be told from
their number: that is all that a saved memory must keep.

    keys      | oldest ............................................................................... newest |
    serve     | left over |      level 1      |      level 1      | level 0 | level 0 | level 0 |      tail     |
              | (exact)   |                   |                   |         |         |         |    (exact)    |

* The **tail** is searched exactly: keys of the run that is not full yet, and of the one whose index is not taken in.
* A **merge** is an index over a larger run, built anew from the keys; the smaller ones serve until it is taken in.
* An index is dropped whole when its first key is evicted. What is **left over** of its keys is searched exactly.

Each key is thus indexed once for each level, and a memory has some C / sizes[-1] parts of the last level and at most
a few dozen smaller ones, whatever its history.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

RUN = 16384
"""Keys of the smallest run of a large memory: below some 8192 keys exact search is as fast as a graph's."""
FAN_OUT = 8
"""Parts of one level that are merged into one of the next."""
PARTS = 4
"""A memory is cut into so many runs at least, unless `part_size` says otherwise."""
SMALLEST_PART = 32
"""Below this many keys an index costs more than it saves, whatever the library."""
LARGEST_PART = 180.0
"""The largest part has about this times the square root of the capacity: with larger ones, more keys are searched
exactly when the oldest part is dropped; with smaller ones, there are more parts to search. See docs/streams.md."""
LAG = 0.75
"""An index is taken in when this share of its own keys has come after them: as long as building takes less than 0.75
of the time in which keys arrive, nobody waits."""


@dataclass(frozen=True, order=True)
class Run:
    """Keys number `start` to `stop - 1` of a memory."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class MergePolicy:
    """Sizes of runs by level, and how many keys later their indexes are taken in.

    Args:
        capacity: C.
        sizes: keys of a run by level, each a multiple of the one before; empty where nothing is ever indexed.
        lags: by level.
    """

    capacity: int
    sizes: tuple[int, ...]
    lags: tuple[int, ...]

    @classmethod
    def make(
        cls,
        capacity: int,
        *,
        part_size: int = 0,
        run_size: int = 0,
        fan_out: int = FAN_OUT,
        smallest: int = 1,
        background_from: int | None = None,
    ) -> MergePolicy:
        """The policy of a memory.

        Args:
            capacity: C.
            part_size: keys of the largest run at most; 0: by the capacity.
            run_size: keys of the smallest run; 0: by the capacity.
            fan_out: as `FAN_OUT`; 1 never merges.
            smallest: runs of fewer keys are never indexed.
            background_from: runs of fewer keys are taken in at once; None: all are.
        """
        quarter = min(capacity, max(SMALLEST_PART, -(-capacity // PARTS)))
        quarter = capacity // -(-capacity // quarter)  # a whole number of runs to a small memory
        least = run_size or min(RUN, part_size or quarter)
        sizes = [least]
        if fan_out > 1:
            largest = part_size
            if not largest:
                level = round(math.log(LARGEST_PART * math.sqrt(capacity) / least, fan_out))
                largest = min(least * fan_out ** max(0, level), quarter)
            while sizes[-1] * fan_out <= largest:
                sizes.append(sizes[-1] * fan_out)
            # A last step that only halves the number of parts is not worth building everything once more, unless
            # somebody asked for parts of that size.
            last = largest // sizes[-1]
            if last >= (2 if part_size else max(2, fan_out // 2)):
                sizes.append(sizes[-1] * last)
        kept = tuple(size for size in sizes if size >= smallest)
        return cls(capacity, kept, tuple(_lag(size, capacity, background_from) for size in kept))

    def serving(self, total: int, settled: int = 0, failed: Collection[Run] = ()) -> list[Run]:
        """The runs whose indexes serve after `total` keys, oldest first.

        Args:
            total: keys that have come since the reset.
            settled: an index over keys before this one does not wait for its lag.
            failed: runs whose index could not be built: smaller ones stay in their place.
        """
        found: list[Run] = []
        if self.sizes:
            first = max(0, total - self.capacity)
            size = self.sizes[-1]
            for start in range(first // size * size, total, size):
                self._cover(start, len(self.sizes) - 1, first, total, settled, failed, found)
        return found

    def _cover(
        self, start: int, level: int, first: int, total: int, settled: int, failed: Collection[Run], found: list[Run]
    ) -> None:
        run = Run(start, start + self.sizes[level])
        if (run.stop + self.lags[level] <= total or run.stop <= settled) and run not in failed:
            # One that has lost its first key serves no more, and the smaller ones that it replaced are gone.
            if start >= first:
                found.append(run)
            return
        if level:
            size = self.sizes[level - 1]
            for smaller in range(max(start, first // size * size), min(run.stop, total), size):
                self._cover(smaller, level - 1, first, total, settled, failed, found)

    def begun(self, total: int, settled: int = 0, failed: Collection[Run] = ()) -> list[Run]:
        """The runs that are full after `total` keys and whose indexes are not taken in yet, smallest first."""
        found = []
        for size, lag in zip(self.sizes, self.lags, strict=True):
            stop = total // size * size
            while stop > max(settled, total - lag) and stop - size >= max(0, total - self.capacity):
                run = Run(stop - size, stop)
                # One that will have lost a key by then, or be part of a larger one, would be built for nothing.
                if run in self.serving(stop + lag, settled, failed):
                    found.append(run)
                stop -= size
        return found

    def next_change(self, total: int) -> int:
        """The number of keys at which `serving` or `begun` next answer differently."""
        after = []
        for size, lag in zip(self.sizes, self.lags, strict=True):
            after.append((total // size + 1) * size)
            after.append(((total - lag) // size + 1) * size + lag)
            # A run serves until one key more than the capacity has come since its first one.
            oldest = max(0, (total - self.capacity - 1) // size * size + size)
            after.append(oldest + self.capacity + 1)
        return min((number for number in after if number > total), default=total + self.capacity)


def _lag(size: int, capacity: int, background_from: int | None) -> int:
    if background_from is None or size < background_from:
        return 0
    # Of a part that is nearly the whole memory keys are evicted before its lag is over.
    return min(int(LAG * size), max(0, capacity - size) // 2)
