"""Where a fine-tuning starts: a checkpoint as it is, or its weights in a model that has more to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from recollect.model.checkpoints import CONFIG, load_checkpoint, save_checkpoint
from recollect.model.training_options import TrainingOptions
from recollect.model.transformer import MemorizingTransformer

from ..cells import fingerprint

STARTS = "starts"


def adapted_start(options: TrainingOptions, output: Path) -> TrainingOptions:
    """`options` with a checkpoint whose configuration is the one to be trained.

    Where the start's configuration differs in more than its memory's size (a model without memory that is to get one),
    a checkpoint of the wanted configuration is made in `output`/starts: weights that both have are the start's, the
    others (gate, memory scale) are as in a new model of this seed.

    Raises:
        CheckpointError: the start cannot be read.
        ValueError: a weight of the start has no place in the wanted model.
    """
    assert options.checkpoint is not None
    start = load_checkpoint(options.checkpoint)
    if start.config.replace(memory_size=options.model.memory_size) == options.model:
        return dataclasses.replace(options, memory_size=options.model.memory_size)
    name = fingerprint({"start": start.digest, "model": options.model.to_dict(), "seed": options.seed})
    folder = output / STARTS / name
    if not (folder / CONFIG).is_file():
        torch.manual_seed(options.seed)
        model = MemorizingTransformer(options.model)
        weights = start.model.state_dict()
        foreign = sorted(set(weights) - set(model.state_dict()))
        if foreign:
            raise ValueError(f"the start has weights that the model to be trained lacks: {', '.join(foreign[:3])}")
        model.load_state_dict({**model.state_dict(), **weights})
        save_checkpoint(folder, model, start.tokenizer, metadata={"started_from": start.digest})
    return dataclasses.replace(options, checkpoint=folder)
