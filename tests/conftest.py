"""Settings that every test shares."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from recollect.memory_backends import MemoryBackend

settings.register_profile("default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


_KEPT: list[MemoryBackend] = []
"""A memory that holds on to Ray."""


@pytest.fixture
def ray_running() -> None:
    """Keeps Ray and its processes alive from one test to the next: starting them takes seconds."""
    from recollect.memory_backends import make_backend
    from recollect.memory_backends.ray_session import SESSION

    if not _KEPT or not SESSION.stands():
        _KEPT[:] = [make_backend("ray:shards=3", num_memories=1, capacity=4, dim=2)]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends that Ray before a module that does not want it: others start a Ray of their own, or want none.

    What tests left open, or what waits in a cycle for the garbage collector, does not keep it running either.
    """
    if not _KEPT:
        return
    if nextitem is not None and (nextitem.path == item.path or "ray_running" in getattr(nextitem, "fixturenames", ())):
        return
    from recollect.memory_backends.ray_session import SESSION

    SESSION.end()
    _KEPT.clear()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
