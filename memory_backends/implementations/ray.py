"""One large memory in shards, each a process of Ray with any backend over its share of the keys.

    ray:shards=4,backend='faiss-ivf:nlist=256,nprobe=16'

Key number n of a memory belongs to shard (n mod C) mod S, so shards stay even and each one's own first-in first-out
order is the memory's (`sharding`). This process keeps the raw keys in the key ring as any backend does, gives out the
slots, answers `gather_keys`, and fills a shard again whose process was lost; the shards search. An append is sent and
not waited for. A search goes to all shards at once, and their answers are merged by score.

Letters as in `base`; S shards.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
import warnings
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.budget import plan_bytes
from recollect.memory_backends.calls import reads
from recollect.memory_backends.errors import CorruptMemory, InvalidSpec, UnsupportedOperation
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.ray_host import ShardAbout
from recollect.memory_backends.ray_link import Recovery, ShardLink, as_ours
from recollect.memory_backends.ray_options import BACKEND, NAME, RayOptions
from recollect.memory_backends.ray_session import SESSION, START_SECONDS
from recollect.memory_backends.ray_shards import PartialAnswer, Shards
from recollect.memory_backends.ray_start import PIP
from recollect.memory_backends.ray_store import StoreRing
from recollect.memory_backends.records import MemoryStats, Requirement
from recollect.memory_backends.registry import (
    build_spec,
    capabilities_of,
    class_and_options,
)
from recollect.memory_backends.sharding import Share, merge, shares

POLL_SECONDS = 0.05


class Ray(MemoryBackend):
    """One memory in shards, each searched by a process of its own, on this machine or over a cluster.

    Attributes:
        shards: the links to them, with what is known of their health.
    """

    name = NAME
    summary = "one large memory in shards, each a Ray process with any backend, here or over a cluster"
    Options = RayOptions
    options: RayOptions
    requires = (Requirement("ray", PIP),)
    capabilities: ClassVar[Capabilities] = Capabilities(exact=True)
    one_shared = True
    search_options = ("backend", "partial", "deadline_seconds")
    sweep = ("ray", "ray:backend=faiss-ivf")
    recall_floor = 0.8

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self.import_library("ray")
        parts = shares(self.capacity, self.options.shards)
        name = uuid.uuid4().hex
        self._made_of = self.options.backend
        self._bases: dict[int, list[int]] = {}
        self._lease = SESSION.lease(
            self.options.address, self.options.where, len(parts), name, self.options.deadline_seconds
        )
        self._finalizer = weakref.finalize(self, SESSION.give_back_later, self._lease)
        self._finalizer.atexit = False  # the session ends by itself
        about = _Maker(self)
        links = [
            ShardLink(share, host, name, about, self.ring) for share, host in zip(parts, self._lease.hosts, strict=True)
        ]
        self.shards = Shards(links)
        try:
            deadline = max(START_SECONDS, self.options.deadline_seconds)
            self._ask("stats", lambda _: (), torch.zeros(0, dtype=torch.int64), deadline=deadline)
        except BaseException as error:
            self._close()
            if isinstance(error, InvalidSpec):
                raise InvalidSpec(f"{NAME!r}: backend={self.options.backend!r}: {error}") from error
            raise

    @classmethod
    def capabilities_with(cls, options: RayOptions) -> Capabilities:
        able = capabilities_of(options.backend)
        if options.keys == "caller":
            return dataclasses.replace(able, devices=("cpu",), persistent=True)
        # A log of keys has no place for the lengths of vectors, which the cosine needs to give keys back.
        metrics = tuple(metric for metric in able.metrics if metric != "cosine")
        return dataclasses.replace(able, devices=("cpu",), persistent=False, metrics=metrics)

    @classmethod
    def keeps_keys(cls, options: RayOptions) -> bool:
        return options.keys == "caller"

    @classmethod
    def sources_with(cls, options: RayOptions) -> tuple[str, ...]:
        return (options.backend,)

    @classmethod
    def build_options(cls, options: RayOptions) -> dict[str, Any]:
        backend = build_spec(options.backend)
        given = super().build_options(options)
        return {**given, "backend": backend} if backend != BACKEND else given

    @classmethod
    def _planned_index_bytes(cls, options: RayOptions, *, capacity: int, dim: int, metric: str) -> int | None:
        """What the shards hold, wherever they run: their own keys and their indexes."""
        backend, own = class_and_options(options.backend)
        total = 0
        for share in shares(capacity, options.shards):
            planned = plan_bytes(
                backend, own, num_memories=1, capacity=share.size, dim=dim, metric=_metric_of_shard(metric)
            )
            if planned.index is None:
                return None
            total += planned.total
        return total

    # What there is to say of the shards -------------------------------------------------------------------------------

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """The shards that the last search was answered without; only `partial=true` lets there be any."""
        return self.shards.missing

    @property
    def recoveries(self) -> list[Recovery]:
        """Shards that were lost and are back: what was noticed when, how long each step took, and what was lost."""
        return self.shards.recoveries

    # The contract -----------------------------------------------------------------------------------------------------

    def _make_ring(self) -> KeyRing:
        if self.options.keys == "caller":
            return super()._make_ring()
        self.index_may_fail = False  # type: ignore[misc]  # an append overwrites nothing that would have to come back
        memory = weakref.ref(self)

        def gather(slots: Tensor, memories: Tensor) -> Tensor:
            this = memory()
            assert this is not None
            return this._gather_from_shards(slots, memories)

        return StoreRing(self.options.store, self.num_memories, self.capacity, self.dim, gather)

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        if isinstance(self.ring, StoreRing) and self.ring.due():
            self.ring.commit(self.ring.before)
        self.shards.append(keys, slots, memories)
        if isinstance(self.ring, StoreRing):
            self.ring.let_go(self.shards.needed_from(self.ring.totals))

    def _read_from(self, ring: KeyRing) -> None:
        if self.options.keys == "store":
            raise UnsupportedOperation(
                f"{self.spec!r} keeps its keys in a store and cannot search those of another backend: take keys=caller"
            )
        super()._read_from(ring)
        self.shards.use(ring)

    def _gather_from_shards(self, slots: Tensor, memories: Tensor) -> Tensor:
        """Keys (M', Q, K, D) at slots (M', Q, K), from the shards that hold them."""
        flat = slots.flatten(1)
        gathered = torch.zeros(*flat.shape, self.dim)
        which, asked = memories.numpy(), flat.numpy()
        answers = self._ask("gather", lambda link: (which, asked, link.share), memories)
        for link in self.shards.links:
            mine = (flat >= 0) & (flat % link.share.shards == link.share.shard)
            gathered[mine] = torch.from_numpy(answers[link.share.shard].copy())
        return gathered.view(*slots.shape, self.dim)

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        asked = queries.numpy()
        if asked.nbytes > SESSION.direct_bytes:
            import ray

            try:
                sent: Any = ray.put(asked)
            except ray.exceptions.RayError as error:
                raise as_ours(error, f"a search of {self.spec!r}") from error
        else:
            sent = asked
        which = memories.numpy()

        def arguments(link: ShardLink) -> tuple[Any, ...]:
            return which, link.totals(memories).numpy(), sent, min(k, link.share.size)

        answers = self._ask("search", arguments, memories, partial=self.options.partial)
        missing = self.shards.count_missing(answers)
        if missing:
            self._warn(missing)
        found = [(self.shards.links[shard].share, *answer) for shard, answer in sorted(answers.items())]
        self.shards.count_moved(sum(asked.nbytes + scores.nbytes + local.nbytes for _, scores, local in found))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            scores = [torch.from_numpy(part) for _, part, _ in found]
            slots = [share.to_slots(torch.from_numpy(local)) for share, _, local in found]
        return merge(scores, slots, k)

    def _warn(self, missing: tuple[int, ...]) -> None:
        named = ", ".join(f"{shard} ({self.shards.links[shard].away_because or 'being filled'})" for shard in missing)
        warnings.warn(
            f"a search of {self.spec!r} was answered without shard {named} of {len(self.shards.links)}: keys there are "
            "not found until it is back",
            PartialAnswer,
            stacklevel=6,  # of who called search()
        )

    def _reset(self, memories: Tensor) -> None:
        self.shards.reset(memories)

    def _recover(self, memories: Tensor) -> None:
        self.shards.refill("an append was taken back")

    def _index_again(self, memories: Tensor) -> None:
        self.shards.refill("an append was taken back")

    def _ask(self, method: str, arguments: Any, memories: Tensor | None = None, **how: Any) -> dict[int, Any]:
        """Asks all shards, by default about every memory and within the deadline of the options."""
        which = torch.arange(self.num_memories) if memories is None else memories
        return self.shards.ask(
            method, arguments, which, **{"deadline": self.options.deadline_seconds, "partial": False, **how}
        )

    def _set_search_options(self, changed: frozenset[str]) -> None:
        if "backend" not in changed:
            return
        wanted_class, wanted = class_and_options(self.options.backend)
        had_class, had = class_and_options(self._made_of)
        changes = {
            option.name: getattr(wanted, option.name)
            for option in dataclasses.fields(wanted)
            if getattr(wanted, option.name) != getattr(had, option.name, None)
        }
        if wanted_class is not had_class or not set(changes) <= set(had_class.search_options):
            can = ", ".join(had_class.search_options) or "none"
            raise UnsupportedOperation(
                f"{NAME!r} can't turn backend={self._made_of!r} into {self.options.backend!r} once it is made (of its "
                f"options it can change: {can}); make a new backend with make_backend"
            )
        if not changes:
            return
        try:
            self._ask("set_search_options", lambda _: (changes,), changes=True)
        except BaseException:
            self.shards.refill("a change of options was taken back", all_of_them=True)
            raise
        self._made_of = self.options.backend

    def _totals_of_shards(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for answer in self._ask("stats", lambda _: ()).values():
            for name, value in answer.items():
                found[name] = found.get(name, 0) + value
        return found

    def _index_bytes(self) -> int:
        return int(self._totals_of_shards()["bytes"])

    def _pending_builds(self) -> int:
        return int(self._totals_of_shards()["pending_builds"])

    def _wait(self) -> None:
        if isinstance(self.ring, StoreRing):
            self.ring.commit(self.ring.totals)
        while self._pending_builds():
            time.sleep(POLL_SECONDS)
        self._ask("wait", lambda _: ())

    def _close(self) -> None:
        self._finalizer.detach()
        try:
            if isinstance(self.ring, StoreRing):
                self.ring.commit(self.ring.totals)
        finally:
            SESSION.give_back(self._lease)

    def _save(self, directory: Path) -> None:
        if not self.capabilities.persistent:
            raise UnsupportedOperation(
                f"the keys of {self.spec!r} are durable in its store, all of them after wait() or close(): a memory of "
                "the same spec and sizes goes on with them"
            )
        described = {}
        for shard, (bases, files) in self._ask("index_files", lambda _: ()).items():
            folder = directory / f"shard-{shard}"
            folder.mkdir()
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            described[str(shard)] = {"bases": bases, "files": sorted(files)}
        (directory / "shards.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    def _restore(self, directory: Path) -> None:
        try:
            described = json.loads((directory / "shards.json").read_text(encoding="utf-8"))
            self._bases = {int(shard): list(about["bases"]) for shard, about in described.items()}
            files = {
                int(shard): {name: (directory / f"shard-{shard}" / name).read_bytes() for name in about["files"]}
                for shard, about in described.items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptMemory(f"{directory} does not describe its shards ({error}); save the memory again") from error
        self.shards.begin_again()
        try:
            self._ask("restore", lambda link: (files[link.share.shard],), changes=True)
        finally:
            self._bases = {}

    @reads
    def stats(self) -> MemoryStats:
        """Keys, bytes and build time now; the index is what the shards hold, their own keys among it."""
        found, shards = super().stats(), self._totals_of_shards()
        return dataclasses.replace(
            found, build_seconds=shards["build_seconds"], stalled_seconds=shards["stalled_seconds"]
        )


class _Maker:
    """Tells what a shard is made from, by the options of its memory now, without keeping the memory alive."""

    def __init__(self, memory: Ray) -> None:
        self._memory = weakref.ref(memory)

    def __call__(self, share: Share) -> ShardAbout:
        memory = self._memory()
        assert memory is not None
        options = memory.options
        return ShardAbout(
            spec=options.backend,
            sizes={
                "num_memories": memory.num_memories,
                "capacity": share.size,
                "dim": memory.dim,
                "metric": _metric_of_shard(memory.metric),
                "device": "cuda" if options.gpus_per_shard else "cpu",
                "seed": memory.seed + share.shard,
            },
            **_threads(options, share.shards),
            bases=memory._bases.get(share.shard),
        )


def _threads(options: RayOptions, shards: int) -> dict[str, int]:
    """How many threads a shard uses: so many that those of a machine have its cores between them."""
    if options.cpus_per_shard >= 1:
        return {"threads": int(options.cpus_per_shard)}
    if SESSION.embedded:
        return {"threads": max(1, torch.get_num_threads() // shards)}
    machines = len(SESSION.machines) if options.placement == "spread" else 1
    return {"threads": 0, "beside": -(-shards // max(1, machines))}


def _metric_of_shard(metric: str) -> str:
    """A backend's hooks see unit vectors and the inner product where it searches by the cosine."""
    return "inner_product" if metric == "cosine" else metric
