"""What age does to a memory's keys: how far keys that earlier weights wrote lie from what the final model would write.

While a model trains, its memory holds keys of weights from many updates ago (Wu et al. 2022, section 3.2,
"distributional shift": they normalise keys and queries so that old and new keys do not differ in size). Here earlier
weights of one training and the final ones read the same text, so that every key has an old and a fresh form. For each
age:

    key distance    |old - fresh| / |fresh|, mean over keys
    key cosine      between old and fresh, mean over keys
    key length      |old| / |fresh|, mean over keys
    overlap         share of the fresh top k that the final model's queries still find among the old keys
    mass kept       softmax mass that these still hold of what the fresh top k hold, by the fresh keys' logits
    perplexity      of the final model with every key and value of its memories as the earlier weights wrote them

Letters: S segments, M memories, T tokens, D head dimension, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend, SearchResult, make_backend
from recollect.model.checkpoints import Checkpoint, load_checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.evaluation import Replay
from recollect.model.evaluation_text import EvaluationText
from recollect.model.memory_layer import LayerMemory
from recollect.model.recording import ObservedBackend
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import TrunkOutput, compute_trunk

from .probe_types import ProbeResult

VERSION = 1
OPTIONS: dict[str, Any] = {"memory_size": 0, "k": 0, "segments": 32}
"""memory_size, k: 0 is the model's own. segments: read so many segments of the text, 0 for all."""


def probe(checkpoints: Sequence[Path], text: EvaluationText, options: Mapping[str, Any]) -> ProbeResult:
    """Compares each earlier checkpoint with the last one; a row for each.

    Raises:
        ConfigurationError: there is no earlier checkpoint, no memory layer, or keys do not leave first-in first-out, so
            that old and fresh keys cannot be matched by slot.
    """
    if len(checkpoints) < 2:
        raise ConfigurationError(
            f"staleness compares earlier weights of a training with its last: want 2 checkpoints or more, here "
            f"{len(checkpoints)}; let the training keep snapshots"
        )
    settings = {**OPTIONS, **options}
    final = load_checkpoint(checkpoints[-1])
    config = final.config
    if not config.memory_layers:
        raise ConfigurationError("staleness is about the keys of a memory, and this model has no memory layer")
    if getattr(config, "eviction", "fifo") != "fifo":
        raise ConfigurationError(f"staleness matches keys by slot, which eviction={config.eviction!r} would move")
    if settings["segments"]:
        text = text.only(torch.arange(min(int(settings["segments"]), text.segments)))
    size, k = int(settings["memory_size"]) or config.memory_size, int(settings["k"]) or config.k
    fresh = _Reading.of(final.model, text, size, k)
    last = training_step(final, checkpoints[-1])
    rows = []
    for path in checkpoints[:-1]:
        old = load_checkpoint(path)
        step = training_step(old, path)
        stale = _Reading.of(old.model, text, size, k)
        age = None if step is None or last is None else last - step
        row: dict[str, Any] = {"step": step, "updates_before_the_end": age}
        row |= _key_figures(stale.keys[0], fresh.keys[0])
        row |= _neighbours(fresh, stale, text, size, k)
        perplexity = _with_memory_of(final.model, fresh.trunk, stale, size, k)
        row |= {"perplexity_stale": perplexity, "perplexity_fresh": fresh.perplexity}
        row["perplexity_rise_percent"] = 100 * (perplexity / fresh.perplexity - 1)
        rows.append(row)
    numbers = {}
    for place, row in enumerate(rows):
        age = row["updates_before_the_end"]
        label = f"checkpoint_{place}" if age is None else f"{age}_updates"
        for name in ("key_distance", "key_cosine", "overlap", "mass_kept", "perplexity_rise_percent"):
            numbers[f"{name}_after_{label}"] = float(row[name])
    return ProbeResult(numbers, rows)


def training_step(checkpoint: Checkpoint, path: Path) -> int | None:
    """The update after which weights were kept: a snapshot's folder is named so, a finished model says so."""
    if Path(path).name.isdigit():
        return int(Path(path).name)
    steps = checkpoint.metadata.get("training", {}).get("steps")
    return steps if isinstance(steps, int) else None


@dataclass
class _Reading:
    """One model's reading of the text with exact memories.

    queries, keys: for each memory layer, (S, M, T, D) as they were searched and appended.
    appended: for each memory layer and segment, what the layer appended (keys and values, whatever their form).
    scale: (H,) what multiplies the first memory layer's inner products to give its logits.
    """

    trunk: TrunkOutput
    perplexity: float
    queries: list[Tensor]
    keys: list[Tensor]
    appended: list[list[tuple[Tensor, ...]]]
    scale: Tensor

    @classmethod
    def of(cls, model: MemorizingTransformer, text: EvaluationText, size: int, k: int) -> _Reading:
        trunk = compute_trunk(model, text)
        layers = len(model.config.memory_layers)
        queries: list[list[Tensor]] = [[] for _ in range(layers)]
        keys: list[list[Tensor]] = [[] for _ in range(layers)]
        backends = [_observed(model, trunk, size, queries[n], keys[n]) for n in range(layers)]
        run = Replay(model, trunk, backend=backends, k=k)
        watched = [_Appends(memory) for memory in run.memories]
        run.memories[:] = cast(list[LayerMemory], watched)
        while run.step():
            pass
        return cls(
            trunk,
            run.result().perplexity,
            [torch.stack(layer) for layer in queries],
            [torch.stack(layer) for layer in keys],
            [memory.appended for memory in watched],
            watched[0].scale,
        )


