"""What the checks of the conformance suite share, and the checks of options, input and saving.

Letters as in `base`. Only `recollect.memory_backends.testing` imports this file; it needs pytest.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend, SearchResult
from recollect.memory_backends.errors import (
    BackendUnavailable,
    InvalidInput,
    InvalidSpec,
    MemoryBackendError,
    OverBudget,
    UnsupportedOperation,
)
from recollect.memory_backends.options import IN_MEMORY, KeyStorageOptions
from recollect.memory_backends.registry import (
    backend_class,
    canonical_spec,
    check_available,
    load_backend,
    make_backend,
)
from recollect.memory_backends.spec import format_spec, options_given, parse_spec
from recollect.memory_backends.testing_oracle import OracleMemory, check_answer, rounding_of

M, C, D = 3, 96, 8
"""The size most checks run at: three memories, small enough to turn over several times in a blink."""


def in_ci() -> bool:
    """Whether this run counts: the environment variable CI is "true"."""
    return os.environ.get("CI", "").lower() in ("true", "1")


def skip_unless_available(spec: str) -> None:
    """Skips the test if the library of a backend is missing; fails it in CI, but for a card that is not here."""
    try:
        check_available(spec)
    except BackendUnavailable as error:
        if in_ci() and (torch.cuda.is_available() or not backend_class(parse_spec(spec)[0]).needs_card):
            pytest.fail(f"in CI every library must be there: {error}")
        pytest.skip(str(error))


def vectors(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed float32, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(one: SearchResult, other: SearchResult) -> None:
    """Holds two answers to be the same, scores to rounding."""
    assert torch.equal(one.slots, other.slots)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-5, atol=1e-5)


class ConformanceBase:
    """The backend that is checked and how; see `BackendConformance` for the attributes."""

    backend_spec: ClassVar[str] = ""
    exact_scores: ClassVar[bool] = True
    no_visible_effect: ClassVar[dict[str, str]] = {}
    examples: ClassVar[int] = 10
    large_capacity: ClassVar[int] = 1024

    @pytest.fixture
    def spec(self) -> str:
        """The registry string to check."""
        assert self.backend_spec, "set backend_spec, or override the fixture spec"
        return self.backend_spec

    @pytest.fixture(autouse=True)
    def _library(self, spec: str) -> None:
        skip_unless_available(spec)

    @pytest.fixture
    def backend(self, spec: str) -> MemoryBackend:
        """M = 3 empty memories of 96 keys of dimension 8."""
        return self.make(spec)

    def make(self, spec: str, **changes: Any) -> MemoryBackend:
        """A backend at the size that most checks run at."""
        return make_backend(spec, **{"num_memories": M, "capacity": C, "dim": D, "seed": 5, **changes})

    def oracle(self, backend: MemoryBackend) -> OracleMemory:
        """An empty oracle of the backend's size."""
        return OracleMemory(backend.num_memories, backend.capacity, backend.metric, rounding_of(backend))

    def held(self, backend: MemoryBackend, keys: Tensor) -> Tensor:
        """Keys (..., D) float32 as a backend, not of the cosine, keeps them."""
        return backend.ring.rounded(keys)

    def check(
        self,
        backend: MemoryBackend,
        oracle: OracleMemory,
        k: int = 5,
        memories: Sequence[int] | None = None,
        seed: int = 1,
    ) -> SearchResult:
        """Searches with 64 queries a memory, holds the answer against the contract and its recall against the floor."""
        which = list(range(backend.num_memories)) if memories is None else list(memories)
        queries = vectors(len(which), 64, backend.dim, seed=seed)
        result = backend.search(queries, k, memories=memories)
        recall = check_answer(
            result, queries, k, oracle, which, exact=backend.capabilities.exact, exact_scores=self.exact_scores
        )
        assert recall.value >= backend.recall_floor, f"recall {recall.value:.3f} is below {backend.recall_floor}"
        return result

    def assert_alike(self, backend: MemoryBackend, one: SearchResult, other: SearchResult) -> None:
        """Holds two answers to be the same, or about the same where the backend does not promise more."""
        if backend.capabilities.deterministic:
            assert_same(one, other)
        else:
            same = (one.slots[..., :, None] == other.slots[..., None, :]).any(-1)
            assert same.float().mean() >= 2 * backend.recall_floor - 1


