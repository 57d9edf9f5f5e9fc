"""What tests of distributed training start on every rank: several runs in one start, each with its outcome in a file.

    torchrun --nproc-per-node 2 tests/distributed_worker.py runs.json

A run is a dictionary: `name`, `options` for `tiny_options`, and what goes wrong: `stop` (rank, step), `poison` (rank,
step), `kill` (rank, step, in the first start alone), `freeze` (rank, step).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import recollect.model.training as training
from recollect.model.checkpoints import load_checkpoint
from recollect.model.distributed import joined
from recollect.model.evaluation import EvaluationOptions
from recollect.model.shared_evaluation import evaluate_shared
from recollect.model.training_options import TrainingOptions


def tiny_options(corpus: Path, output: Path, model: dict[str, Any] | None = None, **changes: Any) -> TrainingOptions:
    """A run of a second, every part of which matters to its losses."""
    values: dict[str, Any] = {
        "corpus": str(corpus),
        "steps": 10,
        "batch_size": 4,
        "warmup_steps": 2,
        "validate_every": 0,
        "validation_tokens": 200,
        "save_every": 0,
        "cache_directory": output.parent / "cache",
        "progress": False,
        "threads": 1,
    }
    sizes = {"vocabulary_size": 300, "memory_size": 24, "qk_convolution_width": 3, "xl_cache": 8, **(model or {})}
    preset = TrainingOptions.preset("tiny", output)
    return TrainingOptions.preset("tiny", output, **{**values, "model": preset.model.replace(**sizes), **changes})


def main() -> None:
    rank, runs = int(os.environ["RANK"]), json.loads(Path(sys.argv[1]).read_text())
    for run in runs:
        output = Path(run["output"])
        outcome: dict[str, Any] = {"threads": torch.get_num_threads()}
        try:
            if "evaluate" in run:
                with joined("cpu", deadline=60) as ranks:
                    result = evaluate_shared(EvaluationOptions(**run["evaluate"]), ranks)
                outcome |= {"perplexity": result.perplexity, "losses": result.losses.loss.tolist()}
            else:
                train(run, rank, output)
            outcome["threads_within"] = torch.get_num_threads()
        except (Exception, KeyboardInterrupt) as error:
            outcome |= {"error": type(error).__name__, "text": str(error)}
            if "last" in run:
                write(output, rank, outcome)
                raise
        write(output, rank, outcome)


def write(output: Path, rank: int, outcome: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / f"outcome{rank}.json").write_text(json.dumps(outcome))


def train(run: dict[str, Any], rank: int, output: Path) -> None:
    options = tiny_options(Path(run["corpus"]), output, **run["options"])

    def on_step(step: int, loss: float) -> None:
        if run.get("stop") == [rank, step]:
            signal.raise_signal(signal.SIGTERM)
        if run.get("kill") == [rank, step] and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if run.get("freeze") == [rank, step]:
            os.kill(os.getpid(), signal.SIGSTOP)

    plain = training._step

    def step_with_poison(options: Any, moving: Any, *rest: Any) -> None:
        if run.get("poison") == [rank, moving.step]:
            with torch.no_grad():
                moving.model.embedding.weight.fill_(torch.nan)
        plain(options, moving, *rest)

    training._step = step_with_poison
    try:
        training.train(options, on_step=on_step)
    finally:
        training._step = plain
    if rank == 0:
        load_checkpoint(output)


if __name__ == "__main__":
    main()
