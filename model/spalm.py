"""A gate that learns when to believe retrieved tokens: SPALM (Yogatama et al. 2021), and its gate for a kNN-LM.

    result = evaluate_spalm(model, text, SpalmOptions(datastore="document"), training=documents)

In SPALM the tokens that followed the nearest contexts become one vector, m = sum of softmax(h . e_k) e_k over their
embeddings e_k, and the prediction is softmax(E z) of z = g h + (1 - g) m, where h is the model's last hidden state and
the gate g = sigmoid(w . h + b) depends on the token. The paper trains the language model along with its gate. Here the
model stays as it is, so that one checkpoint serves every system of a comparison, and there are two forms:

* `embeddings`: the paper's, with two additions that make up for the frozen model: a matrix A that carries m to where
  hidden states are, and a learned weight of the neighbours' distances in the softmax, which starts at zero.
* `predictions`: the gate weighs the two predictions of a kNN-LM, p = g p_model + (1 - g) p_kNN, in place of its one
  constant; the temperature is learned with it. A frozen model needs nothing else, which is why this is the default.

The gate is learned on training documents, and never meets its own text in the datastore (`SpalmOptions.datastore`).

Letters: B batch rows, T tokens of a segment, N tokens in all, K neighbours, V vocabulary, W model width.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from recollect.memory_backends import canonical_spec
from recollect.model.configuration import ConfigurationError
from recollect.model.datastore import Datastore, Neighbours, TextReading, read_text, split_documents
from recollect.model.evaluation import LossCollector
from recollect.model.evaluation_text import EvaluationText, choose_text
from recollect.model.evaluation_types import EvaluationResult, MemorySpecification
from recollect.model.knn_lm import (
    KnnLanguageModelOptions,
    OnSegment,
    as_reading,
    datastore_maker,
    neighbour_weights,
    walk,
)
from recollect.model.streams import IGNORED
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.transformer import MemorizingTransformer

FORMS = ("predictions", "embeddings")
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class SpalmOptions:
    """What is retrieved, and how the gate is trained."""

    datastore: str = "document"
    """'document': the document so far. 'training': training documents, of which each fifth is kept out to train the
    gate on, so that it never meets its own tokens in the datastore."""
    backend: str = "exact"
    """Registry string of the index, which searches by Euclidean distance."""
    k: int = 32
    """Neighbours of each token."""
    datastore_size: int = 8192
    """Pairs: the newest of each document, or so many of the training documents."""
    form: str = "predictions"
    """What the gate weighs: 'predictions' or 'embeddings'."""
    training_tokens: int = 32_768
    """Tokens of training documents that the gate learns from, the longest documents first as in an evaluation."""
    epochs: int = 4
    """How often it reads them."""
    learning_rate: float = 1e-2
    """Peak rate of AdamW, falling linearly to 0."""
    device: str = "cpu"
    """Where the index and the gate are."""
    seed: int = 0
    """For samples, order, and backends that draw random numbers."""

    def __post_init__(self) -> None:
        self.retrieval()  # refuses what a kNN-LM refuses
        if self.form not in FORMS:
            raise ConfigurationError(f"form={self.form!r} is unknown; choose one of {', '.join(FORMS)}")
        for name in ("training_tokens", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.learning_rate > 0.0:
            raise ConfigurationError(f"learning_rate={self.learning_rate} must be above 0")

    def retrieval(self) -> KnnLanguageModelOptions:
        """The options of the kNN-LM that looks up the same neighbours."""
        return KnnLanguageModelOptions(
            self.datastore, self.backend, self.k, self.datastore_size, device=self.device, seed=self.seed
        )


@dataclass(frozen=True)
class SpalmEvaluationResult(EvaluationResult):
    """An `EvaluationResult` of SPALM's output layer; its `memory` names the datastore's backend, size and k.

    Attributes:
        datastore: 'document' or 'training'.
        form: what the gate weighs.
        mean_gate: mean of g over the evaluated tokens that found anything: the model's own share.
        training_loss: of the last epoch.
        training_seconds: time to train the gate, its retrieval included.
        datastore_bytes: room that keys, index and tokens took at the end.
    """

    datastore: str = ""
    form: str = ""
    mean_gate: float = 1.0
    training_loss: float = math.nan
    training_seconds: float = 0.0
    datastore_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary without the per-token losses."""
        names = ("datastore", "form", "mean_gate", "training_loss", "training_seconds", "datastore_bytes")
        return {**super().as_json(), **{name: getattr(self, name) for name in names}}


