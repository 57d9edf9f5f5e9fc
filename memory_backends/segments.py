"""True first-in first-out memory over indexes that are built once, or that forget badly.

Keys are sealed into runs, each of which gets an index that never changes; indexes over neighbouring runs are merged
into larger ones; the newest keys are searched exactly, and so is what is left of a run whose first key was evicted.
`merging` says which runs have an index, as a function of the number of keys alone. Nothing is masked or fetched in
excess: a part whose first key is evicted is dropped whole.

Indexes are built in the background (`background`) while appends and searches go on, and taken in at a number of keys
that is known beforehand. An append waits only if one is not ready by then, which `MemoryStats.stalled_seconds` counts.
So answers depend on the calls alone. Runs of few keys (`background_from`), and all with the option `background=false`,
are built by the append that fills them; a call that brings two runs or more at once (a load, no stream) builds all that
is due before it returns. `wait()` takes in what was begun.

Letters as in `base`; P parts to a memory.
"""

from __future__ import annotations

import functools
import json
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.background import Job, release, submit
from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.errors import BuildFailed, CorruptMemory, InvalidSpec
from recollect.memory_backends.locking import ReadersWriterLock
from recollect.memory_backends.merging import FAN_OUT, PARTS, RUN, SMALLEST_PART, MergePolicy, Run
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.out_of_memory import as_out_of_memory, ran_out
from recollect.memory_backends.raw_keys import rescore
from recollect.memory_backends.ring_search import search_ring
from recollect.memory_backends.threads import run_all


