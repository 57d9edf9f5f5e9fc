"""Training a memorizing transformer on document streams.

    result = train(TrainingOptions.preset("laptop", output="out/model"))

Letters: B batch rows, T tokens of a segment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from recollect.memory_backends.atomic import recover_folder
from recollect.memory_backends.errors import NotFinite
from recollect.model.allocation import keep_freed_memory
from recollect.model.checkpoints import CONFIG, Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from recollect.model.compressive import take_compression_loss
from recollect.model.configuration import ConfigurationError
from recollect.model.corpus import Corpus, load_corpus
from recollect.model.evaluation import replay
from recollect.model.evaluation_text import EvaluationText, choose_text
from recollect.model.optimizers import Optimizers, learning_rate_share, make_optimizers
from recollect.model.streams import IGNORED, DocumentStreams, Segment
from recollect.model.token_cache import TokenizedDocuments, tokenize
from recollect.model.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from recollect.model.training_options import TrainingOptions, TrainingResult
from recollect.model.training_progress import Interruption, Log, progress_bar
from recollect.model.training_state import FOLDER, load_training_state, save_training_state
from recollect.model.transformer import MemorizingTransformer, ModelState
from recollect.model.trunk import compute_trunk

LOG = "training_log.jsonl"
SNAPSHOTS = "snapshots"
AVERAGED_STEPS = 100


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number; the message names the step and the remedy."""


@dataclass
class _Run:
    """The parts of a run that move."""

    model: MemorizingTransformer
    optimizers: Optimizers
    state: ModelState
    streams: DocumentStreams
    step: int
    losses: deque[float]


def train(options: TrainingOptions, *, on_step: Callable[[int, float], None] | None = None) -> TrainingResult:
    """Trains a model and writes its checkpoint into `options.output`.

    Args:
        options: what to train.
        on_step: called after each step with its number, from 1, and its loss.

    The training state is saved on the way and, on Ctrl-C, at the end of the step; the same call then goes on.

    A corpus of one document is all training text. Without a validation document that fills a segment there is no
    validation.

    Raises:
        CheckpointError: `options.output` holds a finished model, or the state of a run with other options.
        CorpusError: the corpus or the tokenizer cannot be used.
        TrainingDiverged: the loss became NaN or infinite.
        KeyboardInterrupt: Ctrl-C, after the state was saved.
    """
    started = time.perf_counter()
    _check_output(options)
    keep_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options, initial = _settle(options)
    corpus = _corpus(options)
    tokenizer = _tokenizer(options, corpus) if initial is None else initial.tokenizer
    documents = tokenize(corpus, "train", tokenizer, options.cache_directory)
    validation = _validation_text(options, corpus, tokenizer)
    run = _start(options, documents, initial)
    log = Log(options.output / LOG, keep_until=run.step)
    validated: dict[str, float] = {}
    with progress_bar(options.steps, show=options.progress) as advance, Interruption() as interruption:
        advance(run.step, "")
        while run.step < options.steps:
            _step(options, run, log)
            if run.step in options.snapshots:
                _snapshot(options, run, tokenizer)
            if on_step is not None:
                on_step(run.step, run.losses[-1])
            advance(run.step, f"loss {sum(run.losses) / len(run.losses):.3f}")
            last = run.step == options.steps
            if validation is not None and (last or run.step % options.validate_every == 0):
                validated = _validate(options, run.model, validation)
                log.write({"step": run.step, **validated})
            due = options.save_every and run.step % options.save_every == 0
            if (due or interruption.asked) and not last:
                _save(options, run)
                if interruption.asked:
                    raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    loss = sum(run.losses) / len(run.losses)
    metadata = {
        "training": options.to_dict(),
        "corpus": {"name": corpus.name, "digest": corpus.digest, "training_tokens_available": documents.tokens},
        "tokens": options.tokens,
        "parameters": run.model.count_parameters(),
        "training_loss": loss,
        "validation": validated,
        "started_from": None if initial is None else initial.digest,
        "versions": {"torch": torch.__version__},
    }
    save_checkpoint(options.output, run.model, tokenizer, metadata=metadata, dtype=options.weights_dtype)
    shutil.rmtree(options.output / FOLDER, ignore_errors=True)
    return TrainingResult(
        output=options.output,
        steps=options.steps,
        tokens=options.tokens,
        seconds=seconds,
        loss=loss,
        validation_perplexity=validated.get("validation_perplexity"),
        validation_perplexity_without_memory=validated.get("validation_perplexity_without_memory"),
    )


