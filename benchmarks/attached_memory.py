"""What an attached memory costs: time per token in evaluation, and greedy decoding, with memory and without.

    python benchmarks/attached_memory.py                      # both families, on this machine's CPU with one thread
    python benchmarks/attached_memory.py --device cuda --width 768 --batch 8

The models have random weights, which cost what trained ones cost: 12 layers, of which the ninth has a memory that is
full. Evaluation reads segments of `--segment` tokens; decoding is `model.generate` from a short prompt. Runs with and
without memory take turns, so that a busy machine slows both, and medians are compared; on a CPU the time counted is
the process's own, on a GPU the clock.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpuinfo import get_cpu_info

from recollect.memory_backends.atomic import write_json
from recollect.pretrained.attach import attach_memory
from recollect.suites.provenance import describe

FAMILIES = ("llama", "gpt2")


def make_model(family: str, width: int, vocabulary: int, context: int) -> Any:
    """A model of 12 layers with heads of 64; Llama with two query heads to a key head."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    heads = width // 64
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=12, n_head=heads, n_positions=context
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 64 * 64,
            num_hidden_layers=12,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=context,
        )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def seconds(work: Callable[[], object], device: str) -> float:
    """How long `work` takes: the process's own time on a CPU, the clock on a GPU."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of one family, in milliseconds a token."""
    device, batch = arguments.device, arguments.batch
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    plain, model = (
        make_model(family, arguments.width, arguments.vocabulary, arguments.segment).to(device, kind) for _ in range(2)
    )
    memory = attach_memory(
        model,
        layers=[8],
        backend=arguments.backend,
        memory_size=arguments.memory_size,
        k=arguments.k,
        gate=arguments.gate,
    )
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> torch.Tensor:
        return torch.randint(3, arguments.vocabulary, (batch, length), generator=generator).to(device)

    def read(which: Any, segment: torch.Tensor) -> None:
        which(segment, use_cache=False)

    def decode(which: Any, prompt: torch.Tensor) -> None:
        count = arguments.new_tokens
        which.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

    while int(memory.lengths.min() if len(memory.lengths) else 0) < arguments.memory_size:
        read(model, text(arguments.segment))
    times: dict[str, list[float]] = {}
    prompt = text(16)
    for round_number in range(arguments.rounds + 1):
        segment = text(arguments.segment)
        for name, which in (("", model), ("_plain", plain)):
            read_seconds = seconds(functools.partial(read, which, segment), device)
            decode_seconds = seconds(functools.partial(decode, which, prompt), device)
            if round_number:  # the first warms up
                times.setdefault(f"evaluation{name}", []).append(read_seconds / segment.numel() * 1e3)
                times.setdefault(f"decoding{name}", []).append(decode_seconds / (batch * arguments.new_tokens) * 1e3)
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return {
        "family": family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: round(value, 4) for name, value in medians.items()},
        "evaluation_ratio": round(medians["evaluation_ms"] / medians["evaluation_plain_ms"], 3),
        "decoding_speed": round(medians["decoding_plain_ms"] / medians["decoding_ms"], 3),
    }


def main() -> None:
    """Measures, prints and, with --output, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--memory-size", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--gate", default="joint")
    parser.add_argument("--backend", default="exact")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(family, arguments) for family in arguments.families]
    for row in rows:
        print(json.dumps(row))
    if arguments.output:
        machine = torch.cuda.get_device_name() if arguments.device == "cuda" else get_cpu_info().get("brand_raw", "CPU")
        settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "families")}
        content = {"provenance": describe(device=arguments.device), "machine": machine, **settings, "rows": rows}
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
