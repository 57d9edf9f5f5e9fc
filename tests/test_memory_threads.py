"""Several threads search a memory while others append and reset: every answer is that of one state."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend, SearchResult
from recollect.memory_backends.errors import ClosedMemory, UnsupportedOperation
from recollect.memory_backends.registry import backend_class, backend_names, load_backend, make_backend
from recollect.memory_backends.segments import SegmentedBackend
from recollect.memory_backends.testing import in_ci, skip_unless_available
from recollect.memory_backends.testing_oracle import OracleMemory, check_answer
from recollect.memory_backends.trained import TrainedBackend

M, C, D, K = 2, 96, 8, 6
SECONDS = 0.7


class History:
    """What every state of a memory held: key number n is the same vector in every run, so a state is its totals."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend = backend
        generator = torch.Generator().manual_seed(0)
        self.keys = torch.randn(M, 4096, D, generator=generator)
        self.drawn = [0] * M
        self.order = threading.Lock()
        self.started: list[tuple[tuple[int, int], ...]] = [((0, 0),) * M]
        """For each state and memory: the first key since the reset, and the end."""
        self.done = 1

    def append(self, memories: list[int], count: int) -> None:
        with self.order:
            state = list(self.started[-1])
            keys = []
            for memory in memories:
                first, end = state[memory]
                begin = end if end + count <= self.keys.shape[1] else first
                if begin == first and end != first:
                    return  # the table is used up
                keys.append(self.keys[memory, end : end + count])
                state[memory] = (first, end + count)
            self.started.append(tuple(state))
            self.backend.add(torch.stack(keys), memories=memories)
            self.done = len(self.started)

    def reset(self, memory: int) -> None:
        with self.order:
            state = list(self.started[-1])
            state[memory] = (state[memory][1], state[memory][1])
            self.started.append(tuple(state))
            self.backend.reset([memory])
            self.done = len(self.started)

    def oracle(self, version: int) -> OracleMemory:
        oracle = OracleMemory(M, C, self.backend.metric)
        for memory, (first, end) in enumerate(self.started[version]):
            if end > first:
                start = max(first, end - C)
                oracle.totals[memory] = start - first
                oracle.add(self.keys[memory : memory + 1, start:end], [memory])
        return oracle


def fits(history: History, version: int, queries: Tensor, result: SearchResult, exact_scores: bool) -> bool:
    exact = history.backend.capabilities.exact
    try:
        check_answer(result, queries, K, history.oracle(version), range(M), exact=exact, exact_scores=exact_scores)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", backend_names())
