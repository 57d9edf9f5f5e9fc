"""What a second process is worth in training: tokens a second of two gloo ranks with a core each, against one rank.

    python benchmarks/distributed_training.py [--preset laptop] [--processes 2] [--rounds 40] [--parallel ddp]

It starts itself under torchrun, a process on every core. They take turns in rounds: some steps of all processes
together, then as many of the first one alone while the others sleep, with the same global batch, memories filled
before. So a busy machine or a slow minute hits both. A step is the very one of `recollect train`.

Printed: tokens a second of both, their ratio with its 95 % interval (target: at least 1.7 for two processes), the same
ratio by processor time, which other programs disturb less, and where a step's time goes: forward and backward (in which
gradients are summed over the ranks), the optimisers (in which matrices are handed on), and waiting at the end of the
step for whoever is slower. Writes benchmarks/results/distributed_training.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import recollect.model.training as training
from recollect.memory_backends.atomic import write_json
from recollect.model.allocation import keep_freed_memory
from recollect.model.distributed import Ranks, joined
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.training_options import TRAINING_PRESETS, TrainingOptions
from recollect.model.training_progress import Interruption
from recollect.model.training_setup import Run, start
from recollect.suites.noise import describe_reference, ratio_interval, reference_operation_ms
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "distributed_training.json"
TARGET = 1.7
STEPS_OF_A_ROUND = 3


class Side:
    """One way to train, and the time of each of its rounds."""

    def __init__(self, options: TrainingOptions, documents: TokenizedDocuments, ranks: Ranks) -> None:
        self.options = options
        self.run: Run = start(options, documents, None, ranks)
        self.interruption = Interruption()
        self.seconds: list[float] = []
        self.optimizing: list[float] = []
        self.waiting: list[float] = []
        self.processor: list[float] = []
        self._optimizing = self._waiting = 0.0
        self._watch()

    def _watch(self) -> None:
        """Takes the time of the optimisers, and of the exchange of losses, which comes when a rank is done."""
        plain_step, plain_sum = self.run.optimizers.step, Ranks.sum

        def step() -> None:
            began = time.perf_counter()
            plain_step()
            self._optimizing += time.perf_counter() - began

        def total(ranks: Ranks, values: Any) -> list[float]:
            began = time.perf_counter()
            answer = plain_sum(ranks, values)
            self._waiting += time.perf_counter() - began
            return answer

        self.run.optimizers.step = step  # type: ignore[method-assign]
        if self.run.ranks.several:
            Ranks.sum = total  # type: ignore[method-assign]

    def round(self, steps: int) -> None:
        self._optimizing = self._waiting = 0.0
        began, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            training._step(self.options, self.run, None, self.interruption)
        self.seconds.append((time.perf_counter() - began) / steps)
        self.processor.append((time.process_time() - processor) / steps)
        self.optimizing.append(self._optimizing / steps)
        self.waiting.append(self._waiting / steps)

    def medians(self) -> dict[str, float]:
        """Milliseconds of a step, of its parts, and of this process's processor."""
        step, optimizing, waiting = (
            1e3 * float(np.median(values)) for values in (self.seconds, self.optimizing, self.waiting)
        )
        return {
            "step_ms": round(step, 1),
            "forward_backward_ms": round(step - optimizing - waiting, 1),
            "optimizers_ms": round(optimizing, 1),
            "waiting_ms": round(waiting, 1),
            "processor_ms": round(1e3 * float(np.median(self.processor)), 1),
        }


def documents_of(options: TrainingOptions, seed: int) -> TokenizedDocuments:
    """Documents of random tokens, longer than any run, one for each row."""
    rng = np.random.default_rng(seed)
    length = 4000 * options.model.segment_length
    arrays = tuple(
        rng.integers(0, options.model.vocabulary_size, length).astype(np.uint16) for _ in range(options.batch_size)
    )
    return TokenizedDocuments(tuple(map(str, range(len(arrays)))), arrays, digest="random")


