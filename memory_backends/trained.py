"""Memory over indexes that learn from their keys and can overwrite a key in place.

One index to a memory, in which a key's position is its slot. Until a memory holds enough keys to learn from, it is
searched exactly over the raw keys. Then its index is trained, and every later key overwrites the one that it evicts.

What was learnt grows stale: keys drift as a text goes on. So an index is trained anew whenever the memory has grown
to twice what it last learnt from (or is full), and then at every turnover, when none of the keys that it learnt from
is left. Each key is thus trained on a bounded number of times (fewer than two while a memory fills, once after), and
the cost of an appended key does not grow with the memory.

A memory of more than `background_from` keys is trained in the background (`background`) while the old index serves
and goes on being overwritten. The new one is due when half as many keys have come as it learnt from, then catches up
with the keys that have come meanwhile, in the background too: with those that came while it did so, in ever shorter
stretches, until no more is left than an append does along with its own keys. All of this happens at numbers of keys
that are known beforehand, so that answers depend on the calls alone; an append waits where a stretch is not ready
(`MemoryStats.stalled_seconds`). A call that brings an eighth of what was learnt from, a load and no stream, trains at
once. `wait()` takes in what was begun.

While an index learns, the ring moves on. So it learns from the keys that are not overwritten before it is due; the
positions of the others it fills with copies of those, and the keys that it catches up with overwrite every one.

Letters as in `base`.
"""

from __future__ import annotations

import functools
import json
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.background import Job, checkpoint, finished, release, submit
from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.block_topk import select_top
from recollect.memory_backends.errors import BuildFailed, CorruptMemory
from recollect.memory_backends.locking import ReadersWriterLock
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.out_of_memory import as_out_of_memory, ran_out
from recollect.memory_backends.raw_keys import true_scores
from recollect.memory_backends.ring_search import search_ring
from recollect.memory_backends.threads import run_all

FEWEST_KEYS = 32
"""Below this many keys there is nothing worth learning."""
LAG = 2
"""An index is due when 1 / LAG of the keys that it learns from have come after it was begun. Sooner would serve better
where topics move fast: `benchmarks/streams.py`, 8192 keys, first turnover, has recall 0.967 and 0.909 of faiss-ivf and
faiss-ivfpq for 2, 0.974 and 0.921 for 4, 0.979 and 0.933 for 8. But appends then wait
longer, in its paced stream on two cores: of 200 steps those of faiss-ivfpq 0.08 s for 2 and 0.37 s for 4."""
SLACK = 8
"""An append of 1 / SLACK of these keys or more is a load: what is being learnt is given up, and learnt at once."""
CATCHING_UP = 8
"""Each stretch of catching up is due when 1 / CATCHING_UP of the keys in it have come."""
LAST_STRETCH = 256
"""So few keys, or twice what an append brings, are caught up with by the append itself."""
STRETCH = 8192
"""Keys that a new index takes between two checkpoints."""


@dataclass(frozen=True)
class TrainedOptions(KeyStorageOptions):
    """Options of every backend whose indexes learn."""

    background: bool = field(
        default=True,
        metadata={
            "help": "learn anew in the background; false: in the append at which it is due, which then waits",
            "unseen": "it changes when an index serves while keys stream in, and nothing of a memory filled at once",
        },
    )


@dataclass
class Learning:
    """An index that is to replace another.

    Attributes:
        begun: the memory's total when it was begun.
        keys: how many it learns from.
        unstable: the oldest of them at that time, which it does not read, and has others in the place of.
        holds: keys before this number are in it once the job is done.
        due: the total at which the job must be done.
        job: learns, or catches up.
    """

    begun: int
    keys: int
    unstable: int
    holds: int
    due: int
    job: Job[Any]


