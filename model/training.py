"""Training a memorizing transformer on document streams.

    result = train(TrainingOptions.preset("laptop", output="out/model"))

Under `torchrun` the same call trains on every process at once, each with its own rows of the batch and their memories
(`recollect.model.distributed`, `recollect.model.parallel`).

Letters: B batch rows, T tokens of a segment, W ranks.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends.errors import NotFinite
from recollect.model.allocation import keep_freed_memory
from recollect.model.checkpoints import Checkpoint, save_checkpoint
from recollect.model.compressive import take_compression_loss
from recollect.model.distributed import Ranks, joined
from recollect.model.evaluation import replay
from recollect.model.evaluation_text import EvaluationText
from recollect.model.optimizers import learning_rate_share
from recollect.model.parallel import summed_loss, whole_state
from recollect.model.shared_evaluation import shared_perplexities
from recollect.model.shared_optimizers import clip_gradients
from recollect.model.streams import IGNORED, Segment
from recollect.model.tokenizer import Tokenizer
from recollect.model.training_options import TrainingOptions, TrainingResult
from recollect.model.training_progress import Interruption, Log, progress_bar
from recollect.model.training_setup import Run, Text, check_output, read_text, settle, start
from recollect.model.training_state import FOLDER, save_training_state
from recollect.model.transformer import MemorizingTransformer, ModelState
from recollect.model.trunk import compute_trunk

LOG = "training_log.jsonl"
SNAPSHOTS = "snapshots"


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number; the message names the step and the remedy."""


def train(options: TrainingOptions, *, on_step: Callable[[int, float], None] | None = None) -> TrainingResult:
    """Trains a model and writes its checkpoint into `options.output`.

    Args:
        options: what to train.
        on_step: called after each step with its number, from 1, and its loss; on every rank, with the loss of all.

    The training state is saved on the way and, on Ctrl-C or SIGTERM, at the end of the step; the same call then goes
    on, with as many processes as before or others.

    A corpus of one document is all training text. Without a validation document that fills a segment there is no
    validation.

    Raises:
        CheckpointError: `options.output` holds a finished model, or the state of a run with other options.
        ConfigurationError: the rows of a batch cannot be dealt to the processes that were started.
        CorpusError: the corpus or the tokenizer cannot be used.
        TrainingDiverged: the loss became NaN or infinite.
        RankError: another process of the job failed, was killed, or is silent.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state was saved.
    """
    with joined(options.device, deadline=options.deadline) as ranks:
        return _train(options, ranks, on_step)


def _train(options: TrainingOptions, ranks: Ranks, on_step: Callable[[int, float], None] | None) -> TrainingResult:
    started = time.perf_counter()
    check_output(options, ranks)
    keep_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options, initial = settle(options)
    text = read_text(options, initial, ranks)
    run = start(options, text.documents, initial, ranks)
    log = Log(options.output / LOG, keep_until=run.step) if ranks.first else None
    validated: dict[str, float] = {}
    shown = options.progress and ranks.first
    with progress_bar(options.steps, show=shown) as advance, Interruption(patient=ranks.several) as interruption:
        advance(run.step, "")
        while run.step < options.steps:
            _step(options, run, log, interruption)
            if run.step in options.snapshots:
                _snapshot(options, run, text.tokenizer)
            if on_step is not None:
                on_step(run.step, run.losses[-1])
            advance(run.step, f"loss {sum(run.losses) / len(run.losses):.3f}")
            last = run.step == options.steps
            if text.validation is not None and (last or run.step % options.validate_every == 0):
                validated = _validate(options, run, text.validation)
                if log is not None:
                    log.write({"step": run.step, **validated})
            asked = run.asked if ranks.several else interruption.asked
            due = options.save_every and run.step % options.save_every == 0
            if (due or asked) and not last:
                _save(options, run)
                if asked:
                    raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    loss = sum(run.losses) / len(run.losses)
    _finish(options, run, text, initial, loss=loss, validated=validated)
    return TrainingResult(
        output=options.output,
        steps=options.steps,
        tokens=options.tokens,
        seconds=seconds,
        loss=loss,
        validation_perplexity=validated.get("validation_perplexity"),
        validation_perplexity_without_memory=validated.get("validation_perplexity_without_memory"),
    )


def training_loss(model: MemorizingTransformer, state: ModelState, segment: Segment) -> tuple[Tensor, ModelState]:
    """Mean cross-entropy of one segment's targets, and the state after it. A segment without targets gives 0."""
    total, after = summed_loss(model, state, segment)
    return total / (segment.targets.to(model.device) != IGNORED).sum().clamp_min(1), after


