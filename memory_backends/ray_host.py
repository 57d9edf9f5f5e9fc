"""What runs in a shard's own process: a host of any number of shards, each a backend over its share of a memory's keys.

A host decides nothing. Who owns a memory tells it which keys are to come, by their numbers since the memory's reset,
and a host that stands elsewhere refuses: its process is a new one and empty (`epoch`), it missed a change (`changes`),
or it holds another number of keys. A refused call changes nothing, and the owner fills the shard anew.

Numbers here are those of the shard: its n-th key since the reset of its memory, whatever slot that has in the whole.
Letters as in `base`; C is the shard's own capacity.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import platform
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.memory_backends.errors import UnsupportedOperation
from recollect.memory_backends.key_log import KeyLog
from recollect.memory_backends.registry import make_backend
from recollect.memory_backends.sharding import Share

SMALL_SLOTS = 2**31

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ShardAbout:
    """What a shard is made from.

    Attributes:
        spec: registry string of the backend that holds it.
        sizes: arguments of `make_backend`.
        threads: that torch and the libraries may use; 0: the cores of its machine, shared among `beside` shards there.
        beside: shards of this memory on one machine.
        bases: where a saved index is brought back: of each memory, the number that the backend counts as its first.
    """

    spec: str
    sizes: Mapping[str, Any]
    threads: int
    beside: int = 1
    bases: Sequence[int] | None = None


@dataclass(frozen=True)
class Group:
    """Keys of several memories that come at once: as many to each.

    Attributes:
        memories: (M',) int64.
        before: (M',) int64, keys that have come to the shard before, by which it knows that it missed none.
        start: (M',) int64, number of the first key; above `before` where those between are evicted already.
        keys: (M', T, D) float32.
    """

    memories: NDArray[np.int64]
    before: NDArray[np.int64]
    start: NDArray[np.int64]
    keys: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return int(self.keys.nbytes + 3 * self.memories.nbytes)


@dataclass(frozen=True)
class Refused:
    """A call that was not carried out, and why."""

    why: str


@dataclass(frozen=True)
class Filled:
    """What a shard has got from a log.

    Attributes:
        held: keys alive in the shard.
        keys: how many it took this time.
        reached: the number, in the whole memory, from which on keys are missing.
        done: whether the log has no more.
    """

    held: int
    keys: int
    reached: int
    done: bool


@dataclass(frozen=True)
class Failed:
    """What a call failed with in the shard. Not raised there: Ray prints errors that nobody came back for."""

    error: Exception


@dataclass(frozen=True)
class Expected:
    """How a shard should stand when a call reaches it.

    Attributes:
        epoch: of the process that was filled.
        changes: changes that were made to the shard since it was made.
    """

    epoch: str
    changes: int


class Shard:
    """One memory's shard: a backend, and the numbers of the keys in it."""

    def __init__(self, about: ShardAbout) -> None:
        self.about = about
        self.threads = about.threads or max(1, _cores() // about.beside)
        torch.set_num_threads(self.threads)
        self.backend = make_backend(about.spec, **about.sizes)
        count = self.backend.num_memories
        self.totals = torch.zeros(count, dtype=torch.int64)
        """(M,) keys that have come since the reset."""
        self.bases = torch.zeros(count, dtype=torch.int64)
        """(M,) number of the key that the backend counts as its first: above 0 where it began with a later one."""
        if about.bases is not None:
            self.bases = torch.tensor(list(about.bases), dtype=torch.int64)
        self.restoring = about.bases is not None
        self.readers: dict[int, tuple[KeyLog, Iterator[tuple[Tensor, Tensor, Tensor]]]] = {}
        """Logs that memories are being filled from, by memory."""
        self.changes = 0

    def add(self, group: Group) -> None:
        """Appends the keys of a group, which was checked."""
        memories, start = torch.from_numpy(group.memories), torch.from_numpy(group.start)
        skipped = memories[torch.from_numpy(group.start != group.before)]
        if len(skipped) and not self.restoring:
            # Whatever the backend holds of them is evicted: it begins anew with the first key that is not.
            self.backend.reset(skipped)
            self.bases[skipped] = start[torch.from_numpy(group.start != group.before)]
        keys = torch.from_numpy(group.keys)
        if self.restoring:
            self.backend.ring.totals[memories] = start - self.bases[memories]
            if keys.shape[1]:
                self.backend.ring.append(keys, memories)
        elif keys.shape[1]:
            self.backend.add(keys, memories=memories)
        self.totals[memories] = start + keys.shape[1]

    def fill(self, uri: str, memory: int, share: Share) -> Filled:
        """Takes the next keys of a log; those of the memory that the shard has already are passed over."""
        if memory not in self.readers:
            log = KeyLog.open(uri)
            self.readers[memory] = log, log.read(memory, shard=share.shard, shards=share.shards)
        log, keys_of_log = self.readers[memory]
        for numbers, _, keys in keys_of_log:
            counted, had = share.count(numbers), int(self.totals[memory])
            new = counted >= had
            if bool(new.any()):
                start = counted[new][:1]
                before = torch.tensor([had])
                self.add(group_of(torch.tensor([memory]), before, start, keys[new][None]))
                return Filled(self.held(), int(new.sum()), int(numbers[-1]) + 1, False)
        total = int(log.totals[memory])
        log.close()
        del self.readers[memory]
        self.totals[memory] = max(int(self.totals[memory]), share.count(total))
        return Filled(self.held(), 0, total, True)

    def search(
        self, memories: NDArray[np.int64], queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Scores (M', Q, k) and local slots (M', Q, k) of the shard."""
        which = torch.from_numpy(memories)
        found = self.backend.search(torch.from_numpy(queries), k, memories=which)
        bases = (self.bases[which] % self.backend.capacity)[:, None, None]
        slots = found.slots
        if bool(bases.any()):
            slots = torch.where(slots < 0, slots, (slots + bases) % self.backend.capacity)
        small = self.backend.capacity < SMALL_SLOTS
        return found.scores.numpy(), (slots.int() if small else slots).numpy()

    def gather(self, memories: Tensor, slots: Tensor, share: Share) -> NDArray[np.float32]:
        """The shard's own among the keys at slots (M', n): (found, D), memory by memory."""
        parts = []
        for memory, row in zip(memories.tolist(), slots, strict=True):
            local = row[(row >= 0) & (row % share.shards == share.shard)] // share.shards
            own = (local - self.bases[memory]) % share.size
            parts.append(self.backend.gather_keys(own[None, None], memories=[memory])[0, 0])
        return torch.cat(parts).numpy()

    def held(self) -> int:
        """Keys alive."""
        return int(self.backend.lengths.sum())


def told(method: Callable[Concatenate[Any, Parameters], Result]) -> Callable[Concatenate[Any, Parameters], Any]:
    """A method that answers with `Failed` instead of raising."""

    @functools.wraps(method)
    def wrapped(self: Any, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result | Failed:
        try:
            return method(self, *arguments, **named)
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # some libraries' errors cannot travel; what they say can
                return Failed(RuntimeError(f"{type(error).__name__}: {error}"))
            return Failed(error)

    return wrapped


class ShardHost:
    """The process of the shards number s of any number of memories; every method is called from another process.

    Each answers with what it says, or with `Refused`, or with `Failed`.
    """

    def __init__(self) -> None:
        self.epoch = uuid.uuid4().hex
        self.shards: dict[str, Shard] = {}
        # What arrives from another process is read where it lies, and cannot be written to. Nothing does.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def where(self) -> dict[str, Any]:
        """Which process this is, and on which machine it says that it runs."""
        return {"pid": os.getpid(), "machine": platform.node(), "epoch": self.epoch, "shards": len(self.shards)}

    @told
    def make(self, name: str, about: ShardAbout) -> str:
        """Makes an empty shard, in place of one of the same name; answers with the epoch of this process."""
        self.forget(name)
        self.shards[name] = Shard(about)
        return self.epoch

    def forget(self, name: str) -> None:
        """Gives back what a shard holds."""
        shard = self.shards.pop(name, None)
        if shard is not None:
            shard.backend.close()

    @told
    def add(self, name: str, expected: Expected, *groups: Group) -> Refused | int:
        """Appends keys; answers with the number of keys alive in the shard."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        for group in groups:
            totals = shard.totals[torch.from_numpy(group.memories)].numpy()
            if (totals != group.before).any():
                return Refused(f"it had got {totals.tolist()} keys where {group.before.tolist()} were expected")
        # Counted first: where it fails half way, nothing that comes after may find the shard as expected.
        shard.changes += 1
        with self._threads(shard):
            for group in groups:
                shard.add(group)
        return shard.held()

    @told
    def fill(self, name: str, expected: Expected, uri: str, memory: int, share: Share) -> Refused | Filled:
        """Takes the next keys of a memory from a log; called again until that has no more."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        shard.changes += 1
        with self._threads(shard):
            return shard.fill(uri, memory, share)

    @told
    def gather(
        self, name: str, expected: Expected, memories: NDArray[np.int64], slots: NDArray[np.int64], share: Share
    ) -> Refused | NDArray[np.float32]:
        """The shard's own among the keys at slots (M', n) of the whole memories: (found, D), memory by memory."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        with self._threads(shard):
            return shard.gather(torch.from_numpy(memories), torch.from_numpy(slots), share)

    @told
    def reset(self, name: str, expected: Expected, memories: NDArray[np.int64]) -> Refused | int:
        """Empties memories; answers as `add`."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        shard.changes += 1
        which = torch.from_numpy(memories)
        with self._threads(shard):
            shard.backend.reset(which)
        for memory in which.tolist():
            shard.readers.pop(memory, None)
        shard.totals[which] = 0
        shard.bases[which] = 0
        return shard.held()

    @told
    def search(
        self,
        name: str,
        expected: Expected,
        memories: NDArray[np.int64],
        totals: NDArray[np.int64],
        queries: NDArray[np.float32],
        k: int,
    ) -> Refused | tuple[NDArray[np.float32], NDArray[Any]]:
        """The k best of the shard's own keys: scores and local slots.

        Args:
            name, expected: which shard, and how it should stand.
            memories: (M',) those searched.
            totals: (M',) keys that should have come to each.
            queries: (M', Q, D).
            k: neighbours.
        """
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        got = shard.totals[torch.from_numpy(memories)].numpy()
        if (got != totals).any():
            return Refused(f"it had got {got.tolist()} keys where {totals.tolist()} were expected")
        with self._threads(shard):
            return shard.search(memories, queries, k)

    @told
    def set_search_options(self, name: str, expected: Expected, options: Mapping[str, Any]) -> Refused | None:
        """Changes search options of the shard's backend."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        shard.changes += 1
        with self._threads(shard):
            shard.backend.set_search_options(**options)
        return None

    @told
    def stats(self, name: str, expected: Expected) -> Refused | dict[str, Any]:
        """Keys, bytes and times of the shard's backend."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        found = shard.backend.stats()
        return {
            "keys": found.keys,
            "bytes": found.key_bytes + found.index_bytes,
            "mapped_bytes": found.mapped_bytes,
            "build_seconds": found.build_seconds,
            "stalled_seconds": found.stalled_seconds,
            "pending_builds": found.pending_builds,
            "threads": shard.threads,
        }

    @told
    def wait(self, name: str, expected: Expected) -> Refused | None:
        """Takes in what was built in the background; for when nothing is being built any more."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        with self._threads(shard):
            shard.backend.wait()
        return None

    @told
    def index_files(self, name: str, expected: Expected) -> Refused | tuple[list[int], dict[str, bytes]]:
        """The index as its backend saves it, without keys: the bases, and the contents of files by relative path."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        with tempfile.TemporaryDirectory(prefix="recollect-shard-") as folder, self._threads(shard):
            shard.backend._save(Path(folder))
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return shard.bases.tolist(), {str(path.relative_to(folder)): path.read_bytes() for path in files}

    @told
    def restore(self, name: str, expected: Expected, files: Mapping[str, bytes]) -> Refused | int:
        """Brings an index back, once the shard that was made with `bases` has got its keys; answers as `add`."""
        shard = self._shard(name, expected)
        if isinstance(shard, Refused):
            return shard
        shard.changes += 1
        with tempfile.TemporaryDirectory(prefix="recollect-shard-") as folder, self._threads(shard):
            for path, content in files.items():
                whole = Path(folder) / path
                whole.parent.mkdir(parents=True, exist_ok=True)
                whole.write_bytes(content)
            shard.backend._restore(Path(folder))
        shard.restoring = False
        return shard.held()

    def _shard(self, name: str, expected: Expected) -> Shard | Refused:
        shard = self.shards.get(name)
        if self.epoch != expected.epoch or shard is None:
            return Refused("its process is a new one and holds nothing of this memory")
        if shard.changes != expected.changes:
            return Refused(f"it had made {shard.changes} changes where {expected.changes} were expected")
        return shard

    @contextlib.contextmanager
    def _threads(self, shard: Shard) -> Iterator[None]:
        if torch.get_num_threads() != shard.threads:
            torch.set_num_threads(shard.threads)
        with torch.inference_mode(False), torch.no_grad():
            yield


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def group_of(memories: Tensor, before: Tensor, start: Tensor, keys: Tensor) -> Group:
    """A group from tensors, `keys` (M', T, D) float32 on the CPU.

    Raises:
        UnsupportedOperation: the keys lie elsewhere.
    """
    if keys.device.type != "cpu":
        raise UnsupportedOperation(f"keys on {str(keys.device)!r} can't travel to another process; bring them to 'cpu'")
    return Group(memories.numpy(), before.numpy(), start.numpy(), np.ascontiguousarray(keys.numpy()))


__all__ = ["Expected", "Failed", "Filled", "Group", "Refused", "ShardAbout", "ShardHost", "group_of"]
