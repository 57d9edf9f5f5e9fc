"""From the values of a variant to the model, the training and the evaluation that they mean, all checked.

Nothing here trains or reads a corpus: a value that cannot be used is told before the first step of the first training.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.memory_backends import canonical_spec, describe_backend
from recollect.memory_backends.errors import MemoryBackendError
from recollect.memory_backends.spec import parse_spec
from recollect.model.configuration import PRESETS, ConfigurationError, ModelConfig
from recollect.model.training_options import PRECISIONS, TrainingOptions

from .options import AblateError

NO_MEMORY = "none"
ONLY_WITH_MEMORY = (
    "memory_size",
    "k",
    "gate",
    "gate_share",
    "memory_key",
    "eviction",
    "eviction_kept_share",
    "separate_memory_scale",
    "memory_position_bias",
)
"""Values of a configuration that mean nothing without a memory."""

AT_EVALUATION = ("segment_length", "xl_cache", "attention_window", "eviction", "eviction_kept_share")
"""Values of the model that an evaluation may change: no weight depends on them."""

DOCUMENTS = ("longest", "sampled")
_NOT_IN_GRIDS = ("output", "model", "memory_size", "checkpoint", "corpus", "tokenizer", "seed", "threads")
_ELSEWHERE = (*_NOT_IN_GRIDS, "cache_directory", "progress", "resume")
_TRAINING_KEYS = tuple(field.name for field in dataclasses.fields(TrainingOptions) if field.name not in _ELSEWHERE)
_NOT_DECIDING = ("corpus", "validate_every", "validation_tokens", "weights_dtype")
"""Values of `TrainingOptions.to_dict` that the weights do not depend on, or that a digest of the content replaces."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is evaluated.

    Attributes:
        backend: registry string of the memory's backend; None is the one it was trained with.
        memory_size: keys of each memory, 0 for none; None is the model's own.
        k: neighbours of each query; None is the model's own.
        rows: documents read side by side.
        max_tokens: tokens that are scored, over all rows.
        fill_tokens: tokens of each document that are only written into the memory before scoring begins, so that a
            large memory is full; 0 scores from the first token on.
        documents: 'longest', where a memory has most to remember, or 'sampled', as long as they happen to be.
        split: which documents: 'test' or 'validation'.
        precision: 'float32' or 'bfloat16' for autocast.
        model: other values of the model's configuration, of `AT_EVALUATION`.
    """

    backend: str | None = None
    memory_size: int | None = None
    k: int | None = None
    rows: int = 8
    max_tokens: int = 65_536
    fill_tokens: int = 0
    documents: str = "longest"
    split: str = "test"
    precision: str = "float32"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def text_key(self) -> str:
        """Everything that decides which tokens are read, but for the segment's length."""
        return f"{self.split} {self.documents} {self.rows} {self.max_tokens} {self.fill_tokens}"