def _step(options: TrainingOptions, run: Run, log: Log | None, interruption: Interruption) -> None:
    """One step of all ranks; the figures in the log are of all rows."""
    began = time.perf_counter()
    segment = run.streams.next_segment()
    if segment is None:
        raise TrainingDiverged("the document streams ended, although training reads them for ever")
    share = learning_rate_share(
        run.step, steps=options.steps, warmup_steps=options.warmup_steps, decay_share=options.decay_share
    )
    run.optimizers.set_share(share)
    run.optimizers.zero_grad()
    try:
        value = _differentiate(options, run, segment, interruption)
    except NotFinite as error:  # a memory is asked before there is a loss to look at
        raise _diverged(options, run.step, str(error)) from error
    norm = clip_gradients(run.model, options.gradient_clip or math.inf)
    if not math.isfinite(value) or not bool(torch.isfinite(norm)):
        raise _diverged(options, run.step, f"the loss is {value}, the gradient's norm {float(norm)}")
    run.optimizers.step()
    run.step += 1
    run.losses.append(value)
    figures = {
        "step": run.step,
        "loss": value,
        "gradient_norm": float(norm),
        "learning_rate_share": share,
        "step_ms": 1e3 * (time.perf_counter() - began),
    }
    if log is not None:
        log.write(figures)


def _differentiate(options: TrainingOptions, run: Run, segment: Segment, interruption: Interruption) -> float:
    """Fills the gradients of the loss over all rows and returns it."""
    if run.shared is None:
        with _autocast(options):
            loss, run.state = training_loss(run.model, run.state, segment)
        compression = take_compression_loss(run.model)
        (loss if compression is None else loss + options.model.compression_loss * compression).backward()
        return float(loss.detach())
    targets = int((segment.targets != IGNORED).sum())
    with _autocast(options):
        loss, own, run.state = run.shared(run.state, segment.of_rows(*run.ranks.rows(len(segment.tokens))), targets)
    loss.backward()
    total, asked = run.ranks.sum([float(own.detach()), float(interruption.asked)])
    run.asked = asked > 0
    return total / max(1, targets)


def _diverged(options: TrainingOptions, step: int, what: str) -> TrainingDiverged:
    return TrainingDiverged(
        f"step {step}: {what}; lower the learning rates "
        f"({options.matrix_learning_rate}, {options.other_learning_rate}) or lengthen the warm-up"
    )


def _autocast(options: TrainingOptions) -> contextlib.AbstractContextManager[Any]:
    kind = torch.device(options.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=options.precision == "bfloat16")


def _validate(options: TrainingOptions, run: Run, text: EvaluationText) -> dict[str, float]:
    """Perplexities of the model as it is, with the memory that it trains with and without."""
    sizes = (options.model.memory_size if options.model.memory_layers else 0, 0)
    with _autocast(options):
        if run.ranks.several:
            with_memory, without = shared_perplexities(
                run.model, text, run.ranks, memory_sizes=sizes, backend=options.backend, seed=options.seed
            )
        else:
            trunk = compute_trunk(run.model, text)
            with_memory, without = (
                replay(run.model, trunk, backend=options.backend, memory_size=size, seed=options.seed).perplexity
                for size in sizes
            )
    return {"validation_perplexity": with_memory, "validation_perplexity_without_memory": without}


def _snapshot(options: TrainingOptions, run: Run, tokenizer: Tokenizer) -> None:
    """Keeps the weights as they are now; an interrupted run that repeats the step writes the same again."""
    folder = options.output / SNAPSHOTS / str(run.step)
    weights = whole_state(run.model, run.ranks)
    if run.ranks.first:
        metadata = {"step": run.step, "of": options.steps}
        dtype = options.weights_dtype
        save_checkpoint(folder, run.model, tokenizer, metadata=metadata, dtype=dtype, weights=weights)
    run.ranks.wait()


def _save(options: TrainingOptions, run: Run) -> None:
    progress = {"step": run.step, "losses": list(run.losses), "options": options.to_dict()}
    save_training_state(options.output, run.model, run.optimizers, run.state, run.streams, progress, run.ranks)


def _finish(
    options: TrainingOptions,
    run: Run,
    text: Text,
    initial: Checkpoint | None,
    *,
    loss: float,
    validated: dict[str, float],
) -> None:
    """Writes the checkpoint and removes the state, which nobody needs any more."""
    metadata: dict[str, Any] = {
        "training": options.to_dict(),
        "corpus": {
            "name": text.corpus.name,
            "digest": text.corpus.digest,
            "training_tokens_available": text.documents.tokens,
        },
        "tokens": options.tokens,
        "parameters": run.model.count_parameters(),
        "training_loss": loss,
        "validation": validated,
        "started_from": None if initial is None else initial.digest,
        "versions": {"torch": torch.__version__},
    }
    if run.ranks.several:
        metadata["processes"] = run.ranks.count
    weights = whole_state(run.model, run.ranks)
    if run.ranks.first:
        save_checkpoint(
            options.output, run.model, text.tokenizer, metadata=metadata, dtype=options.weights_dtype, weights=weights
        )
        shutil.rmtree(options.output / FOLDER, ignore_errors=True)
    run.ranks.wait()
