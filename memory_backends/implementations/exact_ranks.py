"""Exact search whose keys are spread over the ranks of a torch.distributed job: each holds one part of W.

Every rank makes the memory with the same arguments and has M memories of its own (of its own batch rows); slot s of
each lies on rank s mod W (`sharding`). A rank's part is an `exact` backend of W * M memories, which keeps, evicts
and searches them: nothing of a search is written here a second time.

    add          new keys go to the ranks where their slots lie; each rank sends (W - 1) / W of its keys
    search       queries go to every rank, each of which answers from its part; the answers are merged by their scores
    gather_keys  keys are asked for where they lie, each of them once
    reset        tells nobody: the counts of a rank's memories stand in the header of its every call

All ranks make the same calls with equal shapes (`rank_group`), as a training step does; what they hold may differ. The
others are told with the next call that a row began a document. In one process, without a job, it is `exact`.

With `shared=true` the M memories belong to all ranks: each is given the same keys and keeps its slots of them, which is
1/W of them, and asks what it likes. That is what holds a memory that no rank has room for.

Letters as in `base`; W ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from recollect.memory_backends.arguments import check_memories, check_vectors
from recollect.memory_backends.base import Capabilities, MemoryBackend, SearchResult
from recollect.memory_backends.calls import reads, writes
from recollect.memory_backends.errors import InvalidInput
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.pages import lazy_zeros
from recollect.memory_backends.rank_group import (
    ADD,
    GATHER,
    MAKE,
    RESTORE,
    SAVE,
    SEARCH,
    Call,
    RankGroup,
    RanksDiffer,
    Traffic,
    group_of,
    job,
    timeout_of_job,
)
from recollect.memory_backends.rank_part import RankPart
from recollect.memory_backends.rank_ring import CountedRing
from recollect.memory_backends.rank_shards import Appended
from recollect.memory_backends.records import MemoryStats
from recollect.memory_backends.registry import make_backend
from recollect.memory_backends.sharding import Share
from recollect.memory_backends.spec import format_spec, make_options, options_given

PART = "exact"
"""The backend of a rank's part."""
KEYS_AT_ONCE = 4096
"""Keys of each memory that are brought home at a time to be saved."""


