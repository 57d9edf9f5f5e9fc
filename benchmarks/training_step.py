"""What an exact memory costs in training: a step with a full memory against a step without, side by side.

    python benchmarks/training_step.py [--memory-size 8192] [--preset laptop] [--steps 15] [--threads 2]

Both models take turns step by step in one process, so that a busy machine slows them alike; a step is forward,
backward, clipping and the optimisers, as `recollect train` does it. The memory is filled before the first step. Prints
medians and their ratio as JSON. Aim: at most 1.5 at the small preset with 8192 keys on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

from recollect.memory_backends.atomic import write_json
from recollect.model.allocation import keep_freed_memory
from recollect.model.optimizers import Optimizers, make_optimizers
from recollect.model.streams import Segment
from recollect.model.training import training_loss
from recollect.model.training_options import TRAINING_PRESETS, TrainingOptions
from recollect.model.transformer import MemorizingTransformer, ModelState
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "training_step.json"


class Side:
    """One model with its optimisers and its state, and the time of each of its steps."""

    def __init__(self, options: TrainingOptions, memory_size: int) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.model = MemorizingTransformer(options.model.replace(memory_size=memory_size)).train()
        self.optimizers: Optimizers = make_optimizers(
            self.model,
            options.optimizer,
            matrix_learning_rate=1e-9,  # the same work as with any other rate, and nothing drifts
            other_learning_rate=1e-9,
            weight_decay=options.weight_decay,
        )
        self.state: ModelState = self.model.initial_state(options.batch_size)
        self.seconds: list[float] = []
        config = self.model.config
        for memory in self.state.memories:
            shape = (options.batch_size, config.heads, memory_size, config.head_dim)
            memory.append(normalize(torch.randn(shape), dim=-1), torch.randn(shape))

    def step(self, segment: Segment) -> None:
        start = time.perf_counter()
        self.optimizers.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            loss, self.state = training_loss(self.model, self.state, segment)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)
        self.optimizers.step()
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="laptop", choices=list(TRAINING_PRESETS))
    parser.add_argument("--memory-size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = TrainingOptions.preset(arguments.preset, "unused")
    sides = [Side(options, size) for size in (0, arguments.memory_size)]
    for _ in range(arguments.steps + 2):
        segment = _random_segment(options)
        for side in sides:
            side.step(segment)
    medians = [1e3 * statistics.median(side.seconds[2:]) for side in sides]  # the first two warm up
    ratios = [memory / plain for plain, memory in zip(*(side.seconds[2:] for side in sides), strict=True)]
    result = {
        "preset": arguments.preset,
        "precision": options.precision,
        "memory_size": arguments.memory_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": arguments.steps,
        "step_without_memory_ms": round(medians[0], 1),
        "step_with_memory_ms": round(medians[1], 1),
        "ratio_of_medians": round(medians[1] / medians[0], 3),
        "median_of_ratios": round(statistics.median(ratios), 3),
    }
    print(json.dumps(result, indent=1))
    write_json(RESULT, {"provenance": describe(seed=0), **result})


def _random_segment(options: TrainingOptions) -> Segment:
    shape = (options.batch_size, options.model.segment_length)
    tokens = torch.randint(0, options.model.vocabulary_size, shape)
    nothing = torch.zeros(options.batch_size, dtype=torch.int64)
    starts = torch.zeros(options.batch_size, dtype=torch.bool)
    lengths = torch.full_like(nothing, options.model.segment_length)
    return Segment(tokens, tokens.roll(-1, dims=1), starts, nothing, nothing + 1, lengths)


if __name__ == "__main__":
    main()
