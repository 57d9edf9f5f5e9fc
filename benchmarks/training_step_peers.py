"""Our training step against memorizing-transformers-pytorch's, at the same shapes and the same memory, side by side.

    pip install --no-deps memorizing-transformers-pytorch==0.4.1 einops-exts   # its faiss-gpu would break faiss-cpu
    python benchmarks/training_step_peers.py [--memory-size 8192] [--preset laptop] [--steps 15] [--threads 2]

All models take turns step by step in one process, so that a busy machine slows them alike: each package with its memory
and without. A step is forward, backward, clipping and AdamW. Ours runs twice, in float32 and in bfloat16 autocast (what
`recollect train --preset reference` does); the other package cannot run under autocast: its search hands the queries to
NumPy, which knows no bfloat16. k, layers, width, heads, head dimension, feed-forward, vocabulary, segment and batch are
the preset's; its convolution of queries and keys is left out, since the other package has none. All read the same text,
the source of Python's standard library in the shipped tokenizer, and fill their memories by reading it: every key was
written by the model that searches for it.

What stays different, because it is what each package is: ours keeps keys and values for every head, the other one per
row, shared by the heads; ours searches all keys, the other an HNSW graph (M 15). Its index empties itself when it grows
over its size, so it starts below and reaches the memory size with the last step: its memory is never the larger one.

`recall`: of the k keys of highest score, as each side's own index finds them for the queries of its last step, ties
counted as found. Prints JSON; skips, with the reason, where the package is not installed. Aim: 1.5 times its tokens per
second, with exact recall.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recollect.memory_backends.atomic import write_json
from recollect.model.allocation import keep_freed_memory
from recollect.model.checkpoints import reference_checkpoint
from recollect.model.corpus import load_corpus
from recollect.model.streams import Segment
from recollect.model.tokenizer import load_tokenizer
from recollect.model.training import training_loss
from recollect.model.training_options import TRAINING_PRESETS, TrainingOptions
from recollect.model.transformer import MemorizingTransformer
from recollect.suites.provenance import describe

RESULT = Path(__file__).parent / "results" / "training_step_peers.json"
PACKAGE = "memorizing-transformers-pytorch"
INSTALL = f"pip install --no-deps {PACKAGE}==0.4.1 einops-exts==0.0.4, and pip install einops joblib faiss-cpu"
WARM_UP = 2
LEARNING_RATE = 1e-9  # the same work as with any other rate, and nothing drifts


class Side(ABC):
    """One model with its optimiser and its memory, and the time of each of its steps."""

    def __init__(self, model: nn.Module, options: TrainingOptions, precision: str = "float32") -> None:
        self.model = model.train()
        self.options = options
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=options.weight_decay, fused=True
        )
        self.precision = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")
        self.seconds: list[float] = []
        self._queries: Any = None

    @abstractmethod
    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of `tokens` (B, T+1); appends the segment to the memory."""

    @abstractmethod
    def recall(self) -> float:
        """Share of the k best keys that the index finds for the last step's queries."""

    def read(self, tokens: Tensor) -> None:
        """Fills the memory: a forward pass without gradient."""
        with torch.no_grad(), self.precision:
            self.loss(tokens)

    def step(self, tokens: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision:
            loss = self.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def _recording(self, search: Callable[..., Any]) -> Callable[..., Any]:
        """`search`, which remembers the queries of its last call."""

        def recorded(queries: Any, *arguments: Any, **options: Any) -> Any:
            self._queries = queries
            return search(queries, *arguments, **options)

        return recorded


class Ours(Side):
    def __init__(self, options: TrainingOptions, memory_size: int, precision: str) -> None:
        torch.manual_seed(options.seed)
        model = MemorizingTransformer(options.model.replace(memory_size=memory_size))
        super().__init__(model, options, precision)
        self.state = model.initial_state(options.batch_size)
        for memory in self.state.memories:
            memory.backend.search = self._recording(memory.backend.search)  # type: ignore[method-assign]

    def loss(self, tokens: Tensor) -> Tensor:
        assert isinstance(self.model, MemorizingTransformer)
        rows = len(tokens)
        nothing = torch.zeros(rows, dtype=torch.int64)
        starts = torch.zeros(rows, dtype=torch.bool)
        lengths = torch.full_like(nothing, tokens.shape[1] - 1)
        segment = Segment(tokens[:, :-1], tokens[:, 1:], starts, nothing, nothing + 1, lengths)
        loss, self.state = training_loss(self.model, self.state, segment)
        return loss

    def fill(self) -> None:
        """Appends the first keys once more until the memory is full; the other package's may not start full."""
        for memory in self.state.memories:
            backend = memory.backend
            length = int(backend.lengths.min())
            missing = backend.capacity - length
            slots = torch.arange(missing).expand(backend.num_memories, 1, -1) % max(1, length)
            shape = (memory.batch_size, memory.heads, missing, backend.dim)
            memory.append(backend.gather_keys(slots).view(shape), memory.values[:, slots[0, 0]].view(shape))

    def recall(self) -> float:
        backend, k = self.state.memories[0].backend, self.options.model.k
        queries = self._queries.detach()
        found = backend.gather_keys(backend.search(queries, k).slots)
        everything = torch.arange(backend.capacity).expand(backend.num_memories, 1, -1)
        keys = backend.gather_keys(everything)[:, 0]
        return statistics.mean(
            _recall(keys[memory], queries[memory], torch.einsum("qd,qkd->qk", queries[memory], found[memory]))
            for memory in range(backend.num_memories)
        )


class Theirs(Side):
    """memorizing-transformers-pytorch, called as its readme does."""

    def __init__(self, options: TrainingOptions, memory_size: int, folder: Path) -> None:
        from memorizing_transformers_pytorch import MemorizingTransformer as Peer

        config = options.model
        model = Peer(
            num_tokens=config.vocabulary_size,
            dim=config.width,
            depth=config.layers,
            heads=config.heads,
            dim_head=config.head_dim,
            ff_mult=config.feed_forward // config.width,
            memorizing_layers=tuple(layer + 1 for layer in config.memory_layers) if memory_size else (),
            max_knn_memories=memory_size,
            num_retrieved_memories=config.k,
            xl_max_memories=config.xl_cache,
            pad_id=-100,  # no token is padding
            knn_memories_directory=str(folder),
        )
        super().__init__(model, options)
        self.memories = model.create_knn_memories(batch_size=options.batch_size) if memory_size else []
        self.cache: Any = None
        for memory in self.memories:
            memory.search = self._recording(memory.search)

    def loss(self, tokens: Tensor) -> Tensor:
        answer = self.model(
            tokens[:, :-1], knn_memories=self.memories, xl_memories=self.cache, labels=tokens[:, 1:].contiguous()
        )
        if isinstance(answer, tuple):
            answer, self.cache = answer
        return answer

    def recall(self) -> float:
        memory, k = self.memories[0], self.options.model.k
        shares = []
        for row, index in enumerate(memory.knns):
            queries = self._queries[row].detach().flatten(0, -2)
            keys = torch.from_numpy(np.array(memory.db[row, : memory.db_offsets[row], 0]))
            indices = torch.from_numpy(index.search(queries.numpy(), k)).long()
            scores = torch.einsum("qd,qkd->qk", queries, keys[indices.clamp_min(0)])
            shares.append(_recall(keys, queries, scores.masked_fill(indices < 0, -torch.inf)))
        return statistics.mean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="laptop", choices=list(TRAINING_PRESETS))
    parser.add_argument("--memory-size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice, for both")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    try:
        import faiss
        import memorizing_transformers_pytorch  # noqa: F401
    except ImportError as error:
        print(json.dumps({"skipped": f"{PACKAGE} cannot be imported ({error}): {INSTALL}"}))
        return
    keep_freed_memory()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(torch.get_num_threads())
    plain: dict[str, Any] = {"qk_convolution_width": 0, "token_shift": False, "matched_start": False}
    model = TrainingOptions.preset(arguments.preset, "unused").model.replace(**plain, separate_memory_scale=False)
    options = TrainingOptions.preset(arguments.preset, "unused", model=model)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, arguments.memory_size, arguments.steps, Path(folder))
    print(json.dumps(result, indent=1))
    write_json(arguments.output, {"provenance": describe(seed=0), **result})


