"""A memory that Milvus keeps and searches: Milvus Lite in a folder, a server, or a cluster, by the same client.

It is for one large memory that many share and that seldom evicts, such as that of a corpus: the keys outlive the
process, and a server's outgrow this machine. It is not for the memories of documents that stream by, which are reset
and appended to at every step. A step is two requests, and a server makes a search wait until it has seen the newest
append: 170 ms and more, and some seconds for a reset. Lite takes 20 ms to append 512 keys and 35 microseconds for every
neighbour that it returns, so 0.6 s for 512 queries of 32. In this process an append takes 0.3 ms, and an exact search
over 8192 keys 25 ms: benchmarks/durability.py measures it.

Milvus holds each key by its slot, and the backend's own ring holds them a second time in this process (in main memory,
or in a file by `keys_in`): `gather_keys` answers from it, and it is read back from Milvus where a memory is opened that
is there already. One process at a time may append; a search in another that comes upon a key which it does not know
says so, and it opens the memory anew.

What an append that failed half way has left in Milvus is undone before the next search or append, from the ring.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.errors import CorruptMemory, InvalidInput
from recollect.memory_backends.milvus_collections import MOST_HITS, Collections, Index, Rows, Shape
from recollect.memory_backends.milvus_connection import Connection, check_uri, is_lite
from recollect.memory_backends.milvus_errors import MilvusError
from recollect.memory_backends.milvus_lite_server import close_store, leave, leave_behind
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.records import Requirement

LITE_KEYS = 100_000
"""Keys beyond which Lite is the wrong engine."""
FLUSH_ROWS = 4096
"""Rows that Lite searches one by one in Python, until they are written out."""
ROW_BYTES = 200
"""Of a row in Lite beside its two copies of the key: Python's numbers, and where it is found."""

_names = itertools.count()


