"""Ten specs over one trunk against ten separate evaluations, side by side.

    python benchmarks/trunk_sharing.py [--max-tokens 12288] [--rounds 3] [--threads 2]
                                       [--output benchmarks/results/trunk_sharing.json]

One side calls `evaluate` ten times; the other calls `evaluate_backends` once. Both take turns, so that a busy machine
slows them alike; on a busy one CPU time (`cpu_ratio`) tells more than the clock (`ratio`). The aim is at most 0.8. Both
sides must give the same perplexities.

How much is saved depends on how much of the model lies below its first memory layer, and on what the search costs. So
there are three cases: the reference model, whose trunk is one layer of three, at two memory sizes, and a model of the
same width with the paper's depth (memory at the ninth of twelve layers; its weights are random, which costs the same).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recollect.memory_backends.atomic import write_json
from recollect.model.checkpoints import load_checkpoint, reference_checkpoint, save_checkpoint
from recollect.model.evaluation import evaluate, evaluate_backends
from recollect.model.evaluation_types import EvaluationOptions, EvaluationResult
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import TrunkStore
from recollect.suites.provenance import describe

SPECS = (
    "exact",
    "approx-topk",
    "approx-topk:recall_target=0.8",
    *(f"degraded:drop=0.{tenth}" for tenth in range(2, 9)),
)
AIM = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=12_288)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trunk_sharing.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        deep = deep_checkpoint(Path(folder))
        common = {"max_tokens": given.max_tokens, "rows": 2}
        cases = {
            "reference, 512 keys": EvaluationOptions(memory_size=512, **common),
            "reference, 2048 keys": EvaluationOptions(memory_size=2048, **common),
            "memory at layer 9 of 12, 2048 keys": EvaluationOptions(checkpoint=deep, memory_size=2048, **common),
        }
        results = {name: measure(options, given.rounds) for name, options in cases.items()}
    about = {
        "specs": list(SPECS),
        "threads": given.threads,
        "provenance": describe(threads=given.threads),
        "torch": torch.__version__,
        "aim": AIM,
    }
    write_json(given.output, {**about, "cases": results})
    for name, result in results.items():
        print(f"{name}: ratio {result['ratio']} by the clock, {result['cpu_ratio']} by CPU time (aim {AIM})")


def deep_checkpoint(folder: Path) -> Path:
    """A checkpoint with the reference model's width and tokenizer and the paper's depth."""
    reference = load_checkpoint(reference_checkpoint())
    config = reference.config.replace(layers=12, memory_layers=(8,))
    save_checkpoint(folder, MemorizingTransformer(config), reference.tokenizer)
    return folder


def measure(options: EvaluationOptions, rounds: int) -> dict[str, Any]:
    """Both sides of one case, in turns."""
    evaluate(options, backend="exact")  # tokens are cached and allocators warm for both sides
    seconds: dict[str, list[float]] = {"separate": [], "shared": []}
    cpu_seconds: dict[str, list[float]] = {"separate": [], "shared": []}
    for _ in range(rounds):
        store = TrunkStore()
        sides: dict[str, Callable[[], list[EvaluationResult]]] = {
            "separate": lambda: [evaluate(options, backend=spec) for spec in SPECS],
            "shared": lambda store=store: list(evaluate_backends(SPECS, options, trunks=store)),
        }
        perplexities = {}
        for side, run in sides.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            found = run()
            seconds[side].append(round(time.perf_counter() - start, 3))
            cpu_seconds[side].append(round(time.process_time() - start_cpu, 3))
            perplexities[side] = [result.perplexity for result in found]
        if perplexities["separate"] != perplexities["shared"] or store.computed != 1:
            raise SystemExit(f"the two sides differ, or {store.computed} trunks were computed: {perplexities}")
    return {
        "memory_size": options.memory_size,
        "tokens": found[0].tokens,
        "trunks_computed": store.computed,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "ratio": ratio(seconds),
        "cpu_ratio": ratio(cpu_seconds),
    }


def ratio(times: dict[str, list[float]]) -> float:
    """Shared over separate, by their medians."""
    return round(statistics.median(times["shared"]) / statistics.median(times["separate"]), 3)


if __name__ == "__main__":
    main()
