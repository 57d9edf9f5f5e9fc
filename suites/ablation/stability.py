"""What a training's log says of its stability: spikes of the loss, gradient norms, and the time of a step.

A spike is a step whose loss lies above the median of the `WINDOW` losses before it by more than `DEVIATIONS` robust
standard deviations (1.4826 times the median absolute deviation of those losses). Neighbouring spikes count as one. The
first `WINDOW` steps, where the loss falls fast, are not judged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 50
DEVIATIONS = 5.0
SPIKE_RULE = (
    f"a step's loss above the median of the {WINDOW} losses before it by more than {DEVIATIONS:g} x 1.4826 times their "
    "median absolute deviation; neighbouring steps count once"
)


def find_spikes(losses: np.ndarray, *, window: int = WINDOW, deviations: float = DEVIATIONS) -> list[int]:
    """Places in `losses` (N,) where a spike begins."""
    spikes = []
    inside = False
    for place in range(window, len(losses)):
        before = losses[place - window : place]
        median = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(before - median)))
        above = bool(losses[place] > median + deviations * max(deviation, 1e-3))
        if above and not inside:
            spikes.append(place)
        inside = above
    return spikes


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a training log, without its validations; empty where there is no log."""
    steps = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the last line of a process that was killed
        if isinstance(values, dict) and "gradient_norm" in values:
            steps.append(values)
    return steps


def summarise_log(path: Path) -> dict[str, Any]:
    """Figures of a training log: spikes, gradient norms before clipping, median time of a step, loss at the end."""
    steps = read_log(path)
    if not steps:
        return {}
    losses = np.asarray([step["loss"] for step in steps], dtype=np.float64)
    norms = np.asarray([step["gradient_norm"] for step in steps], dtype=np.float64)
    # The first steps pay for what torch makes once, and the memory is not full yet.
    times = np.asarray([step["step_ms"] for step in steps[len(steps) // 2 :]])
    spikes = find_spikes(losses)
    return {
        "steps_logged": len(steps),
        "spikes": len(spikes),
        "spike_steps": [int(steps[place]["step"]) for place in spikes],
        "gradient_norm_median": float(np.median(norms)),
        "gradient_norm_max": float(norms.max()),
        "step_ms": float(np.median(times)),
        "final_loss": float(losses[-min(100, len(losses)) :].mean()),
    }
