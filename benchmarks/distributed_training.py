"""What a second process is worth in training: tokens a second of two gloo ranks with a core each, against one rank.

    python benchmarks/distributed_training.py [--preset laptop] [--processes 2] [--rounds 40] [--parallel ddp]

It starts itself under torchrun, a process on every core. They take turns in rounds, some steps of each: all processes
together; then the first one alone with the same global batch, while the others sleep; then every process by itself with
that batch, side by side, in which nobody talks to anybody. So a slow minute hits all of them. Memories are filled
before. A step is the very one of `recollect train`.

Printed: tokens a second; the ratio of together to alone with its 95 % interval (target: at least 1.7 for two
processes), and by processor time; what this machine gives to two processes that share nothing but its memory and
caches, by the same ratio, which no training can pass; where a step's time goes: forward and backward (in which
gradients are summed over the ranks), the optimisers (in which matrices are handed on), and waiting at the end of the
step for whoever is slower; and, on Linux, whether the process ran, gave its core to its own sending and receiving
threads, had it taken by other programs, or slept until the other rank's numbers came. A program that may run on any
core halves the speed of one rank, for which the other waits, and leaves the lone process undisturbed: where others took
more than a twentieth of the time, it is said, and the ratio is not one of an idle machine. The rounds in which they
took less have ratios of their own then.

Writes benchmarks/results/distributed_training.json.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from recollect.suites.noise import Ratio, describe_reference, median_interval, ratio_interval, reference_operation_ms
from recollect.suites.provenance import describe
from recollect.suites.scheduling import DISTURBED_SHARE, Spent, between, disturbed, moment

RESULT = Path(__file__).parent / "results" / "distributed_training.json"
TARGET = 1.7
STEPS_OF_A_ROUND = 3
QUIET_ROUNDS = 5
"""The fewest undisturbed rounds that have ratios of their own."""


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds of a step, the mean of some: all of it, and its optimisers and its waiting at the end."""

    spent: Spent
    processor: float
    optimizing: float
    waiting: float


class Side:
    """One way to train."""

    def __init__(self, options: TrainingOptions, documents: TokenizedDocuments, ranks: Ranks) -> None:
        self.options = options
        self.run: Run = start(options, documents, None, ranks)
        self.interruption = Interruption()
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

    def round(self, steps: int) -> Round:
        self._optimizing = self._waiting = 0.0
        before = moment()
        for _ in range(steps):
            training._step(self.options, self.run, None, self.interruption)
        after = moment()
        spent = between(before, after)
        each = {name: value and value / steps for name, value in dataclasses.asdict(spent).items()}
        processor = (after.process - before.process) / steps
        return Round(Spent(**each), processor, self._optimizing / steps, self._waiting / steps)