class InputConformance(ConformanceBase):
    """Saving, options and bad input."""

    # Saving, options, bad input ---------------------------------------------------------------------------------------

    def test_save_and_load(self, backend: MemoryBackend, tmp_path: Path) -> None:
        for step in range(3):
            backend.add(vectors(M, 50, D, seed=step))
        backend.reset([1])
        backend.add(vectors(1, 20, D, seed=4), memories=[1])
        queries = vectors(M, 20, D, seed=9)
        before = backend.search(queries, 5)
        if not backend.capabilities.persistent:
            with pytest.raises(UnsupportedOperation):
                backend.save(tmp_path / "memory")
            return
        backend.save(tmp_path / "memory")
        loaded = load_backend(tmp_path / "memory")
        assert loaded.spec == backend.spec
        assert loaded.lengths.tolist() == backend.lengths.tolist()
        self.assert_alike(backend, before, loaded.search(queries, 5))
        assert not [file for file in (tmp_path / "memory").rglob("*") if file.suffix in (".pkl", ".pickle", ".pt")]
        more = vectors(M, 40, D, seed=5)
        assert torch.equal(backend.add(more), loaded.add(more))
        self.assert_alike(backend, backend.search(queries, 5), loaded.search(queries, 5))
        # Saving again replaces what was there.
        backend.save(tmp_path / "memory")
        assert load_backend(tmp_path / "memory").lengths.tolist() == backend.lengths.tolist()

    def test_options_are_described_and_checked(self, spec: str) -> None:
        name = parse_spec(spec)[0]
        cls = backend_class(name)
        with pytest.raises(InvalidSpec, match="no_such_option"):
            canonical_spec(f"{name}:no_such_option=1")
        for option in dataclasses.fields(cls.Options):
            assert option.metadata.get("help"), f"option {option.name!r} has no help"
            hint = typing.get_type_hints(cls.Options)[option.name]
            if hint is not str:
                with pytest.raises(InvalidSpec, match="not-a-value"):
                    canonical_spec(f"{name}:{option.name}='not-a-value'")
            misspelt = option.name + option.name[-1]
            with pytest.raises(InvalidSpec, match=option.name):
                canonical_spec(f"{name}:{misspelt}=1")
        assert set(cls.search_options) <= {option.name for option in dataclasses.fields(cls.Options)}

    def test_every_option_takes_effect_or_raises(self, spec: str) -> None:
        name, given = parse_spec(spec)
        if given:
            pytest.skip("options are the backend's, and are tried once: with its default spec")
        cls = backend_class(name)
        reference = self.fingerprint(name)
        for option in dataclasses.fields(cls.Options):
            if option.name in self.no_visible_effect or option.metadata.get("unseen"):
                continue
            tried, changed = 0, False
            for value in _other_values(typing.get_type_hints(cls.Options)[option.name], option.default):
                try:
                    changed = self.fingerprint(format_spec(name, {option.name: value})) != reference
                except MemoryBackendError:
                    continue
                tried += 1
                if changed:
                    break
            # Where every other value raises (a device that is not here), that is what the option does.
            assert changed or not tried, f"option {option.name!r} changes neither the answers nor the size of the index"

    def fingerprint(self, spec: str) -> tuple[Any, ...]:
        """What of a backend's answers and size could show an option."""
        capacity = self.large_capacity
        backend = self.make(spec, num_memories=1, capacity=capacity, dim=16)
        backend.add(vectors(1, capacity + capacity // 3, 16))
        found = [backend.search(vectors(1, 50, 16, seed=1), k) for k in (1, 10, 64)]
        stats = backend.stats()
        return (*(tuple(result.slots.flatten().tolist()) for result in found), stats.index_bytes, stats.key_bytes)

    def test_set_search_options(self, spec: str, backend: MemoryBackend) -> None:
        backend.add(vectors(M, C, D))
        with pytest.raises(InvalidSpec, match="no_such_option"):
            backend.set_search_options(no_such_option=1)
        for option in dataclasses.fields(backend.Options):
            current = getattr(backend.options, option.name)
            if option.name not in backend.search_options:
                with pytest.raises(UnsupportedOperation, match=option.name):
                    backend.set_search_options(**{option.name: current})
                continue
            for value in _other_values(typing.get_type_hints(backend.Options)[option.name], current):
                fresh = self.make(spec)
                fresh.add(vectors(M, C, D))
                try:
                    fresh.set_search_options(**{option.name: value})
                except MemoryBackendError:
                    continue
                assert options_given(fresh.options) != options_given(backend.options)
                # The same as a backend made so from the start.
                made = self.make(fresh.spec)
                made.add(vectors(M, C, D))
                queries = vectors(M, 20, D, seed=1)
                try:
                    answer = made.search(queries, 5)
                except InvalidInput:
                    continue
                self.assert_alike(backend, fresh.search(queries, 5), answer)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_keys_and_queries_must_be_finite(self, backend: MemoryBackend, bad: float) -> None:
        oracle = self.oracle(backend)
        keys = vectors(M, 30, D)
        backend.add(keys)
        oracle.add(keys, range(M))
        spoilt = vectors(M, 30, D, seed=1)
        spoilt[1, 4, 2] = bad
        with pytest.raises(InvalidInput, match=str(bad)):
            backend.add(spoilt)
        with pytest.raises(InvalidInput, match=str(bad)):
            backend.search(spoilt, 3)
        # Nothing of the refused keys went in.
        self.check(backend, oracle)
        assert (backend.add(keys).numpy() == oracle.add(keys, range(M))).all()

    def test_wrong_arguments(self, spec: str, backend: MemoryBackend) -> None:
        backend.add(vectors(M, 30, D))
        queries = vectors(M, 4, D)
        for wrong in (0, -1):
            with pytest.raises(InvalidInput, match=str(wrong)):
                backend.search(queries, wrong)
        for keys in (vectors(M, 4, D + 1), vectors(M + 1, 4, D), vectors(M, D)):
            with pytest.raises(InvalidInput, match=str(keys.shape[-1])):
                backend.add(keys)
            with pytest.raises(InvalidInput, match=str(keys.shape[-1])):
                backend.search(keys, 3)
        with pytest.raises(InvalidInput, match="int64"):
            backend.add(torch.ones(M, 4, D, dtype=torch.int64))
        for memories in ([0, M], [-1], [0, 0]):
            with pytest.raises(InvalidInput, match=str(memories[-1])):
                backend.search(vectors(len(memories), 4, D), 3, memories=memories)
            with pytest.raises(InvalidInput, match=str(memories[-1])):
                backend.reset(memories)
        assert backend.lengths.tolist() == [30] * M
        for size in ("capacity", "num_memories", "dim"):
            with pytest.raises(InvalidInput, match=rf"{size} is 0"):
                self.make(spec, **{size: 0})
        with pytest.raises(UnsupportedOperation, match="hamming"):
            self.make(spec, metric="hamming")

    def test_stats(self, backend: MemoryBackend) -> None:
        empty = backend.stats()
        assert (empty.keys, empty.key_bytes, empty.bytes_per_key) == (0, 0, 0.0)
        backend.add(vectors(M, 150, D))
        full = backend.stats()
        assert full.keys == M * C
        stored = stored_keys(backend)
        in_file = stored.keys_in != IN_MEMORY
        if stored.storage == "int8":
            assert full.key_bytes == M * C * (D + 4)
            assert full.mapped_bytes == (M * C * D * 4 if in_file else 0)
        else:
            size = M * C * D * (4 if stored.storage == "float32" else 2)
            assert (full.key_bytes, full.mapped_bytes) == ((0, size) if in_file else (size, 0))
        assert full.index_bytes >= 0
        assert full.build_seconds >= 0
        assert full.bytes_per_key == (full.key_bytes + full.index_bytes) / full.keys

    def test_keys_are_kept_as_near_as_their_storage_says(self, backend: MemoryBackend) -> None:
        keys = vectors(M, 60, D) * vectors(M, 60, 1, seed=1).exp()
        kept = backend.gather_keys(backend.add(keys)[:, None])[:, 0]
        stored = stored_keys(backend)
        whole = stored.storage == "int8" and stored.keys_in != IN_MEMORY
        steps = {"float32": 1e-6, "bfloat16": 2.0**-8, "int8": 0.5 / 127}
        step = steps["float32" if whole else stored.storage]
        assert ((kept - keys).abs() <= 1.001 * step * keys.abs().amax(-1, keepdim=True)).all()

    def test_budget(self, spec: str) -> None:
        name, given = parse_spec(spec)
        if not issubclass(backend_class(name).Options, KeyStorageOptions):
            pytest.skip("its options say nothing of bytes")
        with pytest.raises(InvalidSpec, match="lots"):
            canonical_spec(format_spec(name, {**given, "max_bytes": "lots"}))
        large = self.make(format_spec(name, {**given, "max_bytes": "1GiB"}))
        large.add(vectors(M, C, D))
        if not large.stats().bytes_per_key:
            return  # everything lies in a file
        # Refused when it is made, or where nobody can say beforehand, when it would grow too large; then it is as it
        # was.
        small = None
        with pytest.raises(OverBudget, match="max_bytes=100B"):
            small = self.make(format_spec(name, {**given, "max_bytes": "100B"}))
            small.add(vectors(M, C, D))
        assert small is None or small.lengths.tolist() == [0] * M


def stored_keys(backend: MemoryBackend) -> KeyStorageOptions:
    """How a backend says that it stores its keys; the defaults where it says nothing."""
    return backend.options if isinstance(backend.options, KeyStorageOptions) else KeyStorageOptions()


def _other_values(hint: Any, default: Any) -> list[Any]:
    """Values of an option's type other than its default, far from it where that can be."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [value for value in arguments if value != default]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [
            value
            for kind in arguments
            if kind is not type(None)
            for value in _other_values(kind, default)
            if value != default
        ]
    if hint is bool:
        return [not default]
    if hint is int:
        around = default or 16
        return [value for value in (max(1, around // 4), 1, 2, 48, around * 4) if value != default]
    if hint is float:
        around = default or 0.5
        return [value for value in (around / 2, (1 + around) / 2, around * 2, 0.0, 1.0) if value != default]
    return []
