"""Merging data files of a Lance dataset: the rows of several, written into fewer and larger ones.

Every commit brings a small file, and every commit and opening costs a little for each file there is. So files of about
one size are merged when enough have gathered: a row is rewritten once for each power of `FAN_OUT` that its file grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from recollect.memory_backends import lance_support
from recollect.memory_backends.lance_places import Place

FAN_OUT = 32
"""So many data files of about one size are merged into one."""
LARGE_BYTES = 256 << 20
"""Of a data file that is not merged any more."""


class Overtaken(Exception):
    """The files that were to be merged are no longer there: another writer has merged them."""


@dataclass(frozen=True)
class Run:
    """Neighbours that were written anew: their metadata, and that of what was written instead."""

    old: tuple[Any, ...]
    new: tuple[Any, ...]

    @property
    def paths(self) -> frozenset[str]:
        """The files that they had."""
        return frozenset(path_of(metadata) for metadata in self.old)


@dataclass(frozen=True)
class Merged:
    """Fragments that were written in place of others, which a commit must name."""

    runs: tuple[Run, ...]

    @property
    def written(self) -> list[Any]:
        """The metadata of all that was written."""
        return [metadata for run in self.runs for metadata in run.new]

    def in_place_of(self, old: list[Any]) -> list[Any]:
        """The metadata of a version's fragments, `old`, with each run replaced.

        Raises:
            Overtaken: one of them is not there.
        """
        if not {path for run in self.runs for path in run.paths} <= {path_of(metadata) for metadata in old}:
            raise Overtaken
        result: list[Any] = []
        done: list[Run] = []
        for metadata in old:
            run = next((run for run in self.runs if path_of(metadata) in run.paths), None)
            if run is None:
                result.append(metadata)
            elif run not in done:
                result.extend(run.new)
                done.append(run)
        return result


def merge(
    place: Place,
    dataset: Any,
    fragments: list[Any],
    batches: Callable[[list[Any]], Iterable[Any]],
    schema: Any,
) -> Merged:
    """Writes some fragments anew, each run of neighbours for itself so that the order stays.

    Args:
        batches: gives the Arrow batches of a run of fragments, without rows that may go.
        schema: theirs, without metadata.
    """
    runs = []
    for run in runs_of(dataset.get_fragments(), {path_of(fragment.metadata) for fragment in fragments}):
        old = tuple(fragment.metadata for fragment in run)
        size = sum(size_of(metadata) for metadata in old)
        written = lance_support.write_rows(place, dataset, batches(run), schema, size=size)
        runs.append(Run(old, tuple(written)))
    return Merged(tuple(runs))


def run_to_merge(fragments: list[Any], *, large: int = LARGE_BYTES) -> int:
    """How many of the last fragments are to be merged: FAN_OUT or more of about one size, or none.

    Sizes are compared by the power of FAN_OUT that their bytes reach; from `large` bytes on they stay as they are.
    """
    levels = []
    for metadata in reversed(fragments):
        if size_of(metadata) >= large:
            break
        level, size = 0, size_of(metadata)
        while size >= FAN_OUT:
            level, size = level + 1, size // FAN_OUT
        levels.append(level)
    best = 0
    for level in set(levels):
        run = next((place for place, other in enumerate(levels) if other > level), len(levels))
        best = max(best, run if run >= FAN_OUT else 0)
    return best


def wasteful_fragments(dataset: Any, dead: Callable[[Any], bool]) -> list[Any]:
    """The fragments that hold rows that may go, as `dead` says of each, and runs of small ones."""
    fragments = dataset.get_fragments()
    waste = {path_of(fragment.metadata) for fragment in fragments if dead(fragment)}
    small = {path_of(fragment.metadata) for fragment in fragments if not is_large(fragment.metadata)}
    runs = runs_of(fragments, waste | small)
    return [fragment for run in runs if len(run) > 1 or path_of(run[0].metadata) in waste for fragment in run]


def is_large(metadata: Any) -> bool:
    """Whether a fragment is not merged with its neighbours any more."""
    return size_of(metadata) >= LARGE_BYTES


def size_of(metadata: Any) -> int:
    """Bytes of a fragment's data file."""
    return int(metadata.files[0].file_size_bytes or 0)


def path_of(metadata: Any) -> str:
    """The data file of a fragment: of those that are written here, each has one."""
    path: str = metadata.files[0].path
    return path


def runs_of(fragments: list[Any], paths: set[str]) -> list[list[Any]]:
    """The fragments whose files are named, in runs of neighbours."""
    found: list[list[Any]] = []
    beside = False
    for fragment in fragments:
        wanted = path_of(fragment.metadata) in paths
        if wanted and beside:
            found[-1].append(fragment)
        elif wanted:
            found.append([fragment])
        beside = wanted
    return found
