"""Setting a size so that one variant costs as much as another: a window, say, for what the memory costs.

Bytes are counted: what a sequence's caches and memories hold when they are full. Time is measured, on this machine,
with random weights and full memories; the size that was chosen is kept in the output folder, so that a run that goes on
compares the same models.
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
from recollect.model.streams import Segment
from recollect.model.training import training_loss
from recollect.model.transformer import MemorizingTransformer

from .grid import Grid, Variant
from .jobs import digest_of, read_record
from .options import AblateOptions
from .plan import Resolved, resolve
from .settings import model_config, training_identity

FOLDER = "matched"
STEPS = 7
"""Steps timed for each size; their median counts."""


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
            batch, device = target.training.batch_size, target.training.device
            backend, precision = target.training.backend, target.training.precision
            limit_ms = step_ms(target.trained, batch, backend=backend, device=device, precision=precision)
            times: dict[int, float] = {}
            for size, config in sizes.items():
                times[size] = step_ms(config, batch, backend="exact", device=device, precision=precision)
                if times[size] > 1.5 * limit_ms:
                    break
            fits = [size for size, taken in times.items() if taken <= limit_ms]
            record = {"chosen": fits[-1] if fits else wanted.values[0], "target_ms": limit_ms, "step_ms": times}
            write_json(path, record)
        return {key: int(record["chosen"]) if record is not None else wanted.values[0]}


def sequence_bytes(config: ModelConfig) -> int:
    """Bytes of keys and values that one sequence carries when caches and memories are full, float32."""
    memory = len(config.memory_layers) * config.memory_size * config.memory_numbers_per_token
    cached = config.layers * (config.xl_cache + config.compressed_memory)
    return 4 * (memory + cached * 2 * config.heads * config.head_dim)


def step_ms(config: ModelConfig, batch_size: int, *, backend: str, device: str, precision: str) -> float:
    """Median time of a training step with memories and caches full, in milliseconds."""
    torch.manual_seed(0)
    model = MemorizingTransformer(config).to(device).train()
    state = model.initial_state(batch_size, backend=backend)
    shape = (batch_size, config.segment_length)
    for memory in state.memories:
        if isinstance(memory, HiddenMemory):
            memory.append(torch.randn(batch_size, config.memory_size, config.width, device=device))
            continue
        keys = torch.randn(memory.backend.num_memories, memory.backend.capacity, memory.backend.dim, device=device)
        memory.backend.add(torch.nn.functional.normalize(keys, dim=-1))
    times = []
    for _ in range(STEPS + 3 + -(-config.xl_cache // config.segment_length)):
        tokens = torch.randint(config.vocabulary_size, shape)
        none = torch.zeros(batch_size, dtype=torch.int64)
        segment = Segment(tokens, tokens, none.bool(), none, none, none + config.segment_length)
        _synchronise(device)
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss, state = training_loss(model, state, segment)
        loss.backward()
        model.zero_grad()
        _synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[-STEPS:])


def _synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
