"""kNN-LM (Khandelwal et al. 2020): the model's prediction mixed with that of its nearest neighbours.

    options = KnnLanguageModelOptions(datastore="document", datastore_size=2048)
    result = evaluate_knn_lm(model, text, options, validation=validation_text)

For each token the contexts nearest to its own are looked up; the tokens that followed them, weighted by
softmax(-distance / temperature), are a second prediction, and p = (1 - interpolation) p_model + interpolation p_kNN.
The model is not trained for it. Interpolation and temperature are tuned on validation text where they are not given.

Letters: S segments, B batch rows, T tokens of a segment, N tokens in all, K neighbours, V vocabulary, W model width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.memory_backends import canonical_spec
from recollect.model.configuration import ConfigurationError
from recollect.model.datastore import (
    Datastore,
    DocumentDatastore,
    Neighbours,
    TextReading,
    TrainingDatastore,
    read_text,
    sample_text,
)
from recollect.model.evaluation import LossCollector
from recollect.model.evaluation_text import EvaluationText
from recollect.model.evaluation_types import EvaluationResult, MemorySpecification
from recollect.model.streams import IGNORED
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.transformer import MemorizingTransformer

DATASTORES = ("document", "training")
INTERPOLATIONS = tuple(step / 50 for step in range(50))
"""What tuning tries, 0 (the model alone) among it."""
TEMPERATURES = tuple(2.0 ** (step / 2) for step in range(-16, 5))
"""What tuning tries, as multiples of the median distance of a retrieved neighbour."""

OnSegment = Callable[[int, int], None]


@dataclass(frozen=True)
class KnnLanguageModelOptions:
    """What a kNN-LM looks up, and how much it believes it."""

    datastore: str = "document"
    """'document': the document so far, which is what a memory knows. 'training': training documents."""
    backend: str = "exact"
    """Registry string of the index, which searches by Euclidean distance."""
    k: int = 32
    """Neighbours of each token."""
    datastore_size: int = 8192
    """Pairs: the newest of each document, or so many of the training documents."""
    temperature: float | None = None
    """Divides squared distances; None is tuned on validation text."""
    interpolation: float | None = None
    """The neighbours' share of the prediction, from 0 up to but not including 1; None is tuned on validation text."""
    device: str = "cpu"
    """Where the index and the mixing are."""
    seed: int = 0
    """For the sample of training documents, and backends that draw random numbers."""

    def __post_init__(self) -> None:
        if self.datastore not in DATASTORES:
            raise ConfigurationError(f"datastore={self.datastore!r} is unknown; choose one of {', '.join(DATASTORES)}")
        canonical_spec(self.backend)  # a misspelt backend is told now
        for name in ("k", "datastore_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1")
        if self.k > self.datastore_size:
            raise ConfigurationError(
                f"k={self.k} is above datastore_size={self.datastore_size}: "
                "retrieve at most as many pairs as the datastore holds"
            )
        if self.temperature is not None and not self.temperature > 0.0:
            raise ConfigurationError(f"temperature={self.temperature} must be above 0")
        if self.interpolation is not None and not 0.0 <= self.interpolation < 1.0:
            raise ConfigurationError(f"interpolation={self.interpolation} must be 0 or more, and below 1")

    @property
    def is_tuned(self) -> bool:
        """Whether both numbers are known."""
        return self.temperature is not None and self.interpolation is not None


