"""The ways to evaluate a checkpoint: the model itself, and systems that retrieve around or in a model as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recollect.model.configuration import ModelConfig

from .options import AblateError
from .settings import EvaluationSettings

if TYPE_CHECKING:
    from recollect.model.checkpoints import Checkpoint
    from recollect.model.evaluation_text import EvaluationText
    from recollect.model.token_cache import TokenizedDocuments

    from .evaluating import Evaluated, Trunks
    from .grid import Variant


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
        AblateError: an option is unknown, or the system cannot use this model.
    """
    if variant.system == "model":
        if variant.options:
            raise AblateError(f"{where}: options belong to a system, and this variant names none")
        return
    raise AblateError(f"{where}: system {variant.system!r} is not here")


def evaluate_system(system: str, request: Request) -> tuple[Evaluated, dict[str, Any]]:
    """Losses and costs of a system on the request's text, and figures of its own."""
    from .evaluating import evaluate_model, with_config

    model = with_config(request.checkpoint.model, request.config)
    return evaluate_model(model, request.text, request.settings, request.trunks, seed=request.seed), {}
