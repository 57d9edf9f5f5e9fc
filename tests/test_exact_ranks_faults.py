"""What goes wrong between ranks: calls that differ, ranks that are killed or stopped. A clear error, never a hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_jobs import GONE, run

from recollect.memory_backends import InvalidInput, MemoryBackend, NotFinite, make_backend
from recollect.memory_backends.rank_group import RankLost, RanksDiffer
from recollect.memory_backends.testing import vectors

M, C, D = 2, 30, 8
SHORT = "exact-ranks:deadline_seconds=2"


def made(spec: str = "exact-ranks", **changes: Any) -> MemoryBackend:
    return make_backend(spec, **{"num_memories": M, "capacity": C, "dim": D, **changes})


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    """The name and the text of what a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


# Calls that differ ----------------------------------------------------------------------------------------------------


def differing(rank: int, size: int) -> list[tuple[str, str]]:
    """One after another calls that do not fit together; between them the memory answers as if nothing had been."""
    memory, other, exact = made(), made(), make_backend("exact", num_memories=M, capacity=C, dim=D)
    keys, queries = vectors(M, 9, D, seed=rank), vectors(M, 4, D, seed=rank + 5)
    shared = made("exact-ranks:shared=true")
    shared.add(vectors(M, 5, D))
    memory.add(keys)
    exact.add(keys)
    bad = keys.clone()
    bad[1, 2, 3] = float("nan")
    first = rank == 0
    calls: list[Callable[[], Any]] = [
        lambda: memory.search(queries, 3 if first else 4),
        lambda: memory.search(queries[:, : 4 if first else 2], 3),
        lambda: memory.add(keys[:, : 9 if first else 8]),
        lambda: memory.add(keys[:1], memories=[0]) if first else memory.add(keys),
        lambda: memory.search(queries, 3) if first else memory.add(keys),
        lambda: memory.search(queries, 3) if first else other.search(queries, 3),
        lambda: memory.gather_keys(torch.zeros(M, 1, 2 if first else 3, dtype=torch.int64)),
        lambda: memory.add(keys if first else bad),
        lambda: memory.search(queries, 3 if first else 0),
        lambda: memory.gather_keys(torch.full((M, 1, 1), 0 if first else C + 1)),
        lambda: made(capacity=C if first else C + 1),
        lambda: made(num_memories=M if first else M + 1),
        lambda: made() if first else memory.search(queries, 3),
        lambda: made(SHORT) if first else made(SHORT, metric="l2"),
        lambda: shared.add(keys),
        lambda: shared.search(queries, 3, memories=[0, 1] if first else [1, 0]),
        lambda: (None if first else shared.reset([1]), shared.search(queries, 3)),
    ]
    found = []
    for call in calls:
        found.append(refusal(call))
        answer, true = memory.search(queries, 5), exact.search(queries, 5)
        assert torch.equal(answer.slots, true.slots), call
        assert memory.lengths.tolist() == exact.lengths.tolist()
    assert torch.equal(memory.add(keys), exact.add(keys))
    assert other.lengths.tolist() == [0] * M
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_calls_that_differ_are_refused_on_every_rank_and_change_nothing(size: int) -> None:
    every = run(size, differing)
    names = [[name for name, _ in found] for found in every]
    own_errors = {7: NotFinite, 8: InvalidInput, 9: InvalidInput}
    for number in range(len(names[0])):
        assert names[0][number] == "RanksDiffer", every[0][number]
        expected = own_errors.get(number, RanksDiffer).__name__
        assert {found[number] for found in names[1:]} == {expected}, every[1][number]
    texts = [text for _, text in every[0]]
    others = "rank 1" if size == 2 else "ranks 1, 2"
    assert "rank 0: search of 4 queries in each of 2 memories with k=3" in texts[0]
    assert f"{others}: search of 4 queries in each of 2 memories with k=4" in texts[0]
    assert f"{others}: add of 9 keys to each of 2 memories" in texts[4]
    assert "memory number 0" in texts[5]
    assert "memory number 1" in texts[5]
    assert "rank 1 (NotFinite: keys hold nan" in texts[7]
    assert "capacity=30" in texts[10]
    assert "capacity=31" in texts[10]
    assert "made a memory" in texts[12]
    assert "metric='l2'" in texts[13]
    for text in texts[14:]:
        assert f"ranks {list(range(1, size))} gave other keys" in text