@dataclass(frozen=True)
class KnnEvaluationResult(EvaluationResult):
    """An `EvaluationResult` of a kNN-LM; its `memory` names the datastore's backend, size and k.

    Attributes:
        datastore: 'document' or 'training'.
        interpolation, temperature: as used.
        preparation_seconds: time for tuning and for a datastore of training text; `seconds` leaves it out.
        datastore_bytes: room that keys, index and tokens took at the end.
    """

    datastore: str = ""
    interpolation: float = 0.0
    temperature: float = 0.0
    preparation_seconds: float = 0.0
    datastore_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary without the per-token losses."""
        names = ("datastore", "interpolation", "temperature", "preparation_seconds", "datastore_bytes")
        return {**super().as_json(), **{name: getattr(self, name) for name in names}}


def evaluate_knn_lm(
    model: MemorizingTransformer,
    text: EvaluationText | TextReading,
    options: KnnLanguageModelOptions,
    *,
    validation: EvaluationText | TextReading | None = None,
    training: TokenizedDocuments | None = None,
    on_segment: OnSegment | None = None,
) -> KnnEvaluationResult:
    """Evaluates a kNN-LM over a text; losses are in the order that `replay` gives them in.

    Args:
        model: any; its own memory is off. A `TextReading` from `read_text` may be given for another choice.
        text: to evaluate on, or a reading of it.
        options: what is looked up.
        validation: text that temperature and interpolation are tuned on; needed unless both are given.
        training: documents of the datastore 'training', which must not be those of `text` or `validation`.
        on_segment: called with the number of segments done and how many there are.

    Raises:
        ConfigurationError: something that the options need was not given.
        MemoryBackendError: the backend is not to be had, or cannot search by Euclidean distance.
        CorpusError: there is too little training text.
    """
    asked = time.perf_counter()
    tuning_text = validation if not options.is_tuned else None
    if not options.is_tuned and validation is None:
        raise ConfigurationError("temperature and interpolation are tuned on validation text: give it, or both numbers")
    make = datastore_maker(model, options, training)
    if tuning_text is not None:
        options = tune_knn_lm(model, tuning_text, options, make)
    assert options.interpolation is not None
    assert options.temperature is not None
    began = time.perf_counter()
    reading = as_reading(model, text)
    datastore = make(reading.text.rows)
    collector = LossCollector(reading.text)
    for number, logits, _, neighbours in walk(model, reading, datastore, on_segment):
        mixed = mix(logits, neighbours, interpolation=options.interpolation, temperature=options.temperature)
        collector.add(number, mixed)
    memory = MemorySpecification(canonical_spec(options.backend), options.datastore_size, options.k)
    plain = EvaluationResult.from_losses(collector.result(), memory, time.perf_counter() - began)
    return KnnEvaluationResult(
        **{item.name: getattr(plain, item.name) for item in dataclasses.fields(EvaluationResult)},
        datastore=options.datastore,
        interpolation=options.interpolation,
        temperature=options.temperature,
        preparation_seconds=began - asked,
        datastore_bytes=datastore.bytes,
    )


def as_reading(model: MemorizingTransformer, text: EvaluationText | TextReading) -> TextReading:
    """The reading itself, or that of a text with the model's own memory off."""
    return text if isinstance(text, TextReading) else read_text(model, text)


def datastore_maker(
    model: MemorizingTransformer, options: KnnLanguageModelOptions, training: TokenizedDocuments | None
) -> Callable[[int], Datastore]:
    """A function that makes the datastore for a number of rows; training text is read once, for all of them."""
    if options.datastore == "document":
        return lambda rows: DocumentDatastore(
            options.backend,
            rows=rows,
            width=model.config.width,
            capacity=options.datastore_size,
            k=options.k,
            seed=options.seed,
            device=options.device,
        )
    if training is None:
        raise ConfigurationError("datastore='training' needs training documents: give `training`")
    text = sample_text(
        training,
        tokens=options.datastore_size,
        rows=8,
        segment_length=model.config.segment_length,
        seed=options.seed,
    )
    static = TrainingDatastore(
        read_text(model, text), options.backend, k=options.k, seed=options.seed, device=options.device
    )
    return lambda rows: static