@dataclass(frozen=True)
class MilvusOptions(KeyStorageOptions):
    """Options of `milvus`."""

    uri: str = field(
        default="",
        metadata={
            "help": "where Milvus is: http://host:19530, https://host:443, or a path ending in .db for Milvus Lite; "
            "left out, Lite in a temporary folder that goes when the memory is closed"
        },
    )
    collection: str = field(
        default="recollect", metadata={"help": "what the names of its collections begin with; letters, digits and _"}
    )
    existing: Literal["refuse", "reuse", "replace"] = field(
        default="refuse",
        metadata={"help": "what to do with a memory of this name that is there", "unseen": "a temporary one is new"},
    )
    index: Literal["FLAT", "HNSW", "IVF_FLAT", "AUTOINDEX"] = field(
        default="FLAT",
        metadata={
            "help": "Milvus' kind of index; FLAT is exact",
            "unseen": "few keys are searched one by one, whatever the index",
        },
    )
    M: int | None = field(default=None, metadata={"help": "links of a key in HNSW (16)"})
    ef_construction: int | None = field(default=None, metadata={"help": "candidates while HNSW is built (200)"})
    ef: int | None = field(default=None, metadata={"help": "candidates while HNSW is searched, at least k (64)"})
    nlist: int | None = field(default=None, metadata={"help": "cells of IVF_FLAT (128)"})
    nprobe: int | None = field(default=None, metadata={"help": "cells of IVF_FLAT that are searched (16)"})
    batch: int = field(
        default=8192, metadata={"help": "keys in one request at most", "unseen": "it changes how keys are sent"}
    )
    deadline_seconds: float = field(
        default=30.0,
        metadata={"help": "how long a server may take to answer, attempts included", "unseen": "Lite is never away"},
    )
    token_file: str = field(
        default="",
        metadata={"help": "a file with 'user:password' or an API key; left out, the variable MILVUS_TOKEN is asked"},
    )
    ca_file: str = field(default="", metadata={"help": "certificates (PEM) for https; left out, those of the system"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_uri(self.uri)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", self.collection):
            raise ValueError(
                f"collection={self.collection!r} is no name that Milvus takes: up to 200 letters, digits and _, no "
                "digit first"
            )
        for index, names in INDEX_OPTIONS.items():
            for name, least in names.items():
                value = getattr(self, name)
                if value is not None and index != self.index:
                    raise ValueError(f"{name}={value} is for index={index}, and this is index={self.index}")
                if value is not None and value < least:
                    raise ValueError(f"{name}={value} is below {least}")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch} is below 1")
        if self.deadline_seconds <= 0:
            raise ValueError(f"deadline_seconds={self.deadline_seconds:g} is not above 0")
        if is_lite(self.uri) and (self.token_file or self.ca_file):
            raise ValueError("token_file and ca_file are for a server; Milvus Lite asks for no credentials")
        if not self.uri and self.existing == "reuse":
            raise ValueError("existing=reuse needs a uri: what lies in a temporary folder is gone with its process")

    def parameters(self) -> Index:
        """What the index is built and searched with, in Milvus' words."""
        if self.index == "HNSW":
            build = {"M": self.M or 16, "efConstruction": self.ef_construction or 200}
            return Index("HNSW", build, {"ef": self.ef or 64})
        if self.index == "IVF_FLAT":
            return Index("IVF_FLAT", {"nlist": self.nlist or 128}, {"nprobe": self.nprobe or 16})
        return Index(self.index, {}, {})


INDEX_OPTIONS = {
    "HNSW": {"M": 2, "ef_construction": 1, "ef": 1},
    "IVF_FLAT": {"nlist": 1, "nprobe": 1},
}
"""The options that only one kind of index has, and the least that they may be."""


class Milvus(MemoryBackend):
    """A collection of Milvus for each memory, whose rows are keys by slot. The module's text says when to use it."""

    name = "milvus"
    summary = "keys that Milvus keeps and searches: Lite in a folder, a server or a cluster"
    Options: ClassVar[type] = MilvusOptions
    options: MilvusOptions
    capabilities: ClassVar[Capabilities] = Capabilities(exact=True)
    requires = (Requirement("pymilvus", "pymilvus[milvus-lite]>=3"),)
    one_shared = True
    search_options = ("ef", "nprobe")
    sweep = ("milvus", "milvus:index=HNSW")

    @classmethod
    def capabilities_with(cls, options: MilvusOptions) -> Capabilities:
        """Only FLAT is exact; how a server builds another index depends on when it does."""
        exact = options.index == "FLAT"
        return Capabilities(exact=exact, deterministic=exact and is_lite(options.uri))

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        # gRPC, which reads this once, tells of every connection that ends; what matters to the caller is raised here.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        self.import_library("pymilvus")
        fresh = not self.options.uri
        if is_lite(self.options.uri):
            self.import_library("milvus_lite")
        self._sent = [0] * self.num_memories
        """Of each memory: no key of this number or a later one has been sent to Milvus."""
        self._unwritten = [0] * self.num_memories
        """Of each memory: rows that were sent since it was last written out."""
        self._mending = threading.Lock()
        self._warned = False
        self.connection = Connection(
            self.options.uri,
            deadline=self.options.deadline_seconds,
            token_file=self.options.token_file,
            ca_file=self.options.ca_file,
        )
        prefix = f"{self.options.collection}_{os.getpid()}_{next(_names)}" if fresh else self.options.collection
        shape = Shape(self.num_memories, self.capacity, self.dim, self.metric)
        self.collections = Collections(
            self.connection, prefix, shape, self.options.parameters(), batch=self.options.batch
        )
        self._end = weakref.finalize(self, _leave, self.connection, self.collections.names)
        self._end.atexit = False
        try:
            if self.collections.open(self.options.existing, fresh=fresh):
                self._read_back()
        except BaseException:
            self._let_go()
            raise

    # Reading what is there --------------------------------------------------------------------------------------------

    def _read_back(self) -> None:
        """Fills the ring with what the collections hold."""
        for memory in range(self.num_memories):
            which = torch.tensor([memory])
            numbers = [np.empty(0, dtype=np.int64)]
            for rows in self.collections.read(memory):
                numbers.append(rows.numbers)
                self.ring.append(torch.from_numpy(rows.keys)[None].to(self.device), which)
                if self._norms is not None and rows.norms is not None:
                    self._norms[memory, torch.from_numpy(rows.slots)] = torch.from_numpy(rows.norms)
            self._check_numbers(memory, np.concatenate(numbers))
        self._warn_of_lite()

    def _check_numbers(self, memory: int, numbers: np.ndarray[Any, Any]) -> None:
        """Takes the total from key numbers by slot, which are those of the newest keys without a hole."""
        total = int(numbers.max()) + 1 if len(numbers) else 0
        first = total - len(numbers)
        expected = first + (np.arange(len(numbers)) - first) % max(1, len(numbers))
        if (len(numbers) < self.capacity and first) or not np.array_equal(numbers, expected):
            raise CorruptMemory(
                f"memory {memory} of {self.collections.where} holds {len(numbers)} keys that do not follow one another "
                f"up to number {total - 1}: somebody else has written to it or deleted from it. Give existing=replace, "
                "and fill it anew"
            )
        self.ring.totals[memory] = total
        self._sent[memory] = total

    # The hooks --------------------------------------------------------------------------------------------------------

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        count = keys.shape[1]
        for row, memory in enumerate(memories.tolist()):
            total = int(self.ring.totals[memory])
            numbers = np.arange(total - count, total)
            norms = None if self._norms is None else self._norms[memory, slots[row]].numpy()
            # Noted before they are sent: whether they have arrived, an error does not say.
            self._sent[memory] = max(self._sent[memory], total)
            self._unwritten[memory] += count
            self.collections.write(memory, Rows(slots[row].numpy(), numbers, keys[row].numpy(), norms))
            if self._sent[memory] > total:
                self._mend(memory)
            if self.connection.lite and self._unwritten[memory] >= FLUSH_ROWS:
                self._flush(memory)
        self._warn_of_lite()

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        if k > MOST_HITS and not self.connection.lite:
            raise InvalidInput(f"k is {k}; a Milvus server returns {MOST_HITS} neighbours at most")
        scores = torch.full((*queries.shape[:2], k), -torch.inf)
        slots = torch.full(scores.shape, -1, dtype=torch.int64)
        for row, memory in enumerate(memories.tolist()):
            with self._mending:
                if self._sent[memory] > int(self.ring.totals[memory]):
                    self._mend(memory)
            length = int(self.ring.lengths[memory])
            if length:
                found = min(k, length)
                one = self.collections.search(memory, queries[row].numpy(), found, length)
                scores[row, :, :found], slots[row, :, :found] = map(torch.from_numpy, one)
                if bool((slots[row] >= length).any()):
                    raise MilvusError(
                        f"memory {memory} of {self.collections.where} holds more than the {length} keys that this "
                        "process knows of: another one has appended to it. Open it anew, with existing=reuse"
                    )
        return scores, slots

    def _reset(self, memories: Tensor) -> None:
        for memory in memories.tolist():
            if self._sent[memory]:
                self._mend(memory)

    def _set_search_options(self, changed: frozenset[str]) -> None:
        self.collections.index = self.options.parameters()

    def _mend(self, memory: int) -> None:
        """Brings what Milvus holds in line with the ring, which holds no key of a number that was sent in vain."""
        total = int(self.ring.totals[memory])
        if not total:
            self.collections.empty(memory)
        else:
            wrong = np.arange(max(total, self._sent[memory] - self.capacity), self._sent[memory])
            slots = np.unique(wrong % self.capacity)
            length = int(self.ring.lengths[memory])
            alive = slots[slots < length]
            if len(alive):
                last = (total - 1 - alive) // self.capacity * self.capacity + alive
                places = torch.from_numpy(alive)
                norms = None if self._norms is None else self._norms[memory, places].numpy()
                keys = self.ring.gather(places[None, :, None], torch.tensor([memory]))[0, :, 0].numpy()
                self.collections.write(memory, Rows(alive, last, keys, norms))
            if len(alive) < len(slots):
                self.collections.delete(memory, slots[slots >= length])
            self._unwritten[memory] += len(slots)
            if self.connection.lite:
                self._flush(memory)  # a log that was cut off half way in a row is not written on
        self._sent[memory] = total
        if not total:
            self._unwritten[memory] = 0

    def _index_again(self, memories: Tensor) -> None:
        """Nothing yet: where the server is away, it can be brought in line only when it is back."""

    def _restore(self, directory: Path) -> None:
        for memory in range(self.num_memories):
            if self._sent[memory]:
                self.collections.empty(memory)
                self._sent[memory] = self._unwritten[memory] = 0
        self._index_anew(torch.arange(self.num_memories))

    def _flush(self, memory: int) -> None:
        self.collections.flush(memory, self._unwritten[memory])
        self._unwritten[memory] = 0

    def _wait(self) -> None:
        for memory in range(self.num_memories):
            with self._mending:
                if self._sent[memory] > int(self.ring.totals[memory]):
                    self._mend(memory)
                rows, self._unwritten[memory] = self._unwritten[memory], 0
            if rows or (self._sent[memory] and self.connection.lite):
                self.collections.wait(memory, rows, int(self.ring.lengths[memory]))

    # Ending -----------------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Closes the memory and drops its collections: nothing of it is left in Milvus."""
        with self._lock.writing:
            if self._refusal is None:
                self.collections.drop()
        self.close()

    def _close(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._end.detach() is not None:
            if self.connection.store is not None:
                close_store(self.connection.store, self.collections.names)
            self.connection.close()

    # Bytes ------------------------------------------------------------------------------------------------------------

    @classmethod
    def _planned_index_bytes(cls, options: MilvusOptions, *, capacity: int, dim: int, metric: str) -> int:
        # Lite is in this process: a table of rows, an array of keys, and for a graph the keys once more with its links.
        if not is_lite(options.uri):
            return 0
        index = options.parameters()
        links = 4 * dim + 8 * index.build.get("M", 16) if index.kind in ("HNSW", "AUTOINDEX") else 0
        cells = 4 * dim if index.kind == "IVF_FLAT" else 0
        return capacity * (8 * dim + ROW_BYTES + links + cells)

    def _index_bytes(self) -> int:
        each = self._planned_index_bytes(self.options, capacity=1, dim=self.dim, metric=self.metric)
        return int(self.ring.lengths.sum()) * each

    def _warn_of_lite(self) -> None:
        keys = int(self.ring.lengths.sum())
        if self.connection.lite and keys > LITE_KEYS and not self._warned:
            self._warned = True
            warnings.warn(
                f"{keys} keys are many for Milvus Lite: a search goes through all rows in Python, and opening them "
                f"again after a crash takes minutes. Beyond {LITE_KEYS} keys run a Milvus server "
                "(uri=http://host:19530), or keep the keys in a store and search them by a backend in this process, "
                "such as faiss-ivf",
                stacklevel=2,
            )


def _leave(connection: Connection, names: list[str]) -> None:
    """For a memory that nobody closed; while garbage is collected, so that it asks Milvus for nothing."""
    if connection.store is not None:
        leave_behind(functools.partial(leave, connection.store, names))
    else:
        leave_behind(connection.close)
