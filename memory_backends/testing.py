"""The conformance suite: what every backend promises, as tests that a third party runs on its own.

    from recollect.memory_backends.testing import BackendConformance

    class TestMyIndex(BackendConformance):
        backend_spec = "my-index:cells=4"

in a file that pytest collects is all it takes. To run it over several specs, override the fixture:

    class TestMyIndex(BackendConformance):
        @pytest.fixture(params=["my-index", "my-index:cells=64"])
        def spec(self, request):
            return request.param

A backend whose library is missing is skipped, and fails where the environment variable CI is "true": a run that counts
must not pass because nothing was there to fail. Needs pytest and hypothesis, which nothing else in the package does.

Letters as in `base`: M memories, C capacity, T new keys, Q queries, D dimension, K neighbours.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from recollect.memory_backends.base import MemoryBackend, SearchResult
from recollect.memory_backends.errors import InvalidInput, UnsupportedOperation
from recollect.memory_backends.records import METRICS
from recollect.memory_backends.registry import backend_class, canonical_spec, capabilities_of
from recollect.memory_backends.spec import parse_spec
from recollect.memory_backends.testing_base import (
    C,
    D,
    InputConformance,
    M,
    in_ci,
    skip_unless_available,
    vectors,
)
from recollect.memory_backends.testing_oracle import OracleMemory, check_answer, make_machine


class BackendConformance(InputConformance):
    """The checks. A subclass sets `backend_spec`, or overrides the fixture `spec`.

    Attributes:
        backend_spec: the registry string to check.
        exact_scores: set it to False, with a comment that says why, for a backend whose scores are not the true ones.
        no_visible_effect: options that change neither answers nor size (say, a number of threads), with the reason; so
            does an entry "unseen" in the metadata of the option itself.
        examples: histories that the state machine tries.
        large_capacity: C where recall and the effect of options are judged.
    """

    # Shapes, types, devices -------------------------------------------------------------------------------------------

    def test_names_itself(self, spec: str, backend: MemoryBackend) -> None:
        assert backend.spec == canonical_spec(spec) == canonical_spec(backend.spec)
        assert backend.summary, "a backend says in one line what it is"
        assert set(backend.capabilities.metrics) <= set(METRICS)
        assert "inner_product" in backend.capabilities.metrics, "attention searches by the inner product"

    @pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 7), (33, 32)])
    def test_shapes_and_types(self, backend: MemoryBackend, count: int, k: int) -> None:
        slots = backend.add(vectors(M, 40, D))
        assert slots.shape == (M, 40)
        assert slots.dtype == torch.int64
        result = backend.search(vectors(M, count, D, seed=1), k)
        assert result.scores.shape == result.slots.shape == (M, count, k)
        assert result.scores.dtype == torch.float32
        assert result.slots.dtype == torch.int64
        assert result.scores.device == result.slots.device == torch.device("cpu")
        gathered = backend.gather_keys(result.slots)
        assert gathered.shape == (M, count, k, D)
        assert gathered.dtype == torch.float32
        assert backend.lengths.tolist() == [40] * M

    def test_nothing_in_nothing_out(self, backend: MemoryBackend) -> None:
        assert backend.add(vectors(M, 0, D)).shape == (M, 0)
        assert backend.add(vectors(0, 4, D), memories=[]).shape == (0, 4)
        backend.add(vectors(M, 4, D))
        assert backend.search(vectors(M, 0, D), 3).slots.shape == (M, 0, 3)
        assert backend.search(vectors(0, 4, D), 3, memories=[]).slots.shape == (0, 4, 3)
        backend.reset([])
        assert backend.lengths.tolist() == [4] * M

    def test_empty_memory(self, backend: MemoryBackend) -> None:
        self.check(backend, self.oracle(backend))
        result = backend.search(vectors(M, 4, D), 3)
        assert (result.slots == -1).all()
        assert (result.scores == -torch.inf).all()
        assert (backend.gather_keys(result.slots) == 0).all()

    @pytest.mark.parametrize("threads", [1, 2])
    def test_filled_under_inference_mode_and_used_outside_it(self, spec: str, threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                backend = self.make(spec)
                oracle = self.oracle(backend)
                keys = vectors(M, C + 20, D)
                backend.add(keys)
                oracle.add(keys, range(M))
                self.check(backend, oracle)
            keys = vectors(M, 30, D, seed=2)
            backend.add(keys)
            oracle.add(keys, range(M))
            self.check(backend, oracle)
            backend.reset([1])
            assert backend.lengths.tolist() == [C, 0, C]
        finally:
            torch.set_num_threads(before)

    def test_one_memory_empty(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        keys = vectors(2, 50, D)
        backend.add(keys, memories=[0, 2])
        oracle.add(keys, [0, 2])
        result = self.check(backend, oracle)
        assert (result.slots[1] == -1).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_floating_types(self, spec: str, dtype: torch.dtype) -> None:
        keys, queries = vectors(M, 50, D).to(dtype), vectors(M, 20, D, seed=1).to(dtype)
        one, other = self.make(spec), self.make(spec)
        one.add(keys)
        other.add(keys.float())
        self.assert_alike(one, one.search(queries, 5), other.search(queries.float(), 5))

    def test_strided_input(self, spec: str) -> None:
        keys, queries = vectors(M, D, 50).transpose(1, 2), vectors(20, M, D, seed=1).transpose(0, 1)
        assert not keys.is_contiguous()
        one, other = self.make(spec), self.make(spec)
        assert torch.equal(one.add(keys), other.add(keys.contiguous()))
        self.assert_alike(one, one.search(queries, 5), other.search(queries.contiguous(), 5))

    def test_input_is_left_alone(self, backend: MemoryBackend) -> None:
        keys, queries = vectors(M, 70, D), vectors(M, 20, D, seed=1)
        kept_keys, kept_queries = keys.clone(), queries.clone()
        backend.add(keys)
        before = backend.search(queries, 5)
        assert torch.equal(keys, kept_keys)
        assert torch.equal(queries, kept_queries)
        keys.fill_(3.0)
        self.assert_alike(backend, before, backend.search(queries, 5))
        all_slots = torch.arange(70).expand(M, 1, 70)
        assert torch.allclose(backend.gather_keys(all_slots)[:, 0], self.held(backend, kept_keys), atol=1e-6)

    def test_no_gradient_and_no_autocast(self, backend: MemoryBackend) -> None:
        keys, queries = vectors(M, 50, D), vectors(M, 20, D, seed=1)
        backend.add(keys.clone().requires_grad_())
        outside = backend.search(queries, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = backend.search(queries.clone().requires_grad_(), 5)
        assert not inside.scores.requires_grad
        assert not backend.gather_keys(inside.slots).requires_grad
        self.assert_alike(backend, outside, inside)

    def test_devices(self, spec: str) -> None:
        with pytest.raises(UnsupportedOperation, match="meta"):
            self.make(spec, device="meta")
        with pytest.raises(InvalidInput, match="no-such-device"):
            self.make(spec, device="no-such-device")
        if "cuda" not in capabilities_of(spec).devices:
            with pytest.raises(UnsupportedOperation, match="cuda"):
                self.make(spec, device="cuda")
        elif torch.cuda.is_available():
            backend = self.make(spec, device="cuda")
            oracle = self.oracle(backend)
            keys = vectors(M, 130, D)
            assert backend.add(keys.cuda()).device.type == "cuda"
            oracle.add(keys, range(M))
            self.check(backend, oracle)
            assert backend.search(keys[:, :3].cuda(), 2).slots.device.type == "cuda"

    # First in, first out ----------------------------------------------------------------------------------------------

    def test_right_from_the_first_key(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        for step in range(45):
            key = vectors(M, 1, D, seed=100 + step)
            assert (backend.add(key).numpy() == oracle.add(key, range(M))).all()
            self.check(backend, oracle, seed=step)

    def test_more_neighbours_than_keys(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        for memory, count in enumerate((1, 7, 40)):
            keys = vectors(1, count, D, seed=memory)
            backend.add(keys, memories=[memory])
            oracle.add(keys, [memory])
        for k in (8, 41, 200):
            self.check(backend, oracle, k=k)

    def test_slots_across_wraparound(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        for step, count in enumerate((30, 50, 30, 1, 95, 96, 17, 64)):
            keys = vectors(M, count, D, seed=step)
            assert (backend.add(keys).numpy() == oracle.add(keys, range(M))).all()
            self.check(backend, oracle, seed=step)

    def test_one_add_longer_than_the_capacity(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        for step, count in enumerate((C + 1, 3 * C + 5, 10)):
            keys = vectors(M, count, D, seed=step)
            slots = backend.add(keys)
            assert (slots.numpy() == oracle.add(keys, range(M))).all()
            assert (slots[:, : max(0, count - C)] == -1).all()
            assert backend.lengths.tolist() == [C] * M
            self.check(backend, oracle)

    def test_evicted_is_never_returned(self, backend: MemoryBackend) -> None:
        # The old keys suit the queries far better than any new one: an index that still holds them shows it.
        direction = torch.nn.functional.normalize(vectors(M, 1, D), dim=-1)
        backend.add(10 * direction + 0.01 * vectors(M, C, D, seed=1))
        backend.search(direction, 5)
        backend.add(vectors(M, C, D, seed=2))
        oracle = self.oracle(backend)
        oracle.add(vectors(M, C, D, seed=2), range(M))
        result = backend.search(direction.expand(M, 4, D), 5)
        assert result.scores[result.slots >= 0].max() < 9
        self.check(backend, oracle)

    def test_overwritten_slot_answers_with_its_new_key(self, backend: MemoryBackend) -> None:
        backend.add(vectors(M, C, D))
        new = 5 * torch.nn.functional.normalize(vectors(M, 30, D, seed=1), dim=-1)
        slots = backend.add(new)
        assert slots.tolist() == [list(range(30))] * M
        # Each query has its own key among the first few; an index may miss some, never answer with the old one.
        result = backend.search(new, 3)
        own = result.slots == slots[..., None]
        assert own.any(-1).float().mean() >= backend.recall_floor
        kept = self.held(backend, new)
        expected = (new * kept).sum(-1, keepdim=True).expand_as(result.scores)[own]
        torch.testing.assert_close(result.scores[own], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(backend.gather_keys(slots[:, None])[:, 0], kept, rtol=1e-5, atol=1e-5)

    def test_gather_keys(self, backend: MemoryBackend) -> None:
        keys = vectors(M, 130, D)
        slots = backend.add(keys)
        asked = slots[:, 60:].clone().view(M, 7, 10)
        asked[:, 2, 3] = -1
        expected = self.held(backend, keys)[:, 60:].clone().view(M, 7, 10, D)
        expected[:, 2, 3] = 0
        torch.testing.assert_close(backend.gather_keys(asked), expected)
        torch.testing.assert_close(backend.gather_keys(asked[[2, 0]], memories=[2, 0]), expected[[2, 0]])
        with pytest.raises(InvalidInput):
            backend.gather_keys(torch.full((M, 1, 1), C))
        with pytest.raises(InvalidInput):
            backend.gather_keys(torch.full((M, 1, 1), -2))

    # Memories are independent -----------------------------------------------------------------------------------------

    def test_others_are_left_alone(self, backend: MemoryBackend) -> None:
        backend.add(vectors(M, 60, D))
        queries = vectors(M, 20, D, seed=1)
        before = backend.search(queries, 5)
        backend.add(vectors(1, 80, D, seed=2), memories=[0])
        backend.reset([2])
        after = backend.search(queries, 5)
        assert torch.equal(before.slots[1], after.slots[1])
        assert torch.equal(before.scores[1], after.scores[1])
        assert backend.lengths.tolist() == [C, 60, 0]
        assert (after.slots[2] == -1).all()

    def test_some_memories_in_any_order(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        for step, which in enumerate(([2, 0], [1], [0, 1, 2], [1, 0])):
            keys = vectors(len(which), 40, D, seed=step)
            assert (backend.add(keys, memories=which).numpy() == oracle.add(keys, which)).all()
        self.check(backend, oracle, memories=[1])
        self.check(backend, oracle, memories=[2, 0])
        queries = vectors(M, 20, D, seed=9)
        whole = backend.search(queries, 5)
        some = backend.search(queries[[2, 0]], 5, memories=torch.tensor([2, 0]))
        self.assert_alike(backend, some, SearchResult(whole.scores[[2, 0]], whole.slots[[2, 0]]))

    def test_reset_forgets(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        backend.add(vectors(M, 150, D))
        backend.reset()
        assert backend.lengths.tolist() == [0] * M
        assert (backend.search(vectors(M, 4, D), 3).slots == -1).all()
        keys = vectors(M, 40, D, seed=3)
        assert (backend.add(keys).numpy() == oracle.add(keys, range(M))).all()
        assert backend.add(vectors(M, 1, D)).tolist() == [[40]] * M

    # Answers ----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("metric", METRICS)
    def test_recall_floor(self, spec: str, metric: str) -> None:
        if metric not in capabilities_of(spec).metrics:
            with pytest.raises(UnsupportedOperation, match=metric):
                self.make(spec, metric=metric)
            return
        capacity = self.large_capacity
        backend = self.make(spec, metric=metric, num_memories=2, capacity=capacity, dim=16)
        oracle = self.oracle(backend)
        for step in range(12):
            # Lengths differ from key to key, as a model's may: an index of another metric answers otherwise.
            keys = vectors(2, capacity // 8, 16, seed=step)
            keys = keys * (0.5 + vectors(2, capacity // 8, 1, seed=50 + step).abs())
            backend.add(keys)
            oracle.add(keys, range(2))
        self.check(backend, oracle, k=10)

    def test_same_seed_same_answer(self, spec: str) -> None:
        one, other = self.make(spec), self.make(spec)
        for step in range(3):
            one.add(vectors(M, 50, D, seed=step))
            other.add(vectors(M, 50, D, seed=step))
        queries = vectors(M, 20, D, seed=9)
        self.assert_alike(one, one.search(queries, 5), other.search(queries, 5))
        self.assert_alike(one, one.search(queries, 5), one.search(queries, 5))

    def test_equal_keys(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        keys = vectors(M, 1, D).expand(M, 80, D)
        backend.add(keys)
        oracle.add(keys, range(M))
        self.check(backend, oracle, k=7)

    def test_zero_keys_and_queries(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        keys = vectors(M, 60, D)
        keys[:, 10:20] = 0
        backend.add(keys)
        oracle.add(keys, range(M))
        queries = torch.zeros(M, 2, D)
        check_answer(backend.search(queries, 3), queries, 3, oracle, range(M), exact=backend.capabilities.exact)

    def test_one_huge_key(self, backend: MemoryBackend) -> None:
        oracle = self.oracle(backend)
        keys = vectors(M, 60, D)
        keys[:, 7] *= 1e6
        backend.add(keys)
        oracle.add(keys, range(M))
        result = backend.search(keys[:, 7:8], 1)
        if backend.capabilities.exact:
            assert (result.slots == 7).all()
        assert torch.isfinite(result.scores[result.slots >= 0]).all()

    # A random history -------------------------------------------------------------------------------------------------

    def test_random_history(self, spec: str) -> None:
        cls = backend_class(parse_spec(spec)[0])
        machine = make_machine(
            lambda: self.make(spec, capacity=40), recall_floor=cls.recall_floor, exact_scores=self.exact_scores
        )
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=12,
                deadline=None,
                # The recall of an approximate index has bad luck in some history: let it be the same ones every time.
                derandomize=in_ci() or not capabilities_of(spec).exact,
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )


__all__ = ["BackendConformance", "OracleMemory", "check_answer", "in_ci", "skip_unless_available", "vectors"]