def from_two_threads(rank: int, size: int) -> bool:
    """Searches of two threads pair up with searches of the others in whatever order: each gets its own answer."""
    memory, exact = made(), make_backend("exact", num_memories=M, capacity=C, dim=D)
    keys = vectors(M, C, D, seed=rank)
    memory.add(keys)
    exact.add(keys)
    wrong: list[str] = []

    def search(thread: int) -> None:
        for step in range(10):
            queries = vectors(M, 4, D, seed=100 * rank + 10 * thread + step)
            if not torch.equal(memory.search(queries, 5).slots, exact.search(queries, 5).slots):
                wrong.append(f"thread {thread}, step {step}")

    threads = [threading.Thread(target=search, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    return True


def test_two_threads_search_at_once() -> None:
    assert run(2, from_two_threads) == [True, True]


# Ranks that are lost --------------------------------------------------------------------------------------------------


def losing(rank: int, size: int, how: int, when: str) -> Any:
    """Rank 1 ends or stops at some moment of a call; the others tell what they got, and what they get afterwards."""
    memory, second = made(SHORT), made(SHORT)
    memory.add(vectors(M, 9, D, seed=rank))
    second.add(vectors(M, 9, D, seed=rank))
    queries = vectors(M, 4, D)
    if rank == 1:
        if when == "before a call":
            os.kill(os.getpid(), how)
        elif when == "after its header":
            memory.ranks.gather = lambda tensor: os.kill(os.getpid(), how)
        elif when == "with its answer":
            search = memory.part.search
            memory.part.search = lambda *a, **b: (os.kill(os.getpid(), how), search(*a, **b))[1]
    begun = time.monotonic()
    first = refusal(lambda: memory.search(queries, 3))
    taken = time.monotonic() - begun
    begun = time.monotonic()
    later = [refusal(lambda: memory.add(queries)), refusal(lambda: second.search(queries, 3)), refusal(second.reset)]
    at_once = time.monotonic() - begun
    memory.close()
    return first, later, taken, at_once


@pytest.mark.parametrize("when", ["before a call", "after its header", "with its answer"])
def test_a_killed_rank(when: str) -> None:
    one, gone, other = run(3, losing, signal.SIGKILL, when, without=1, seconds=60)
    assert gone == GONE
    check_lost(one, other)
    if when == "before a call":
        assert "rank 1 of 3 ended" in one[0][1]


@pytest.mark.parametrize("when", ["before a call", "with its answer"])
def test_a_stopped_rank(when: str) -> None:
    one, gone, other = run(3, losing, signal.SIGSTOP, when, without=1, seconds=60)
    assert gone == GONE
    check_lost(one, other)
    if when == "before a call":
        assert "rank 1 of 3 did not answer within 2 s" in one[0][1]


def check_lost(*found: Any) -> None:
    for first, later, _, _ in found:
        assert first[0] == RankLost.__name__, first
        assert "torchrun" in first[1]
        # Nothing goes on after that, not even with another memory of the same ranks.
        assert [name for name, _ in later] == [RankLost.__name__] * 3


def failing_alone(rank: int, size: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Rank 1 fails in the middle of a call, when the others hold the new keys already."""
    memory = made(SHORT)
    if rank == 1:

        def fail(*arguments: Any, **named: Any) -> None:
            raise ValueError("no room")

        memory.part.add = fail
    keys = vectors(M, 6, D)
    first = refusal(lambda: memory.add(keys))
    return first, refusal(lambda: memory.search(keys, 2))


def test_a_rank_that_fails_in_the_middle_refuses_to_go_on() -> None:
    (zero, one) = run(2, failing_alone, seconds=60)
    assert zero[0] == ("nothing", "")
    assert one[0] == ("ValueError", "no room")
    assert zero[1][0] == one[1][0] == RankLost.__name__
    assert "ValueError: no room" in one[1][1]


def deadlines(rank: int, size: int) -> list[float]:
    return [made(spec).ranks.deadline_seconds for spec in ("exact-ranks", SHORT)]  # type: ignore[attr-defined]


def test_the_deadline_is_that_of_the_job_unless_one_is_given() -> None:
    assert run(2, deadlines) == [[60.0, 2.0]] * 2


def missing(rank: int, size: int) -> tuple[str, str]:
    """Rank 1 never makes the memory that the others make."""
    return refusal(lambda: made(SHORT)) if rank != 1 else refusal(lambda: time.sleep(3))


def test_a_memory_that_not_every_rank_makes() -> None:
    found = run(3, missing, seconds=60)
    assert [name for name, _ in found] == [RankLost.__name__, "nothing", RankLost.__name__]
