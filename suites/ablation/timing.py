"""What a training step costs: timed apart from the trainings, which share the machine, and beside the reference.

The steps of two models alternate, and the ratio of their times is the median over pairs of neighbouring steps, since
whatever else runs on the machine slows both. With one thread on a CPU it is the process's own time that counts, which
other work disturbs least. Memories and caches are full of random keys, the weights are random.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from recollect.memory_backends.atomic import write_json
from recollect.model.configuration import ModelConfig
from recollect.model.hidden_keys import HiddenMemory
from recollect.model.optimizers import make_optimizers
from recollect.model.streams import Segment
from recollect.model.training import training_loss
from recollect.model.training_options import TrainingOptions
from recollect.model.transformer import MemorizingTransformer

from .jobs import digest_of
from .settings import training_identity

TIMINGS = "timings"
STEPS = 9
"""Pairs of steps that are timed."""
WARM = 2
"""Steps before them, in which torch makes what it makes once."""


def timing_digest(options: TrainingOptions, reference: TrainingOptions) -> str:
    """Names a comparison of two trainings' steps, whatever the seed."""
    return digest_of({"this": _identity(options), "reference": _identity(reference), "timing": 1})


def timing_path(output: Path, digest: str) -> Path:
    """Where the record of a comparison lies."""
    return output / TIMINGS / f"{digest}.json"


def timing_task(options: TrainingOptions) -> dict[str, Any]:
    """What decides the time of a step, as JSON for the process that measures it."""
    return {
        "model": options.model.to_dict(),
        "batch_size": options.batch_size,
        "backend": options.backend,
        "device": options.device,
        "precision": options.precision,
        "optimizer": options.optimizer,
    }


def write_timing(path: Path, this: dict[str, Any], reference: dict[str, Any], *, machine: str = "") -> None:
    """Measures and writes one comparison, with the name of the machine that it holds for."""
    own, other, ratio = paired_ms(TimedModel(_options(this)), TimedModel(_options(reference)))
    record = {"step_ms": own, "reference_step_ms": other, "step_ratio": ratio, "pairs": STEPS, "machine": machine}
    write_json(path, record)


class TimedModel:
    """A model in the middle of its training, as far as time goes.

    Args:
        options: of the training.
    """

    def __init__(self, options: TrainingOptions) -> None:
        torch.manual_seed(0)
        self.options = options
        self.device = torch.device(options.device)
        config, rows = options.model, options.batch_size
        self.model = MemorizingTransformer(config).to(self.device).train()
        self.optimizers = make_optimizers(
            self.model, options.optimizer, matrix_learning_rate=1e-6, other_learning_rate=1e-6, weight_decay=0.0
        )
        self.optimizers.set_share(1.0)
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.process_time if alone else time.perf_counter
        self.state = self.model.initial_state(rows, backend=options.backend)
        for memory in self.state.memories:
            if isinstance(memory, HiddenMemory):
                memory.append(torch.randn(rows, config.memory_size, config.width, device=self.device))
                continue
            backend = memory.backend
            keys = torch.randn(backend.num_memories, backend.capacity, backend.dim, device=self.device)
            backend.add(torch.nn.functional.normalize(keys, dim=-1))
        carried = config.xl_cache + config.compressed_memory * config.compression_rate
        for _ in range(WARM + -(-carried // config.segment_length)):
            self.step()

    def step(self) -> float:
        """Milliseconds of one more step."""
        config, rows = self.options.model, self.options.batch_size
        tokens = torch.randint(config.vocabulary_size, (rows, config.segment_length))
        zeros = torch.zeros(rows, dtype=torch.int64)
        segment = Segment(tokens, tokens, zeros.bool(), zeros, zeros, zeros + config.segment_length)
        self._synchronise()
        start = self._clock()
        self.optimizers.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            loss, self.state = training_loss(self.model, self.state, segment)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step()
        self._synchronise()
        return 1e3 * (self._clock() - start)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def paired_ms(first: TimedModel, second: TimedModel, *, steps: int = STEPS) -> tuple[float, float, float]:
    """Median milliseconds of a step of each, and the median of first by second over pairs of neighbouring steps."""
    own, other = [], []
    for number in range(steps):
        # Which goes first changes, so that neither profits from the other's warm caches.
        if number % 2:
            own.append(first.step())
            other.append(second.step())
        else:
            other.append(second.step())
            own.append(first.step())
    ratios = [mine / theirs for mine, theirs in zip(own, other, strict=True)]
    return statistics.median(own), statistics.median(other), statistics.median(ratios)


def _identity(options: TrainingOptions) -> dict[str, Any]:
    identity = training_identity(options)
    wanted = ("batch_size", "backend", "device", "precision", "optimizer", "threads")
    return {**identity, "training": {name: value for name, value in identity["training"].items() if name in wanted}}


def _options(task: dict[str, Any]) -> TrainingOptions:
    return TrainingOptions(output=Path("unset"), **{**task, "model": ModelConfig.from_dict(task["model"])})