@dataclass(frozen=True)
class PartOptions(KeyStorageOptions):
    """Options of every backend that is made of sealed parts."""

    part_size: int = field(
        default=0,
        metadata={"help": "most keys in a sealed part; 0: by the capacity, at most a quarter of it"},
    )
    run_size: int = field(
        default=0,
        metadata={
            "help": f"keys that are sealed at first, until when they are searched exactly; 0: {RUN}, or a quarter of "
            f"the capacity if that is less, at least {SMALLEST_PART}"
        },
    )
    fan_out: int = field(
        default=FAN_OUT,
        metadata={
            "help": "parts of one size that are merged into a larger one; 1: never merged",
            "unseen": f"a memory of fewer than {RUN * PARTS * 2} keys merges nothing by default",
        },
    )
    background: bool = field(
        default=True,
        metadata={
            "help": "build indexes in the background; false: in the append that fills a run, which then waits",
            "unseen": "it changes when an index serves while keys stream in, and nothing of a memory filled at once",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("part_size", 0), ("run_size", 0), ("fan_out", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")
        if self.part_size and self.run_size > self.part_size:
            raise ValueError(f"run_size={self.run_size} exceeds part_size={self.part_size}")


@dataclass(frozen=True)
class Part:
    """An index over a run of keys; position i in it is key number `run.start` + i."""

    run: Run
    index: Any


class SegmentedBackend(MemoryBackend):
    """Sealed parts and an exact tail; a subclass says how a part is built and searched.

    A subclass whose scores are not the exact ones (quantised, or of transformed keys) sets `exact_scores` to False:
    then the best `_fetch(k)` candidates of its parts are scored anew from the raw keys before they are merged.
    """

    Options: ClassVar[type] = PartOptions
    exact_scores: ClassVar[bool] = True
    parallel: ClassVar[bool] = True
    """The library releases the interpreter lock, so parts can be built and searched side by side."""
    background_from: ClassVar[int] = 1024
    """Runs of fewer keys are built at once: that takes less than handing them over and searching them meanwhile."""

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        for name in ("part_size", "run_size"):
            if getattr(self.options, name) > self.capacity:
                raise InvalidSpec(
                    f"{self.name!r}: {name}={getattr(self.options, name)} exceeds the capacity of {self.capacity} keys"
                )
        self.policy = MergePolicy.make(
            self.capacity,
            part_size=self.options.part_size,
            run_size=self.options.run_size,
            fan_out=self.options.fan_out,
            smallest=self._smallest_part(),
            background_from=self.background_from if self.options.background else None,
        )
        self.parts: list[tuple[Part, ...]] = [()] * self.num_memories
        """The parts that serve each memory, oldest first. Replaced whole, so that a search sees one state of it."""
        self.settled: list[int] = [0] * self.num_memories
        """Indexes over keys before this number did not wait for their lag."""
        self.failed: list[set[Run]] = [set() for _ in range(self.num_memories)]
        """Runs that could not be built, and are not tried again."""
        self.jobs: list[dict[Run, Job[Any]]] = [{} for _ in range(self.num_memories)]
        """What is built in the background for each memory, or is built and not taken in yet."""
        self._ending: list[Job[Any]] = []
        """What was abandoned while it ran, and may still read the ring."""
        self._quiet_until: list[int] = [0] * self.num_memories
        """Below this number of keys nothing is sealed, taken in or dropped."""
        self._settling = ReadersWriterLock()
        """`_wait` changes parts while others search: one at a time."""

    # What a backend fills in ------------------------------------------------------------------------------------------

    @abstractmethod
    def _build_part(self, keys: np.ndarray, seed: int) -> Any:
        """An index over keys (n, D), n >= `_smallest_part()`.

        It runs in a thread of its own, beside every other hook. It must not keep `keys`, which the ring reuses, and
        should call `background.checkpoint()` between stretches of some tens of milliseconds.
        """

    @abstractmethod
    def _search_part(self, part: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, k) and positions (Q, k) in the part, -1 where missing; k is at most the part's keys."""

    @abstractmethod
    def _part_bytes(self, part: Any) -> int:
        """Bytes that a part takes, its own copy of the keys included."""

    def _smallest_part(self) -> int:
        """Runs of fewer keys than this are never sealed but searched exactly."""
        return 1

    def _is_exact(self, part: Any) -> bool:
        """Whether the scores of this part are the exact ones."""
        return self.exact_scores

    def _fetch(self, k: int) -> int:
        """How many candidates to take from a part; more than k where `exact_scores` is False and it pays."""
        return k

    # The contract -----------------------------------------------------------------------------------------------------

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        load = bool(self.policy.sizes) and keys.shape[1] >= min(2 * self.policy.sizes[0], self.capacity)
        self._bring_up(memories.tolist(), settle=load)

    def _reset(self, memories: Tensor) -> None:
        for memory in memories.tolist():
            self._forget_jobs(memory)
            self.parts[memory] = ()
            self.settled[memory] = self._quiet_until[memory] = 0
            self.failed[memory] = set()

    def _recover(self, memories: Tensor) -> None:
        # The parts are as they were; but what is being built may have read keys of the append that failed.
        for memory in memories.tolist():
            self._forget_jobs(memory)
            self._quiet_until[memory] = 0
        self._bring_up(memories.tolist())

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.parts[memory] for memory in memories.tolist()]
        found = [*self._search_sealed(queries, k, memories, parts), *self._search_rest(queries, k, memories, parts)]
        if len(found) == 1:
            scores, slots = found[0]
        else:
            scores, slots = (torch.cat(pieces, dim=-1) for pieces in zip(*found, strict=True))
        best, order = scores.topk(k, dim=-1)
        return best, slots.gather(-1, order).masked_fill_(best == -torch.inf, -1)

    def _index_bytes(self) -> int:
        return sum(self._part_bytes(part.index) for parts in self.parts for part in parts)

    def _pending_builds(self) -> int:
        return sum(job.pending for jobs in self.jobs for job in tuple(jobs.values()))

    def _wait(self) -> None:
        with self._settling.writing:
            self._bring_up(list(range(self.num_memories)), settle=True)

    def _close(self) -> None:
        for memory in range(self.num_memories):
            self._forget_jobs(memory)
        for job in self._ending:
            job.join()
        self.parts = [()] * self.num_memories

    def _save(self, directory: Path) -> None:
        failed = [[[run.start, run.stop] for run in sorted(runs)] for runs in self.failed]
        write_json(directory / "parts.json", {"settled": self.settled, "failed": failed})

    def _restore(self, directory: Path) -> None:
        # A part depends on its keys, their numbers and the seed alone, so a rebuilt one answers as the saved one did.
        path = directory / "parts.json"
        if path.exists():
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
                self.settled = [int(number) for number in about["settled"]]
                self.failed = [{Run(int(start), int(stop)) for start, stop in runs} for runs in about["failed"]]
            except (ValueError, TypeError, KeyError) as error:
                raise CorruptMemory(f"{path} does not tell the parts of a {self.name!r} memory: {error}") from error
            if not len(self.settled) == len(self.failed) == self.num_memories:
                raise CorruptMemory(f"{path} tells of {len(self.settled)} memories, not {self.num_memories}")
        else:  # written when every run was sealed at once
            self.settled = self.ring.totals.tolist()
        self._bring_up(list(range(self.num_memories)))

    # Sealing and merging ----------------------------------------------------------------------------------------------

    def _bring_up(self, memories: list[int], *, settle: bool = False) -> None:
        """Begins, takes in and drops indexes, as the policy says for the keys that there are now.

        Nothing of the memory is changed until all that is needed is there.
        """
        totals = self.ring.totals.tolist()
        due = [memory for memory in memories if settle or totals[memory] >= self._quiet_until[memory]]
        if not due:
            return
        settled = {memory: totals[memory] if settle else self.settled[memory] for memory in due}
        serving = {memory: self.policy.serving(totals[memory], settled[memory], self.failed[memory]) for memory in due}
        kept = {memory: {part.run: part for part in self.parts[memory]} for memory in due}
        begun = {memory: self.policy.begun(totals[memory], settled[memory], self.failed[memory]) for memory in due}
        for memory in due:
            for run in begun[memory]:
                if run not in self.jobs[memory]:
                    self.jobs[memory][run] = submit(self._build_task(memory, run), len(run))
        wanted = [(memory, run) for memory in due for run in serving[memory] if run not in kept[memory]]
        for (memory, run), index in zip(wanted, self._obtain(wanted), strict=True):
            kept[memory][run] = Part(run, index)
        dropped: list[Part] = []
        for memory in due:
            self.parts[memory] = tuple(kept[memory].pop(run) for run in serving[memory])
            dropped += kept[memory].values()
            self.settled[memory] = settled[memory]
            self._quiet_until[memory] = self.policy.next_change(totals[memory])
            for run in [run for run in self.jobs[memory] if run not in begun[memory]]:
                self._abandon(self.jobs[memory].pop(run))  # taken in, or wanted no more
        kept.clear()
        release(dropped)

    def _obtain(self, wanted: list[tuple[int, Run]]) -> list[Any]:
        """The indexes over these runs: those that were begun in the background, the others built now."""
        if not wanted:
            return []
        begun = [self.jobs[memory].get(run) for memory, run in wanted]
        started = time.perf_counter()
        late = any(job is not None and job.pending for job in begun)
        tasks: list[Callable[[], Any]] = [
            job.outcome if job else self._build_task(memory, run)
            for (memory, run), job in zip(wanted, begun, strict=True)
        ]
        made = run_all(tasks) if self.parallel else [task() for task in tasks]
        taken = time.perf_counter() - started
        if late:
            self.stalled_seconds += taken
        if None in begun:
            self.build_seconds += taken
        self.build_seconds += sum(job.seconds for job in begun if job is not None)
        failures = [(*which, job.error) for which, job in zip(wanted, begun, strict=True) if job and job.error]
        if failures:
            self._tell(failures)
        return made

    def _tell(self, failures: list[tuple[int, Run, BaseException]]) -> NoReturn:
        """Raises what builds in the background have raised, of which none is tried again."""
        for memory, run, _ in failures:
            self.failed[memory].add(run)
        memory, run, error = failures[0]
        if ran_out(error):
            doing = f"to build an index over {len(run)} keys of a {self.spec!r} memory in the background"
            raise as_out_of_memory(error, doing) from error
        others = f", and so did {len(failures) - 1} others" if len(failures) > 1 else ""
        raise BuildFailed(
            f"building an index over keys {run.start} to {run.stop - 1} of memory {memory} of a {self.spec!r} memory "
            f"failed ({type(error).__name__}: {error}){others}: no key is lost, they are searched without it; call "
            "again to go on"
        ) from error

    def _build_task(self, memory: int, run: Run) -> Callable[[], Any]:
        # Not Python's hash: it differs from run to run for some types, and this must not.
        seed = (self.seed * 1_000_003 + (memory + self.first_memory) * 1_009 + run.start * 31 + len(run)) % (2**31 - 1)
        return functools.partial(self._build, memory, run, seed)

    def _build(self, memory: int, run: Run, seed: int) -> Any:
        # The ring moves on meanwhile. When it comes to overwrite these keys the index is wanted no more.
        return self._build_part(self.ring.in_order(memory, run.start, run.stop).cpu().numpy(), seed)

    def _forget_jobs(self, memory: int) -> None:
        for job in self.jobs[memory].values():
            self._abandon(job)
        self.jobs[memory] = {}

    def _abandon(self, job: Job[Any]) -> None:
        job.abandon()
        self._ending = [job for job in (*self._ending, job) if job.pending]

    # Searching --------------------------------------------------------------------------------------------------------

    def _search_sealed(
        self, queries: Tensor, k: int, memories: Tensor, parts: list[tuple[Part, ...]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Candidates of the parts: scores and slots (M', Q, any), or nothing if there is no part."""
        columns = max(len(sealed) for sealed in parts)
        if not columns:
            return []
        width = self._fetch(k)
        shape = (*queries.shape[:2], columns, width)
        scores = np.full(shape, -np.inf, dtype=np.float32)
        slots = np.full(shape, -1, dtype=np.int64)
        plain = queries.cpu().numpy()

        def search(row: int, column: int, part: Part) -> None:
            wanted = min(width, len(part.run))
            found, positions = self._search_part(part.index, plain[row], wanted)
            missing = positions < 0
            target = slots[row, :, column, :wanted]
            start = part.run.start % self.capacity
            np.add(positions, start, out=target, casting="unsafe")
            if start + len(part.run) > self.capacity:
                target[target >= self.capacity] -= self.capacity
            scores[row, :, column, :wanted] = found
            if missing.any():
                target[missing] = -1
                scores[row, :, column, :wanted][missing] = -np.inf

        tasks = [
            functools.partial(search, row, column, part)
            for row, sealed in enumerate(parts)
            for column, part in enumerate(sealed)
        ]
        if self.parallel:
            run_all(tasks)
        else:
            for task in tasks:
                task()
        all_scores = torch.from_numpy(scores).flatten(2).to(self.device)
        all_slots = torch.from_numpy(slots).flatten(2).to(self.device)
        if all(self._is_exact(part.index) for sealed in parts for part in sealed):
            return [(all_scores, all_slots)]
        if columns > 1:
            all_scores, order = all_scores.topk(width, dim=-1, sorted=False)
            all_slots = all_slots.gather(-1, order)
        return [rescore(self.ring, queries, all_slots, k, memories, metric=self.metric)]

    def _search_rest(
        self, queries: Tensor, k: int, memories: Tensor, parts: list[tuple[Part, ...]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Exact search of the keys without a part: the k best scores and slots (M', Q, k) of each stretch of slots."""
        which = memories.tolist()
        totals = self.ring.totals[memories].tolist()
        stretches: dict[int, list[int]] = {}
        """Lengths (M') by first slot: memories that move together are searched together."""
        for row, (total, sealed) in enumerate(zip(totals, parts, strict=True)):
            for first, length in self._unsealed(total, sealed):
                stretches.setdefault(first, [0] * len(which))[row] = length
        return [
            search_ring(self.ring, queries, k, which, lengths, self.metric, first=first)
            for first, lengths in sorted(stretches.items())
        ]

    def _unsealed(self, total: int, sealed: tuple[Part, ...]) -> list[tuple[int, int]]:
        """Stretches of slots (first, length) whose keys no part holds; those next to each other are one."""
        oldest = max(0, total - self.capacity)
        edges = [oldest, *(edge for part in sealed for edge in (part.run.start, part.run.stop)), total]
        runs = [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
        pieces = []
        for start, stop in runs:
            first, length = start % self.capacity, stop - start
            here = min(length, self.capacity - first)
            pieces.append((first, here))
            if here < length:
                pieces.append((0, length - here))
        joined: list[tuple[int, int]] = []
        for first, length in sorted(pieces):
            if joined and sum(joined[-1]) == first:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((first, length))
        return joined


__all__ = ["PARTS", "SMALLEST_PART", "Part", "PartOptions", "SegmentedBackend"]