class TrainedBackend(MemoryBackend):
    """An index to a memory, trained, overwritten in place, and trained anew; a subclass says how.

    A subclass whose scores are not the exact ones (quantised) sets `exact_scores` to False: then the best `_fetch(k)`
    candidates are scored anew from the raw keys.
    """

    exact_scores: ClassVar[bool] = True
    background_from: ClassVar[int] = 4096
    """Indexes that learn from fewer keys do so at once: that takes some milliseconds."""

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.indexes: list[Any] = [None] * self.num_memories
        """The index of each memory, None until it is trained."""
        self.learnt: list[int] = [0] * self.num_memories
        """How many keys each index last learnt from."""
        self.learnt_at: list[int] = [0] * self.num_memories
        """The memory's total of added keys at that time."""
        self.not_before: list[int] = [0] * self.num_memories
        """After training has failed: the total at which it is tried again."""
        self.learning: list[Learning | None] = [None] * self.num_memories
        """What is to replace the index of each memory."""
        self._ending: list[Job[Any]] = []
        """What was given up while it ran, and may still read the ring."""
        self._updating = False
        """Whether an append has begun to change indexes."""
        self._settling = ReadersWriterLock()
        """`_wait` changes indexes while others search: one at a time."""

    # What a backend fills in ------------------------------------------------------------------------------------------

    @abstractmethod
    def _train(self, keys: np.ndarray, seed: int, older: Any, turnover: int) -> Any:
        """An index trained on keys (n, D) that holds key i at position i. It must not keep `keys`.

        It runs in a thread of its own, beside every other hook.

        Args:
            keys: as many as the memory holds, by slot.
            seed: the memory's own.
            older: the index that this one replaces, to learn on from; None where there is none, or where it was
                trained on fewer keys.
            turnover: how many times the memory has been filled so far, 0 while it is not full.
        """

    def _sample(self, keys: int) -> int:
        """How many of so many keys are enough to learn from; all of them where `_learn_from` is not filled in."""
        return keys

    def _learn_from(self, sample: np.ndarray, keys: int, seed: int, older: Any, turnover: int) -> Any:
        """An index that has learnt from a sample (n, D) of so many keys and holds none yet.

        None where a library learns and indexes in one: then `_train` is asked for it. Other arguments as there.
        """
        return None

    @abstractmethod
    def _append(self, index: Any, keys: np.ndarray) -> None:
        """Adds keys (T, D) at the next positions."""

    @abstractmethod
    def _overwrite(self, index: Any, positions: np.ndarray, keys: np.ndarray) -> None:
        """Replaces the keys at positions (T,) int64 by keys (T, D)."""

    @abstractmethod
    def _search_index(self, index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, k) and positions (Q, k) int64, -1 where missing."""

    @abstractmethod
    def _bytes_of(self, index: Any, keys: int) -> int:
        """Bytes that an index of so many keys takes, its own copy of them included."""

    @abstractmethod
    def _write_index(self, index: Any, path: Path) -> None:
        """Writes an index to `path`, a file or a folder, by the library's own format."""

    @abstractmethod
    def _read_index(self, path: Path) -> Any:
        """The index that `_write_index` wrote."""

    def _true_scores(self, memory: int, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Scores (Q, N) of the raw keys of one memory at positions (Q, N); anything where the position is -1."""
        asked, slots = torch.from_numpy(queries)[None], torch.from_numpy(positions)[None]
        metric = "l2" if self.metric == "l2" else "inner_product"
        return true_scores(self.ring, asked, slots, torch.tensor([memory]), metric=metric)[0].numpy()

    def _fewest_keys(self) -> int:
        """Keys that training needs."""
        return 1

    def _fetch(self, k: int) -> int:
        """How many candidates to take from an index; more than k where `exact_scores` is False and it pays."""
        return k

    # The contract -----------------------------------------------------------------------------------------------------

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        which, count = memories.tolist(), slots.shape[1]
        for memory in which:
            learning = self.learning[memory]
            if learning is not None and count * SLACK >= learning.keys:
                # Such a load may have overwritten what is being read.
                learning.job.abandon()
                learning.job.join()
                self.learning[memory] = None
        ready = self._ready([memory for memory in which if self._due_at(memory) <= int(self.ring.totals[memory])])
        self._updating = True
        now = [memory for memory in which if self._is_due(memory) and not self._later(memory, count)]
        swapped = [memory for memory, index in ready.items() if self._catch_up(memory, index, 2 * count)]
        done = {*now, *swapped}
        kept = [row for row, memory in enumerate(which) if self.indexes[memory] is not None and memory not in done]
        plain, places = keys.cpu().numpy(), slots.numpy()
        run_all([functools.partial(self._update, which[row], plain[row], places[row]) for row in kept])
        if now:
            started = time.perf_counter()
            for memory, index in zip(now, run_all([self._training(memory, 0) for memory in now]), strict=True):
                self._take_in(memory, index, int(self.ring.totals[memory]), int(self.ring.lengths[memory]))
            self.build_seconds += time.perf_counter() - started
        for memory in which:
            if self._is_due(memory):
                self._begin(memory)
        self._updating = False

    def _reset(self, memories: Tensor) -> None:
        for memory in memories.tolist():
            self._give_up(memory)
            self.indexes[memory] = None
            self.learnt[memory] = self.learnt_at[memory] = self.not_before[memory] = 0

    def _recover(self, memories: Tensor) -> None:
        if self._updating:
            self._updating = False
            super()._recover(memories)

    def _pending_builds(self) -> int:
        return sum(learning is not None and learning.job.pending for learning in tuple(self.learning))

    def _wait(self) -> None:
        with self._settling.writing:
            which = [memory for memory, learning in enumerate(self.learning) if learning is not None]
            for memory, index in self._ready(which).items():
                self._catch_up(memory, index, self.capacity)

    def _close(self) -> None:
        for memory in range(self.num_memories):
            self._give_up(memory)
        for job in self._ending:
            job.join()
        self.indexes = [None] * self.num_memories

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        which = memories.tolist()
        lengths = self.ring.lengths[memories].tolist()
        indexes = [self.indexes[memory] for memory in which]
        exactly = [row for row, index in enumerate(indexes) if index is None]
        if exactly:
            some = [length if row in set(exactly) else 0 for row, length in enumerate(lengths)]
            scores, slots = search_ring(self.ring, queries, k, which, some, self.metric)
            if len(exactly) == len(which):
                return scores, slots
        width = max(k, self._fetch(k))
        found_scores = np.full((*queries.shape[:2], width), -np.inf, dtype=np.float32)
        found_slots = np.full(found_scores.shape, -1, dtype=np.int64)
        plain = queries.cpu().numpy()

        def search(row: int) -> None:
            wanted = min(width, lengths[row])
            one_scores, one_slots = self._search_index(indexes[row], plain[row], wanted)
            if not self.exact_scores:
                one_scores = self._true_scores(which[row], plain[row], one_slots)
            missing = one_slots < 0
            if missing.any():
                one_scores = np.where(missing, -np.inf, one_scores)
            found_scores[row, :, :wanted], found_slots[row, :, :wanted] = one_scores, one_slots

        run_all([functools.partial(search, row) for row, index in enumerate(indexes) if index is not None])
        best, places = torch.from_numpy(found_scores).to(self.device), torch.from_numpy(found_slots).to(self.device)
        if not self.exact_scores:
            best, order = select_top(best, k)
            places = places.gather(-1, order)
        if exactly:
            best[exactly], places[exactly] = scores[exactly], slots[exactly]
        return best, places

    def _index_bytes(self) -> int:
        lengths = self.ring.lengths.tolist()
        return sum(self._bytes_of(index, lengths[m]) for m, index in enumerate(self.indexes) if index is not None)

    # Training ---------------------------------------------------------------------------------------------------------

    def _is_due(self, memory: int) -> bool:
        """Whether a new index is to be begun."""
        length, total = int(self.ring.lengths[memory]), int(self.ring.totals[memory])
        if self.learning[memory] is not None or total < self.not_before[memory]:
            return False
        if self.indexes[memory] is None:
            return length >= max(self._fewest_keys(), min(self.capacity, max(FEWEST_KEYS, self.capacity // 4)))
        grown = self.learnt[memory] < self.capacity and length >= min(2 * self.learnt[memory], self.capacity)
        return grown or total >= self.learnt_at[memory] + self.capacity

    def _later(self, memory: int, count: int) -> bool:
        """Whether a new index is made in the background, in an append of `count` keys."""
        length = int(self.ring.lengths[memory])
        wanted = getattr(self.options, "background", True)
        return bool(wanted) and length > self.background_from and count * SLACK < length

    def _due_at(self, memory: int) -> float:
        learning = self.learning[memory]
        return float("inf") if learning is None else learning.due

    def _begin(self, memory: int) -> None:
        """Begins a new index in the background."""
        length, total = int(self.ring.lengths[memory]), int(self.ring.totals[memory])
        lag = length // LAG
        # Overwritten before the index is due, or by the append at which it is.
        unstable = max(0, length + lag + length // SLACK - self.capacity)
        job = submit(self._training(memory, unstable), length)
        self.learning[memory] = Learning(total, length, unstable, total, total + lag, job)

    def _ready(self, memories: list[int]) -> dict[int, Any]:
        """The indexes that these memories learn, once their jobs are done; waits for them.

        Raises:
            BuildFailed: one of them could not be made; the old ones serve on, and a turnover later it is tried again.
        """
        jobs = {memory: learning.job for memory in memories if (learning := self.learning[memory]) is not None}
        late = any(job.pending for job in jobs.values())
        started = time.perf_counter()
        ready = dict(zip(jobs, run_all([job.outcome for job in jobs.values()]), strict=True))
        if late:
            self.stalled_seconds += time.perf_counter() - started
        failures = {memory: job.error for memory, job in jobs.items() if job.error is not None}
        for memory in failures:
            learning = self.learning[memory]
            assert learning is not None
            self.learning[memory] = None
            self.not_before[memory] = learning.begun + self.capacity
        for memory, error in failures.items():
            if ran_out(error):
                doing = f"to train an index of a {self.spec!r} memory in the background"
                raise as_out_of_memory(error, doing) from error
            raise BuildFailed(
                f"training an index of memory {memory} of a {self.spec!r} memory failed ({type(error).__name__}: "
                f"{error}): no key is lost, what served so far serves on; call again to go on"
            ) from error
        return ready

    def _catch_up(self, memory: int, index: Any, most: int) -> bool:
        """Takes a new index in if no more than `most` keys are missing in it, else lets it catch up in the background.

        Returns:
            Whether it was taken in.
        """
        learning = self.learning[memory]
        assert learning is not None
        total = int(self.ring.totals[memory])
        behind = total - learning.holds
        # By then the keys that it did not read are evicted, and those in their place overwritten.
        whole = learning.begun + learning.unstable
        self.build_seconds += learning.job.seconds
        if behind <= max(most, LAST_STRETCH) and (total >= whole or most >= self.capacity):
            oldest = learning.begun - learning.keys
            self._replay(memory, index, max(oldest, total - self.capacity), oldest + learning.unstable, again=True)
            self._replay(memory, index, learning.holds, total)
            self.learning[memory] = None
            self._take_in(memory, index, learning.begun, learning.keys)
            return True
        task = functools.partial(self._replay, memory, index, learning.holds, total)
        due = max(whole, total + max(1, behind // CATCHING_UP))
        job = submit(task, behind)
        self.learning[memory] = Learning(learning.begun, learning.keys, learning.unstable, total, due, job)
        return False

    def _replay(self, memory: int, index: Any, start: int, stop: int, *, again: bool = False) -> Any:
        """Gives keys number `start` to `stop - 1` to an index that holds those before, or (`again`) has their slots."""
        while start < stop:
            end = min(stop, start + STRETCH)
            fresh = start < self.capacity and not again
            if fresh:
                end = min(end, self.capacity)
            keys = self.ring.in_order(memory, start, end).cpu().numpy()
            if fresh:
                self._append(index, keys)
            else:
                self._overwrite(index, np.arange(start, end) % self.capacity, keys)
            checkpoint()
            start = end
        return index

    def _take_in(self, memory: int, index: Any, begun: int, keys: int) -> None:
        old = [self.indexes[memory]]
        self.indexes[memory], self.learnt[memory], self.learnt_at[memory] = index, keys, begun
        if keys > self.background_from:
            release(old)

    def _give_up(self, memory: int) -> None:
        learning = self.learning[memory]
        if learning is not None:
            learning.job.abandon()
            self._ending = [job for job in (*self._ending, learning.job) if job.pending]
        self.learning[memory] = None

    def _training(self, memory: int, unstable: int) -> Callable[[], Any]:
        """What makes a new index of all keys of a memory, the oldest `unstable` of them replaced by others."""
        length, total = int(self.ring.lengths[memory]), int(self.ring.totals[memory])
        seed = (self.seed * 1_000_003 + memory + self.first_memory) % (2**31 - 1)
        older = self.indexes[memory] if self.learnt[memory] == length else None
        return functools.partial(self._learn, memory, length, total, unstable, seed, older)

    def _learn(self, memory: int, length: int, total: int, unstable: int, seed: int, older: Any) -> Any:
        turnover = total // self.capacity
        wanted = self._sample(length)
        places = _stable_places(length, total - length, unstable, self.capacity)
        if wanted < length:
            drawn = np.sort(np.random.default_rng(seed + turnover).choice(length, wanted, replace=False))
            index = self._learn_from(self._keys_at(memory, places[drawn]), length, seed, older, turnover)
        else:
            keys = self._keys_at(memory, places) if unstable else self.ring.chunk(memory, 0, length).cpu().numpy()
            index = self._learn_from(keys, length, seed, older, turnover)
            if index is None:
                return self._train(keys, seed, older, turnover)
        for start in range(0, length, STRETCH):
            checkpoint()
            self._append(index, self._keys_at(memory, places[start : start + STRETCH]))
        return index

    def _keys_at(self, memory: int, places: np.ndarray) -> np.ndarray:
        slots = torch.from_numpy(places)[None, None]
        return self.ring.gather(slots, torch.tensor([memory]))[0, 0].cpu().numpy()

    def _update(self, memory: int, keys: np.ndarray, slots: np.ndarray) -> None:
        # Before this call the index held the keys of all slots below this: T' <= C new keys wrap round at most once.
        held = min(int(self.ring.totals[memory]) - len(keys), self.capacity)
        new = slots >= held
        if not new.all():
            self._overwrite(self.indexes[memory], slots[~new], keys[~new])
        if new.any():
            self._append(self.indexes[memory], keys[new])

    # Saving -----------------------------------------------------------------------------------------------------------

    def _save(self, directory: Path) -> None:
        trained = [memory for memory, index in enumerate(self.indexes) if index is not None]
        for memory in trained:
            self._write_index(self.indexes[memory], directory / str(memory))
        write_json(directory / "trained.json", {str(m): [self.learnt[m], self.learnt_at[m]] for m in trained})
        learning: dict[str, list[int]] = {}
        for memory, new in enumerate(self.learning):
            # One that fails is told by the append that needs it.
            index = None if new is None else new.job.outcome()
            if new is not None and index is not None:
                self._write_index(index, directory / f"{memory}-new")
                learning[str(memory)] = [new.begun, new.keys, new.unstable, new.holds, new.due]
        write_json(directory / "learning.json", {"learning": learning, "not_before": self.not_before})

    def _restore(self, directory: Path) -> None:
        path, more = directory / "trained.json", directory / "learning.json"
        try:
            trained = json.loads(path.read_text(encoding="utf-8"))
            for memory, (learnt, learnt_at) in trained.items():
                self.learnt[int(memory)], self.learnt_at[int(memory)] = int(learnt), int(learnt_at)
                self.indexes[int(memory)] = self._read_index(directory / memory)
            if more.exists():  # else it was written when training was not done in the background
                about = json.loads(more.read_text(encoding="utf-8"))
                self.not_before = [int(number) for number in about["not_before"]]
                for memory, numbers in about["learning"].items():
                    job = finished(self._read_index(directory / f"{memory}-new"))
                    begun, keys, unstable, holds, due = (int(number) for number in numbers)
                    self.learning[int(memory)] = Learning(begun, keys, unstable, holds, due, job)
        except (OSError, ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
            raise CorruptMemory(f"{directory} does not hold the indexes of a {self.name!r} memory: {error}") from error


def _stable_places(length: int, first: int, unstable: int, capacity: int) -> np.ndarray:
    """Slots (length,) whose keys stand for those of slots 0 to length - 1.

    Each stands for itself, but for the oldest `unstable` ones, for which others do in turn.

    Args:
        length: keys alive.
        first: number of the oldest.
        unstable: how many of the oldest must not be read.
        capacity: C.
    """
    places = np.arange(length)
    if unstable:
        ages = (places - first) % capacity
        instead = unstable + ages % (length - unstable)
        places = (first + np.where(ages < unstable, instead, ages)) % capacity
    return places