def _observed(
    model: MemorizingTransformer, trunk: TrunkOutput, size: int, asked: list[Tensor], keys: list[Tensor]
) -> ObservedBackend:
    """An exact backend of a memory layer that keeps what it is asked and given."""
    (prototype,) = model.initial_upper_state(trunk.rows, memory_size=size).memories[:1]
    inner = prototype.backend
    backend = make_backend("exact", num_memories=inner.num_memories, capacity=size, dim=inner.dim)

    def on_search(backend: MemoryBackend, queries: Tensor, k: int, result: SearchResult) -> None:
        asked.append(queries.detach().float().cpu().clone())

    return ObservedBackend(
        backend, on_search=on_search, on_append=lambda given: keys.append(given.detach().float().cpu().clone())
    )


@dataclass
class _Appends:
    """A layer's memory that also keeps what is appended to it, or appends what another model wrote instead."""

    memory: Any
    instead: list[tuple[Tensor, ...]] | None = None
    appended: list[tuple[Tensor, ...]] = field(default_factory=list)
    scale: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __getattr__(self, name: str) -> Any:
        # Only for what is not defined here: reset_rows and the rest.
        return getattr(self.memory, name)

    def attend(self, queries: Tensor, scale: Tensor, *rest: Any) -> Any:
        """As `LayerMemory.attend`."""
        self.scale = scale.detach().float().cpu()
        return self.memory.attend(queries, scale, *rest)

    def append(self, *tensors: Tensor) -> None:
        """As `LayerMemory.append`."""
        number = len(self.appended)
        self.appended.append(tuple(tensor.detach().clone() for tensor in tensors))
        self.memory.append(*(tensors if self.instead is None else self.instead[number]))


def _with_memory_of(model: MemorizingTransformer, trunk: TrunkOutput, stale: _Reading, size: int, k: int) -> float:
    """Perplexity of `model` when its memories hold what another model wrote for the same text."""
    run = Replay(model, trunk, backend="exact", memory_size=size, k=k)
    swapped = [_Appends(memory, stale.appended[n]) for n, memory in enumerate(run.memories)]
    run.memories[:] = cast(list[LayerMemory], swapped)
    while run.step():
        pass
    return run.result().perplexity


def _key_figures(old: Tensor, fresh: Tensor) -> dict[str, float]:
    """Distances of keys (S, M, T, D) of the first memory layer, over segments' text and padding alike."""
    old, fresh = old.double(), fresh.double()
    length = fresh.norm(dim=-1).clamp_min(1e-12)
    return {
        "key_distance": float(((old - fresh).norm(dim=-1) / length).mean()),
        "key_cosine": float(torch.nn.functional.cosine_similarity(old, fresh, dim=-1).mean()),
        "key_length": float((old.norm(dim=-1) / length).mean()),
    }


@torch.inference_mode()
def _neighbours(fresh: _Reading, stale: _Reading, text: EvaluationText, size: int, k: int) -> dict[str, float]:
    """Overlap and mass kept in the first memory layer, over the queries of text whose memory holds more than k keys.

    With k keys or fewer every key is found, whatever it looks like.
    """
    queries = fresh.queries[0]
    memories, dim = queries.shape[1], queries.shape[3]
    per_row = memories // text.rows
    new, old = (make_backend("exact", num_memories=memories, capacity=size, dim=dim) for _ in range(2))
    scale = fresh.scale
    if len(scale) != per_row:  # one memory for all heads of a row: the heads' scales lie in the queries
        scale = torch.ones(per_row)
    weight = scale.repeat(text.rows)[:, None, None]
    hits = mass = 0.0
    count = 0
    for number in range(text.segments):
        starting = text.document_starts[number].repeat_interleave(per_row).nonzero().flatten()
        if len(starting):
            new.reset(starting)
            old.reset(starting)
        if int(new.lengths.max()) > k:
            asked = queries[number]
            best, found = new.search(asked, k), old.search(asked, k)
            per_query = asked.shape[1] // text.segment_length
            wanted = text.is_text[number].repeat(1, per_query).repeat_interleave(per_row, dim=0)
            wanted = wanted & (new.lengths > k)[:, None]
            same = (best.slots[..., :, None] == found.slots[..., None, :]).any(-1).float().mean(-1)
            # The fresh keys' own logits at the slots that the old keys led to, against those of the true best.
            logits = torch.einsum("mqd,mqkd->mqk", asked, new.gather_keys(found.slots)) * weight
            true = best.scores * weight
            largest = true.amax(-1, keepdim=True)
            hits += float(same[wanted].sum())
            mass += float(((logits - largest).exp().sum(-1) / (true - largest).exp().sum(-1))[wanted].sum())
            count += int(wanted.sum())
        new.add(fresh.keys[0][number])
        old.add(stale.keys[0][number])
    if not count:
        raise ConfigurationError(
            f"no memory holds more than k={k} keys when it is searched, so all are found: read more text"
        )
    return {"overlap": hits / count, "mass_kept": mass / count}
