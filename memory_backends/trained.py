"""Memory over indexes that learn from their keys and can overwrite a key in place.

One index to a memory, in which a key's position is its slot. Until a memory holds enough keys to learn from, it is
searched exactly over the raw keys. Then its index is trained, and every later key overwrites the one that it evicts.

What was learnt grows stale: keys drift as a text goes on. So an index is trained anew whenever the memory has grown
to twice what it last learnt from (or is full), and then at every turnover, when none of the keys that it learnt from
is left. Each key is thus trained on a bounded number of times (fewer than two while a memory fills, once after), and
the cost of an appended key does not grow with the memory.

Letters as in `base`.
"""

from __future__ import annotations

import functools
import json
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.block_topk import select_top
from recollect.memory_backends.errors import CorruptMemory
from recollect.memory_backends.raw_keys import true_scores
from recollect.memory_backends.ring_search import search_ring
from recollect.memory_backends.threads import run_all

FEWEST_KEYS = 32
"""Below this many keys there is nothing worth learning."""


class TrainedBackend(MemoryBackend):
    """An index to a memory, trained, overwritten in place, and trained anew; a subclass says how.

    A subclass whose scores are not the exact ones (quantised) sets `exact_scores` to False: then the best `_fetch(k)`
    candidates are scored anew from the raw keys.
    """

    exact_scores: ClassVar[bool] = True

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.indexes: list[Any] = [None] * self.num_memories
        """The index of each memory, None until it is trained."""
        self.learnt: list[int] = [0] * self.num_memories
        """How many keys each index last learnt from."""
        self.learnt_at: list[int] = [0] * self.num_memories
        """The memory's total of added keys at that time."""

    # What a backend fills in ------------------------------------------------------------------------------------------

    @abstractmethod
    def _train(self, keys: np.ndarray, seed: int, older: Any, turnover: int) -> Any:
        """An index trained on keys (n, D) that holds key i at position i. It must not keep `keys`.

        Args:
            keys: all that the memory holds, by slot.
            seed: the memory's own.
            older: the index that this one replaces, to learn on from; None where there is none, or where it was
                trained on fewer keys.
            turnover: how many times the memory has been filled so far, 0 while it is not full.
        """

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
        plain, places = keys.cpu().numpy(), slots.numpy()
        which = memories.tolist()
        due = [memory for memory in which if self._is_due(memory)]
        kept = [row for row, memory in enumerate(which) if self.indexes[memory] is not None and memory not in set(due)]
        run_all([functools.partial(self._update, which[row], plain[row], places[row]) for row in kept])
        if due:
            started = time.perf_counter()
            for memory, index in zip(due, run_all([self._training(memory) for memory in due]), strict=True):
                self.indexes[memory] = index
                self.learnt[memory] = int(self.ring.lengths[memory])
                self.learnt_at[memory] = int(self.ring.totals[memory])
            self.build_seconds += time.perf_counter() - started

    def _reset(self, memories: Tensor) -> None:
        for memory in memories.tolist():
            self.indexes[memory] = None
            self.learnt[memory] = self.learnt_at[memory] = 0

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        which = memories.tolist()
        lengths = self.ring.lengths[memories].tolist()
        exactly = [row for row, memory in enumerate(which) if self.indexes[memory] is None]
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
            one_scores, one_slots = self._search_index(self.indexes[which[row]], plain[row], wanted)
            if not self.exact_scores:
                one_scores = self._true_scores(which[row], plain[row], one_slots)
            missing = one_slots < 0
            if missing.any():
                one_scores = np.where(missing, -np.inf, one_scores)
            found_scores[row, :, :wanted], found_slots[row, :, :wanted] = one_scores, one_slots

        run_all([functools.partial(search, row) for row in range(len(which)) if self.indexes[which[row]] is not None])
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
        length, total = int(self.ring.lengths[memory]), int(self.ring.totals[memory])
        if self.indexes[memory] is None:
            return length >= max(self._fewest_keys(), min(self.capacity, max(FEWEST_KEYS, self.capacity // 4)))
        grown = self.learnt[memory] < self.capacity and length >= min(2 * self.learnt[memory], self.capacity)
        return grown or total >= self.learnt_at[memory] + self.capacity

    def _training(self, memory: int) -> Callable[[], Any]:
        keys = self.ring.chunk(memory, 0, int(self.ring.lengths[memory])).cpu().numpy()
        seed = (self.seed * 1_000_003 + memory) % (2**31 - 1)
        older = self.indexes[memory] if self.learnt[memory] == len(keys) else None
        return functools.partial(self._train, keys, seed, older, int(self.ring.totals[memory]) // self.capacity)

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

    def _restore(self, directory: Path) -> None:
        path = directory / "trained.json"
        try:
            trained = json.loads(path.read_text(encoding="utf-8"))
            for memory, (learnt, learnt_at) in trained.items():
                self.learnt[int(memory)], self.learnt_at[int(memory)] = int(learnt), int(learnt_at)
                self.indexes[int(memory)] = self._read_index(directory / memory)
        except (OSError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise CorruptMemory(f"{directory} does not hold the indexes of a {self.name!r} memory: {error}") from error