@dataclass(frozen=True, kw_only=True)
class ExactRanksOptions(KeyStorageOptions):
    """Options of `exact-ranks`."""

    shared: bool = field(
        default=False,
        metadata={
            "help": "the memories belong to all ranks together: each is given the same keys, keeps a part of them, and "
            "searches by queries of its own; otherwise each rank has memories of its own, spread over all",
            "unseen": "in one process both are the same",
        },
    )
    deadline_seconds: float = field(
        default=0.0,
        metadata={
            "help": "how long the other ranks are waited for before they count as lost, above what a rank may take "
            "between two calls (a checkpoint, a validation); 0 is the time-out of the job's own process group",
            "unseen": "it decides when an error is raised",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deadline_seconds < 0:
            raise ValueError(f"deadline_seconds={self.deadline_seconds} is below 0")


class ExactRanks(MemoryBackend):
    """The true nearest neighbours, each rank of a job holding one part of the keys.

    Attributes:
        ranks: the ranks of the job; None in a process by itself.
        part: the `exact` backend that holds what lies on this rank: memory j * M + m is memory m of rank j; where the
            memories are shared, memory m is.
    """

    name = "exact-ranks"
    summary = "exact search with the keys spread over the ranks of a torch.distributed job"
    Options: ClassVar[type] = ExactRanksOptions
    options: ExactRanksOptions
    capabilities: ClassVar[Capabilities] = Capabilities(exact=True, devices=("cpu", "cuda"))
    one_shared = True  # in one process, as the suites run, it is `exact`
    recall_floor = 1.0

    def __init__(
        self,
        options: Any = None,
        *,
        num_memories: int,
        capacity: int,
        dim: int,
        metric: str = "inner_product",
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        rank, size = job()
        if options is None or isinstance(options, Mapping):
            options = make_options(self.Options, options or {}, name=self.name)
        # What is not a whole number above 0 is for the base class to refuse.
        owners = 1 if getattr(options, "shared", False) else size
        parts = num_memories * owners if type(num_memories) is int else num_memories
        slots = max(1, Share(capacity, size, rank).size) if type(capacity) is int and capacity > 0 else capacity
        super().__init__(options, num_memories=parts, capacity=slots, dim=dim, metric=metric, device=device, seed=seed)
        self.ring.close()
        self.ranks: RankGroup | None = None
        part: dict[str, Any] = {
            "num_memories": parts,
            "capacity": slots,
            "dim": dim,
            # Alone, this class takes keys to unit length itself, for the part's hooks see what its own would.
            "metric": "inner_product" if size == 1 and metric == "cosine" else metric,
            "device": self.device,
            "seed": seed,
        }
        if size == 1:
            self.part = make_backend(self._spec_of_part(), **part)
            self.ring = self.part.ring
            return
        # The part keeps norms of its own; these are for files, and take no memory until then.
        self._norms = lazy_zeros(num_memories, capacity, device=torch.device("cpu")) if metric == "cosine" else None
        self.num_memories, self.capacity = num_memories, capacity
        self.ranks = group_of(self.options.deadline_seconds or timeout_of_job(), self.device)
        with self.ranks.lock:
            try:
                self.part = make_backend(self._spec_of_part(), **part)
            except Exception as error:
                self.ranks.agree(Call(MAKE, self.ranks.memories), torch.zeros(0, dtype=torch.int64), error)
                raise
            made = f"{self.spec!r} with {num_memories=}, {capacity=}, {dim=}, {metric=} on {self.device.type}"
            self._number = self.ranks.make(made, table=2 * num_memories + size + 1)
        self.ring = self._counted = CountedRing(num_memories, capacity, dim, like=self.part.ring)
        self.spread = RankPart(
            self.part, self.ranks, num_memories=num_memories, capacity=capacity, shared=self.options.shared
        )

    def _spec_of_part(self) -> str:
        given = options_given(self.options)
        shared = {option.name for option in dataclasses.fields(KeyStorageOptions)}
        return format_spec(PART, {name: value for name, value in given.items() if name in shared})

    @property
    def traffic(self) -> Traffic:
        """What this rank has moved so far, for this memory and all that share its ranks; nothing in one process."""
        return Traffic() if self.ranks is None else dataclasses.replace(self.ranks.traffic)

    # In a process by itself -------------------------------------------------------------------------------------------

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        self.part._add(keys, slots, memories)

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        return self.part._search(queries, k, memories)

    def _reset(self, memories: Tensor) -> None:
        self.part._reset(memories)

    def _restore(self, directory: Path) -> None:
        self._index_anew(torch.arange(self.num_memories))

    def _index_bytes(self) -> int:
        return self.part._index_bytes()

    @classmethod
    def _planned_index_bytes(cls, options: Any, *, capacity: int, dim: int, metric: str) -> int:
        return 0  # As `exact`.

    def _close(self) -> None:
        self.part.close()

    # With other ranks: what a caller uses -----------------------------------------------------------------------------

    @writes
    def add(self, keys: Tensor, *, memories: Iterable[int] | Tensor | None = None) -> Tensor:
        """As every backend's; all ranks append as many keys to as many memories.

        Raises:
            RanksDiffer: they do not, or one of them could not; no rank appended anything.
            RankLost: a rank ended or does not answer.
        """
        if self.ranks is None:
            return super().add(keys, memories=memories)
        with self.ranks.lock:
            which, prepared, told = self._agree(ADD, keys, memories)
            slots = torch.zeros(prepared.shape[:2], dtype=torch.int64)
            if not prepared.numel():
                return slots.to(keys.device)
            with self.ranks.together():
                owners = len(self.spread.known)
                before = told[:owners, 0]
                after = before + (told[:owners, 1] > 0) * prepared.shape[1]
                mine = self._mine(before, after)
                # Those that stay, in the order of `mine`: memory by memory, oldest first.
                stay = min(prepared.shape[1], self.capacity)
                rows = prepared[which.argsort().to(self.device), -stay:].flatten(0, 1)
                self.spread.take_in(rows, mine, before, after)
                numbers = self.ring.totals[which, None] + torch.arange(prepared.shape[1])
                slots = numbers % self.capacity
                slots[:, : prepared.shape[1] - stay] = -1
                self.ring.totals[which] += prepared.shape[1]
            return slots.to(keys.device)

    @reads
    def search(self, queries: Tensor, k: int, *, memories: Iterable[int] | Tensor | None = None) -> SearchResult:
        """As every backend's; all ranks search as many memories by as many queries for as many neighbours.

        Raises:
            RanksDiffer: they do not, or one of them could not.
            RankLost: a rank ended or does not answer.
        """
        if self.ranks is None:
            return super().search(queries, k, memories=memories)
        with self.ranks.lock:
            _, prepared, told = self._agree(SEARCH, queries, memories, k)
            with self.ranks.together():
                scores, slots = self.spread.search(prepared, k, told)
        return SearchResult(scores.to(queries.device), slots.to(queries.device))

    @reads
    def gather_keys(self, slots: Tensor, *, memories: Iterable[int] | Tensor | None = None) -> Tensor:
        """As every backend's; all ranks ask for as many keys.

        Raises:
            RanksDiffer: they do not, or one of them could not.
            RankLost: a rank ended or does not answer.
        """
        if self.ranks is None:
            return super().gather_keys(slots, memories=memories)
        with self.ranks.lock:
            return self._gather(self.ranks, slots, memories).to(slots.device)

    @writes
    def reset(self, memories: Iterable[int] | Tensor | None = None) -> None:
        """As every backend's, and as each rank needs it: the others learn of it with the next call."""
        if self.ranks is None:
            super().reset(memories)
            return
        self.ranks.check_usable()
        self.ring.reset(check_memories(memories, self.num_memories))

    @writes
    def save(self, directory: str | Path) -> None:
        """Writes the memories of this rank; every rank saves, each into a folder of its own.

        What is written is what a process by itself would write: it can be loaded on any number of ranks.
        """
        if self.ranks is None:
            super().save(directory)
            return
        with self.ranks.lock:
            try:
                self._bring_home(self.ranks)
                super().save(directory)
            finally:
                self._counted.leave_home()

    @reads
    def stats(self) -> MemoryStats:
        """Keys of this rank's own memories, and the bytes of what lies on this rank."""
        if self.ranks is None:
            return super().stats()
        return dataclasses.replace(self.part.stats(), keys=int(self.ring.lengths.sum()))

    # With other ranks: how --------------------------------------------------------------------------------------------

    def _agree(
        self, kind: int, vectors: Tensor, memories: Iterable[int] | Tensor | None, k: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Checks what was handed in and agrees on the call.

        Returns:
            The memories meant (M',), the vectors (M', n, D), and (W, 2, M) as `RankPart.search` takes it.
        """
        assert self.ranks is not None
        try:
            if isinstance(k, bool) or not isinstance(k, int) or k < 1:
                raise InvalidInput(f"k is {k!r}; it must be a whole number of at least 1")
            which = check_memories(memories, self.num_memories)
            what = "keys" if kind == ADD else "queries"
            prepared = check_vectors(vectors, which, what=what, dim=self.dim, device=self.device)
        except Exception as error:
            self.ranks.agree(Call(kind, self._number), self.ring.totals, error)
            raise
        places = torch.zeros(self.num_memories, dtype=torch.int64)
        places[which] = torch.arange(1, len(which) + 1)
        call = Call(kind, self._number, len(which), prepared.shape[1], k)
        words = torch.cat((self.ring.totals, places, self._checksum(prepared if kind == ADD else None)))
        told = self._follow(self.ranks.agree(call, words), call, 2 * self.num_memories + 1)
        return which, prepared, told[:, :-1].view(-1, 2, self.num_memories)

    def _checksum(self, keys: Tensor | None) -> Tensor:
        """(1,) by which ranks that share memories find out that they were given different keys."""
        if keys is None or not self.options.shared:
            return torch.zeros(1, dtype=torch.int64)
        return keys.contiguous().view(torch.int32).sum(dtype=torch.int64).reshape(1).cpu()

    def _follow(self, told: Tensor, call: Call, alike: int) -> Tensor:
        """Brings the part in line with what the ranks told; the first `alike` numbers must be equal for shared ones."""
        assert self.ranks is not None
        if self.options.shared:
            differing = (told[:, :alike] != told[0, :alike]).any(1).nonzero().flatten().tolist()
            if differing:
                raise RanksDiffer(
                    f"{call}: ranks {differing} gave other keys, named other memories or reset others than rank 0, and "
                    "the memories are shared: give every rank the same (shared=false for memories of its own). "
                    "Nothing was done and nothing has changed"
                )
        with self.ranks.together():
            self.spread.follow(told[: len(self.spread.known), : self.num_memories])
        return told

    def _mine(self, before: Tensor, after: Tensor) -> Appended:
        """This rank's keys that stay, of those between two counts (O, M)."""
        assert self.ranks is not None
        owner = 0 if self.options.shared else self.ranks.rank
        return Appended.between(before[owner], after[owner], self.capacity)

    def _gather(self, ranks: RankGroup, slots: Tensor, memories: Iterable[int] | Tensor | None) -> Tensor:
        try:
            which = check_memories(memories, self.num_memories)
            if slots.dim() != 3 or slots.dtype != torch.int64 or slots.shape[0] != len(which):
                raise InvalidInput(
                    f"slots are (memories={len(which)}, queries, k) int64, got {tuple(slots.shape)} {slots.dtype}"
                )
            lengths = self.ring.lengths[which].to(slots.device)[:, None, None]
            if bool(((slots < -1) | (slots >= lengths)).any()):
                raise InvalidInput(
                    f"a slot is outside -1..length-1 of its memory (lengths {self.lengths[which].tolist()})"
                )
            there = (slots >= 0).to(self.device)
            flat = (slots + (which.to(slots.device) * self.capacity)[:, None, None]).to(self.device)[there]
            wanted, places = flat.unique(return_inverse=True)
            lies_on = wanted % self.capacity % ranks.size
            order = lies_on.argsort(stable=True)
            counts = torch.bincount(lies_on, minlength=ranks.size).cpu()
        except Exception as error:
            ranks.agree(Call(GATHER, self._number), self.ring.totals, error)
            raise
        call = Call(GATHER, self._number, len(which), slots.shape[1], slots.shape[2])
        told = self._follow(ranks.agree(call, torch.cat((self.ring.totals, counts))), call, self.num_memories)
        with ranks.together():
            keys = self.spread.gather(wanted[order], told[:, self.num_memories :])
            # Where nothing is asked for, the row of zeros behind the others.
            rows = torch.cat((keys, keys.new_zeros(1, self.dim)))
            which_row = torch.full(there.shape, len(keys), device=self.device)
            which_row[there] = order.argsort()[places]
            gathered = rows.index_select(0, which_row.flatten()).view(*slots.shape, self.dim)
        return gathered

    # Files ------------------------------------------------------------------------------------------------------------

    def _bring_home(self, ranks: RankGroup) -> None:
        """Fills the ring's `home`, and the norms beside it, with this rank's own keys."""
        lengths, home = self.ring.lengths, self._counted.home
        told = ranks.agree(Call(SAVE, self._number), self.ring.totals)
        longest = int(told.max().clamp(max=self.capacity))
        home.totals.zero_()
        for start in range(0, longest, KEYS_AT_ONCE):
            slots = torch.arange(start, min(longest, start + KEYS_AT_ONCE)).expand(self.num_memories, -1)
            keys = self.gather_keys(torch.where(slots < lengths[:, None], slots, -1)[:, None])[:, 0].cpu()
            for memory, length in enumerate(lengths.tolist()):
                here = keys[memory, : max(0, length - start)]
                if len(here):
                    if self._norms is not None:
                        norms = here.norm(dim=-1)
                        self._norms[memory, start : start + len(here)] = norms
                        here = here / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
                    # From an empty memory on key number n has slot n: so the order is that of slots, as files have it.
                    home.append(here[None], torch.tensor([memory]))

    def _index_anew(self, memories: Tensor) -> None:
        if self.ranks is None:
            self.part._index_anew(memories)
            return
        ranks, home = self.ranks, self._counted.home
        with ranks.lock:
            after = ranks.agree(Call(RESTORE, self._number), self.ring.totals)[: len(self.spread.known)]
            with ranks.together():
                before = (after - self.capacity).clamp(min=0)
                mine = self._mine(before, after)
                home.totals.copy_(self.ring.totals)
                keys = torch.cat([home.in_order(memory) for memory in range(self.num_memories)])
                if self._norms is not None:
                    keys = keys * self._norms[mine.memories, mine.numbers % self.capacity][:, None]
                self.spread.start_from(before)
                self.spread.take_in(keys.to(self.device), mine, before, after)
        self._counted.leave_home()


__all__ = ["ExactRanks", "ExactRanksOptions"]
