"""What Milvus keeps of a memory: a collection for each, its rows, and what it says of itself.

A row is a key: its slot (the primary key, so that overwriting a slot is an upsert), its number since the last reset,
the key itself, and for the cosine the length that it had. A collection is called `prefix_memory_generation`. Emptying a
memory makes the collection of the next generation and drops the former one, so that at no moment there is none, and
whoever opens it after a crash finds the one or the other.

Every memory has a collection of its own because a filter over a shared one costs recall: a graph search that must pass
over other memories' keys comes to too few of its own.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.memory_backends.errors import CorruptMemory, InvalidInput
from recollect.memory_backends.milvus_connection import Connection
from recollect.memory_backends.milvus_errors import MilvusError, MilvusUnavailable

VERSION = 1
PROPERTY = "recollect"
"""Name of the property that holds what a collection is of; its description says the same, where there is one."""
MILVUS_METRICS = {"inner_product": "IP", "l2": "L2", "cosine": "IP"}
"""For the cosine the keys are unit vectors already, and a key of zeros has no cosine."""
MOST_HITS = 16_384
"""Neighbours that a server returns for a query at most, and queries in one request."""
HITS_A_REQUEST = 1 << 20
REQUEST_BYTES = 32 * 2**20
"""Of rows in one request; a server takes 64 MiB by default."""
LITE_SCORES = 1 << 25
"""Scores that Lite computes at once at most, and for l2 differences of components."""
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Shape:
    """What collections are of: M memories of C keys of dimension D, by a metric."""

    num_memories: int
    capacity: int
    dim: int
    metric: str

    def differs(self, said: dict[str, Any]) -> str:
        """In words, where a collection that says `said` of itself is of something else; empty where it is not."""
        mine = {"num_memories": self.num_memories, "capacity": self.capacity, "dim": self.dim, "metric": self.metric}
        return ", ".join(f"{name} {said.get(name)!r} instead of {value!r}" for name, value in mine.items()
                         if said.get(name) != value)  # fmt: skip


@dataclass(frozen=True)
class Index:
    """The index of every collection: its kind, what it is built with, and what it is searched with."""

    kind: str
    build: dict[str, int]
    search: dict[str, int]

    def search_for(self, k: int, *, lite: bool) -> dict[str, int]:
        """Parameters of a search for k neighbours, for which a graph needs as many candidates."""
        if self.kind == "HNSW" or (self.kind == "AUTOINDEX" and lite):
            return {"ef": max(k, self.search.get("ef", 64))}
        return dict(self.search)


@dataclass(frozen=True)
class Rows:
    """Some rows of a collection: slots (n,), numbers (n,), keys (n, D) and lengths (n,), the last for the cosine."""

    slots: np.ndarray[Any, Any]
    numbers: np.ndarray[Any, Any]
    keys: np.ndarray[Any, Any]
    norms: np.ndarray[Any, Any] | None

    def __len__(self) -> int:
        return len(self.slots)


class Collections:
    """The collections of one backend.

    Args:
        connection: where they are.
        prefix: what their names begin with.
        shape: what they are of.
        index: how they are searched.
        batch: rows that are sent at once.
    """

    def __init__(self, connection: Connection, prefix: str, shape: Shape, index: Index, *, batch: int) -> None:
        self.connection = connection
        self.prefix = prefix
        self.shape = shape
        self.index = index
        row_bytes = 4 * shape.dim + 32
        self.batch = max(1, min(batch, REQUEST_BYTES // row_bytes))
        self.names: list[str] = []
        """Of each memory's collection; this very list is what is left behind where nobody closes the backend."""
        # Lite searches rows without an index as it would with this one, and needs no second copy of them in a file.
        self._indexed = not (connection.lite and index.kind == "FLAT")

    @property
    def where(self) -> str:
        """The collections and their place, for messages."""
        return f"{self.prefix!r} at {self.connection.where}"

    # Making and finding -----------------------------------------------------------------------------------------------

    def open(self, existing: str, *, fresh: bool = False) -> bool:
        """Makes the collections, or finds them.

        Args:
            existing: "refuse", "reuse" or "replace" those that are there.
            fresh: nobody else can have any of this name.

        Returns:
            Whether they were there, and hold what they held.

        Raises:
            InvalidInput: they are there and must not be, or are of other memories.
            CorruptMemory: some of them are missing.
        """
        found = {} if fresh else self.find()
        if found and existing == "refuse":
            raise InvalidInput(
                f"there is a memory {self.where} already: give existing=reuse to go on with it, existing=replace to "
                "lose it, or another name as collection"
            )
        if found and existing == "reuse":
            self._join(found)
            return True
        former = [name for generations in found.values() for name in generations.values()]
        for name in former:
            self._describe(name)  # what somebody else has made is not dropped
        first = 1 + max((generation for generations in found.values() for generation in generations), default=-1)
        self.names[:] = [self._name(memory, first) for memory in range(self.shape.num_memories)]
        # Memory 0 comes last: where there is one of it, there are all.
        for memory in reversed(range(self.shape.num_memories)):
            self._create(memory, self.names[memory])
        for name in former:
            self._drop(name)
        return False

    def find(self) -> dict[int, dict[int, str]]:
        """Names of the collections that are there, by memory and generation."""
        pattern = re.compile(re.escape(self.prefix) + r"_(\d+)_(\d+)\Z")
        found: dict[int, dict[int, str]] = {}
        for name in self.connection.call("list collections", "list_collections"):
            match = pattern.match(name)
            if match:
                found.setdefault(int(match[1]), {})[int(match[2])] = name
        return found

    def _join(self, found: dict[int, dict[int, str]]) -> None:
        newest = {memory: generations[max(generations)] for memory, generations in found.items()}
        said = self._describe(newest[min(newest)])
        if said.get("version", 0) > VERSION:
            raise InvalidInput(f"the memory {self.where} was written by a newer release of recollect: upgrade it")
        differing = self.shape.differs(said)
        if differing:
            raise InvalidInput(
                f"the memory {self.where} was made with {differing}: make it with the same, take another name as "
                "collection, or give existing=replace to lose what is there"
            )
        missing = sorted(set(range(self.shape.num_memories)) - set(newest))
        if missing:
            raise CorruptMemory(
                f"of the memory {self.where} the collections of memories {missing} are missing: it was not made to "
                "the end, or somebody dropped them. Give existing=replace, and fill it anew"
            )
        self._check_index(newest[0], said)
        self.names[:] = [newest[memory] for memory in range(self.shape.num_memories)]
        for memory, name in enumerate(self.names):
            for generation, older in found[memory].items():
                if generation < max(found[memory]):
                    self._drop(older)
            if self._indexed:
                seconds = self.connection.deadline + self.shape.capacity / 10_000
                self.connection.call("load a collection", "load_collection", name, seconds=seconds)

    def _check_index(self, name: str, said: dict[str, Any]) -> None:
        mine = {"index": self.index.kind, "build": self.index.build}
        for what, value in mine.items():
            if said.get(what) != value:
                raise InvalidInput(
                    f"the memory {self.where} was made with {what} {said.get(what)!r} instead of {value!r} ({name}): "
                    "an index is fixed once it is made; give the same, or existing=replace and fill it anew"
                )

    def _describe(self, name: str) -> dict[str, Any]:
        described = self.connection.call("describe a collection", "describe_collection", name)
        for text in ((described.get("properties") or {}).get(PROPERTY), described.get("description")):
            try:
                said = json.loads(text or "")
            except (TypeError, ValueError):
                continue
            if isinstance(said, dict) and "num_memories" in said:
                return said
        raise InvalidInput(
            f"collection {name!r} at {self.connection.where} was not made by recollect: take another name as collection"
        )

    def _name(self, memory: int, generation: int) -> str:
        return f"{self.prefix}_{memory}_{generation}"

    def _create(self, memory: int, name: str) -> None:
        from pymilvus import DataType, MilvusClient

        said = json.dumps(
            {
                "version": VERSION,
                "memory": memory,
                "num_memories": self.shape.num_memories,
                "capacity": self.shape.capacity,
                "dim": self.shape.dim,
                "metric": self.shape.metric,
                "index": self.index.kind,
                "build": self.index.build,
            }
        )
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=said)
        schema.add_field("slot", DataType.INT64, is_primary=True)
        schema.add_field("number", DataType.INT64)
        if self.shape.metric == "cosine":
            schema.add_field("norm", DataType.FLOAT)
        schema.add_field("key", DataType.FLOAT_VECTOR, dim=self.shape.dim)
        # One shard: rows then arrive in the order in which they were sent, and what a crash leaves has no holes.
        self.connection.call(
            "make a collection",
            "create_collection",
            name,
            schema=schema,
            consistency_level="Strong",
            num_shards=1,
            properties={PROPERTY: said},
        )
        if self._indexed:
            parameters = MilvusClient.prepare_index_params()
            parameters.add_index(
                "key",
                index_type=self.index.kind,
                index_name="key",
                metric_type=MILVUS_METRICS[self.shape.metric],
                params=self.index.build,
            )
            # pymilvus would wait for it without a deadline; there is nothing to build yet.
            self.connection.call("make an index", "create_index", name, parameters, sync=False)
            self.connection.call("load a collection", "load_collection", name)

    def _drop(self, name: str) -> None:
        self.connection.call("drop a collection", "drop_collection", name)

    def empty(self, memory: int) -> None:
        """Puts an empty collection into the place of a memory's."""
        former = self.names[memory]
        following = self._name(memory, 1 + int(former.rpartition("_")[2]))
        self._create(memory, following)
        self.names[memory] = following
        self._drop(former)

    def drop(self) -> None:
        """Drops all of them."""
        while self.names:
            self._drop(self.names[-1])
            self.names.pop()

    # Rows -------------------------------------------------------------------------------------------------------------

    def write(self, memory: int, rows: Rows) -> None:
        """Writes rows, in place of those that have their slots."""
        name = self.names[memory]
        for start in range(0, len(rows), self.batch):
            some = slice(start, start + self.batch)
            columns: dict[str, list[Any]] = {
                "slot": rows.slots[some].tolist(),
                "number": rows.numbers[some].tolist(),
                "key": rows.keys[some].tolist(),
            }
            if rows.norms is not None:
                columns["norm"] = rows.norms[some].tolist()
            data = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            # An upsert even where the slots are new: it may be sent twice, when nobody knows whether it arrived.
            self.connection.call("append keys", "upsert", name, data)

    def delete(self, memory: int, slots: np.ndarray[Any, Any]) -> None:
        """Takes rows away."""
        for start in range(0, len(slots), self.batch):
            some = slots[start : start + self.batch].tolist()
            self.connection.call("take keys away", "delete", self.names[memory], ids=some, loaded=self.names[memory])

    def read(self, memory: int) -> Iterator[Rows]:
        """All rows, by slot from 0 on."""
        fields = ["slot", "number", "key", *(["norm"] if self.shape.metric == "cosine" else [])]
        for start in range(0, self.shape.capacity, self.batch):
            slots = list(range(start, min(start + self.batch, self.shape.capacity)))
            found = self.connection.call(
                "read keys",
                "get",
                self.names[memory],
                slots,
                output_fields=fields,
                consistency_level="Strong",
                loaded=self.names[memory],
            )
            found.sort(key=lambda row: row["slot"])
            if found:
                yield Rows(
                    np.array([row["slot"] for row in found], dtype=np.int64),
                    np.array([row["number"] for row in found], dtype=np.int64),
                    np.array([row["key"] for row in found], dtype=np.float32).reshape(len(found), self.shape.dim),
                    np.array([row["norm"] for row in found], dtype=np.float32) if "norm" in fields else None,
                )
            if len(found) < len(slots):
                return

    # Searching --------------------------------------------------------------------------------------------------------

    def search(
        self, memory: int, queries: np.ndarray[Any, Any], k: int, length: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The best of a memory's keys for queries (Q, D) float32.

        Args:
            length: keys that the memory holds, at least k.

        Returns:
            Scores (Q, k) float32 that fall, and slots (Q, k); -inf and -1 where fewer were found.
        """
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        slots = np.full((len(queries), k), -1, dtype=np.int64)
        step = self._queries_a_request(k, length)
        parameters = {
            "metric_type": MILVUS_METRICS[self.shape.metric],
            "params": self.index.search_for(k, lite=self.connection.lite),
        }
        for start in range(0, len(queries), step):
            found = self.connection.call(
                "search",
                "search",
                self.names[memory],
                data=list(queries[start : start + step]),
                anns_field="key",
                limit=k,
                search_params=parameters,
                consistency_level="Strong",
                loaded=self.names[memory],
            )
            for row, hits in enumerate(found, start):
                count = len(hits.ids)
                slots[row, :count] = hits.ids
                scores[row, :count] = hits.distances
        if self.shape.metric == "l2":
            scores = np.where(slots >= 0, -scores, scores)  # Milvus' distances are squares, the smallest the best
        return scores, slots

    def _queries_a_request(self, k: int, length: int) -> int:
        if not self.connection.lite:
            return max(1, min(MOST_HITS, HITS_A_REQUEST // k))
        # Lite holds all scores of a request at once, and for l2 even the differences of all components.
        parts = length * (self.shape.dim if self.shape.metric == "l2" else 1)
        return max(1, min(HITS_A_REQUEST // k, LITE_SCORES // parts))

    # Waiting ----------------------------------------------------------------------------------------------------------

    def flush(self, memory: int, rows: int) -> None:
        """Has a memory's rows written out, `rows` of them at most since the last time."""
        seconds = self.connection.deadline + rows / 10_000
        self.connection.call("write keys out", "flush", self.names[memory], seconds=seconds)

    def wait(self, memory: int, rows: int, length: int) -> None:
        """Returns when all rows are written out, indexed, and searched by their index.

        Args:
            rows: not written out yet, at most.
            length: keys that the memory holds.

        Raises:
            MilvusUnavailable: for as long as the deadline nothing more was indexed.
        """
        name = self.names[memory]
        if self.connection.store is not None:
            self.flush(memory, rows)
            self.connection.store.settle(name)
            return
        self.flush(memory, rows)
        left, since = -1, time.monotonic()
        while True:
            state = self.connection.call("ask for an index", "describe_index", name, "key") or {}
            if state.get("state") == "Failed":
                raise MilvusError(f"Milvus at {self.connection.where} can't index {name!r}; its log says why")
            pending = int(state.get("pending_index_rows", 0))
            # Until a server has noticed what was written out, it counts neither those rows nor any as pending.
            if state.get("state") == "Finished" and not pending and int(state.get("total_rows", length)) >= length:
                break
            if pending != left:
                left, since = pending, time.monotonic()
            if time.monotonic() - since > self.connection.deadline:
                raise MilvusUnavailable(
                    f"Milvus at {self.connection.where} has indexed nothing of {name!r} for "
                    f"{self.connection.deadline:g} seconds, with {pending} rows left: see that its index node runs, or "
                    "raise deadline_seconds"
                )
            time.sleep(POLL_SECONDS)
        # The nodes that search take the indexed segments in place of their own rows when they next look, or are told.
        seconds = self.connection.deadline + length / 10_000
        self.connection.call("load a collection", "refresh_load", name, seconds=seconds)
