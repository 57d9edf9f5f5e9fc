"""Merging data files of a `KeyLog`: the rows alive of several, written into fewer and larger ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recollect.memory_backends import key_rows, lance_support
from recollect.memory_backends.lance_places import Place
from recollect.memory_backends.log_state import LogState


class Overtaken(Exception):
    """The files that were to be merged are no longer there: another writer has merged them."""


@dataclass(frozen=True)
class Merged:
    """Fragments that were written in place of others, which a commit must name.

    Attributes:
        groups: for each run of neighbours the files that they had, and the metadata of what was written instead.
    """

    groups: tuple[tuple[frozenset[str], tuple[Any, ...]], ...]

    @property
    def written(self) -> list[Any]:
        """The metadata of all that was written."""
        return [metadata for _, new in self.groups for metadata in new]

    def in_place_of(self, old: list[Any]) -> list[Any]:
        """The metadata of a version's fragments, `old`, with each run replaced.

        Raises:
            Overtaken: one of them is not there.
        """
        if not {path for paths, _ in self.groups for path in paths} <= {path_of(metadata) for metadata in old}:
            raise Overtaken
        result: list[Any] = []
        done: set[frozenset[str]] = set()
        for metadata in old:
            paths, new = next((group for group in self.groups if path_of(metadata) in group[0]), (None, (metadata,)))
            if paths is None or paths not in done:
                result.extend(new)
            if paths is not None:
                done.add(paths)
        return result


def merge(place: Place, dataset: Any, state: LogState, fragments: list[Any]) -> Merged:
    """Writes the rows alive of some fragments anew, each run of neighbours for itself so that the order stays."""
    groups = []
    for run in _runs(dataset.get_fragments(), {path_of(fragment.metadata) for fragment in fragments}):
        size = sum(fragment.metadata.num_rows for fragment in run) * state.dim * 4
        batches = key_rows.alive_batches(dataset, run, state)
        written = lance_support.write_rows(place, dataset, batches, key_rows.schema_of(state.dim), size=size)
        groups.append((frozenset(path_of(fragment.metadata) for fragment in run), tuple(written)))
    return Merged(tuple(groups))


def wasteful_fragments(dataset: Any, state: LogState) -> list[Any]:
    """The fragments that hold rows no longer alive, and runs of small ones."""
    fragments = dataset.get_fragments()
    dead = {path_of(fragment.metadata) for fragment in fragments if key_rows.has_dead(fragment, state)}
    small = {path_of(fragment.metadata) for fragment in fragments if key_rows.is_small(fragment, state.dim)}
    runs = _runs(fragments, dead | small)
    return [fragment for run in runs if len(run) > 1 or path_of(run[0].metadata) in dead for fragment in run]


def path_of(metadata: Any) -> str:
    """The data file of a fragment: of those that a log writes, each has one."""
    path: str = metadata.files[0].path
    return path


def _runs(fragments: list[Any], paths: set[str]) -> list[list[Any]]:
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
