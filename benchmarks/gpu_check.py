"""What a GPU should show, checked and timed in one go: `python benchmarks/gpu_check.py`.

Checks first (the same answers as on the CPU, gradients among them, for every choice that a model has), then ratios
measured side by side: exact search against the bare matmul and against matmul with top-k, a training step with memory
against the step without, and memory attached to a pretrained model against the model alone. The results go to
benchmarks/results/gpu_check-CARD.json with the date. `--device cpu --small` rehearses it anywhere.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from attached_memory import measure as measure_attached

from recollect.memory_backends import BackendUnavailable, UnsupportedOperation, list_backends, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.model.configuration import ModelConfig
from recollect.model.gates import GATES
from recollect.model.transformer import MemorizingTransformer

RESULTS = Path(__file__).resolve().parent / "results"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(functions: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each function, taken in turn so that drift meets all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if turn >= 2:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def check_backends(device: torch.device) -> list[dict[str, Any]]:
    """Every backend that can live on the device answers as well there as the exact backend on the CPU says it must."""
    rows = []
    keys, queries = torch.randn(4, 3000, 64), torch.randn(4, 64, 64)
    oracle = make_backend("exact", num_memories=4, capacity=2500, dim=64)
    oracle.add(keys)
    kth_score = oracle.search(queries, 32).scores[..., -1:]
    for info in list_backends():
        if device.type not in info.capabilities.devices:
            continue
        spec = info.sweep[-1]
        try:
            backend = make_backend(spec, num_memories=4, capacity=2500, dim=64, device=device)
        except (BackendUnavailable, UnsupportedOperation) as error:
            rows.append({"spec": spec, "status": "skipped", "reason": str(error)})
            continue
        backend.add(keys.to(device))
        result = backend.search(queries.to(device), 32)
        found = backend.gather_keys(result.slots).cpu()
        true_scores = torch.einsum("mqd,mqkd->mqk", queries, found).masked_fill(result.slots.cpu() < 0, -torch.inf)
        recall = float((true_scores >= kth_score - 1e-4).float().mean())
        status = "ok" if recall >= info.recall_floor - 1e-6 and result.scores.device.type == device.type else "failed"
        rows.append({"spec": spec, "status": status, "recall": recall, "floor": info.recall_floor})
    return rows


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{gate: {"gate": gate} for gate in GATES if gate != "head"},
    "cache": {"xl_cache": 16},
    "window": {"xl_cache": 16, "attention_window": 12},
    "compressive": {"xl_cache": 16, "compressed_memory": 8, "compression_rate": 4},
    "hidden": {"memory_key": "hidden", "normalise_queries_and_keys": False},
    "most_used": {"eviction": "most_used"},
    "convolution": {"qk_convolution_width": 3, "token_shift": True, "matched_start": True},
}


def check_gradients(device: torch.device, choices: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of a small model agree with the CPU's, memory included."""
    config = ModelConfig.preset("tiny", **choices)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocabulary_size, (2, 7 * config.segment_length), generator=generator)
    losses, gradients = [], []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = MemorizingTransformer(config).to(place)
        state = model.initial_state(2)
        start = torch.ones(2, dtype=torch.bool, device=place)
        total = torch.zeros((), device=place)
        for number, segment in enumerate(tokens.to(place).split(config.segment_length, dim=1)):
            output = model(segment, state, start if number == 0 else torch.zeros_like(start))
            state = output.state
            total = total + functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), segment[:, 1:].flatten())
        total.backward()
        losses.append(float(total.detach()))
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    difference = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    fine = difference < 1e-3 and abs(losses[0] - losses[1]) < 1e-3
    return {"status": "ok" if fine else "failed", "loss": losses, "relative_gradient_difference": difference}