def walk(
    model: MemorizingTransformer, reading: TextReading, datastore: Datastore, on_segment: OnSegment | None = None
) -> Iterator[tuple[int, Tensor, Tensor, Neighbours]]:
    """For each segment its number, logits (B, T, V), hidden (B, T, W) and neighbours (B, T, K), causally.

    They lie where the datastore does.
    """
    embedding = model.embedding.weight.detach().float().to(datastore.device)
    text = reading.text
    for number in range(text.segments):
        datastore.begin(text.document_starts[number])
        contexts = reading.contexts[number].to(datastore.device)
        neighbours = datastore.search(contexts)
        datastore.append(contexts, text.targets[number].to(datastore.device))
        hidden = reading.hidden[number].to(datastore.device)
        yield number, functional.linear(hidden, embedding), hidden, neighbours
        if on_segment is not None:
            on_segment(number + 1, text.segments)


def neighbour_weights(neighbours: Neighbours, temperature: float | Tensor) -> Tensor:
    """(..., K): softmax(-distance / temperature) over the found neighbours, all zero where none was found."""
    found = neighbours.found
    near = torch.where(found, neighbours.distances, 0.0)  # no infinity, of which a gradient would be NaN
    scaled = (-near / temperature).masked_fill(~found, torch.finfo(torch.float32).min)
    return torch.softmax(scaled, dim=-1).masked_fill(~found, 0.0)


def mix(logits: Tensor, neighbours: Neighbours, *, interpolation: float, temperature: float) -> Tensor:
    """Logarithms of the mixed prediction (..., V); where nothing was found, the model's own."""
    share = interpolation * neighbours.found.any(dim=-1, keepdim=True)
    mixed = torch.softmax(logits.float(), dim=-1) * (1.0 - share)
    mixed = mixed.scatter_add(-1, neighbours.tokens, share * neighbour_weights(neighbours, temperature))
    return mixed.clamp_min(torch.finfo(torch.float32).tiny).log()


def tune_knn_lm(
    model: MemorizingTransformer,
    validation: EvaluationText | TextReading,
    options: KnnLanguageModelOptions,
    make: Callable[[int], Datastore],
) -> KnnLanguageModelOptions:
    """The options with the temperature and interpolation of the lowest loss on validation text.

    What the options give already stays. The interpolation 0 is tried too: neighbours that do not help are left out.
    """
    reading = as_reading(model, validation)
    of_model, distances, matches = [], [], []
    for number, logits, _, neighbours in walk(model, reading, make(reading.text.rows)):
        targets = reading.text.targets[number].to(logits.device)
        wanted = targets != IGNORED
        goal = targets[wanted][:, None]
        of_model.append(torch.softmax(logits[wanted].float(), dim=-1).gather(1, goal)[:, 0])
        distances.append(neighbours.distances[wanted])
        matches.append(neighbours.tokens[wanted] == goal)
    probability, distance, match = (torch.cat(part).cpu() for part in (of_model, distances, matches))
    found = torch.isfinite(distance)
    typical = float(distance[found].median()) if bool(found.any()) else 1.0
    if options.temperature is None:
        temperatures = [max(factor * typical, 1e-6) for factor in TEMPERATURES]
    else:
        temperatures = [options.temperature]
    tried = INTERPOLATIONS if options.interpolation is None else (options.interpolation,)
    shares = torch.tensor(tried)[:, None] * found.any(dim=1)
    best = (float("inf"), 0.0, 1.0)
    for temperature in temperatures:
        weights = neighbour_weights(Neighbours(distance, torch.zeros_like(match, dtype=torch.int64)), temperature)
        of_neighbours = (weights * match).sum(dim=1)
        mixed = (1.0 - shares) * probability + shares * of_neighbours  # (interpolations, N)
        losses = -mixed.clamp_min(torch.finfo(torch.float32).tiny).log().double().mean(dim=1)
        place = int(losses.argmin())
        best = min(best, (float(losses[place]), tried[place], temperature))
    return dataclasses.replace(options, interpolation=best[1], temperature=best[2])
