"""The ways to evaluate a checkpoint: the model itself, and systems that retrieve around or in a model as it is."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recollect.memory_backends.errors import MemoryBackendError
from recollect.model.configuration import ConfigurationError, ModelConfig

from .options import AblateError
from .settings import EvaluationSettings

if TYPE_CHECKING:
    from recollect.model.checkpoints import Checkpoint
    from recollect.model.evaluation_text import EvaluationText
    from recollect.model.knn_lm import KnnEvaluationResult
    from recollect.model.spalm import SpalmEvaluationResult
    from recollect.model.token_cache import TokenizedDocuments

    from .evaluating import Evaluated, Trunks
    from .grid import Variant

VALIDATION_TOKENS = 16_384
"""Tokens of validation documents that kNN-LM and SPALM are tuned on."""

_SYSTEM_FIGURES = ("interpolation", "temperature", "datastore_bytes", "mean_gate", "training_loss", "training_seconds")


@dataclass(frozen=True)
class Request:
    """What a system is given.

    Attributes:
        checkpoint: the trained model and its tokenizer.
        config: the model as it is to be evaluated.
        text: what is read.
        settings: of the evaluation.
        options: of the system.
        seed: for what draws random numbers.
        trunks: shared by the evaluations of this checkpoint.
        documents: the section's tokens of a split.
        splits: the splits that have documents.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    text: EvaluationText
    settings: EvaluationSettings
    options: dict[str, Any]
    seed: int
    trunks: Trunks
    documents: Callable[[str], TokenizedDocuments]
    splits: tuple[str, ...]


def check_system(variant: Variant, trained: ModelConfig, settings: EvaluationSettings, where: str) -> None:
    """Checks a variant's system and its options before anything is trained.

    Raises:
        AblateError: an option is unknown or impossible, or the system cannot use these settings.
    """
    if variant.system == "model":
        if variant.options:
            raise AblateError(f"{where}: options belong to a system, and this variant names none")
        return
    if variant.system == "training-free":
        return  # checked when the configuration was made
    if settings.fill_tokens:
        raise AblateError(f"{where}: {variant.system} scores a text from its start: evaluation.fill_tokens must be 0")
    if settings.memory_size:
        raise AblateError(
            f"{where}: {variant.system} is evaluated with the model's own memory off: give it from = a variant without "
            "memory, or evaluation.memory_size = 0"
        )
    _retrieval_options(variant.system, variant.options, where, seed=0, device="cpu")


def training_free_config(trained: ModelConfig, options: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration of a model that is given memory without training, for the options of 'training-free'."""
    from recollect.model.training_free import TRAINING_FREE_GATES

    _refuse(options, ("memory_layers", "gate", "gate_share"), where)
    gate = options.get("gate", "joint")
    if gate not in TRAINING_FREE_GATES:
        raise AblateError(f"{where}: options.gate is {gate!r}; choose of {', '.join(TRAINING_FREE_GATES)}")
    layers = options.get("memory_layers")
    if not isinstance(layers, list) or not layers:
        raise AblateError(f"{where}: options.memory_layers is {layers!r}; want a list of layers")
    changes = {
        "memory_layers": tuple(layers),
        "gate": gate,
        "gate_share": options.get("gate_share", trained.gate_share),
        "separate_memory_scale": False,
        "memory_position_bias": True,
    }
    try:
        return trained.replace(**changes)
    except (ConfigurationError, TypeError, ValueError) as error:
        raise AblateError(f"{where}: options: {error}") from error


def evaluate_system(system: str, request: Request) -> tuple[Evaluated, dict[str, Any]]:
    """Losses and costs of a system on the request's text, and figures of its own."""
    from .evaluating import evaluate_model, with_config

    model = request.checkpoint.model
    if system in ("knn-lm", "spalm"):
        return _evaluate_retrieval(system, request)
    if system == "training-free":
        from recollect.model.training_free import with_memory

        config = request.config
        model = with_memory(
            model,
            config.memory_layers,
            config.gate,
            gate_share=config.gate_share,
            memory_size=config.memory_size,
            k=config.k,
        )
    model = with_config(model, request.config)
    return evaluate_model(model, request.text, request.settings, request.trunks, seed=request.seed), {}


def _evaluate_retrieval(system: str, request: Request) -> tuple[Evaluated, dict[str, Any]]:
    """kNN-LM and SPALM: the model's own memory is off, and neighbours are looked up at its output."""
    from recollect.model.evaluation_text import choose_text
    from recollect.model.knn_lm import KnnLanguageModelOptions, evaluate_knn_lm
    from recollect.model.spalm import SpalmOptions, evaluate_spalm

    from .evaluating import Evaluated, cache_bytes, sorted_losses, with_config

    model = with_config(request.checkpoint.model, request.config)
    options = _retrieval_options(
        system, request.options, system, seed=request.seed, device=str(request.checkpoint.model.device)
    )
    validation = None
    if "validation" in request.splits:
        validation = choose_text(
            request.documents("validation"),
            rows=request.settings.rows,
            segment_length=request.config.segment_length,
            max_tokens=VALIDATION_TOKENS,
        )
    result: KnnEvaluationResult | SpalmEvaluationResult
    if isinstance(options, KnnLanguageModelOptions):
        training = request.documents("train") if options.datastore == "training" else None
        result = evaluate_knn_lm(model, request.text, options, validation=validation, training=training)
    else:
        assert isinstance(options, SpalmOptions)
        result = evaluate_spalm(model, request.text, options, training=request.documents("train"))
    figures = {name: value for name, value in result.as_json().items() if name in _SYSTEM_FIGURES}
    evaluated = Evaluated(
        result=dataclasses.replace(result, losses=sorted_losses(result.losses)),
        seconds=result.seconds,
        scored_tokens=int(request.text.lengths.sum()),
        memory_bytes=result.datastore_bytes // (request.text.rows if options.datastore == "document" else 1),
        cache_bytes=cache_bytes(model.initial_upper_state(1, memory_size=0), model, 1),
    )
    return evaluated, figures


def _retrieval_options(system: str, options: Mapping[str, Any], where: str, *, seed: int, device: str) -> Any:
    from recollect.model.knn_lm import KnnLanguageModelOptions
    from recollect.model.spalm import SpalmOptions

    kind: type[Any] = KnnLanguageModelOptions if system == "knn-lm" else SpalmOptions
    known = tuple(field.name for field in dataclasses.fields(kind) if field.name not in ("seed", "device"))
    _refuse(options, known, where)
    try:
        return kind(**options, seed=seed, device=device)
    except (ConfigurationError, MemoryBackendError, TypeError) as error:
        raise AblateError(f"{where}: options: {error}") from error


def _refuse(options: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise AblateError(f"{where}: options.{name} is unknown{hint}; known are {', '.join(known)}")
