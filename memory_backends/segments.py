"""True first-in first-out memory over indexes that are built once, or that forget badly.

The C slots of a memory are cut into equal blocks of at most `part_size` slots. Keys arrive in slot order, so a block
fills up, is sealed (an index is built over its keys and never changed), and stays so until the ring comes round and
starts to overwrite it. Then its index is dropped, and for as long as the block is half new and half old it is searched
exactly, over the raw keys in `self.ring`.

    slots   | sealed | sealed | new  old | sealed |         the third block is being overwritten: its first slots
                                   ^ next slot              hold the newest keys, its others the oldest ones

The exact tail (the newest keys) and what is left of the oldest part are neighbours in that one block, so at most one
block of a memory is searched exactly, whatever its history. Nothing is masked or fetched in excess, each key is
indexed once (the cost of an appended key does not grow with the memory), and the slot of a neighbour is the block's
first slot plus its position in the part.

Letters as in `base`; P blocks to a memory.
"""

from __future__ import annotations

import functools
import itertools
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.errors import InvalidSpec
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.raw_keys import rescore
from recollect.memory_backends.ring_search import search_ring
from recollect.memory_backends.threads import run_all

PARTS = 4
"""Blocks that a memory is cut into unless `part_size` says otherwise."""
SMALLEST_PART = 32
"""Below this many keys an index costs more than it saves, whatever the library."""


