"""The check of plans against a larger measurement judges as it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from recollect.suites.planning.calibration import Point

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "plan_check.py"


@pytest.fixture(scope="module")
def plan_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_check", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def point(keys: int, *, factor: float = 1.0) -> Point:
    return Point(
        spec="exact",
        keys=keys,
        dim=64,
        queries=512,
        k=32,
        build_seconds=1e-6 * keys,
        append_us=2.0,
        longest_append_ms=1.0,
        search_ms=factor * 0.001 * keys,
        recall=1.0,
        index_bytes=0,
        reference_ms=5.0,
        noisy=False,
        code="",
    )


def test_a_prediction_is_judged_against_what_was_measured(
    plan_check: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [point(4096 * 2**step) for step in range(5)]
    right = plan_check.check("exact", points, point(10**6))
    assert [one["ratio"] for one in right["figures"].values()] == pytest.approx([1.0, 1.0, 1.0])
    wrong = plan_check.check("exact", points, point(10**6, factor=2.0))
    assert wrong["figures"]["search_ms"]["ratio"] == pytest.approx(0.5)
    assert not wrong["figures"]["search_ms"]["within"]
    plan_check.show([wrong], 65536, 10**6)
    printed = capsys.readouterr().out
    assert "outside its range" in printed
    assert "off by 1.26 times on average" in printed