def compare(options: TrainingOptions, memory_size: int, steps: int, folder: Path) -> dict[str, Any]:
    """Times all four sides in turns; the memories of both packages are filled first."""
    length = options.model.segment_length
    timed = WARM_UP + steps
    filling = memory_size // length - timed
    if filling < 0:
        sys.exit(f"--memory-size {memory_size} is too small for {steps} steps of {length} tokens: give fewer steps")
    text = _text(options, (filling + timed + 1) * length + 1)
    segments = [text[:, place : place + length + 1] for place in range(0, text.shape[1] - length, length)]
    ours = {
        precision: (Ours(options, memory_size, precision), Ours(options, 0, precision))
        for precision in ("float32", "bfloat16")
    }
    theirs = (Theirs(options, memory_size, folder), Theirs(options, 0, folder))
    pairs: list[tuple[Side, Side]] = [*ours.values(), theirs]
    for with_memory, _ in pairs:
        for segment in segments[:filling]:
            with_memory.read(segment)
    for full, _ in ours.values():
        full.fill()
    for segment in segments[filling : filling + timed]:
        for pair in pairs:
            for side in pair:
                side.step(segment)

    def median_of_ratios(one: Side, other: Side) -> float:
        seconds = zip(one.seconds[WARM_UP:], other.seconds[WARM_UP:], strict=True)
        return round(statistics.median(first / second for first, second in seconds), 3)

    def summary(side: Side, without: Side) -> dict[str, float]:
        milliseconds = 1e3 * statistics.median(side.seconds[WARM_UP:])
        return {
            "step_with_memory_ms": round(milliseconds, 1),
            "step_without_memory_ms": round(1e3 * statistics.median(without.seconds[WARM_UP:]), 1),
            "with_memory_to_without": median_of_ratios(side, without),
            "tokens_per_second": round(options.batch_size * length / milliseconds * 1e3),
            "tokens_per_second_to_theirs": median_of_ratios(theirs[0], side),
            "without_memory_to_theirs": median_of_ratios(theirs[1], without),
            "recall": round(side.recall(), 4),
            "parameters": sum(parameter.numel() for parameter in side.model.parameters()),
        }

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "vocabulary_size": options.model.vocabulary_size,
        "layers": options.model.layers,
        "width": options.model.width,
        "memory_size": memory_size,
        "batch_size": options.batch_size,
        "segment_length": length,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "torch": torch.__version__,
        "faiss": importlib.metadata.version("faiss-cpu"),
        "peer": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "ours_float32": summary(*ours["float32"]),
        "ours_bfloat16": summary(*ours["bfloat16"]),
        "theirs_float32": summary(*theirs),
    }


def _recall(keys: Tensor, queries: Tensor, found: Tensor) -> float:
    """Share of `found` scores (Q, K) that belong to the K best of `keys` (N, D); equal scores are as good."""
    least = (queries @ keys.T).topk(found.shape[-1]).values[:, -1:]
    return float((found >= least - 1e-5).float().mean())


def _text(options: TrainingOptions, tokens_per_row: int) -> Tensor:
    """(B, tokens_per_row) of the standard library's source, each row a different part of it."""
    tokenizer = load_tokenizer(reference_checkpoint())
    wanted = options.batch_size * tokens_per_row
    pieces: list[np.ndarray] = []
    for document in load_corpus("stdlib").documents("train"):
        pieces.append(tokenizer.encode(document.text).astype(np.int64))
        if sum(map(len, pieces)) >= wanted:
            break
    tokens = torch.from_numpy(np.concatenate(pieces)[:wanted])
    return (tokens % options.model.vocabulary_size).view(options.batch_size, tokens_per_row)


if __name__ == "__main__":
    main()
