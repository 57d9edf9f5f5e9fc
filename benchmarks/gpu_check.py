"""What a GPU should show, checked and timed in one go: `python benchmarks/gpu_check.py`.

Checks first (the fused search's kernels against the oracle; the same answers as on the CPU, gradients among them, for
every choice that a model has), then ratios measured side by side: exact search against the bare matmul, matmul with
top-k, faiss and cuVS; indexes that live on the card; a training step with memory against the step without, also
compiled; and memory attached to a pretrained model against the model alone. Ratios with a target are printed against
it. The results go to benchmarks/results/gpu_check-CARD.json with the date, after every part. `--parts` runs some
of them and leaves the others as they are in that file. Most of the time goes to compiling kernels, which are kept on
disk: `--processes 16` compiles them by as many processes first (half a minute instead of several). `--device cpu
--small` rehearses it anywhere, the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is first imported

import torch
import torch.nn.functional as functional
from attached_memory import measure as measure_attached
from gpu_search import TARGET_SIZE, TARGETS, check_fused, fixed_tiles, side_by_side, time_indexes, time_search
from gpu_tiles import compile_ahead, compile_share, time_tiles
from rich.console import Console

from recollect.memory_backends import BackendUnavailable, UnsupportedOperation, list_backends, make_backend
from recollect.memory_backends.atomic import write_json
from recollect.model.configuration import ModelConfig
from recollect.model.gates import GATES
from recollect.model.transformer import MemorizingTransformer
from recollect.suites.provenance import describe

RESULTS = Path(__file__).resolve().parent / "results"


def check_backends(device: torch.device, *, small: bool) -> list[dict[str, Any]]:
    """Every backend that can live on the device answers as well there as the exact backend on the CPU says it must."""
    rows = []
    capacity = 2500 if small else 5000  # the larger is one that a card searches by the fused kernels
    keys, queries = torch.randn(4, capacity + 500, 64), torch.randn(4, 64, 64)
    oracle = make_backend("exact", num_memories=4, capacity=capacity, dim=64)
    oracle.add(keys)
    kth_score = oracle.search(queries, 32).scores[..., -1:]
    for info in list_backends():
        if info.one_shared or device.type not in info.capabilities.devices:
            continue
        # The floor of a chain of backends is for keys as attention makes them: its first entry is the careful one.
        spec = info.sweep[0 if info.name == "rerank" else -1]
        try:
            backend = make_backend(spec, num_memories=4, capacity=capacity, dim=64, device=device)
            with fixed_tiles():
                backend.add(keys.to(device))
                result = backend.search(queries.to(device), 32)
        except (BackendUnavailable, UnsupportedOperation) as error:
            rows.append({"spec": spec, "status": "skipped", "reason": str(error)})
            continue
        except Exception as error:  # of a library that this project could not run before
            rows.append({"spec": spec, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]})
            continue
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


STEP_TARGETS = {"8192": 1.15, "65536": 1.5}


def time_training_step(
    device: torch.device, preset: str, memory_sizes: list[int], rows: int, rounds: int, *, compiled: bool
) -> dict[str, Any]:
    """Milliseconds of one training step (forward, backward; bf16 autocast) with full memories of several sizes."""
    config = ModelConfig.preset(preset)
    torch.manual_seed(0)
    model = MemorizingTransformer(config).to(device)
    # Other tokens at every step, as in training: what is read again a segment later makes twins of the memory's keys.
    tokens = torch.randint(config.vocabulary_size, (4 * (rounds + 2), rows, config.segment_length), device=device)
    start = torch.zeros(rows, dtype=torch.bool, device=device)
    run = torch.compile(model) if compiled else model
    functions: dict[str, Callable[[], Any]] = {}
    for size in memory_sizes:
        state = model.initial_state(rows, memory_size=size)
        for memory in state.memories:
            shape = (rows, config.heads, size, config.head_dim)
            memory.append(
                functional.normalize(torch.randn(shape, device=device), dim=-1), torch.randn(shape, device=device)
            )
        held = {"state": state, "steps": 0}

        def step(held: dict[str, Any] = held) -> None:
            read = tokens[held["steps"] % len(tokens)]
            with torch.autocast(device.type, torch.bfloat16):
                output = run(read, held["state"], start)
                loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), read[:, 1:].flatten())
            loss.backward()
            held["state"] = output.state
            held["steps"] += 1
            model.zero_grad()

        functions[str(size)] = step
    milliseconds = side_by_side(functions, device, rounds)
    base = milliseconds[str(memory_sizes[0])]
    return {
        "preset": preset,
        "rows": rows,
        "compiled": compiled,
        "milliseconds": milliseconds,
        "ratio_to_no_memory": {size: value / base for size, value in milliseconds.items()},
    }


PARTS = (
    "search",
    "training_step",
    "kernels",
    "gradients",
    "backends",
    "indexes",
    "attached_memory",
    "compiled_step",
    "tiles",
)
"""In the order of their worth: a card may be lent for minutes."""


def tried(measurement: Callable[[], Any]) -> Any:
    """A measurement that may fail on a machine it never ran on, without taking the others along."""
    try:
        return measurement()
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:1000]}


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


def verdicts(results: dict[str, Any]) -> list[str]:
    """A line for each ratio that has a target, where it was measured at the sizes that the target is for."""
    lines = []
    parts = {name: rows for name, rows in results.items() if isinstance(rows, list)}  # a part that failed is no list
    search = parts.get("search", [{}])[0]
    at_size = (search.get("memories"), search.get("keys"), search.get("queries"), search.get("dim")) == TARGET_SIZE
    for name, (target, side) in TARGETS.items():
        value = search["ratios"].get(name) if at_size and "ratios" in search else None
        if value is not None:
            met = value <= target if side == "at most" else value >= target
            lines.append(f"{name}: {value:.3g}, {side} {target:g}: {'met' if met else 'missed'}")
    for step in [*parts.get("training_step", []), *parts.get("compiled_step", [])]:
        if step.get("preset") != "paper":
            continue
        for size, value in step.get("ratio_to_no_memory", {}).items():
            if size in STEP_TARGETS:
                met = "met" if value <= STEP_TARGETS[size] else "missed"
                kind = "compiled training step" if step["compiled"] else "training step"
                lines.append(f"{kind}, memory {size} over none: {value:.3g}, at most {STEP_TARGETS[size]:g}: {met}")
    return lines


def failures(results: dict[str, Any]) -> list[str]:
    """What did not hold, or did not run though it should have."""
    parts = {name: value if isinstance(value, list) else [value] for name, value in results.items()}
    gradients = results.get("gradients", {})
    if "status" not in gradients:
        parts["gradients"] = [{"of": name, **row} for name, row in gradients.items()]
    return [
        f"{name}: {json.dumps(row)[:600]}"
        for name, rows in parts.items()
        for row in rows
        if isinstance(row, dict) and row.get("status") == "failed"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that any machine finishes in seconds")
    parser.add_argument("--processes", type=int, default=1, help="compile the kernels beforehand by so many processes")
    parser.add_argument("--share", metavar="I/N", help="only compile the I-th of N parts of the kernels")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
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
    console = Console(stderr=True)
    slug = "".join(letter if letter.isalnum() else "-" for letter in card.lower()).strip("-")
    output = None if str(arguments.output) == "-" else arguments.output or RESULTS / f"gpu_check-{slug}.json"
    results: dict[str, Any] = {}
    if output is not None and output.exists() and set(arguments.parts) != set(PARTS):
        results = json.loads(output.read_text(encoding="utf-8"))
    about = {**describe(device=str(device), seed=0), "card": card}
    search_sizes = [(2, 4096, 64, 64)] if small else [TARGET_SIZE, (64, 8192, 512, 128), (8, 65536, 512, 64)]
    index_size = {"memories": 1, "keys": 2048, "queries": 32, "dim": 16}
    if not small:
        index_size = {"memories": 8, "keys": 65536, "queries": 512, "dim": 128}
    steps = ("laptop", [0, 512], 2) if small else ("paper", [0, 8192, 65536], 8)
    parts: dict[str, Callable[[], Any]] = {
        "kernels": lambda: check_fused(device, small=small),
        "backends": lambda: check_backends(device, small=small),
        "gradients": lambda: {name: check_gradients(device, choices) for name, choices in CHOICES.items()},
        "tiles": lambda: time_tiles(device, *(search_sizes[0] if small else (8, *TARGET_SIZE[1:]))),
        "search": lambda: [
            tried(lambda m=m, c=c, q=q, d=d: time_search(device, memories=m, keys=c, queries=q, dim=d, rounds=rounds))
            for m, c, q, d in search_sizes
        ],
        "indexes": lambda: time_indexes(device, **index_size),
        "training_step": lambda: [time_training_step(device, *steps, rounds, compiled=False)],
        "compiled_step": lambda: [] if small else [time_training_step(device, *steps, rounds, compiled=True)],
        "attached_memory": lambda: time_attached(device, small=small),
    }
    if arguments.share:
        compile_share(device, search_sizes, *map(int, arguments.share.split("/")))
        return 0
    if arguments.processes > 1:
        with console.status(f"compiling by {arguments.processes} processes ..."):
            compile_ahead(Path(__file__), arguments.processes)
    for name in PARTS:
        measure = parts[name]
        if name not in arguments.parts:
            continue
        with console.status(f"{name} ..."):
            begun = datetime.datetime.now(datetime.UTC)
            results[name] = tried(measure)
        seconds = (datetime.datetime.now(datetime.UTC) - begun).total_seconds()
        console.print(f"{name}: {seconds:.0f} s")
        results["provenance"] = about
        when = {"date": about["date"], "commit": about["commit"], "seconds": seconds}
        results.setdefault("measured", {})[name] = when
        results["verdicts"] = verdicts(results)
        if output is not None:
            write_json(output, results)
    print(json.dumps(results, indent=1))
    found = failures(results)
    for line in [*results["verdicts"], *(f"FAILED {failure}" for failure in found)]:
        console.print(line, markup=False, highlight=False)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