class GatedOutput(nn.Module):
    """The gate, and what both forms share; the embedding is the model's and is not trained.

    Args:
        embedding: (V, W).
        typical_distance: of a retrieved neighbour, the unit of distances.
    """

    embedding: Tensor

    def __init__(self, embedding: Tensor, *, typical_distance: float) -> None:
        super().__init__()
        self.register_buffer("embedding", embedding.detach().float())
        self.typical_distance = typical_distance
        self.gate = nn.Linear(embedding.shape[1], 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 2.0)

    def share(self, hidden: Tensor, neighbours: Neighbours) -> Tensor:
        """g (..., 1), the model's own share: 1 where nothing was found, of hidden (..., W)."""
        gate = torch.sigmoid(self.gate(hidden))
        return torch.where(neighbours.found.any(dim=-1, keepdim=True), gate, 1.0)

    def forward(self, hidden: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
        """Logits (..., V) and gate g (...), of hidden (..., W) and neighbours (..., K)."""
        raise TypeError(f"{type(self).__name__} must define forward()")


class PredictionsOutput(GatedOutput):
    """p = g p_model + (1 - g) p_kNN."""

    def __init__(self, embedding: Tensor, *, typical_distance: float) -> None:
        super().__init__(embedding, typical_distance=typical_distance)
        # Logarithm of how many temperatures the typical distance is.
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(8.0)))

    def forward(self, hidden: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
        gate = self.share(hidden, neighbours)
        weights = neighbour_weights(neighbours, self.typical_distance / self.log_sharpness.exp())
        mixed = gate * torch.softmax(functional.linear(hidden, self.embedding), dim=-1)
        mixed = mixed.scatter_add(-1, neighbours.tokens, (1.0 - gate) * weights)
        return mixed.clamp_min(torch.finfo(torch.float32).tiny).log(), gate[..., 0]


class EmbeddingsOutput(GatedOutput):
    """softmax(E z) of z = g h + (1 - g) A m.

    Args:
        embedding, typical_distance: as for `GatedOutput`.
        typical_hidden: root mean square of the hidden states' elements, for the start of A.
    """

    def __init__(self, embedding: Tensor, *, typical_distance: float, typical_hidden: float) -> None:
        super().__init__(embedding, typical_distance=typical_distance)
        width = embedding.shape[1]
        typical_embedding = float(self.embedding.square().mean().sqrt())
        # A is this constant times the matrix, whose elements then are of a size that the learning rate can move.
        self.ratio = typical_hidden / max(typical_embedding, 1e-12)
        self.carry = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.carry.weight)
        # In tenths of what multiplies a distance: at the gate's learning rate it could not move far enough otherwise.
        self.distance_weight = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
        found = neighbours.found
        embedded = functional.embedding(neighbours.tokens, self.embedding)  # (..., K, W)
        scores = (embedded @ hidden[..., None])[..., 0]
        distances = torch.where(found, neighbours.distances, 0.0) / self.typical_distance
        scores = (scores - 10.0 * self.distance_weight * distances).masked_fill(~found, torch.finfo(torch.float32).min)
        weights = torch.softmax(scores, dim=-1).masked_fill(~found, 0.0)
        retrieved = self.ratio * self.carry((weights[..., None, :] @ embedded)[..., 0, :])
        gate = self.share(hidden, neighbours)
        return functional.linear(torch.lerp(retrieved, hidden, gate), self.embedding), gate[..., 0]


