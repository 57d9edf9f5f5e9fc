"""What the benchmark of training by several processes makes of its rounds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from recollect.suites.scheduling import Spent

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import distributed_training


def rounds(wall: float, *, others: float | None = 0.0, count: int = 5) -> list[Any]:
    spent = Spent(wall=wall, ran=wall - 0.02 - (others or 0.0), helpers=0.01, others=others, asleep=0.01)
    return [distributed_training.Round(spent, spent.ran + 0.01, optimizing=0.03, waiting=0.01)] * count


def compare(**changes: Any) -> dict[str, Any]:
    """One process takes 0.4 s for 1000 tokens; two together 0.25; each by itself 0.5 and 0.4, side by side."""
    sides = {"alone": rounds(0.4), "together": [rounds(0.25), rounds(0.25)], "apart": [rounds(0.5), rounds(0.4)]}
    return distributed_training.compare(1000, **(sides | changes))


def test_ratios() -> None:
    found = compare()
    assert (found["alone"]["tokens_per_second"], found["together"]["tokens_per_second"]) == (2500.0, 4000.0)
    assert (found["ratio"], found["ratio_interval"]) == (1.6, [1.6, 1.6])
    assert (found["machine_ratio"], found["machine_ratio_interval"]) == (1.8, [1.8, 1.8])
    assert found["processor_ratio"] == pytest.approx((0.4 - 0.01) / (0.25 - 0.01), abs=1e-3)
    assert found["together"]["ranks"][1]["forward_backward_ms"] == 210.0
    assert (found["disturbed"], found["others_share"]) == (False, 0.0)


def test_other_programs_on_one_rank_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    slowed = rounds(0.35, others=0.1)
    found = compare(together=[rounds(0.35), slowed])
    assert (found["disturbed"], found["others_share"]) == (True, round(0.1 / 0.35, 3))
    about = {"preset": "laptop", "tokens_of_a_step": 1000, "parallel": "ddp", "processes": 2, "target": 1.7}
    distributed_training.show({**about, "noisy": False, **found})
    assert "other programs had a process's core for 29% of its time" in " ".join(capsys.readouterr().out.split())


def test_a_short_disturbance_counts_for_as_much_as_it_took() -> None:
    mixed = [*rounds(0.25, count=39), *rounds(0.35, others=0.1, count=1)]
    assert not compare(together=[mixed, mixed], alone=rounds(0.4, count=40), apart=[rounds(0.4, count=40)])["disturbed"]


def test_a_system_that_keeps_no_account_is_no_idle_one(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {"together": [rounds(0.25, others=None)] * 2, "alone": rounds(0.4, others=None)}
    found = compare(apart=[rounds(0.4, others=None)] * 2, **unknown)
    assert found["others_share"] is None
    assert found["disturbed"] is None
    about = {"preset": "laptop", "tokens_of_a_step": 1000, "parallel": "ddp", "processes": 2, "target": 1.7}
    distributed_training.show({**about, "noisy": False, **found})
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not tell whether other programs" in shown
    assert "Not an idle machine" not in shown
