"""What the benchmark of training by several processes makes of its rounds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from recollect.suites.scheduling import Spent

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import distributed_training

ABOUT = {
    "preset": "laptop",
    "tokens_of_a_step": 1000,
    "parallel": "ddp",
    "processes": 2,
    "rounds": 12,
    "target": 1.7,
    "noisy": False,
}


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
    assert found["machine_processor_ratio"] == pytest.approx(0.39 / 0.49 + 0.39 / 0.39, abs=1e-3)
    assert found["together"]["ranks"][1]["forward_backward_ms"] == 210.0
    assert (found["disturbed"], found["others_share"]) == (False, 0.0)


def test_other_programs_on_one_rank_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    slowed = rounds(0.35, others=0.1)
    found = compare(together=[rounds(0.35), slowed])
    assert (found["disturbed"], found["others_share"]) == (True, round(0.1 / 0.35, 3))
    distributed_training.show({**ABOUT, **found})
    assert "other programs had a process's core for 29% of its time" in " ".join(capsys.readouterr().out.split())


def test_undisturbed_rounds_have_ratios_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    one = [*rounds(0.25, count=6), *rounds(0.5, others=0.25, count=6)]
    other = [*rounds(0.25, count=5), *rounds(0.5, others=0.01, count=7)]
    other[0] = rounds(0.25, others=0.1)[0]
    sides = {"alone": rounds(0.4, count=12), "together": [one, other], "apart": [rounds(0.5, count=12)] * 2}
    found = compare(**sides)
    assert (found["disturbed"], found["quiet_rounds"]) == (True, 5)
    assert found["in_quiet_rounds"] == {"ratio": [1.6, 1.6, 1.6], "machine_ratio": [1.6, 1.6, 1.6]}
    distributed_training.show({**ABOUT, **found})
    shown = " ".join(capsys.readouterr().out.split())
    assert "Rounds in which they took less: 5 of 12" in shown
    assert "In these: 1.600 times the tokens a second (1.600 to 1.600)" in shown
    sides["alone"][2] = rounds(0.4, others=0.3)[0]
    assert (compare(**sides)["quiet_rounds"], compare(**sides)["in_quiet_rounds"]) == (4, None)


def test_a_short_disturbance_counts_for_as_much_as_it_took() -> None:
    mixed = [*rounds(0.25, count=39), *rounds(0.35, others=0.1, count=1)]
    assert not compare(together=[mixed, mixed], alone=rounds(0.4, count=40), apart=[rounds(0.4, count=40)])["disturbed"]


def test_a_system_that_keeps_no_account_is_no_idle_one(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {"together": [rounds(0.25, others=None)] * 2, "alone": rounds(0.4, others=None)}
    found = compare(apart=[rounds(0.4, others=None)] * 2, **unknown)
    assert found["others_share"] is None
    assert found["disturbed"] is None
    distributed_training.show({**ABOUT, **found})
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not tell whether other programs" in shown
    assert "Not an idle machine" not in shown