def evaluate_spalm(
    model: MemorizingTransformer,
    text: EvaluationText | TextReading,
    options: SpalmOptions,
    *,
    training: TokenizedDocuments,
    on_segment: OnSegment | None = None,
) -> SpalmEvaluationResult:
    """Trains a gate on training documents and evaluates it over a text, in the order of `replay`.

    Args:
        model: any; it stays as it is and its own memory is off.
        text: to evaluate on, or a reading of it.
        options: what is retrieved, and how the gate is trained.
        training: training documents, which must not be those of `text`.
        on_segment: called with the number of segments done and how many there are.

    Raises:
        ConfigurationError, MemoryBackendError, CorpusError: what the options ask for cannot be had.
    """
    began = time.perf_counter()
    output, make, training_loss = train_spalm(model, options, training)
    trained = time.perf_counter()
    reading = as_reading(model, text)
    datastore = make(reading.text.rows)
    collector, shares = LossCollector(reading.text), []
    with torch.no_grad():
        for number, _, hidden, neighbours in walk(model, reading, datastore, on_segment):
            logits, gate = output(hidden, neighbours)
            collector.add(number, logits)
            wanted = (reading.text.targets[number] != IGNORED).to(gate.device) & neighbours.found.any(dim=-1)
            shares.append(gate[wanted])
    memory = MemorySpecification(canonical_spec(options.backend), options.datastore_size, options.k)
    plain = EvaluationResult.from_losses(collector.result(), memory, time.perf_counter() - trained)
    found = torch.cat(shares)
    return SpalmEvaluationResult(
        **{item.name: getattr(plain, item.name) for item in dataclasses.fields(EvaluationResult)},
        datastore=options.datastore,
        form=options.form,
        mean_gate=float(found.mean()) if len(found) else 1.0,
        training_loss=training_loss,
        training_seconds=trained - began,
        datastore_bytes=datastore.bytes,
    )


def train_spalm(
    model: MemorizingTransformer, options: SpalmOptions, training: TokenizedDocuments
) -> tuple[GatedOutput, Callable[[int], Datastore], float]:
    """The trained output layer, what makes its datastore for a number of rows, and the loss of the last epoch."""
    stored, learned = training, training
    if options.datastore == "training":
        stored, learned = split_documents(training)
    make = datastore_maker(model, options.retrieval(), stored)
    text = choose_text(learned, rows=8, segment_length=model.config.segment_length, max_tokens=options.training_tokens)
    hidden, neighbours, targets = _examples(model, read_text(model, text), make(text.rows))
    known = neighbours.distances[neighbours.found]
    distance = max(float(known.median()), 1e-6) if len(known) else 1.0
    output: GatedOutput
    if options.form == "predictions":
        output = PredictionsOutput(model.embedding.weight, typical_distance=distance)
    else:
        typical = float(hidden.square().mean().sqrt())
        output = EmbeddingsOutput(model.embedding.weight, typical_distance=distance, typical_hidden=typical)
    output = output.to(options.device)
    optimizer = torch.optim.AdamW(output.parameters(), lr=options.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    batches = -(-len(targets) // TOKENS_AT_ONCE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.epochs * batches)
    loss_of_epoch = math.nan
    for _ in range(options.epochs):
        total = 0.0
        for chosen in torch.randperm(len(targets), generator=generator).split(TOKENS_AT_ONCE):
            asked = Neighbours(neighbours.distances[chosen], neighbours.tokens[chosen])
            logits, _ = output(hidden[chosen], asked)
            loss = functional.cross_entropy(logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        loss_of_epoch = total / len(targets)
    return output.requires_grad_(False), make, loss_of_epoch


def _examples(
    model: MemorizingTransformer, reading: TextReading, datastore: Datastore
) -> tuple[Tensor, Neighbours, Tensor]:
    """Hidden states (N, W), neighbours (N, K) and targets (N,) of a text's predicted tokens."""
    hidden, distances, tokens, targets = [], [], [], []
    for number, _, states, neighbours in walk(model, reading, datastore):
        goal = reading.text.targets[number].to(states.device)
        wanted = goal != IGNORED
        hidden.append(states[wanted])
        distances.append(neighbours.distances[wanted])
        tokens.append(neighbours.tokens[wanted])
        targets.append(goal[wanted])
    return torch.cat(hidden), Neighbours(torch.cat(distances), torch.cat(tokens)), torch.cat(targets)