def model_config(table: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration of a `[model]` table; where there is no memory, what would belong to one is left at default.

    So every variant without memory is one and the same model, trained once.
    """
    values = dict(table)
    preset = values.pop("preset", "laptop")
    if preset not in PRESETS:
        raise AblateError(f"{where}: model.preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    known = PRESETS[preset].to_dict()
    _refuse(values, (*known, "preset"), f"{where}: model")
    try:
        return without_idle_memory(ModelConfig.from_dict({**known, **values}))
    except ConfigurationError as error:
        raise AblateError(f"{where}: model: {error}") from error


def without_idle_memory(config: ModelConfig) -> ModelConfig:
    """The same model, with every value of a memory that it does not have at its default."""
    if config.memory_layers and config.memory_size:
        return config
    plain = ModelConfig()
    return config.replace(memory_layers=(), **{name: getattr(plain, name) for name in ONLY_WITH_MEMORY})


def training_options(
    table: Mapping[str, Any], config: ModelConfig, where: str, *, seed: int, threads: int, device: str | None
) -> TrainingOptions:
    """The options of a `[training]` table; output, corpus and tokenizer are set when the job is planned."""
    _refuse(table, _TRAINING_KEYS, f"{where}: training")
    values = dict(table)
    if device is not None:
        values["device"] = device
    try:
        options = TrainingOptions(
            output=Path("unset"), model=config, seed=seed, threads=threads, progress=False, **values
        )
    except (ConfigurationError, TypeError, ValueError) as error:
        raise AblateError(f"{where}: training: {error}") from error
    for name, value in values.items():
        wanted = type(getattr(_DEFAULTS, name))
        if wanted in (int, float, bool, str) and not _is(value, wanted):
            raise AblateError(f"{where}: training.{name} is {value!r}; want {wanted.__name__}")
    return dataclasses.replace(options, backend=_spec(options.backend, f"{where}: training.backend"))


_DEFAULTS = TrainingOptions(output=Path("unset"))


def training_identity(options: TrainingOptions) -> dict[str, Any]:
    """What decides the weights, defaults left out, so that a value added by a later release changes no identity."""
    values = options.to_dict()
    model = values.pop("model")
    defaults = _DEFAULTS.to_dict()
    plain = defaults.pop("model")
    if not options.model.memory_layers:
        values.pop("backend")
    kept = {
        name: value
        for name, value in values.items()
        if name not in _NOT_DECIDING and (name == "seed" or value != defaults[name])
    }
    return {"training": kept, "model": {name: value for name, value in model.items() if value != plain[name]}}


def evaluation_settings(
    table: Mapping[str, Any], config: ModelConfig, training: TrainingOptions, where: str
) -> tuple[EvaluationSettings, ModelConfig]:
    """The settings of an `[evaluation]` table with nothing left open, and the configuration that is evaluated."""
    known = tuple(field.name for field in dataclasses.fields(EvaluationSettings))
    _refuse(table, known, f"{where}: evaluation")
    settings = EvaluationSettings(**{**table, "model": dict(table.get("model", {}))})
    for name, smallest in (("rows", 1), ("max_tokens", 1), ("fill_tokens", 0), ("memory_size", 0), ("k", 1)):
        value = getattr(settings, name)
        if value is not None and (not _is(value, int) or value < smallest):
            raise AblateError(f"{where}: evaluation.{name} is {value!r}; want a whole number of at least {smallest}")
    if settings.documents not in DOCUMENTS:
        raise AblateError(f"{where}: evaluation.documents is {settings.documents!r}; choose of {', '.join(DOCUMENTS)}")
    if settings.split not in ("test", "validation"):
        raise AblateError(f"{where}: evaluation.split is {settings.split!r}; choose test or validation")
    if settings.precision not in PRECISIONS:
        raise AblateError(f"{where}: evaluation.precision is {settings.precision!r}; choose of {', '.join(PRECISIONS)}")
    _refuse(settings.model, AT_EVALUATION, f"{where}: evaluation.model")
    size = (config.memory_size if config.memory_layers else 0) if settings.memory_size is None else settings.memory_size
    if size and not config.memory_layers:
        raise AblateError(f"{where}: evaluation.memory_size is {size}, but the model has no memory layer")
    k = config.k if settings.k is None else settings.k
    changes = {**settings.model, **({"memory_size": size, "k": k} if size else {})}
    try:
        evaluated = ModelConfig.from_dict({**config.to_dict(), **changes})
    except ConfigurationError as error:
        raise AblateError(f"{where}: evaluation: {error}") from error
    if settings.fill_tokens and size and len(config.memory_layers) != 1:
        raise AblateError(
            f"{where}: evaluation.fill_tokens needs a model with one memory layer, as the keys of a second depend on "
            f"what the first retrieved; this one has the layers {config.memory_layers}"
        )
    if settings.fill_tokens and size and evaluated.eviction != "fifo":
        raise AblateError(
            f"{where}: evaluation.fill_tokens fills a memory unsearched, so eviction {evaluated.eviction!r} would "
            "have no use to judge by; score from the first token on (fill_tokens = 0)"
        )
    backend = training.backend if settings.backend is None else settings.backend
    if backend == NO_MEMORY:
        size = 0
    spec = _spec(backend, f"{where}: evaluation.backend") if size else NO_MEMORY
    settings = dataclasses.replace(settings, backend=spec, memory_size=size, k=k if size else 0)
    return settings, evaluated


def missing_library(*specs: str | None) -> str:
    """Why one of the specs cannot be used here; empty where all can."""
    for spec in specs:
        if spec not in (None, NO_MEMORY):
            info = describe_backend(parse_spec(str(spec))[0])
            if not info.available:
                return info.reason
    return ""


def _spec(spec: Any, where: str) -> str:
    if not isinstance(spec, str):
        raise AblateError(f"{where} is {spec!r}; want a registry string such as 'exact'")
    try:
        return canonical_spec(spec)
    except MemoryBackendError as error:
        raise AblateError(f"{where}: {error}") from error


def _is(value: Any, wanted: type) -> bool:
    if wanted is bool:
        return isinstance(value, bool)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted) and not isinstance(value, bool)


def _refuse(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise AblateError(f"{where}.{name} is unknown{hint}; known are {', '.join(known)}")