def measure(arguments: argparse.Namespace, ranks: Ranks, folder: str) -> dict[str, Any] | None:
    """Everything, on the first rank; the others help and give None."""
    changes: dict[str, Any] = {"batch_size": arguments.batch_size} if arguments.batch_size else {}
    options = TrainingOptions.preset(
        arguments.preset,
        folder,
        steps=10**6,
        parallel=arguments.parallel,
        matrix_learning_rate=1e-9,  # the same work as with any other rate, and nothing drifts
        other_learning_rate=1e-9,
        **changes,
    )
    documents = documents_of(options, arguments.seed)
    together = Side(options, documents, ranks)
    alone = Side(options, documents, Ranks()) if ranks.first else None
    config = options.model
    filling = -(-config.memory_size // config.segment_length) + 1
    references: list[float] = []
    with Progress(console=Console(stderr=True), disable=not ranks.first) as progress:
        task = progress.add_task("filling memories", total=2 * filling + 2 * arguments.rounds)
        for number in range(filling + arguments.rounds):
            if number == filling:
                progress.update(task, description="measuring")
                for side in (together, alone):
                    if side is not None:
                        for values in (side.seconds, side.optimizing, side.waiting, side.processor):
                            values.clear()
            steps = arguments.steps if number >= filling else 1
            ranks.wait()
            together.round(steps)
            progress.advance(task)
            ranks.wait()
            if alone is not None:
                alone.round(steps)
                references.append(reference_operation_ms())
            progress.advance(task)
    processors = ranks.all(together.medians())
    if alone is None:
        return None
    tokens = options.batch_size * config.segment_length
    ratio = ratio_interval(alone.seconds, together.seconds)
    reference = describe_reference(references[filling:])
    return {
        "preset": arguments.preset,
        "parallel": arguments.parallel,
        "processes": ranks.count,
        "batch_size": options.batch_size,
        "tokens_of_a_step": tokens,
        "parameters": together.run.model.count_parameters(),
        "rounds": arguments.rounds,
        "steps_of_a_round": arguments.steps,
        "alone": {"tokens_per_second": round(tokens / float(np.median(alone.seconds)), 1), **alone.medians()},
        "together": {"tokens_per_second": round(tokens / float(np.median(together.seconds)), 1), "ranks": processors},
        "ratio": round(ratio.value, 3),
        "ratio_interval": [round(ratio.low, 3), round(ratio.high, 3)],
        "processor_ratio": round(alone.medians()["processor_ms"] / max(each["processor_ms"] for each in processors), 3),
        "target": TARGET if ranks.count == 2 else None,
        "reference_spread": round(reference.spread, 3),
        "noisy": reference.noisy,
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['preset']}, {result['tokens_of_a_step']} tokens a step, {result['parallel']}")
    for heading in ("", "tokens/s", "step ms", "forward, backward", "optimisers", "waiting", "processor"):
        table.add_column(heading, justify="right" if heading else "left")
    names = ("step_ms", "forward_backward_ms", "optimizers_ms", "waiting_ms", "processor_ms")
    alone, together = result["alone"], result["together"]
    table.add_row("one process", f"{alone['tokens_per_second']:,.0f}", *(f"{alone[name]:.1f}" for name in names))
    for rank, values in enumerate(together["ranks"]):
        speed = f"{together['tokens_per_second']:,.0f}" if rank == 0 else ""
        table.add_row(
            f"{result['processes']} processes, rank {rank}", speed, *(f"{values[name]:.1f}" for name in names)
        )
    console = Console()
    console.print(table)
    low, high = result["ratio_interval"]
    wanted = f", target {result['target']}" if result["target"] else ""
    console.print(f"{result['ratio']:.3f} times the tokens a second ({low:.3f} to {high:.3f}){wanted}")
    console.print(f"{result['processor_ratio']:.3f} times by processor time, the slower rank's")
    if result["noisy"]:
        console.print("The machine was busy: its reference operation varied. Look at the interval.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="laptop", choices=list(TRAINING_PRESETS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=None, help="of all processes together; default: the preset's")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=STEPS_OF_A_ROUND, help="steps of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < arguments.processes:
        sys.exit(f"{arguments.processes} processes need a core each, and {len(cores)} may be used here")
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
        sys.exit(subprocess.run([sys.executable, *launcher, __file__, *sys.argv[1:]], check=False).returncode)
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"])]})
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, joined("cpu") as ranks:
        result = measure(arguments, ranks, folder)
    if result is None:
        return
    show(result)
    if not arguments.no_write:
        RESULT.parent.mkdir(exist_ok=True)
        write_json(RESULT, {"provenance": describe(threads=1, seed=arguments.seed), **result})
        print(json.dumps({"written": str(RESULT)}))


if __name__ == "__main__":
    main()