@dataclass(frozen=True)
class PartOptions(KeyStorageOptions):
    """Options of every backend that is made of sealed parts."""

    part_size: int = field(
        default=0,
        metadata={"help": f"most keys in a sealed part; 0: a quarter of the capacity, at least {SMALLEST_PART}"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part_size < 0:
            raise ValueError(f"part_size={self.part_size} is below 0")


class SegmentedBackend(MemoryBackend):
    """Sealed parts and an exact tail; a subclass says how a part is built and searched.

    A subclass whose scores are not the exact ones (quantised, or of transformed keys) sets `exact_scores` to False:
    then the best `_fetch(k)` candidates of its parts are scored anew from the raw keys before they are merged.
    """

    Options: ClassVar[type] = PartOptions
    exact_scores: ClassVar[bool] = True
    parallel: ClassVar[bool] = True
    """The library releases the interpreter lock, so parts can be built and searched side by side."""

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        part_size = self.options.part_size
        if part_size > self.capacity:
            raise InvalidSpec(f"{self.name!r}: part_size={part_size} exceeds the capacity of {self.capacity} keys")
        if part_size == 0:
            part_size = min(self.capacity, max(SMALLEST_PART, -(-self.capacity // PARTS)))
        blocks = -(-self.capacity // part_size)
        self.bounds = [block * self.capacity // blocks for block in range(blocks + 1)]
        """P + 1 slots: block b is slots bounds[b] to bounds[b + 1] - 1."""
        self.parts: list[list[Any]] = [[None] * blocks for _ in range(self.num_memories)]
        """The sealed part of each memory and block, None where the block is not sealed."""

    # What a backend fills in ------------------------------------------------------------------------------------------

    @abstractmethod
    def _build_part(self, keys: np.ndarray, seed: int) -> Any:
        """An index over keys (n, D), n >= `_smallest_part()`. It must not keep `keys`, which the ring reuses."""

    @abstractmethod
    def _search_part(self, part: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, k) and positions (Q, k) in the part, -1 where missing; k is at most the part's keys."""

    @abstractmethod
    def _part_bytes(self, part: Any) -> int:
        """Bytes that a part takes, its own copy of the keys included."""

    def _smallest_part(self) -> int:
        """Blocks with fewer slots than this are never sealed but searched exactly."""
        return 1

    def _is_exact(self, part: Any) -> bool:
        """Whether the scores of this part are the exact ones."""
        return self.exact_scores

    def _fetch(self, k: int) -> int:
        """How many candidates to take from a part; more than k where `exact_scores` is False and it pays."""
        return k

    # The contract -----------------------------------------------------------------------------------------------------

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        for memory, first in zip(memories.tolist(), slots[:, 0].tolist(), strict=True):
            for block in self._touched(first, slots.shape[1]):
                self.parts[memory][block] = None
        self._seal(memories)

    def _reset(self, memories: Tensor) -> None:
        for memory in memories.tolist():
            self.parts[memory] = [None] * len(self.parts[memory])

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        found = [*self._search_sealed(queries, k, memories), *self._search_unsealed(queries, k, memories)]
        if len(found) == 1:
            scores, slots = found[0]
        else:
            scores, slots = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        best, order = scores.topk(k, dim=-1)
        return best, slots.gather(-1, order).masked_fill_(best == -torch.inf, -1)

    def _index_bytes(self) -> int:
        return sum(self._part_bytes(part) for parts in self.parts for part in parts if part is not None)

    def _restore(self, directory: Path) -> None:
        # A part depends on its keys, its block and the seed alone, so a rebuilt one answers as the saved one did.
        self._seal(torch.arange(self.num_memories))

    # Sealing ----------------------------------------------------------------------------------------------------------

    def _touched(self, first: int, count: int) -> list[int]:
        """The blocks that `count` slots from `first` on fall into; the ring goes round."""
        blocks = len(self.bounds) - 1
        last = (first + count - 1) % self.capacity
        begin, end = self._block_of(first), self._block_of(last)
        if count >= self.capacity or (begin == end and last < first):
            return list(range(blocks))
        return [(begin + step) % blocks for step in range((end - begin) % blocks + 1)]

    def _block_of(self, slot: int) -> int:
        blocks = len(self.bounds) - 1
        block = min(slot * blocks // self.capacity, blocks - 1)
        # Rounding may put the guess one too low, never elsewhere.
        return block + 1 if block + 1 < blocks and slot >= self.bounds[block + 1] else block

    def _seal(self, memories: Tensor) -> None:
        """Builds a part for each block that is full, not being overwritten, and has none yet."""
        due: list[tuple[int, int]] = []
        lengths, totals = self.ring.lengths, self.ring.totals
        for memory in memories.tolist():
            length, position = int(lengths[memory]), int(totals[memory]) % self.capacity
            for block, part in enumerate(self.parts[memory]):
                start, stop = self.bounds[block], self.bounds[block + 1]
                big_enough = stop - start >= self._smallest_part()
                if part is None and big_enough and length >= stop and not start < position < stop:
                    due.append((memory, block))
        if not due:
            return
        started = time.perf_counter()
        for (memory, block), part in zip(due, self._run([self._build_task(*which) for which in due]), strict=True):
            self.parts[memory][block] = part
        self.build_seconds += time.perf_counter() - started

    def _build_task(self, memory: int, block: int) -> Callable[[], Any]:
        keys = self.ring.chunk(memory, self.bounds[block], self.bounds[block + 1]).cpu().numpy()
        # Not Python's hash: it differs from run to run for some types, and this must not.
        seed = (self.seed * 1_000_003 + memory * 1_009 + block) % (2**31 - 1)
        return functools.partial(self._build_part, keys, seed)

    def _run(self, tasks: list[Callable[[], Any]]) -> list[Any]:
        return run_all(tasks) if self.parallel else [task() for task in tasks]

    # Searching --------------------------------------------------------------------------------------------------------

    def _search_sealed(self, queries: Tensor, k: int, memories: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Candidates of the sealed parts: scores and slots (M', Q, any), or nothing if no part is sealed."""
        rows = memories.tolist()
        blocks = [b for b in range(len(self.bounds) - 1) if any(self.parts[m][b] is not None for m in rows)]
        if not blocks:
            return []
        width = self._fetch(k)
        shape = (*queries.shape[:2], len(blocks), width)
        scores = np.full(shape, -np.inf, dtype=np.float32)
        slots = np.full(shape, -1, dtype=np.int64)
        plain = queries.cpu().numpy()

        def search(row: int, column: int, part: Any) -> None:
            start, stop = self.bounds[blocks[column]], self.bounds[blocks[column] + 1]
            wanted = min(width, stop - start)
            found, positions = self._search_part(part, plain[row], wanted)
            missing = positions < 0
            target = slots[row, :, column, :wanted]
            np.add(positions, start, out=target, casting="unsafe")
            scores[row, :, column, :wanted] = found
            if missing.any():
                target[missing] = -1
                scores[row, :, column, :wanted][missing] = -np.inf

        self._run(
            [
                functools.partial(search, row, column, self.parts[memory][block])
                for row, memory in enumerate(rows)
                for column, block in enumerate(blocks)
                if self.parts[memory][block] is not None
            ]
        )
        all_scores = torch.from_numpy(scores).flatten(2).to(self.device)
        all_slots = torch.from_numpy(slots).flatten(2).to(self.device)
        if all(self._is_exact(part) for memory in rows for part in self.parts[memory] if part is not None):
            return [(all_scores, all_slots)]
        if len(blocks) > 1:
            all_scores, order = all_scores.topk(width, dim=-1, sorted=False)
            all_slots = all_slots.gather(-1, order)
        return [rescore(self.ring, queries, all_slots, k, memories, metric=self.metric)]

    def _search_unsealed(self, queries: Tensor, k: int, memories: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Exact search of the blocks that have no part: the k best scores and slots (M', Q, k) of each such block."""
        which = memories.tolist()
        lengths = self.ring.lengths[memories].tolist()
        found = []
        for block, (start, stop) in enumerate(itertools.pairwise(self.bounds)):
            alive = [
                min(length, stop) - start if self.parts[memory][block] is None and length > start else 0
                for memory, length in zip(which, lengths, strict=True)
            ]
            if any(alive):
                found.append(search_ring(self.ring, queries, k, which, alive, self.metric, first=start))
        return found
