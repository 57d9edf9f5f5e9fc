"""A durable log of the keys of M memories, in one Lance dataset: a folder, or an address of an object store.

    with KeyLog.create("keys.lance", num_memories=1, capacity=1_000_000, dim=64) as log:
        log.append(keys)                                   # durable when it returns
    with KeyLog.open("s3://bucket/keys.lance") as log:
        for numbers, slots, keys in log.read(0): ...       # the keys alive, oldest first

A row is one key: its memory, that memory's generation (how often it was reset), its number since then, its slot, the
key, and a checksum of the key. Key number n has slot n mod C and the newest C keys are alive, as in `base`. How many
keys each memory has had, and its generation, stand in the manifest of every version: opening reads no rows.

A change is one commit that succeeds only upon the newest version. So an append that returned is whole, one that was
killed left nothing, and of two writers who give a memory the same numbers the second is refused; writers of different
memories do not disturb each other. Small data files are merged as they gather, so that a commit stays cheap; rows that
are no longer alive go with `prune`.

Searching is the backends' work: they are built over what `read` gives.

Letters: M memories, C capacity, T new keys a memory, D dimension.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from recollect.memory_backends import key_rows, lance_merging, lance_support, log_reading
from recollect.memory_backends.arguments import check_memories, check_vectors
from recollect.memory_backends.errors import ClosedMemory, InvalidInput, WriteConflict
from recollect.memory_backends.lance_places import Place, place_of
from recollect.memory_backends.log_state import STATE, LogState, starts_of
from recollect.memory_backends.records import METRICS

BATCH_ROWS = 16384
SECONDS_TO_COMMIT = 60.0
"""How long an append goes on trying while other writers commit first."""
SECONDS_TO_KEEP = 120.0
"""Older versions than this go when files are merged; a reader of one has that long to finish, or reads anew."""
SECONDS_BETWEEN_CLEANINGS = 60.0


class KeyLog:
    """The keys of M memories on disk. Made by `create`, read by `open`; not for several threads at once.

    It shows the state that it last saw: what others have written since is seen after `refresh`, and taken into account
    by every change.

    Attributes:
        place: where it lies.
    """

    def __init__(self, place: Place, dataset: Any) -> None:
        self.place = place
        self._open: Any = dataset
        self._state = LogState.from_json(lance_support.metadata_of(dataset).get(STATE), place)
        self._cleaned = time.monotonic()
        self._pinned = False

    # Making and opening -----------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        uri: str | Path,
        *,
        num_memories: int,
        capacity: int,
        dim: int,
        metric: str = "inner_product",
        storage_options: Mapping[str, str] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> KeyLog:
        """An empty log.

        Args:
            uri: a folder that is new or empty, or an address such as `s3://bucket/keys`.
            num_memories, capacity, dim, metric: as for `make_backend`.
            storage_options: for the object store, as Lance takes them; credentials are better kept in the environment.
            about: JSON values that the log carries.

        Raises:
            BackendUnavailable: pylance is not installed.
            InvalidInput: a number or the address is wrong.
            StoreUnreachable: the address does not answer.
            WriteConflict: something lies there.
        """
        for what, number in (("num_memories", num_memories), ("capacity", capacity), ("dim", dim)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InvalidInput(f"{what} is {number!r}; it must be a whole number of at least 1")
        if metric not in METRICS:
            raise InvalidInput(f"metric is {metric!r}; it is one of {', '.join(METRICS)}")
        place = place_of(uri, storage_options)
        none = (0,) * num_memories
        state = LogState(num_memories, capacity, dim, metric, none, none, dict(about or {}))
        lance_support.import_lance()
        return cls(place, lance_support.create_dataset(place, _schema(state)))

    @classmethod
    def open(
        cls,
        uri: str | Path,
        storage_options: Mapping[str, str] | None = None,
        *,
        version: int | None = None,
        num_memories: int | None = None,
        capacity: int | None = None,
        dim: int | None = None,
        metric: str | None = None,
    ) -> KeyLog:
        """A log that was made before.

        Args:
            version: an older version, to read it; the newest when None.
            num_memories, capacity, dim, metric: what it must have, where given.

        Raises:
            BackendUnavailable: pylance is not installed.
            CorruptMemory: it is no log, or damaged.
            InvalidInput: it is not of the size that was asked for.
            StoreMissing: there is nothing.
            StoreUnreachable: the address does not answer.
        """
        place = place_of(uri, storage_options)
        log = cls(place, lance_support.open_dataset(place, version=version))
        log._pinned = version is not None
        wanted = {"num_memories": num_memories, "capacity": capacity, "dim": dim, "metric": metric}
        wrong = {
            name: value for name, value in wanted.items() if value is not None and value != getattr(log._state, name)
        }
        if wrong:
            asked = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
            has = ", ".join(f"{name}={getattr(log._state, name)!r}" for name in wrong)
            raise InvalidInput(f"{place} is a log of {has}, and {asked} was asked for: ask for that, or give another")
        return log

    def close(self) -> None:
        """Gives back what it holds; every later call is refused."""
        self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What it says of itself -------------------------------------------------------------------------------------------

    @property
    def state(self) -> LogState:
        """What the version that it shows says of itself."""
        return self._state

    @property
    def num_memories(self) -> int:
        """M."""
        return self._state.num_memories

    @property
    def capacity(self) -> int:
        """C."""
        return self._state.capacity

    @property
    def dim(self) -> int:
        """D."""
        return self._state.dim

    @property
    def metric(self) -> str:
        """By which its keys are compared."""
        return self._state.metric

    @property
    def totals(self) -> Tensor:
        """(M,) int64: keys of each memory since its last reset, evicted ones too."""
        return torch.tensor(self._state.totals, dtype=torch.int64)

    @property
    def generations(self) -> Tensor:
        """(M,) int64: how often each memory was reset."""
        return torch.tensor(self._state.generations, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """(M,) int64: keys alive in each memory."""
        return self.totals.clamp(max=self.capacity)

    @property
    def version(self) -> int:
        """The version that it shows; every change makes one."""
        return int(self._dataset.version)

    @property
    def stored_rows(self) -> int:
        """Rows in its files, alive or not: `prune` brings them down to the sum of `lengths`."""
        return sum(fragment.metadata.num_rows for fragment in self._dataset.get_fragments())

    def refresh(self) -> None:
        """Shows what is there now.

        Raises:
            StoreMissing: it was deleted meanwhile.
        """
        self._show(lance_support.newest(self.place, self._dataset))

    # Changing it ------------------------------------------------------------------------------------------------------

    def append(
        self,
        keys: Tensor,
        memories: Iterable[int] | Tensor | None = None,
        *,
        first: int | Iterable[int] | Tensor | None = None,
    ) -> Tensor:
        """Adds keys; they are durable when it returns.

        Args:
            keys: (M', T, D), any floating type and device, finite; kept as float32.
            memories: the M' distinct memories they go to; all M in order when None.
            first: the number of each memory's first new key, or one for all: `totals` as the caller knows them. When
                None they follow the totals that this object last saw.

        Returns:
            (M', T) int64: their numbers.

        Raises:
            DiskFull: there is no room; nothing was added.
            InvalidInput: a wrong shape, NaN or infinity, or a memory that does not exist.
            StoreMissing: the log was deleted meanwhile.
            StoreUnreachable: the address does not answer. Whether the keys were added shows after `refresh`.
            WriteConflict: there are more or fewer keys than `first` says: another writer was there, or an append of
                this one got lost. Nothing was added.
        """
        which = check_memories(memories, self.num_memories)
        prepared = check_vectors(keys, which, what="keys", dim=self.dim, device=torch.device("cpu"))
        starts = starts_of(first, self.totals[which])
        new = prepared.shape[1]
        numbers = starts[:, None] + torch.arange(new)
        self._check_writable()
        listed = [(memory, start) for memory, start in zip(which.tolist(), starts.tolist(), strict=True)]
        self._state.appended(listed, new, self.place)  # told before anything is written
        if not new or not listed:
            return numbers
        kept = min(new, self.capacity)
        generations = {memory: self._state.generations[memory] for memory, _ in listed}
        batch = key_rows.batch_of(
            which, torch.tensor(list(generations.values())), numbers[:, -kept:], prepared[:, -kept:], self.capacity
        )
        fragments = lance_support.write_rows(
            self.place, self._dataset, [batch], key_rows.schema_of(self.dim), size=batch.nbytes
        )

        def change(state: LogState) -> LogState:
            moved = [memory for memory, known in generations.items() if state.generations[memory] != known]
            if moved:
                raise WriteConflict(f"{self.place}: memory {moved[0]} was reset by another writer; call refresh()")
            return state.appended(listed, new, self.place)

        try:
            self._change(change, lambda old: [*old, *fragments], fragments)
        except WriteConflict:
            lance_support.drop_rows(self.place, fragments)
            raise
        self._merge_small()
        return numbers

    def reset(self, memories: Iterable[int] | Tensor | None = None) -> None:
        """Empties some memories, or all: their keys are no longer alive, and numbers begin at 0 again; durable."""
        which = set(check_memories(memories, self.num_memories).tolist())
        self._check_writable()
        if which:
            self._change(lambda state: state.emptied(which), lambda old: old)

    def replace(self, batches: Iterable[Any], state: LogState) -> None:
        """Makes rows (`key_rows.batch_of`) all that there is, and `state` what is said of them: a snapshot's version.

        Raises:
            WriteConflict: another writer was there; nothing was changed.
        """
        self._check_writable()
        fragments = lance_support.write_rows(
            self.place, self._dataset, batches, key_rows.schema_of(self.dim), size=state.alive * 4 * self.dim
        )
        self._show(lance_support.commit_only(self.place, self._dataset, _schema(state), fragments))

    def prune(self, *, keep_seconds: float = SECONDS_TO_KEEP, alone: bool = False) -> None:
        """Drops rows that are no longer alive, merges small files, and removes what only older versions need.

        Args:
            keep_seconds: versions younger than this stay, for those who are reading them.
            alone: nobody else writes: then files that killed writers left go as well, which are otherwise spared for
                a week, since they may be those of a write under way.
        """
        self._check_writable()
        wasteful = lance_support.ask(
            self.place,
            "read",
            lambda: lance_merging.wasteful_fragments(
                self._dataset, lambda fragment: key_rows.has_dead(fragment, self._state)
            ),
        )
        self._rewrite(wasteful)
        self._clean(keep_seconds, alone=alone)

    # Versions that stay -----------------------------------------------------------------------------------------------

    def keep(self, name: str) -> None:
        """Gives the version that it shows a name, under which it stays whatever is pruned."""
        lance_support.ask(self.place, "name a version of", lambda: self._dataset.tags.create(name, self.version))

    def give_up(self, name: str) -> None:
        """Takes a name back: the version goes when the log is pruned."""
        lance_support.ask(self.place, "give up a version of", lambda: self._dataset.tags.delete(name))

    def kept(self) -> dict[str, int]:
        """The versions that stay, by name."""
        tags = lance_support.ask(self.place, "read", self._dataset.tags.list)
        return {name: int(tag["version"]) for name, tag in tags.items()}

    # Reading it -------------------------------------------------------------------------------------------------------

    def read(
        self, memory: int, *, shard: int = 0, shards: int = 1, batch_rows: int = BATCH_ROWS
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The keys alive in a memory, oldest first, in the version that this object shows when it is called.

        Args:
            shard, shards: only keys whose number n has (n mod C) mod shards == shard.
            batch_rows: keys at a time, at most.

        Yields:
            Numbers (n,) int64, slots (n,) int64, keys (n, D) float32.

        Raises:
            CorruptMemory: a key is missing, doubled or altered.
            InvalidInput: there is no such memory or shard.
            StoreMissing: the store was deleted, or pruned, while it was read.
        """
        if isinstance(memory, bool) or not isinstance(memory, int) or not 0 <= memory < self.num_memories:
            raise InvalidInput(f"memory is {memory!r}; it is within 0..{self.num_memories - 1}")
        if not 0 <= shard < shards:
            raise InvalidInput(f"shard is {shard!r} of {shards!r}; it is within 0..shards-1, and shards at least 1")
        if batch_rows < 1:
            raise InvalidInput(f"batch_rows is {batch_rows!r}; it must be at least 1")
        return log_reading.read_memory(self.place, self._dataset, self._state, memory, shard, shards, batch_rows)

    def scan(self, *, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The keys alive in all memories in one pass: memories (n,) and numbers (n,) int64, keys (n, D) float32.

        Those of one memory come oldest first. Raises as `read` does.
        """
        return log_reading.read_all(self.place, self._dataset, self._state, batch_rows)

    def verify(self) -> int:
        """Reads every key alive and compares its checksum; returns how many there are.

        Raises:
            CorruptMemory: a key is missing, doubled or altered, or the dataset's files are.
        """
        lance_support.ask(self.place, "verify", self._dataset.validate)
        return sum(len(numbers) for _, numbers, _ in self.scan())

    # Inside -----------------------------------------------------------------------------------------------------------

    @property
    def _dataset(self) -> Any:
        if self._open is None:
            raise ClosedMemory(f"the log {self.place} is closed: open it again")
        return self._open

    def _show(self, dataset: Any) -> None:
        self._state = LogState.from_json(lance_support.metadata_of(dataset).get(STATE), self.place)
        self._open = dataset

    def _check_writable(self) -> None:
        if self._pinned:
            raise InvalidInput(
                f"{self.place} was opened at version {self.version} to be read: open it without version="
            )

    def _change(
        self,
        change: Callable[[LogState], LogState],
        rows: Callable[[list[Any]], list[Any]],
        own: Iterable[Any] = (),
    ) -> None:
        """Commits a change of the state and of the fragments, upon whatever version is the newest.

        Args:
            own: fragments written for it. Where a newer version has them, the commit took place and its answer got
                lost on the way.
        """
        written = {metadata.files[0].path for metadata in own}
        until = time.monotonic() + SECONDS_TO_COMMIT
        while True:
            state = change(self._state)
            old = [fragment.metadata for fragment in self._dataset.get_fragments()]
            try:
                self._show(lance_support.commit_only(self.place, self._dataset, _schema(state), rows(old)))
                return
            except WriteConflict:
                if time.monotonic() > until:
                    raise
                before = self._dataset.version
                self.refresh()
                if self._dataset.version == before:
                    raise  # nobody was faster: it is another conflict, and would come again
                there = {fragment.metadata.files[0].path for fragment in self._dataset.get_fragments()}
                if written and written <= there:
                    return
                time.sleep(random.uniform(0.0, 0.01))

    def _merge_small(self) -> None:
        run = lance_merging.run_to_merge([fragment.metadata for fragment in self._dataset.get_fragments()])
        if run:
            self._rewrite(self._dataset.get_fragments()[-run:])
            if time.monotonic() - self._cleaned > SECONDS_BETWEEN_CLEANINGS:
                self._clean(SECONDS_TO_KEEP, alone=False)

    def _rewrite(self, fragments: list[Any]) -> None:
        """Puts rows alive of `fragments` into fewer and larger ones, at their place in the order."""
        if not fragments:
            return
        dataset, state = self._dataset, self._state
        merged = lance_merging.merge(
            self.place,
            dataset,
            fragments,
            lambda run: key_rows.alive_batches(dataset, run, state),
            key_rows.schema_of(self.dim),
        )
        try:
            self._change(lambda state: state, merged.in_place_of)
        except lance_merging.Overtaken:
            # Another writer has merged them: its files hold the same rows.
            lance_support.drop_rows(self.place, merged.written)

    def _clean(self, keep_seconds: float, *, alone: bool) -> None:
        dataset = self._dataset
        lance_support.ask(
            self.place,
            "prune",
            lambda: dataset.cleanup_old_versions(
                older_than=timedelta(seconds=max(keep_seconds, 1e-6)),
                delete_unverified=alone,
                error_if_tagged_old_versions=False,
            ),
        )
        self._cleaned = time.monotonic()


def _schema(state: LogState) -> Any:
    return key_rows.schema_of(state.dim).with_metadata({STATE: state.to_json()})