def time_search(
    device: torch.device, *, memories: int, keys: int, queries: int, dim: int, rounds: int
) -> dict[str, Any]:
    """Exact search against its floor and its plain form, and the memory it takes beyond its inputs."""
    backend = make_backend("exact", num_memories=memories, capacity=keys, dim=dim, device=device)
    backend.add(torch.randn(memories, keys, dim, device=device))
    asked = torch.randn(memories, queries, dim, device=device)
    stored = backend.ring.keys
    half_keys, half_asked = stored.bfloat16(), asked.bfloat16()

    def one_by_one(a: torch.Tensor, b: torch.Tensor, then: Callable[[torch.Tensor], Any]) -> None:
        # One memory at a time: all the scores at once may not fit.
        for row in range(memories):
            then(a[row] @ b[row].T)

    functions: dict[str, Callable[[], Any]] = {
        "matmul_fp32": lambda: one_by_one(asked, stored, lambda scores: scores),
        "matmul_bf16": lambda: one_by_one(half_asked, half_keys, lambda scores: scores),
        "matmul_topk_fp32": lambda: one_by_one(asked, stored, lambda scores: scores.topk(32)),
        "matmul_topk_bf16": lambda: one_by_one(half_asked, half_keys, lambda scores: scores.topk(32)),
        "exact": lambda: backend.search(asked, 32),
        "approx-topk": lambda: approximate.search(asked, 32),
    }
    approximate = make_backend("approx-topk", num_memories=memories, capacity=keys, dim=dim, device=device)
    approximate.add(stored)
    milliseconds = side_by_side(functions, device, rounds)
    extra = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        backend.search(asked, 32)
        extra = (torch.cuda.max_memory_allocated(device) - before) / (memories * queries * keys * 4)
    return {
        "memories": memories,
        "keys": keys,
        "queries": queries,
        "dim": dim,
        "milliseconds": milliseconds,
        "exact_over_matmul_fp32": milliseconds["exact"] / milliseconds["matmul_fp32"],
        "exact_over_matmul_bf16": milliseconds["exact"] / milliseconds["matmul_bf16"],
        "matmul_topk_fp32_over_exact": milliseconds["matmul_topk_fp32"] / milliseconds["exact"],
        "peak_extra_memory_over_score_matrix": extra,
    }


def time_training_step(
    device: torch.device, preset: str, memory_sizes: list[int], rows: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of one training step (forward, backward; bf16 autocast) with full memories of several sizes."""
    config = ModelConfig.preset(preset)
    torch.manual_seed(0)
    model = MemorizingTransformer(config).to(device)
    tokens = torch.randint(config.vocabulary_size, (rows, config.segment_length), device=device)
    start = torch.zeros(rows, dtype=torch.bool, device=device)
    functions: dict[str, Callable[[], Any]] = {}
    for size in memory_sizes:
        state = model.initial_state(rows, memory_size=size)
        for memory in state.memories:
            shape = (rows, config.heads, size, config.head_dim)
            memory.append(
                functional.normalize(torch.randn(shape, device=device), dim=-1), torch.randn(shape, device=device)
            )
        held = {"state": state}

        def step(held: dict[str, Any] = held) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                output = model(tokens, held["state"], start)
                loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            held["state"] = output.state
            model.zero_grad()

        functions[str(size)] = step
    milliseconds = side_by_side(functions, device, rounds)
    base = milliseconds[str(memory_sizes[0])]
    return {
        "preset": preset,
        "rows": rows,
        "milliseconds": milliseconds,
        "ratio_to_no_memory": {size: value / base for size, value in milliseconds.items()},
    }


def time_attached(device: torch.device, *, small: bool) -> list[dict[str, Any]]:
    """Pretrained architectures with an attached memory against themselves without: reading, and greedy decoding."""
    settings = argparse.Namespace(
        device=device.type,
        width=128 if small else 1024,
        vocabulary=512 if small else 32000,
        segment=64 if small else 512,
        batch=1 if small else 8,
        memory_size=256 if small else 8192,
        k=32,
        gate="joint",
        backend="exact",
        new_tokens=4 if small else 64,
        rounds=1 if small else 5,
    )
    return [measure_attached(family, settings) for family in ("llama", "gpt2")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that any machine finishes in seconds")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/gpu_check-CARD.json; '-' writes nothing"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here; `--device cpu --small` rehearses this script")
        return 2
    small = arguments.small
    rounds = 3 if small else 10
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    results = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": card,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backends": check_backends(device),
        "gradients": {name: check_gradients(device, choices) for name, choices in CHOICES.items()},
        "search": [
            time_search(device, memories=m, keys=c, queries=q, dim=d, rounds=rounds)
            for m, c, q, d in ([(2, 4096, 64, 64)] if small else [(64, 65536, 512, 128), (8, 8192, 512, 128)])
        ],
        "training_step": time_training_step(
            device, "laptop" if small else "paper", [0, 512] if small else [0, 8192, 65536], 2 if small else 8, rounds
        ),
        "attached_memory": time_attached(device, small=small),
    }
    print(json.dumps(results, indent=1))
    if str(arguments.output) != "-":
        slug = "".join(letter if letter.isalnum() else "-" for letter in card.lower()).strip("-")
        write_json(arguments.output or RESULTS / f"gpu_check-{slug}.json", results)
    checks = [*results["backends"], *results["gradients"].values()]
    return 1 if any(row["status"] == "failed" for row in checks) else 0


if __name__ == "__main__":
    raise SystemExit(main())