def test_answers_are_of_one_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_available(name)
    # pynndescent builds under the interpreter lock: searches would only wait for it.
    for cls in (SegmentedBackend, TrainedBackend) if name != "pynndescent" else ():
        monkeypatch.setattr(cls, "background_from", 16)  # so that indexes are built in the background meanwhile
    backend = make_backend(name, num_memories=M, capacity=C, dim=D, seed=3)
    exact_scores = getattr(backend_class(name), "scores_are_true", True)
    history = History(backend)
    history.append([0, 1], 90)
    backend.search(torch.zeros(M, 1, D), 1)  # what a library compiles, it compiles here
    end = time.monotonic() + SECONDS
    answers: list[tuple[int, int, Tensor, SearchResult]] = []
    trouble: list[BaseException] = []

    def guarded(work: object, *arguments: object) -> None:
        try:
            while time.monotonic() < end and not trouble:
                work(*arguments)  # type: ignore[operator]
        except BaseException as error:
            trouble.append(error)

    def search(generator: torch.Generator) -> None:
        queries = torch.randn(M, 5, D, generator=generator)
        before = history.done - 1
        result = backend.search(queries, K)
        after = len(history.started) - 1
        if len(answers) < 400:
            answers.append((before, after, queries, result))
        with backend.unchanged():
            held = backend.search(queries, K)
            keys = backend.gather_keys(held.slots)
        if backend.metric == "inner_product" and exact_scores:
            found = held.slots >= 0
            scores = torch.einsum("mqd,mqkd->mqk", queries, keys)
            torch.testing.assert_close(held.scores[found], scores[found], rtol=1e-3, atol=1e-3)

    def append() -> None:
        history.append([0, 1], 7)
        history.append([1], 13)
        time.sleep(0.002)

    def reset() -> None:
        time.sleep(0.02)
        history.reset(1)

    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    threads = [threading.Thread(target=guarded, args=(search, generator)) for generator in generators]
    threads += [threading.Thread(target=guarded, args=(work,)) for work in (append, reset)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if trouble:
        raise trouble[0]
    assert answers
    assert len(history.started) > 5
    step = max(1, len(answers) // 60)
    for before, after, queries, result in answers[::step]:
        versions = range(max(0, before), after + 1)
        assert any(fits(history, version, queries, result, exact_scores) for version in versions), (
            f"{name}: an answer is of none of the states {versions} of the memory"
        )
    assert in_ci() is not None


@pytest.mark.parametrize("name", backend_names())
def test_searching_from_threads_answers_alike(name: str) -> None:
    # Also with different k at once: what a library keeps between calls must not leak from one search into another.
    skip_unless_available(name)
    backend = make_backend(name, num_memories=M, capacity=512, dim=D, seed=3)
    generator = torch.Generator().manual_seed(0)
    backend.add(torch.randn(M, 600, D, generator=generator))
    queries = torch.randn(M, 40, D, generator=generator)
    wanted = {k: backend.search(queries, k) for k in (1, 8, 90)}
    if not backend.capabilities.deterministic:
        pytest.skip(f"{name} promises no equal answers")
    wrong: list[str] = []

    def work(order: tuple[int, ...]) -> None:
        for _ in range(6):
            for k in order:
                found = backend.search(queries, k)
                if not torch.equal(found.slots, wanted[k].slots):
                    wrong.append(f"k={k}")

    threads = [threading.Thread(target=work, args=(order,)) for order in ((1, 8, 90), (90, 1, 8), (8, 90, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


class TestClosing:
    def test_a_closed_memory_refuses(self, tmp_path: Path) -> None:
        with make_backend("exact", num_memories=1, capacity=8, dim=2) as memory:
            memory.add(torch.ones(1, 3, 2))
            memory.save(tmp_path / "memory")
        memory.close()  # once more does nothing
        for call in (
            lambda: memory.add(torch.ones(1, 1, 2)),
            lambda: memory.search(torch.ones(1, 1, 2), 1),
            lambda: memory.gather_keys(torch.zeros(1, 1, 1, dtype=torch.int64)),
            lambda: memory.reset(),
            lambda: memory.save(tmp_path / "other"),
            lambda: memory.wait(),
        ):
            with pytest.raises(ClosedMemory, match="load_backend"):
                call()
        assert load_backend(tmp_path / "memory").lengths.tolist() == [3]

    @pytest.mark.parametrize("name", backend_names())
    def test_every_backend_closes(self, name: str) -> None:
        skip_unless_available(name)
        memory = make_backend(name, num_memories=1, capacity=256, dim=4)
        memory.add(torch.randn(1, 300, 4))
        memory.wait()
        memory.wait()
        assert memory.stats().pending_builds == 0
        assert memory.stats().stalled_seconds >= 0
        memory.close()
        with pytest.raises(ClosedMemory):
            memory.search(torch.ones(1, 1, 4), 1)

    def test_closing_waits_for_searches(self) -> None:
        memory = make_backend("exact", num_memories=1, capacity=8, dim=2)
        memory.add(torch.ones(1, 3, 2))
        closed = threading.Thread(target=memory.close)
        with memory.unchanged():
            closed.start()
            time.sleep(0.05)
            assert closed.is_alive()
            assert memory.search(torch.ones(1, 1, 2), 1).slots.shape == (1, 1, 1)
        closed.join(5)
        assert not closed.is_alive()

    def test_what_is_held_cannot_be_changed(self) -> None:
        memory = make_backend("exact", num_memories=1, capacity=8, dim=2)
        with memory.unchanged(), pytest.raises(UnsupportedOperation, match="unchanged"):
            memory.add(torch.ones(1, 3, 2))
