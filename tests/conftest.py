"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


@pytest.fixture(scope="module")
def ray_running() -> Iterator[None]:
    """Keeps Ray and its processes alive from one test to the next: starting them takes seconds.

    Not beyond a module: others start a Ray of their own, or want none. What tests left open, or what waits in a cycle
    for the garbage collector, does not keep it running either.
    """
    from recollect.memory_backends import make_backend
    from recollect.memory_backends.ray_session import SESSION

    with make_backend("ray:shards=3", num_memories=1, capacity=4, dim=2):
        yield
    SESSION.end()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
