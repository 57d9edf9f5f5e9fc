"""Backends by name, what is said of them, and the errors on the way."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from torch import Tensor

from recollect.memory_backends import (
    BackendUnavailable,
    InvalidInput,
    MemoryBackend,
    MemoryBackendError,
    Requirement,
    UnknownBackend,
    UnsupportedOperation,
    backend_names,
    canonical_spec,
    describe_backend,
    list_backends,
    make_backend,
    registry,
)

BUILT_IN = {
    "approx-topk",
    "degraded",
    "exact",
    "faiss-flat",
    "faiss-hnsw",
    "faiss-ivf",
    "faiss-ivfpq",
    "hnswlib",
    "milvus",
    "pynndescent",
    "rerank",
    "scann",
}


class Needy(MemoryBackend):
    """A third party's backend whose library nobody has."""

    name = "needy"
    requires = (Requirement("a_library_nobody_has", "a-library-nobody-has>=2"),)

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        raise AssertionError("never made")

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("never made")

    def _reset(self, memories: Tensor) -> None:
        raise AssertionError("never made")


class Impostor(Needy):
    """A third party's backend under another's name."""

    name = "exact"


def publish(monkeypatch: pytest.MonkeyPatch, **points: type) -> None:
    found = [
        importlib.metadata.EntryPoint(name, f"{cls.__module__}:{cls.__name__}", registry.ENTRY_POINT_GROUP)
        for name, cls in points.items()
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: found)


def test_every_built_in_backend_is_found_by_its_file() -> None:
    assert set(backend_names()) >= BUILT_IN
    for info in list_backends():
        assert info.summary, info.name
        for spec in info.sweep:
            assert canonical_spec(spec) == spec
            assert spec.split(":")[0] == info.name


def test_unknown_backend_offers_the_nearest() -> None:
    with pytest.raises(UnknownBackend, match="did you mean 'exact'"):
        make_backend("exat", num_memories=1, capacity=4, dim=2)


def test_third_party_backend_is_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, needy=Needy)
    info = describe_backend("needy")
    assert not info.available
    assert info.pip_command == "pip install 'a-library-nobody-has>=2'"
    with pytest.raises(BackendUnavailable, match="pip install 'a-library-nobody-has>=2'") as caught:
        make_backend("needy", num_memories=1, capacity=4, dim=2)
    assert isinstance(caught.value, ImportError)


def test_third_party_may_not_take_a_built_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, exact=Impostor)
    with pytest.raises(MemoryBackendError, match="takes the name of a built-in"):
        backend_names()


def test_third_party_name_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, other=Needy)
    with pytest.raises(MemoryBackendError, match="calls itself 'needy'"):
        make_backend("other", num_memories=1, capacity=4, dim=2)


@pytest.mark.parametrize("what", ["num_memories", "capacity", "dim"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
def test_sizes_are_checked(what: str, value: object) -> None:
    sizes: dict[str, object] = {"num_memories": 1, "capacity": 4, "dim": 2, what: value}
    with pytest.raises(InvalidInput, match=f"{what} is {value!r}"):
        make_backend("exact", **sizes)  # type: ignore[arg-type]


def test_device_and_metric_are_checked() -> None:
    with pytest.raises(InvalidInput, match="not a torch device"):
        make_backend("exact", num_memories=1, capacity=4, dim=2, device="gpu")
    with pytest.raises(UnsupportedOperation, match="can search by"):
        make_backend("exact", num_memories=1, capacity=4, dim=2, metric="hamming")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedOperation, match="no CUDA device"):
            make_backend("exact", num_memories=1, capacity=4, dim=2, device="cuda")