def training_loss(model: MemorizingTransformer, state: ModelState, segment: Segment) -> tuple[torch.Tensor, ModelState]:
    """Mean cross-entropy of one segment's targets, and the state after it. A segment without targets gives 0."""
    output = model(segment.tokens.to(model.device), state, segment.document_starts.to(model.device))
    targets = segment.targets.to(model.device).flatten()
    total = functional.cross_entropy(
        output.logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp_min(1), output.state


def _check_output(options: TrainingOptions) -> None:
    if (options.output / CONFIG).is_file():
        raise CheckpointError(
            f"{options.output} holds a finished model already: give another output folder, or remove it"
        )
    if not options.resume:
        shutil.rmtree(options.output / FOLDER, ignore_errors=True)


def _settle(options: TrainingOptions) -> tuple[TrainingOptions, Checkpoint | None]:
    """The options with the model that is really trained, and the checkpoint to start from."""
    initial = None if options.checkpoint is None else load_checkpoint(options.checkpoint)
    model = options.model if initial is None else initial.config
    if options.memory_size is not None:
        model = model.replace(memory_size=options.memory_size)
    return dataclasses.replace(options, model=model), initial


def _corpus(options: TrainingOptions) -> Corpus:
    corpus = load_corpus(options.corpus)
    if sum(len(documents) for documents in corpus.by_split.values()) == 1:
        return load_corpus(options.corpus, everything_is="train")
    return corpus


def _tokenizer(options: TrainingOptions, corpus: Corpus) -> Tokenizer:
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        texts = (document.text for document in corpus.documents("train"))
        tokenizer = train_tokenizer(texts, options.model.vocabulary_size)
    if tokenizer.vocabulary_size > options.model.vocabulary_size:
        raise ConfigurationError(
            f"the tokenizer has {tokenizer.vocabulary_size} tokens, more than "
            f"vocabulary_size={options.model.vocabulary_size}"
        )
    return tokenizer


def _start(options: TrainingOptions, documents: TokenizedDocuments, initial: Checkpoint | None) -> _Run:
    """A new run, or the interrupted one that `options.output` holds."""
    torch.manual_seed(options.seed)
    model = MemorizingTransformer(options.model)
    if initial is not None:
        model.load_state_dict(initial.model.state_dict())
    model = model.to(options.device).train()
    optimizers = make_optimizers(
        model,
        options.optimizer,
        matrix_learning_rate=options.matrix_learning_rate,
        other_learning_rate=options.other_learning_rate,
        weight_decay=options.weight_decay,
    )
    streams = DocumentStreams(
        documents, options.batch_size, options.model.segment_length, seed=options.seed, shuffle=True, epochs=None
    )
    state = model.initial_state(options.batch_size, backend=options.backend, seed=options.seed)
    run = _Run(model, optimizers, state, streams, step=0, losses=deque(maxlen=AVERAGED_STEPS))
    recover_folder(options.output / FOLDER)
    if (options.output / FOLDER).is_dir():
        progress = load_training_state(options.output, model, optimizers, state, streams, options.to_dict())
        run.step = int(progress["step"])
        run.losses.extend(progress["losses"])
    return run


def _step(options: TrainingOptions, run: _Run, log: Log) -> None:
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
        with _autocast(options):
            loss, run.state = training_loss(run.model, run.state, segment)
    except NotFinite as error:  # a memory is asked before there is a loss to look at
        raise _diverged(options, run.step, str(error)) from error
    compression = take_compression_loss(run.model)
    (loss if compression is None else loss + options.model.compression_loss * compression).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), options.gradient_clip or math.inf)
    value = float(loss.detach())
    if not math.isfinite(value) or not bool(torch.isfinite(norm)):
        raise _diverged(options, run.step, f"the loss is {value}, the gradient's norm {float(norm)}")
    run.optimizers.step()
    run.step += 1
    run.losses.append(value)
    log.write(
        {
            "step": run.step,
            "loss": value,
            "gradient_norm": float(norm),
            "learning_rate_share": share,
            "step_ms": 1e3 * (time.perf_counter() - began),
        }
    )


def _diverged(options: TrainingOptions, step: int, what: str) -> TrainingDiverged:
    return TrainingDiverged(
        f"step {step}: {what}; lower the learning rates "
        f"({options.matrix_learning_rate}, {options.other_learning_rate}) or lengthen the warm-up"
    )


def _autocast(options: TrainingOptions) -> contextlib.AbstractContextManager[Any]:
    kind = torch.device(options.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=options.precision == "bfloat16")


def _validation_text(options: TrainingOptions, corpus: Corpus, tokenizer: Tokenizer) -> EvaluationText | None:
    """What validation reads; None where it is switched off or no validation document fills a segment."""
    if not options.validate_every or not corpus.document_names("validation"):
        return None
    documents = tokenize(corpus, "validation", tokenizer, options.cache_directory)
    length = options.model.segment_length
    rows = min(options.batch_size, max(1, options.validation_tokens // length))
    if max(len(array) for array in documents.arrays) < max(2, length):
        return None
    return choose_text(
        documents, rows=rows, segment_length=length, max_tokens=max(options.validation_tokens, rows * length)
    )


def _validate(options: TrainingOptions, model: MemorizingTransformer, text: EvaluationText) -> dict[str, float]:
    """Perplexities of the model as it is, with the memory that it trains with and without."""
    with _autocast(options):
        trunk = compute_trunk(model, text)
        with_memory, without = (
            replay(model, trunk, backend=options.backend, memory_size=size, seed=options.seed).perplexity
            for size in (options.model.memory_size if options.model.memory_layers else 0, 0)
        )
    return {"validation_perplexity": with_memory, "validation_perplexity_without_memory": without}


def _snapshot(options: TrainingOptions, run: _Run, tokenizer: Tokenizer) -> None:
    """Keeps the weights as they are now; an interrupted run that repeats the step writes the same again."""
    folder = options.output / SNAPSHOTS / str(run.step)
    metadata = {"step": run.step, "of": options.steps}
    save_checkpoint(folder, run.model, tokenizer, metadata=metadata, dtype=options.weights_dtype)


def _save(options: TrainingOptions, run: _Run) -> None:
    progress = {"step": run.step, "losses": list(run.losses), "options": options.to_dict()}
    save_training_state(options.output, run.model, run.optimizers, run.state, run.streams, progress)
