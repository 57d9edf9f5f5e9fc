"""What a training run needs before its first step: its options settled, text, tokenizer, and the parts that move."""

from __future__ import annotations

import dataclasses
import shutil
from collections import deque
from dataclasses import dataclass

import tokenizers
import torch
from torch import nn

from recollect.memory_backends.atomic import recover_folder
from recollect.model.checkpoints import CONFIG, Checkpoint, CheckpointError, load_checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.corpus import Corpus, load_corpus
from recollect.model.distributed import Ranks
from recollect.model.evaluation_text import EvaluationText, choose_text
from recollect.model.optimizers import Optimizers, make_optimizers
from recollect.model.parallel import shard, shared_loss
from recollect.model.shared_optimizers import share_optimizers
from recollect.model.streams import DocumentStreams
from recollect.model.token_cache import TokenizedDocuments, tokenize
from recollect.model.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from recollect.model.training_options import TrainingOptions
from recollect.model.training_state import FOLDER, load_training_state
from recollect.model.transformer import MemorizingTransformer, ModelState

AVERAGED_STEPS = 100


@dataclass
class Run:
    """The parts of a run that move.

    Attributes:
        state: of this rank's rows.
        streams: of the rows of all ranks, which every rank deals alike.
        shared: the model's loss as several ranks compute it; None where there is one.
        asked: whether any rank was asked to stop.
    """

    model: MemorizingTransformer
    optimizers: Optimizers
    state: ModelState
    streams: DocumentStreams
    step: int
    losses: deque[float]
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    shared: nn.Module | None = None
    asked: bool = False


@dataclass(frozen=True)
class Text:
    """What a run reads."""

    corpus: Corpus
    tokenizer: Tokenizer
    documents: TokenizedDocuments
    validation: EvaluationText | None


def check_output(options: TrainingOptions, ranks: Ranks) -> None:
    """Refuses an output that holds a finished model, and one that not every rank can see.

    Raises:
        CheckpointError, ConfigurationError: these.
    """
    if (options.output / CONFIG).is_file():
        raise CheckpointError(
            f"{options.output} holds a finished model already: give another output folder, or remove it"
        )
    if ranks.first:
        if not options.resume:
            shutil.rmtree(options.output / FOLDER, ignore_errors=True)
        recover_folder(options.output / FOLDER)
    if not ranks.several:
        return
    ranks.rows(options.batch_size)
    ranks.agree({**options.to_dict(), "output": str(options.output.absolute()), "parallel": options.parallel})
    ranks.from_first(lambda: options.output.mkdir(parents=True, exist_ok=True))
    blind = [rank for rank, sees in enumerate(ranks.all(options.output.is_dir())) if not sees]
    if blind:
        raise ConfigurationError(
            f"output={options.output} is not seen by rank {blind[0]} of {ranks.count}: give a folder on a disk that "
            "every machine shares"
        )


def settle(options: TrainingOptions) -> tuple[TrainingOptions, Checkpoint | None]:
    """The options with the model that is really trained, and the checkpoint to start from."""
    initial = None if options.checkpoint is None else load_checkpoint(options.checkpoint)
    model = options.model if initial is None else initial.config
    if options.memory_size is not None:
        model = model.replace(memory_size=options.memory_size)
    return dataclasses.replace(options, model=model), initial


def read_text(options: TrainingOptions, initial: Checkpoint | None, ranks: Ranks) -> Text:
    """The text of a run, the same on every rank.

    Raises:
        CorpusError, ConfigurationError: it cannot be used, or differs from rank to rank.
    """
    corpus = _corpus(options)
    ranks.agree({"corpus": corpus.digest})
    if initial is not None:
        tokenizer = initial.tokenizer
    elif not ranks.several:
        tokenizer = _tokenizer(options, corpus)
    else:  # one rank trains it, on all of the machine's cores
        content = ranks.from_first(lambda: _tokenizer(options, corpus).to_json())
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(content))
    documents = tokenize(corpus, "train", tokenizer, options.cache_directory)
    ranks.agree({"training text": documents.digest})  # and waits for whichever rank makes the tokens of it
    return Text(corpus, tokenizer, documents, _validation_text(options, corpus, tokenizer))


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


def start(options: TrainingOptions, documents: TokenizedDocuments, initial: Checkpoint | None, ranks: Ranks) -> Run:
    """A new run, or the interrupted one that `options.output` holds."""
    torch.manual_seed(options.seed)
    model = MemorizingTransformer(options.model)
    if initial is not None:
        model.load_state_dict(initial.model.state_dict())
    model = model.to(ranks.device).train()
    if ranks.several and options.parallel == "fsdp":
        shard(model, ranks)
    optimizers = make_optimizers(
        model,
        options.optimizer,
        matrix_learning_rate=options.matrix_learning_rate,
        other_learning_rate=options.other_learning_rate,
        weight_decay=options.weight_decay,
    )
    shared = None
    if ranks.several:
        optimizers = share_optimizers(optimizers, ranks, options.parallel)
        shared = shared_loss(model, ranks, options.parallel, memory=bool(options.model.memory_size))
    streams = DocumentStreams(
        documents, options.batch_size, options.model.segment_length, seed=options.seed, shuffle=True, epochs=None
    )
    first_row, stop = ranks.rows(options.batch_size)
    state = model.initial_state(stop - first_row, backend=options.backend, seed=options.seed)
    for memory in state.memories:
        memory.backend.number_from(first_row * memory.per_row)
    run = Run(model, optimizers, state, streams, 0, deque(maxlen=AVERAGED_STEPS), ranks, shared)
    if (options.output / FOLDER).is_dir():
        progress = load_training_state(options.output, model, optimizers, state, streams, options.to_dict(), ranks)
        run.step = int(progress["step"])
        run.losses.extend(progress["losses"])
    ranks.wait()  # the first step's deadline is no time to read a large state in
    return run
