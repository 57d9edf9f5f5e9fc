"""What sharding costs, measured on a Ray that is really started: small shapes, one shard killed."""

from __future__ import annotations

from pathlib import Path

from recollect.memory_backends.testing import skip_unless_available
from recollect.suites.planning.cluster_bytes import SMALL_SLOTS
from recollect.suites.planning.cluster_costs import read_costs
from recollect.suites.planning.cluster_measuring import Shape, measure_cluster

SHAPES = (
    Shape(1, count=8, dim=8, k=2),
    Shape(2, count=8, dim=8, k=2),
    Shape(2, count=512, dim=8, k=2),
    Shape(1, count=64, dim=64, k=4),
    Shape(2, memories=2, count=16, dim=16, k=8),
)


def test_costs_are_measured_and_written(tmp_path: Path) -> None:
    skip_unless_available("ray")
    told: list[tuple[int, int]] = []
    path = tmp_path / "costs.json"
    found = measure_cluster(
        path, rounds=2, shapes=SHAPES, recovered_keys=4000, on_point=lambda done, total, _: told.append((done, total))
    )
    assert read_costs(path) == found
    assert told[-1] == (11, 11)
    assert [point.kind for point in found.points] == ["search", "append"] * len(SHAPES)
    assert all(point.sharded_ms > 0 and point.alone_ms > 0 for point in found.points)
    assert (found.recovered.keys, found.recovered.lost) == (2000, 0)
    assert found.recovered.refill_seconds > 0
    assert 2**20 < found.process_bytes < 2**31
    assert "a shard" in str(found.law("search"))


def test_slots_are_as_small_as_the_shards_send_them() -> None:
    from recollect.memory_backends import ray_host

    assert SMALL_SLOTS == ray_host.SMALL_SLOTS
