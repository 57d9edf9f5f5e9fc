"""The shipped conformance suite over every backend that the registry lists."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from recollect.memory_backends import backend_names, canonical_spec, describe_backend
from recollect.memory_backends.registry import backend_class
from recollect.memory_backends.spec import parse_spec
from recollect.memory_backends.testing import BackendConformance

SWEEP_ENTRIES = 1
"""Entries of each backend's sweep beside its default spec: the suite has to stay a matter of minutes on two cores."""

STORAGES = (
    "exact:storage=bfloat16",
    "exact:storage=int8",
    "exact:keys_in=temporary",
    "exact:keys_in=temporary,storage=int8",
    "approx-topk:storage=int8",
    "faiss-flat:keys_in=temporary,storage=bfloat16",
    "faiss-ivfpq:keys_in=temporary",
    "faiss-ivf:storage=int8",
    "hnswlib:storage=bfloat16",
)
"""Ways to store keys: all of them with the oracle, and one of them with each kind of index."""


def specs() -> list[str]:
    """Every backend's default spec and the first other entries of its sweep, canonical."""
    found: list[str] = []
    for name in backend_names():
        others = [spec for spec in describe_backend(name).sweep if spec != canonical_spec(name)]
        found += [canonical_spec(name), *others[:SWEEP_ENTRIES]]
    return [*found, *STORAGES]


class TestEveryBackend(BackendConformance):
    """One spec after another; a missing library is a skip, and a failure in CI."""

    no_visible_effect: ClassVar[dict[str, str]] = {
        "ef_construction": "hnswlib takes no less than M, and finds all of a thousand keys then; see test_graphs.py",
    }

    @pytest.fixture(params=specs())
    def spec(self, request: pytest.FixtureRequest) -> Any:
        if parse_spec(request.param)[0] == "ray" and not backend_class("ray").missing_requirements():
            request.getfixturevalue("ray_running")
        return request.param
