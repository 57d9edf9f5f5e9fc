"""The whole contract of a memory backend, in prose and in code.

Letters used throughout this package:
    M   memories a backend holds; M' of them when a call names only some
    C   capacity: keys a memory keeps at most
    T   new keys a memory gets in one call
    Q   queries a memory gets in one call
    D   dimension of a key
    K   neighbours asked for (argument `k`)

A backend holds M independent memories of keys and searches them. In a transformer a memory belongs to one batch row
and one head: M = B * H, memory m = b * H + h. The values that belong to the keys are the caller's: `add` returns for
each key its slot, where the caller keeps the value, and `search` answers with slots.

What every backend promises, and `recollect.memory_backends.testing` holds:

* **Slots and order.** Key number n of a memory since its last reset has slot n mod C. The newest C keys are alive,
  the others are evicted, first in first out: an evicted key is never returned, an overwritten slot answers with its
  new key.
* **Right from the first key.** `search` answers from the first key on, before any training of an index, and sees
  every key whose `add` has returned.
* **Higher is better.** Scores fall along K for every metric: the inner product, minus the squared Euclidean
  distance (`l2`), or the cosine. A missing neighbour is slot -1 with score -inf, and stands last.
* **Memories are independent.** Adding to, resetting or searching some leaves the others as they were.
* **The caller's tensors are left alone.** They are detached, cast and copied where needed, never changed, never kept.
  No gradient flows through a backend: attention recomputes its logits from `gather_keys`.
* **Same seed, same calls, same answer**, where `Capabilities.deterministic` says so.
* **Any number of threads.** Searches and gathers run side by side. What changes a memory (`add`, `reset`,
  `set_search_options`) or writes it (`save`) waits until they are done and runs alone, and neither side starves. So an
  answer is always that of one state, as it was between two changes. A caller who needs several calls to see the same
  state (a search, then `gather_keys` of what it found) makes them within `with memory.unchanged():`. A library that
  cannot search from several threads has a lock of its own in its backend's file.
* **An append takes place or it does not.** One that fails half way (out of memory, Ctrl-C) leaves the keys, the slots
  and the answers as they were.
* **Closed is closed.** `wait()` returns when no work is left in the background, `close()` ends it and gives back what
  the memory holds; every later call raises `ClosedMemory`. `with make_backend(...) as memory:` closes it at the end.

A new backend is one file in `implementations/` with one subclass that fills in `_add`, `_search` and `_reset`. The
public methods here validate and cast for it. The raw keys stand in `self.ring`, already up to date when a hook runs;
for the metric `cosine` the ring and the hooks see unit vectors and the metric `inner_product`. Several threads may be
in `_search` at once and never in any other hook: what it changes (a cache, a workspace of the library) it must guard
itself. Work in the background never takes this class's lock: its results are taken in by a later call of a hook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from recollect.memory_backends.arguments import check_device, check_finite, check_memories, check_vectors
from recollect.memory_backends.budget import check_grown, check_planned
from recollect.memory_backends.calls import closed_error, full_precision, plain_tensors, reads, writes
from recollect.memory_backends.declared import Declared
from recollect.memory_backends.errors import (
    ClosedMemory,
    InvalidInput,
    MemoryBackendError,
    UnsupportedOperation,
    UnusableMemory,
)
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.locking import ReadersWriterLock
from recollect.memory_backends.numbering import Numbered
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.out_of_memory import as_out_of_memory, check_fits, ran_out
from recollect.memory_backends.pages import lazy_zeros
from recollect.memory_backends.records import (
    METRICS,
    Capabilities,
    MemoryStats,
    Metric,
    NoOptions,
    Requirement,
    SearchResult,
)
from recollect.memory_backends.spec import format_spec, make_options, options_given, with_search_options
from recollect.memory_backends.undo import Undo


class MemoryBackend(Declared, Numbered, ABC):
    """M independent first-in first-out memories of keys, and their search. The module's text is the contract.

    Args:
        options: an instance of the class's `Options`, or a mapping to make one from.
        num_memories: M, at least 1.
        capacity: C, at least 1.
        dim: D, at least 1.
        metric: "inner_product", "l2" or "cosine".
        device: where the raw keys and, where the backend can, the index live. Arguments may come from any device;
            results go back to the device of the argument.
        seed: decides everything random.

    Raises:
        BackendUnavailable: the library is not installed.
        DiskFull: the folder that the keys should lie in has no room for them.
        InvalidInput: a number is out of range.
        OutOfMemory: the keys do not fit.
        OverBudget: keys and index would take more than `max_bytes`.
        UnsupportedOperation: the backend can't do this metric or device.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    Options: ClassVar[type] = NoOptions
    capabilities: ClassVar[Capabilities] = Capabilities()
    requires: ClassVar[tuple[Requirement, ...]] = ()
    needs_card: ClassVar[bool] = False
    """Whether it can be made only where there is a GPU, wherever its raw keys lie."""
    one_shared: ClassVar[bool] = False
    """Whether it is for one large memory that many share, rather than for a memory of every batch row and head: then
    the suites do not measure it unless it is named, and benchmarks of its own say what it costs."""
    search_options: ClassVar[tuple[str, ...]] = ()
    """Names of the options that `set_search_options` may change."""
    sweep: ClassVar[tuple[str, ...]] = ()
    """Specs that the benchmarks run; empty means the name alone."""
    curve: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Search options by name with values from coarse to thorough, which trace the curve of recall against time; of
    several options every combination. Empty where there is nothing to trace."""
    builds: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Likewise the options fixed at building that tuning may try."""
    index_may_fail: ClassVar[bool] = True
    """Whether `_add` can raise. False where it does nothing that could, since the ring is the index: then an append
    need not keep the keys that it overwrites until it has succeeded."""
    recall_floor: ClassVar[float] = 0.9
    """Recall against `exact` that every spec of `sweep` must reach in the conformance suite."""

    @plain_tensors
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
        for what, number in (("num_memories", num_memories), ("capacity", capacity), ("dim", dim)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InvalidInput(f"{what} is {number!r}; it must be a whole number of at least 1")
        if options is None or isinstance(options, Mapping):
            options = make_options(self.Options, options or {}, name=self.name)
        elif not isinstance(options, self.Options):
            raise InvalidInput(f"options of {self.name!r} are a {self.Options.__name__} or a mapping, got {options!r}")
        self.check_available()
        capabilities = self.capabilities_with(options)
        if capabilities != self.capabilities:
            vars(self)["capabilities"] = capabilities  # what the class declares holds for its default options
        if metric not in self.capabilities.metrics:
            can = ", ".join(self.capabilities.metrics)
            raise UnsupportedOperation(f"{self.name!r} does not search by metric {metric!r}; it can search by {can}")
        self._lock = ReadersWriterLock()
        self._refusal: MemoryBackendError | None = None
        """What every call raises, once the memory is closed or cannot be used."""
        self.options = options
        self.num_memories = num_memories
        self.capacity = capacity
        self.dim = dim
        self.metric = metric
        self.device = check_device(device, self.name, self.capabilities.devices)
        self.seed = seed
        self.build_seconds = 0.0
        self.stalled_seconds = 0.0
        self._norms: Tensor | None = None
        self.key_options = options if isinstance(options, KeyStorageOptions) else KeyStorageOptions()
        """How the keys are stored; the defaults for a backend whose options say nothing of it."""
        doing = f"to hold the keys of a {self.spec!r} memory (num_memories={num_memories}, {capacity=}, {dim=})"
        planned = check_planned(self)
        if self.device.type == "cpu":
            check_fits(planned.keys, doing)
        try:
            self.ring = self._make_ring()
            if metric == "cosine":
                self._norms = lazy_zeros(num_memories, capacity, device=self.device)
        except (MemoryError, RuntimeError) as error:
            if ran_out(error):
                raise as_out_of_memory(error, doing) from error
            raise

    @property
    def checks_late(self) -> bool:
        """Whether queries may be searched before it is known that they are finite; what is found is thrown away then.
        For a search on a card, which takes any numbers and waits for its end anyway."""
        return False

    # What a backend fills in ------------------------------------------------------------------------------------------

    @abstractmethod
    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        """Indexes keys that `self.ring` already holds.

        Args:
            keys: (M', T', D) float32 on `self.device`, T' = min(T, C) >= 1: the keys that stay, as the ring gives
                them back.
            slots: (M', T') int64 on the CPU, no -1.
            memories: (M',) int64 on the CPU, distinct.
        """

    @abstractmethod
    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        """Finds neighbours; at least one of `memories` holds a key.

        Args:
            queries: (M', Q, D) float32 on `self.device`, contiguous, Q >= 1.
            k: at least 1 and at most the longest length among `memories`.
            memories: (M',) int64 on the CPU, distinct.

        Returns:
            Scores (M', Q, k) float32 falling along k, and slots (M', Q, k) int64, -1 where missing (those last).
        """

    @abstractmethod
    def _reset(self, memories: Tensor) -> None:
        """Forgets every key of `memories` (M',) int64 on the CPU; `self.ring` is empty there already."""

    def _make_ring(self) -> KeyRing:
        """What keeps the raw keys; for a backend whose keys lie elsewhere, something that acts as a ring."""
        return KeyRing(
            self.num_memories,
            self.capacity,
            self.dim,
            device=self.device,
            storage=self.key_options.storage,
            keys_in=self.key_options.keys_in,
        )

    def _read_from(self, ring: KeyRing) -> None:
        """Reads keys where another backend keeps them, instead of a ring of its own; before any key is added."""
        self.ring = ring

    def _set_search_options(self, changed: frozenset[str]) -> None:
        """Brings the index in line with `self.options`, of which the named ones were changed."""

    def _index_bytes(self) -> int:
        """Bytes of the index beside the raw keys in `self.ring`."""
        return 0

    @classmethod
    def _planned_index_bytes(cls, options: Any, *, capacity: int, dim: int, metric: str) -> int | None:
        """Bytes of one full memory's index at most, also while it is built; None where nobody can say beforehand.

        By this `max_bytes` is checked when a memory is made; whatever it says, the bytes of `_index_bytes` are held to
        the budget at every append.
        """
        return 0 if cls._index_bytes is MemoryBackend._index_bytes else None

    def _pending_builds(self) -> int:
        """How many indexes are being built in the background."""
        return 0

    def _wait(self) -> None:
        """Returns when no work is left in the background."""

    def _close(self) -> None:
        """Ends the work in the background and gives back files and threads; called once."""

    def _recover(self, memories: Tensor) -> None:
        """Brings the index in line with `self.ring` after `_add` to `memories` failed half way; by default anew."""
        self._index_again(memories)

    def _index_again(self, memories: Tensor) -> None:
        totals = self.ring.totals.clone()
        self.ring.totals[memories] = 0
        try:
            self._reset(memories)
        finally:
            self.ring.totals.copy_(totals)
        self._index_anew(memories)

    def _save(self, directory: Path) -> None:
        """Writes the index's own files into an empty folder; nothing by default, since `_restore` rebuilds."""

    def _restore(self, directory: Path) -> None:
        """Brings the index back after `self.ring` was read from a saved memory; by default from the raw keys."""
        self._index_anew(torch.arange(self.num_memories))

    def _index_anew(self, memories: Tensor) -> None:
        for memory in memories.tolist():
            keys = self.ring.in_order(memory)
            if len(keys):
                first = self.ring.first_number(memory)
                numbers = torch.arange(first, first + len(keys))
                self._add(keys.clone()[None], (numbers % self.capacity)[None], torch.tensor([memory]))

    # What a caller uses -----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> str:
        """The canonical registry string of this backend and its options."""
        return format_spec(self.name, options_given(self.options))

    @property
    def lengths(self) -> Tensor:
        """(M,) int64 on the CPU: how many keys each memory holds."""
        with self._lock.reading:
            return self.ring.lengths

    @writes
    def add(self, keys: Tensor, *, memories: Iterable[int] | Tensor | None = None) -> Tensor:
        """Appends keys, evicting the oldest beyond the capacity.

        Args:
            keys: (M', T, D), any floating type and device, finite.
            memories: the M' distinct memories they go to; all M in order when None.

        Returns:
            (M', T) int64 on the device of `keys`: their slots, -1 for keys evicted within this same call.

        Raises:
            InvalidInput: a wrong shape, NaN or infinity, or a memory that does not exist.
            OutOfMemory: the index cannot grow; the memory is as it was.
            OverBudget: it would grow beyond `max_bytes`; the memory is as it was.
        """
        which = check_memories(memories, self.num_memories)
        prepared = check_vectors(keys, which, what="keys", dim=self.dim, device=self.device)
        norms = None
        if self._norms is not None:
            norms = prepared.norm(dim=-1)
            prepared = prepared / norms.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        if not prepared.shape[1] or not len(which):
            return torch.zeros(prepared.shape[:2], dtype=torch.int64, device=keys.device)
        indexed = False
        undo = Undo(self.ring, self._norms, which, prepared.shape[1], keep_rows=self.index_may_fail)
        try:
            slots = self.ring.append(prepared, which)
            kept = slots[:, -min(slots.shape[1], self.capacity) :]
            if self._norms is not None and norms is not None:
                self._norms[which.to(self.device)[:, None], kept.to(self.device)] = norms[:, -kept.shape[1] :]
            with full_precision(self.device):
                self._add(self.ring.rounded(prepared[:, -kept.shape[1] :]).contiguous(), kept, which)
            indexed = True
            if self.key_options.max_bytes:
                check_grown(self)
        except BaseException:
            undo.roll_back(self, indexed=indexed)
            raise
        return slots.to(keys.device)

    @reads
    def search(self, queries: Tensor, k: int, *, memories: Iterable[int] | Tensor | None = None) -> SearchResult:
        """Finds the k best keys for each query, each memory searched by its own queries.

        Args:
            queries: (M', Q, D), any floating type and device, finite.
            k: at least 1; neighbours beyond a memory's length are missing (slot -1, score -inf).
            memories: the M' distinct memories that are searched; all M in order when None.

        Raises:
            InvalidInput: a wrong shape, NaN or infinity, k below 1, or a memory that does not exist.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidInput(f"k is {k!r}; it must be a whole number of at least 1")
        which = check_memories(memories, self.num_memories)
        late = self.checks_late
        asked = check_vectors(queries, which, what="queries", dim=self.dim, device=self.device, finite=not late)
        prepared, total = asked.contiguous(), asked.sum() if late else None
        if self._norms is not None:
            prepared = torch.nn.functional.normalize(prepared, dim=-1, eps=torch.finfo(torch.float32).tiny)
        shape = (*prepared.shape[:2], k)
        longest = int(self.ring.lengths[which].max()) if len(which) else 0
        if longest == 0 or prepared.shape[1] == 0:
            scores = torch.full(shape, -torch.inf, device=queries.device)
            return SearchResult(scores, torch.full(shape, -1, dtype=torch.int64, device=queries.device))
        found = min(k, longest)
        with full_precision(self.device):
            scores, slots = self._search(prepared, found, which)
        if total is not None:
            check_finite(asked, what="queries", total=total)
        if found < k:
            scores = torch.nn.functional.pad(scores, (0, k - found), value=-torch.inf)
            slots = torch.nn.functional.pad(slots, (0, k - found), value=-1)
        return SearchResult(scores.to(queries.device), slots.to(queries.device))

    @reads
    def gather_keys(self, slots: Tensor, *, memories: Iterable[int] | Tensor | None = None) -> Tensor:
        """The keys at `slots` as they were added, or as near as their storage keeps them, in float32.

        Args:
            slots: (M', Q, K) int64, each alive in its memory or -1.
            memories: the M' memories they belong to; all M in order when None.

        Returns:
            (M', Q, K, D) float32 on the device of `slots`; zeros where the slot is -1.
        """
        which = check_memories(memories, self.num_memories)
        if slots.dim() != 3 or slots.dtype != torch.int64 or slots.shape[0] != len(which):
            raise InvalidInput(
                f"slots are (memories={len(which)}, queries, k) int64, got {tuple(slots.shape)} {slots.dtype}"
            )
        lengths = self.ring.lengths[which].to(slots.device)[:, None, None]
        if bool(((slots < -1) | (slots >= lengths)).any()):
            raise InvalidInput(f"a slot is outside -1..length-1 of its memory (lengths {self.lengths[which].tolist()})")
        keys = self.ring.gather(slots, which)
        if self._norms is not None:
            rows = which.to(self.device)[:, None, None]
            keys = keys * self._norms[rows, slots.to(self.device).clamp(min=0)][..., None]
        return keys.to(slots.device)

    @writes
    def reset(self, memories: Iterable[int] | Tensor | None = None) -> None:
        """Empties some memories, or all of them: a new document begins there."""
        which = check_memories(memories, self.num_memories)
        if self._refusal is not None and len(which) < self.num_memories:
            raise UnusableMemory(*self._refusal.args)
        if len(which):
            self.ring.reset(which)
            self._reset(which)
        self._refusal = None

    @writes
    def set_search_options(self, **options: Any) -> None:
        """Changes options that need no rebuild, for sweeps over one built index.

        Raises:
            InvalidSpec: an option is unknown or ill-typed.
            UnsupportedOperation: the option is fixed once the index is made.
        """
        changed = with_search_options(self.options, options, self.search_options, name=self.name)
        former, self.options = self.options, changed
        try:
            self._set_search_options(frozenset(options))
        except BaseException:
            self.options = former
            raise

    def unchanged(self) -> AbstractContextManager[None]:
        """`with memory.unchanged():` the calls within see one state; other threads search on, changes wait."""
        return self._lock.reading

    @reads
    def wait(self) -> None:
        """Returns when no work is left in the background, such as building an index; at once where there is none."""
        self._wait()

    @plain_tensors
    def close(self) -> None:
        """Ends the work in the background and gives back what the memory holds; every later call is refused."""
        with self._lock.writing:
            if not isinstance(self._refusal, ClosedMemory):
                self._close()
                self.ring.close()
                self._norms = None
                self._refusal = closed_error(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @reads
    def stats(self) -> MemoryStats:
        """Keys, bytes and build time now."""
        keys = int(self.lengths.sum())
        norm_bytes = 0 if self._norms is None else self._norms.element_size()
        return MemoryStats(
            keys,
            keys * (self.ring.key_bytes + norm_bytes),
            self._index_bytes(),
            self.build_seconds,
            self._pending_builds(),
            self.stalled_seconds,
            keys * self.ring.mapped_key_bytes,
        )

    @writes
    def save(self, directory: str | Path) -> None:
        """Writes the memory into a folder, whole or not at all: JSON and raw arrays, nothing pickled.

        Raises:
            DiskFull: there is no room; what was saved there before is as it was.
        """
        from recollect.memory_backends.storage import save_backend

        save_backend(self, Path(directory))


__all__ = [
    "METRICS",
    "Capabilities",
    "MemoryBackend",
    "MemoryBackendError",
    "MemoryStats",
    "Metric",
    "NoOptions",
    "Requirement",
    "SearchResult",
]
