"""Setting a size so that one variant costs as much as another: a window, say, for what the memory costs.

Bytes are counted: what a sequence's caches and memories hold when they are full. Time is that of a training step,
measured on this machine beside the other variant's (`timing.py`); the size chosen is kept in the output folder, so that
a run that goes on compares the same models.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json
from recollect.model.configuration import ModelConfig
from recollect.model.training_options import TrainingOptions

from .grid import Grid, Variant
from .jobs import digest_of, read_record
from .options import AblateOptions
from .plan import Resolved, resolve
from .settings import model_config, training_identity
from .timing import TimedModel, paired_ms

FOLDER = "matched"
TOO_LONG = 1.3
"""Ratio of times from which on no larger size is tried."""


class Costs:
    """Chooses sizes by cost, and remembers what it chose.

    Args:
        output: the folder of the run.
        options: of the run.
        measure: measure what is not known; otherwise the least size stands in for it (a plan that trains nothing).
    """

    def __init__(self, output: Path, options: AblateOptions, *, measure: bool) -> None:
        self.output, self.options, self.measure = output, options, measure

    def matched(self, grid: Grid, variant: Variant, resolved: Resolved) -> dict[str, Any]:
        """The value that makes `variant` cost most without costing more than the variant it is matched to."""
        wanted = variant.match_cost
        assert wanted is not None
        key = wanted.vary.partition(".")[2]
        target = resolve(grid, grid.variant(wanted.to), self.options, seed=0, changes={})
        table = variant.tables["model"]
        sizes = {size: model_config({**table, key: size}, variant.where(grid)) for size in wanted.values}
        if wanted.of == "bytes":
            limit = sequence_bytes(target.trained)
            fitting = [size for size, config in sizes.items() if sequence_bytes(config) <= limit]
            return {key: fitting[-1] if fitting else wanted.values[0]}
        identity = {
            "to": training_identity(target.training),
            "this": training_identity(resolved.training),
            "vary": key,
            "values": list(wanted.values),
        }
        path = self.output / FOLDER / f"{digest_of(identity)}.json"
        record = read_record(path)
        if record is None and self.measure:
            record = self._choose(target.training, resolved.training, sizes)
            write_json(path, record)
        return {key: int(record["chosen"]) if record is not None else wanted.values[0]}

    def _choose(self, target: TrainingOptions, this: TrainingOptions, sizes: dict[int, ModelConfig]) -> dict[str, Any]:
        """The largest size whose step takes no longer than the target's, timed beside it."""
        measure = TimedModel(target)
        ratios: dict[int, float] = {}
        for size, config in sizes.items():
            _, _, ratios[size] = paired_ms(TimedModel(dataclasses.replace(this, model=config)), measure)
            if ratios[size] > TOO_LONG:
                break
        fits = [size for size, ratio in ratios.items() if ratio <= 1.0]
        return {"chosen": fits[-1] if fits else min(sizes), "step_ratio": ratios}


def sequence_bytes(config: ModelConfig) -> int:
    """Bytes of keys and values that one sequence carries when caches and memories are full, float32."""
    memory = len(config.memory_layers) * config.memory_size * config.memory_numbers_per_token
    cached = config.layers * (config.xl_cache + config.compressed_memory)
    return 4 * (memory + cached * 2 * config.heads * config.head_dim)
