"""How steadily a training run went, from the losses and gradient norms of its steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

WINDOW = 50
"""A step is judged by so many before it: enough for a spread, few enough that the loss has hardly fallen since."""
LEAST_BEFORE = 20
"""With fewer steps before it a step is not judged."""
SPIKE = 5.0
"""So many standard deviations above the running median is a spike (one step in three million of Gaussian noise)."""
_SIGMA_OF_MAD = 1.4826  # the median absolute deviation of Gaussian noise is sigma / 1.4826


def count_spikes(losses: ArrayLike, *, warmup: int = 0) -> int:
    """Loss spikes of a run: steps far above the running median of the steps before, runs of them counted once.

    The spread is 1.4826 times the median absolute deviation, which earlier spikes hardly move. Hard text makes spikes
    too; runs of one seed read the same text, so between two variants of a seed only the model's own differ.

    losses: (steps,) training loss of each step; not finite counts as a spike.
    warmup: steps at the start that are not judged.
    """
    values = np.asarray(losses, dtype=np.float64)
    spikes, inside = 0, False
    for step in range(max(warmup, LEAST_BEFORE), len(values)):
        before = values[max(0, step - WINDOW) : step]
        before = before[np.isfinite(before)]
        above = not np.isfinite(values[step])
        if not above and len(before):
            middle = float(np.median(before))
            spread = _SIGMA_OF_MAD * float(np.median(np.abs(before - middle)))
            # A spread of 0 (a loss that never moves) must not make every step a spike.
            above = values[step] > middle + SPIKE * max(spread, 1e-3 * abs(middle))
        spikes += above and not inside
        inside = bool(above)
    return int(spikes)


def gradient_norm_summary(norms: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum of a run's gradient norms before clipping; empty for no finite norm."""
    values = np.asarray(norms, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    return {
        "gradient_norm_median": float(np.median(values)),
        "gradient_norm_p95": float(np.quantile(values, 0.95)),
        "gradient_norm_max": float(values.max()),
    }