def medians(rounds: list[Round]) -> dict[str, float | None]:
    """Milliseconds of a step, of its parts, of this process's processor, and where its thread's time went."""

    def median(values: list[float]) -> float:
        return round(1e3 * float(np.median(values)), 1)

    spent = [each.spent for each in rounds]
    others = [each.others for each in spent if each.others is not None]
    return {
        "step_ms": median([each.wall for each in spent]),
        "forward_backward_ms": median([each.spent.wall - each.optimizing - each.waiting for each in rounds]),
        "optimizers_ms": median([each.optimizing for each in rounds]),
        "waiting_ms": median([each.waiting for each in rounds]),
        "processor_ms": median([each.processor for each in rounds]),
        "ran_ms": median([each.ran for each in spent]),
        "helpers_ms": median([each.helpers for each in spent]),
        "others_ms": median(others) if others else None,
        "asleep_ms": median([each.asleep for each in spent]),
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
    shared, own = Side(options, documents, ranks), Side(options, documents, Ranks())
    config = options.model
    filling = -(-config.memory_size // config.segment_length) + 1
    together: list[Round] = []
    alone: list[Round] = []
    apart: list[Round] = []
    references: list[float] = []
    with Progress(console=Console(stderr=True), disable=not ranks.first) as progress:
        task = progress.add_task("filling memories", total=filling)
        for _ in range(filling):
            shared.round(1)
            own.round(1)
            progress.advance(task)
        task = progress.add_task("measuring", total=arguments.rounds)
        for _ in range(arguments.rounds):
            ranks.wait()
            together.append(shared.round(arguments.steps))
            ranks.wait()
            if ranks.first:
                alone.append(own.round(arguments.steps))
                references.append(reference_operation_ms())
            ranks.wait()
            apart.append(own.round(arguments.steps))
            progress.advance(task)
    of_ranks = ranks.all((together, apart))
    if not ranks.first:
        return None
    tokens = options.batch_size * config.segment_length
    reference = describe_reference(references)
    result = {
        "preset": arguments.preset,
        "parallel": arguments.parallel,
        "processes": ranks.count,
        "batch_size": options.batch_size,
        "tokens_of_a_step": tokens,
        "parameters": shared.run.model.count_parameters(),
        "rounds": arguments.rounds,
        "steps_of_a_round": arguments.steps,
        "target": TARGET if ranks.count == 2 else None,
        "reference_spread": round(reference.spread, 3),
        "noisy": reference.noisy,
    }
    return result | compare(tokens, alone, [each[0] for each in of_ranks], [each[1] for each in of_ranks])


def compare(tokens: int, alone: list[Round], together: list[list[Round]], apart: list[list[Round]]) -> dict[str, Any]:
    """The figures of all rounds.

    Args:
        tokens: of a step.
        alone: the rounds of the first rank with the whole batch, while the others slept.
        together: by rank, the rounds in which all of them trained one model.
        apart: by rank, the rounds in which each trained its own with the whole batch.
    """
    lone = [each.spent.wall for each in alone]
    ratio = ratio_interval(lone, [each.spent.wall for each in together[0]])
    machine = summed_ratio(lone, [[each.spent.wall for each in rounds] for rounds in apart])
    ranks = [medians(rounds) for rounds in together]
    lone_processor, *processor = (
        float(np.median([each.processor for each in rounds])) for rounds in (alone, *together, *apart)
    )
    everyone = [total(rounds) for rounds in (alone, *together, *apart)]
    told = all(each.others is not None for each in everyone)
    in_quiet: dict[str, Any] = {}
    quiet = [
        turns for turns in zip(alone, *together, *apart, strict=True) if not disturbed(turn.spent for turn in turns)
    ]
    if told and len(quiet) >= QUIET_ROUNDS:
        first, *rest = ([turn.spent.wall for turn in side] for side in zip(*quiet, strict=True))
        in_quiet = {
            "ratio": _figures(ratio_interval(first, rest[0])),
            "machine_ratio": _figures(summed_ratio(first, rest[len(together) :])),
        }
    return {
        "alone": {"tokens_per_second": round(tokens / float(np.median(lone)), 1), **medians(alone)},
        "together": {
            "tokens_per_second": round(tokens / float(np.median([each.spent.wall for each in together[0]])), 1),
            "ranks": ranks,
        },
        "apart": {"ranks": [medians(rounds) for rounds in apart]},
        "ratio": round(ratio.value, 3),
        "ratio_interval": [round(ratio.low, 3), round(ratio.high, 3)],
        "processor_ratio": round(lone_processor / max(processor[: len(together)]), 3),
        "machine_ratio": round(machine.value, 3),
        "machine_ratio_interval": [round(machine.low, 3), round(machine.high, 3)],
        "machine_processor_ratio": round(sum(lone_processor / each for each in processor[len(together) :]), 3),
        "others_share": round(max(each.others_share for each in everyone), 3) if told else None,
        "disturbed": disturbed(everyone) if told else None,
        "quiet_rounds": len(quiet) if told else None,
        "in_quiet_rounds": in_quiet or None,
    }


def summed_ratio(alone: list[float], apart: list[list[float]]) -> Ratio:
    """How many times the work of one all ranks do side by side: the sum over them of its time over theirs."""
    ratios = np.sum([np.asarray(alone) / np.asarray(times) for times in apart], axis=0)
    return Ratio(float(np.median(ratios)), *median_interval(ratios))


def _figures(ratio: Ratio) -> list[float]:
    return [round(value, 3) for value in (ratio.value, ratio.low, ratio.high)]


def total(rounds: list[Round]) -> Spent:
    """All rounds in one: a disturbance of a few seconds counts for as much as it took."""
    spent = [each.spent for each in rounds]
    known = [each.others for each in spent if each.others is not None]
    return Spent(
        wall=sum(each.wall for each in spent),
        ran=sum(each.ran for each in spent),
        helpers=sum(each.helpers for each in spent),
        others=sum(known) if known else None,
        asleep=sum(each.asleep for each in spent),
    )


def show(result: dict[str, Any]) -> None:
    """Prints the tables and what follows from them."""
    console = Console()
    title = f"{result['preset']}, {result['tokens_of_a_step']} tokens a step, {result['parallel']}"
    together, count = result["together"], result["processes"]
    rows = [("one process alone", f"{result['alone']['tokens_per_second']:,.0f}", result["alone"])]
    for rank, values in enumerate(together["ranks"]):
        speed = f"{together['tokens_per_second']:,.0f}" if rank == 0 else ""
        rows.append((f"{count} together, rank {rank}", speed, values))
    rows += [(f"{count} apart, rank {rank}", "", values) for rank, values in enumerate(result["apart"]["ranks"])]
    parts = {"step_ms": "step", "forward_backward_ms": "forward, backward", "optimizers_ms": "optimisers"}
    states = {"ran_ms": "ran", "helpers_ms": "own threads", "others_ms": "other programs", "asleep_ms": "asleep"}
    for heading, columns in (
        (f"{title}: ms of a step", {**parts, "waiting_ms": "waiting", "processor_ms": "processor"}),
        ("What its thread did: ms of a step", states),
    ):
        table = Table(title=heading)
        table.add_column("")
        if "step_ms" in columns:
            table.add_column("tokens/s", justify="right")
        for name in columns.values():
            table.add_column(name, justify="right")
        for name, speed, values in rows:
            figures = ["unknown" if values[column] is None else f"{values[column]:.1f}" for column in columns]
            table.add_row(name, *([speed] if "step_ms" in columns else []), *figures)
        console.print(table)
    low, high = result["ratio_interval"]
    wanted = f", target {result['target']}" if result["target"] else ""
    console.print(f"{result['ratio']:.3f} times the tokens a second ({low:.3f} to {high:.3f}){wanted}")
    console.print(f"{result['processor_ratio']:.3f} times by processor time, the slower rank's")
    low, high = result["machine_ratio_interval"]
    console.print(
        f"{result['machine_ratio']:.3f} times ({low:.3f} to {high:.3f}) is what this machine gives to {count} "
        "processes that train side by side and exchange nothing"
    )
    console.print(f"{result['machine_processor_ratio']:.3f} times by processor time, of these")
    if result["disturbed"] is None:
        console.print("This system does not tell whether other programs had the processes' cores.")
    elif result["disturbed"]:
        console.print(
            f"Not an idle machine: other programs had a process's core for {result['others_share']:.0%} of its time "
            f"(more than {DISTURBED_SHARE:.0%}). The ratio is theirs as well: end them, and measure again."
        )
        console.print(f"Rounds in which they took less: {result['quiet_rounds']} of {result['rounds']}.")
        if result["in_quiet_rounds"]:
            (ratio, *interval), (machine, *bounds) = (
                result["in_quiet_rounds"][name] for name in ("ratio", "machine_ratio")
            )
            console.print(
                f"In these: {ratio:.3f} times the tokens a second ({interval[0]:.3f} to {interval[1]:.3f}); "
                f"{machine:.3f} ({bounds[0]:.3f} to {bounds[1]:.3f}) side by side."
            )
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
