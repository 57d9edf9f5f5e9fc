"""Two stages: any backend finds candidates, which are scored anew from the raw keys.

    rerank:source='faiss-ivfpq:nprobe=32',candidates=512

The source's own scores (of codes, of rounded keys) decide only which keys are looked at again: the answer's scores are
the true ones. There is one copy of the raw keys. The source is driven by its hooks, over this backend's key ring and
under this backend's lock; only a source that asks for a storage of its own, such as `exact:storage=int8`, has a ring of
its own, whose bytes count as index.

Letters as in `base`; N candidates to a query.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.budget import plan_bytes
from recollect.memory_backends.calls import reads
from recollect.memory_backends.errors import InvalidInput, InvalidSpec, UnknownBackend, UnsupportedOperation
from recollect.memory_backends.options import IN_MEMORY, KeyStorageOptions
from recollect.memory_backends.raw_keys import rescore
from recollect.memory_backends.records import METRICS, MemoryStats
from recollect.memory_backends.registry import (
    build_spec,
    canonical_spec,
    capabilities_of,
    class_and_options,
    make_backend,
)
from recollect.memory_backends.spec import parse_spec

NAME = "rerank"
SOURCE = "exact:storage=int8"


@dataclass(frozen=True)
class RerankOptions(KeyStorageOptions):
    """Options of `rerank`; `source` is kept in its canonical form."""

    source: str = field(
        default=SOURCE,
        metadata={
            "help": "registry string, in quotes, of the backend that finds candidates; may change in its search options"
        },
    )
    candidates: int = field(
        default=256, metadata={"help": "candidates of a query that are scored by whole keys; at least k are"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} is below 1")
        try:
            canonical = canonical_spec(self.source)
        except (InvalidSpec, UnknownBackend) as error:
            raise InvalidSpec(f"{NAME!r}: source={self.source!r}: {error}") from error
        if parse_spec(canonical)[0] == NAME:
            raise InvalidSpec(
                f"{NAME!r}: source={self.source!r} would score the same keys twice: name what is in its source, with "
                "the larger number of candidates"
            )
        object.__setattr__(self, "source", canonical)


class Rerank(MemoryBackend):
    """Candidates of another backend, its `source`, in the order of their true scores."""

    name = NAME
    summary = "two stages: another backend's candidates, scored anew by whole keys"
    Options = RerankOptions
    options: RerankOptions
    capabilities: ClassVar[Capabilities] = Capabilities(devices=("cpu", "cuda", "mps"))
    search_options = ("source", "candidates")
    sweep = (
        "rerank:candidates=64,source='approx-topk:recall_target=0.8'",
        "rerank",
        "rerank:source=faiss-ivfpq:k_factor=1",
    )
    curve: ClassVar = {"candidates": (32, 64, 128, 256, 512, 1024)}
    recall_floor = 0.75

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        try:
            self.source = make_backend(
                self.options.source,
                num_memories=self.num_memories,
                capacity=self.capacity,
                dim=self.dim,
                metric=_metric_of_source(self.metric),
                device=self.device,
                seed=self.seed,
            )
        except InvalidSpec as error:
            raise InvalidSpec(f"{NAME!r}: source={self.options.source!r}: {error}") from error
        self.shares_keys = _reads_shared_keys(self.source.options)
        """Whether the source reads the keys where this backend keeps them."""
        if self.shares_keys:
            try:
                self.source._read_from(self.ring)
            except BaseException:
                self.source.close()
                raise

    @classmethod
    def capabilities_with(cls, options: RerankOptions) -> Capabilities:
        able = capabilities_of(options.source)
        metrics = tuple(metric for metric in METRICS if _metric_of_source(metric) in able.metrics)
        # What is exact over keys of a storage of its own need not be among the keys that there are.
        _, own = class_and_options(options.source)
        exact = able.exact and getattr(own, "storage", "float32") == "float32"
        return dataclasses.replace(able, exact=exact, metrics=metrics)

    @classmethod
    def sources_with(cls, options: RerankOptions) -> tuple[str, ...]:
        return (options.source,)

    @classmethod
    def build_options(cls, options: RerankOptions) -> dict[str, Any]:
        source = build_spec(options.source)
        given = super().build_options(options)
        return {**given, "source": source} if source != SOURCE else given

    @classmethod
    def _planned_index_bytes(cls, options: RerankOptions, *, capacity: int, dim: int, metric: str) -> int | None:
        source, own = class_and_options(options.source)
        planned = plan_bytes(source, own, num_memories=1, capacity=capacity, dim=dim, metric=_metric_of_source(metric))
        if planned.index is None:
            return None
        return planned.index + (0 if _reads_shared_keys(own) else planned.keys)

    # The contract -----------------------------------------------------------------------------------------------------

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        if not self.shares_keys:
            # Anew each time: after an append that failed, the source's ring stands elsewhere than this one.
            self.source.ring.totals[memories] = self.ring.totals[memories] - keys.shape[1]
            self.source.ring.append(self.ring.rounded(keys), memories)
        self.source._add(keys, slots, memories)

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(self.ring.lengths[memories].max())
        wanted = min(max(k, self.options.candidates), longest)
        try:
            _, slots = self.source._search(queries, wanted, memories)
        except InvalidInput as error:
            raise InvalidInput(f"{error} ({self.spec!r} asks its source for {wanted} candidates)") from error
        return rescore(self.ring, queries, slots, k, memories, metric=self.metric)

    def _reset(self, memories: Tensor) -> None:
        if not self.shares_keys:
            self.source.ring.reset(memories)
        self.source._reset(memories)

    def _recover(self, memories: Tensor) -> None:
        self._fill_own_ring(memories)
        self.source._recover(memories)

    def _fill_own_ring(self, memories: Tensor) -> None:
        """Brings a source's own ring in line with this backend's."""
        if self.shares_keys:
            return
        for memory in memories.tolist():
            one = torch.tensor([memory])
            self.source.ring.totals[memory] = self.ring.first_number(memory)
            self.source.ring.append(self.ring.in_order(memory)[None], one)

    def _set_search_options(self, changed: frozenset[str]) -> None:
        if "source" not in changed:
            return
        cls, wanted = class_and_options(self.options.source)
        if isinstance(self.source, cls):
            changes = {
                option.name: getattr(wanted, option.name)
                for option in dataclasses.fields(wanted)
                if getattr(wanted, option.name) != getattr(self.source.options, option.name)
            }
            if set(changes) <= set(self.source.search_options):
                if changes:
                    self.source.set_search_options(**changes)
                return
        can = ", ".join(self.source.search_options) or "none"
        raise UnsupportedOperation(
            f"{NAME!r} can't turn source={self.source.spec!r} into {self.options.source!r} once it is made (of its "
            f"options it can change: {can}); make a new backend with make_backend"
        )

    def _index_bytes(self) -> int:
        own = 0 if self.shares_keys else self.source.ring.key_bytes * int(self.ring.lengths.sum())
        return self.source._index_bytes() + own

    def _pending_builds(self) -> int:
        return self.source._pending_builds()

    def _wait(self) -> None:
        self.source.wait()

    def _close(self) -> None:
        self.source.close()

    def _save(self, directory: Path) -> None:
        (directory / "source").mkdir()
        self.source._save(directory / "source")

    def _restore(self, directory: Path) -> None:
        self._fill_own_ring(torch.arange(self.num_memories))
        self.source._restore(directory / "source")

    @reads
    def stats(self) -> MemoryStats:
        """Keys, bytes and build time now, the source's among them."""
        found = super().stats()
        return dataclasses.replace(
            found, build_seconds=self.source.build_seconds, stalled_seconds=self.source.stalled_seconds
        )


def _reads_shared_keys(options: Any) -> bool:
    """Whether a source with these options asks for no storage of its own."""
    return not isinstance(options, KeyStorageOptions) or (options.storage == "float32" and options.keys_in == IN_MEMORY)


def _metric_of_source(metric: str) -> str:
    """A backend's hooks see unit vectors and the inner product where it searches by the cosine."""
    return "inner_product" if metric == "cosine" else metric
