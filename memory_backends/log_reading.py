"""Reading a version of a `KeyLog`: what is alive, oldest first, and every way in which it may not be what it should.

Letters: M memories, C capacity, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends import key_rows, lance_support
from recollect.memory_backends.errors import CorruptMemory, StoreMissing
from recollect.memory_backends.lance_places import Place
from recollect.memory_backends.log_state import LogState

_REPAIR = "bring it back from a copy"


def read_memory(
    place: Place, dataset: Any, state: LogState, memory: int, shard: int, shards: int, batch_rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """As `KeyLog.read`, of a version."""
    expected = key_rows.expected_numbers(state, memory, shard, shards)
    seen = 0
    scan = key_rows.scan_memory(dataset, state, memory, shard, shards, batch_rows)
    for numbers, slots, keys in _told(place, dataset, scan):
        wanted = expected[seen : seen + len(numbers)]
        if not np.array_equal(numbers, wanted) or not np.array_equal(slots, numbers % state.capacity):
            raise CorruptMemory(
                f"{place} holds keys {_ends(numbers)} of memory {memory} where {_ends(wanted)} belong: {_REPAIR}"
            )
        seen += len(numbers)
        yield torch.from_numpy(numbers), torch.from_numpy(slots), torch.from_numpy(keys)
    if seen != len(expected):
        raise CorruptMemory(f"{place} holds {seen} of the {len(expected)} keys alive in memory {memory}: {_REPAIR}")


def read_all(place: Place, dataset: Any, state: LogState, batch_rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """As `KeyLog.scan`, of a version."""
    following = np.array([state.first_alive(memory) for memory in range(state.num_memories)])
    for memories, numbers, keys in _told(place, dataset, key_rows.scan_alive(dataset, state, batch_rows)):
        wrong, following = key_rows.out_of_turn(memories, numbers, following)
        if wrong is not None:
            where = f"key {numbers[wrong]} of memory {memories[wrong]}"
            raise CorruptMemory(f"{place} holds {where} out of its turn: {_REPAIR}")
        yield torch.from_numpy(memories), torch.from_numpy(numbers), torch.from_numpy(keys)
    missing = np.flatnonzero(following != np.array(state.totals))
    if len(missing):
        memory = int(missing[0])
        raise CorruptMemory(
            f"{place} ends at key {following[memory]} of memory {memory}, which has {state.totals[memory]}: {_REPAIR}"
        )


def _told(place: Place, dataset: Any, parts: Iterator[key_rows.Part]) -> Iterator[key_rows.Part]:
    """The parts of a scan, its errors in this package's words."""
    while True:
        try:
            part = lance_support.ask(place, "read", lambda: next(parts, None))
        except StoreMissing as error:
            raise StoreMissing(
                f"{place} was deleted, or its older versions were pruned, while version {dataset.version} was read: "
                f"call refresh() and read again, or {_REPAIR}"
            ) from error
        if part is None:
            return
        yield part


def _ends(numbers: np.ndarray[Any, Any]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) else "none"
