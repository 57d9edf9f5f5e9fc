"""What a training run takes and what it gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recollect.model.checkpoints import DTYPES
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.distributed import DEADLINE_SECONDS, PARALLEL
from recollect.model.optimizers import OPTIMIZERS

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides a training run. `TrainingOptions.preset` makes the runs that have a name.

    Two runs with equal options on one machine give equal weights, interrupted or not.
    """

    output: Path
    """Folder of the checkpoint; the log `training_log.jsonl` and, until the run is complete, `training/` lie in it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes and choices of the model; with `checkpoint` they are the checkpoint's instead."""
    memory_size: int | None = None
    """Keys that each memory holds while training, 0 for no memory; None is the model's own size."""
    checkpoint: Path | None = None
    """Start from this checkpoint's weights, with its sizes and tokenizer; None starts from random weights."""
    corpus: str = "stdlib"
    """'stdlib' (the source of Python's standard library), or a text file, folder, JSON lines or dataset."""
    tokenizer: Path | None = None
    """A tokenizer.json or AutoTokenizer folder; None trains one on the training documents."""
    steps: int = 3000
    """Segments that each row reads; the run sees steps * batch_size * model.segment_length tokens."""
    batch_size: int = 8
    """Rows, each with documents of its own."""
    seed: int = 0
    """Decides the initial weights, the order of documents, and the backend's random numbers."""
    optimizer: str = "muon"
    """'muon' (AdamW for all but matrices) or 'adamw'."""
    matrix_learning_rate: float = 3e-3
    """Peak rate of attention and feed-forward matrices."""
    other_learning_rate: float = 1e-2
    """Peak rate of embedding, norms, scales, gates and convolutions."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_share: float = 0.7
    """Share of the run, at its end, over which the rates fall linearly to 0."""
    gradient_clip: float = 1.0
    """Largest norm of the whole gradient; 0 is no clipping."""
    precision: str = "float32"
    """'float32', or 'bfloat16' for autocast: faster where the processor multiplies bf16 matrices, slower elsewhere."""
    backend: str = "exact"
    """Registry string of the memory's backend."""
    device: str = "cpu"
    """Where model and memory live."""
    parallel: str = "ddp"
    """With several processes: 'ddp', the whole model in each, or 'fsdp', a share of its weights in each."""
    deadline: float = DEADLINE_SECONDS
    """With several processes: seconds that each waits for the others in a step before it gives them up."""
    threads: int | None = None
    """Threads of torch; None leaves them as they are, and gives each of several processes its share of the cores.
    Weights are equal between runs only with equal threads."""
    validate_every: int = 250
    """Steps between validations, with and without memory; 0 is none."""
    validation_tokens: int = 40_000
    """Tokens of the validation documents that each validation reads."""
    save_every: int = 250
    """Steps between saves of the training state, from which an interrupted run goes on; 0 is none."""
    resume: bool = True
    """Go on where an interrupted run in `output` stopped; otherwise start anew."""
    weights_dtype: str = "float32"
    """How the finished weights are stored: 'float32' or 'bfloat16' (half the size)."""
    cache_directory: Path | None = None
    """Where token streams are cached; None is the user's cache folder."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the weights are kept, stored like the finished ones, in `output`/snapshots/<step>."""
    progress: bool = True
    """Show a progress bar on standard error."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        for name in ("tokenizer", "cache_directory", "checkpoint"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name, smallest in (
            ("steps", 1),
            ("batch_size", 1),
            ("warmup_steps", 0),
            ("validate_every", 0),
            ("validation_tokens", 1),
            ("save_every", 0),
        ):
            if getattr(self, name) < smallest:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least {smallest}")
        object.__setattr__(self, "snapshots", tuple(int(step) for step in self.snapshots))
        for step in self.snapshots:
            if not 1 <= step < self.steps:
                raise ConfigurationError(
                    f"snapshots={self.snapshots}: step {step} is not between 1 and {self.steps - 1}"
                )
        if self.checkpoint is not None and self.tokenizer is not None:
            raise ConfigurationError(f"tokenizer={self.tokenizer} cannot be given: the checkpoint brings its own")
        if self.memory_size is not None and self.memory_size < 0:
            raise ConfigurationError(f"memory_size={self.memory_size} must be 0 (no memory) or more")
        if self.threads is not None and self.threads < 1:
            raise ConfigurationError(f"threads={self.threads} must be at least 1")
        for name in ("matrix_learning_rate", "other_learning_rate"):
            if not getattr(self, name) > 0.0:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be above 0")
        if not self.deadline > 0.0:
            raise ConfigurationError(f"deadline={self.deadline} seconds must be above 0")
        for name in ("weight_decay", "gradient_clip"):
            if not getattr(self, name) >= 0.0:
                raise ConfigurationError(f"{name}={getattr(self, name)} must not be negative")
        if not 0.0 < self.decay_share <= 1.0:
            raise ConfigurationError(f"decay_share={self.decay_share} must be above 0 and at most 1")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
            ("weights_dtype", tuple(DTYPES)),
            ("parallel", PARALLEL),
        ):
            if getattr(self, name) not in known:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")

    @property
    def tokens(self) -> int:
        """Tokens that the run reads, padding included."""
        return self.steps * self.batch_size * self.model.segment_length

    def to_dict(self) -> dict[str, Any]:
        """What decides the weights, as plain JSON values: paths, progress and saving are left out."""
        left_out = {"output", "model", "tokenizer", "checkpoint", "cache_directory", "progress", "resume"}
        left_out |= {"save_every", "snapshots", "parallel", "deadline"}
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in left_out}
        return {**values, "model": self.model.to_dict()}

    @classmethod
    def preset(cls, name: str, output: str | Path, **changes: Any) -> TrainingOptions:
        """A named run from `TRAINING_PRESETS` that writes to `output`, with `changes` applied.

        Raises ConfigurationError for an unknown preset or an unknown or impossible value.
        """
        if name not in TRAINING_PRESETS:
            raise ConfigurationError(f"preset {name!r} is unknown; choose one of {', '.join(TRAINING_PRESETS)}")
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ConfigurationError(
                f"unknown training options: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**{"output": Path(output), **TRAINING_PRESETS[name], **changes})


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run gives.

    Attributes:
        output: folder of the checkpoint.
        steps, tokens: what was read in all.
        seconds: wall time of this call (a resumed run counts from its resumption).
        loss: mean training loss over the last 100 steps, natural logarithm.
        validation_perplexity: of the finished model with its training memory; None without validation.
        validation_perplexity_without_memory: the same model and text with the memory off.
    """

    output: Path
    steps: int
    tokens: int
    seconds: float
    loss: float
    validation_perplexity: float | None
    validation_perplexity_without_memory: float | None

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


_REFERENCE: dict[str, Any] = {
    "model": ModelConfig.preset("laptop", memory_size=8192),
    "steps": 5000,
    "validate_every": 500,
    "save_every": 500,
    "precision": "bfloat16",
    "weights_dtype": "bfloat16",
    "threads": 1,
}

TRAINING_PRESETS: dict[str, dict[str, Any]] = {
    "laptop": {"model": ModelConfig.preset("laptop")},
    # The model that ships with the package, and its twin: the same tokens in the same order, never a memory.
    "reference": _REFERENCE,
    "reference-twin": {**_REFERENCE, "model": ModelConfig.preset("laptop", memory_size=0)},
    "tiny": {
        "model": ModelConfig.preset("tiny", vocabulary_size=512),
        "steps": 200,
        "batch_size": 4,
        "warmup_steps": 10,
        "validate_every": 100,
        "validation_tokens": 4000,
    },
    "paper": {
        "model": ModelConfig.preset("paper"),
        "batch_size": 32,
        "steps": 500_000,
        "warmup_steps": 1000,
        "optimizer": "adamw",
        "matrix_learning_rate": 3e-4,
        "other_learning_rate": 3e-4,
    },
}
