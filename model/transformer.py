"""The memorizing transformer (Wu et al. 2022), split where its first memory begins.

The trunk (embedding and the layers below the first memory layer) gives the same output whatever the backend; only the
upper part (from the first memory layer to the logits) must run again for each backend.

Letters: B batch rows, T tokens of the segment, V vocabulary, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.registry import make_backend
from recollect.model.attention import Attention, LayerState
from recollect.model.closed_form import RootMeanSquareNorm, squared_relu
from recollect.model.compiling import eagerly
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.hidden_keys import AnyMemory, make_layer_memory
from recollect.model.value_store import FLOAT32

if TYPE_CHECKING:
    from recollect.model.generation import Generation
    from recollect.model.reading import Reader
    from recollect.model.tokenizer import Tokenizer


@dataclass
class TrunkState:
    """States of the layers below the first memory layer."""

    layers: list[LayerState]


@dataclass
class UpperState:
    """States of the layers from the first memory layer up, and the memory of each memory layer (none when off)."""

    layers: list[LayerState]
    memories: list[AnyMemory]


@dataclass
class ModelState:
    """Everything the model carries from one segment to the next."""

    trunk: TrunkState
    upper: UpperState

    @property
    def memories(self) -> list[AnyMemory]:
        return self.upper.memories

    @property
    def batch_size(self) -> int:
        """B."""
        return len((self.trunk.layers + self.upper.layers)[0].cached_tokens)


@dataclass
class ModelOutput:
    """logits (B, T, V) and the state after these tokens."""

    logits: Tensor
    state: ModelState


class FeedForward(nn.Module):
    """Two matrices and a non-linearity between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.inner = nn.Linear(config.width, config.feed_forward, bias=False)
        self.outer = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.inner(hidden)
        if self.activation == "squared_relu":
            inner = squared_relu(inner)
        else:
            inner = functional.gelu(inner) if self.activation == "gelu" else functional.relu(inner)
        return self.outer(inner)


class Layer(nn.Module):
    """Attention and feed-forward, each added to the residual stream after normalising its input."""

    def __init__(self, config: ModelConfig, *, has_memory: bool) -> None:
        super().__init__()
        self.attention_norm = RootMeanSquareNorm(config.width, eps=1e-6)
        self.attention = Attention(config, has_memory=has_memory)
        self.feed_forward_norm = RootMeanSquareNorm(config.width, eps=1e-6)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, state: LayerState, memory: AnyMemory | None) -> tuple[Tensor, LayerState]:
        attended, state = self.attention(self.attention_norm(hidden), state, memory)
        hidden = hidden + attended
        return hidden + self.feed_forward(self.feed_forward_norm(hidden)), state


class MemorizingTransformer(nn.Module):
    """A decoder-only transformer whose memory layers also attend to pairs retrieved from a memory.

        model = MemorizingTransformer.from_pretrained("reference")   # or from_preset("laptop"): random weights
        tokens = model.tokenizer.tensor(text)                        # (1, N)
        logits = model(tokens).logits                                # (1, N, V): what may follow each token
        print(model.generate("import ", max_new_tokens=40).text)

    It reads text in segments of `config.segment_length` tokens. Within a segment every token attends to those before it
    (and to the Transformer-XL cache, where there is one). In the memory layers each token also retrieves the k keys of
    earlier segments that match it best, however long ago they were read, and a gate joins both.

    What it carries from segment to segment is a `ModelState`: made by `initial_state` (or by the first call), replaced
    by the one that each call returns. Its memories are changed in place, so a state that was used once is spent.

    Input and output embedding are one matrix.

    Attributes:
        config: every size and choice.
        tokenizer: the tokenizer beside the model; None where there is none yet (`from_preset` without one).
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.layers = nn.ModuleList(Layer(config, has_memory=n in config.memory_layers) for n in range(config.layers))
        self.final_norm = RootMeanSquareNorm(config.width, eps=1e-6)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Attention):
                for projection in (module.query, module.key, module.value):
                    nn.init.normal_(projection.weight, std=self.config.width**-0.5)
                nn.init.zeros_(module.output.weight)  # each block starts as the identity
                if self.config.matched_start:
                    module.match_shifted_channels()
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.inner.weight, std=self.config.width**-0.5)
                nn.init.zeros_(module.outer.weight)

    # From and to files

    @classmethod
    def from_preset(cls, name: str, *, tokenizer: Tokenizer | None = None, **changes: Any) -> MemorizingTransformer:
        """A new model with random weights.

        Args:
            name: a preset of `ModelConfig.preset`: tiny, laptop or paper.
            tokenizer: kept beside the model, which gets its vocabulary size unless `changes` names another.
            changes: single values of `ModelConfig`, such as `memory_layers=(1, 2)` or `gate="token"`.

        Raises:
            ConfigurationError: an unknown preset or value, or a vocabulary smaller than the tokenizer's.
        """
        if tokenizer is not None:
            changes = {"vocabulary_size": tokenizer.vocabulary_size, **changes}
        config = ModelConfig.preset(name, **changes)
        if tokenizer is not None and config.vocabulary_size < tokenizer.vocabulary_size:
            raise ConfigurationError(
                f"vocabulary_size={config.vocabulary_size} is too small for the tokenizer, which has "
                f"{tokenizer.vocabulary_size} tokens"
            )
        return cls(config, tokenizer)

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | Path = "reference", *, device: torch.device | str = "cpu"
    ) -> MemorizingTransformer:
        """A trained model with its tokenizer, in evaluation mode.

        Args:
            path_or_name: the folder of a checkpoint, as `save_pretrained` and `recollect train` write it, or
                "reference", the small model that ships with the package ("./reference" is a folder of that name).
            device: where the weights go.

        Raises:
            CheckpointError: there is no such folder, or its files are damaged or do not belong together.
        """
        from recollect.model.checkpoints import REFERENCE, load_checkpoint, reference_checkpoint

        folder = reference_checkpoint() if path_or_name == REFERENCE else path_or_name
        return load_checkpoint(folder, device=device).model

    def save_pretrained(
        self, directory: str | Path, *, dtype: str = "float32", metadata: dict[str, Any] | None = None
    ) -> None:
        """Writes weights, configuration and tokenizer into a folder that `from_pretrained` reads.

        Args:
            directory: made if missing; other files in it stay.
            dtype: how the weights are stored: "float32", or "bfloat16" for half the size.
            metadata: JSON values to keep beside them.

        Raises:
            CheckpointError: the model has no tokenizer, or `dtype` is unknown.
        """
        from recollect.model.checkpoints import CheckpointError, save_checkpoint

        if self.tokenizer is None:
            raise CheckpointError(
                "this model has no tokenizer to be saved with: set model.tokenizer to what load_tokenizer or "
                "train_tokenizer gives"
            )
        save_checkpoint(directory, self, self.tokenizer, metadata=metadata, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def count_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    # States

    def initial_state(
        self,
        batch_size: int,
        *,
        backend: str = "exact",
        memory_size: int | None = None,
        k: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        values: str = FLOAT32,
    ) -> ModelState:
        """The state before any token: empty caches and empty memories.

        Args:
            batch_size: B.
            backend: specification of the kNN backend, as for `make_backend`.
            memory_size: C, keys for each (row, head); None is the configuration's, 0 is no memory at all.
            k: neighbours for each query; None is the configuration's.
            seed: for backends that draw random numbers.
            device: where the backend's keys lie; None is where the model is.
            values: how values are stored: 'float32', 'bfloat16' (half the bytes), and where, if not in main memory:
                'bfloat16:in=temporary', or a folder, for a memory-mapped file.
        """
        return ModelState(
            self.initial_trunk_state(batch_size),
            self.initial_upper_state(
                batch_size, backend=backend, memory_size=memory_size, k=k, seed=seed, device=device, values=values
            ),
        )

    def initial_trunk_state(self, batch_size: int) -> TrunkState:
        return TrunkState([self._empty_layer(batch_size) for _ in range(self.config.first_upper_layer)])

    def initial_upper_state(
        self,
        batch_size: int,
        *,
        backend: str | list[MemoryBackend] = "exact",
        memory_size: int | None = None,
        k: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        values: str = FLOAT32,
    ) -> UpperState:
        """As `initial_state`, for the upper part; `backend` may also be ready-made backends, one per memory layer."""
        config = self.config
        layers = [self._empty_layer(batch_size) for _ in range(config.first_upper_layer, config.layers)]
        size = config.memory_size if memory_size is None else memory_size
        if size < 0:
            raise ValueError(f"memory_size={size} must be 0 (no memory) or more")
        if isinstance(backend, str):
            backends = [
                make_backend(
                    backend,
                    num_memories=batch_size * config.memories_per_row,
                    capacity=size,
                    dim=config.memory_dim,
                    device=self.device if device is None else device,
                    seed=seed + layer,
                )
                for layer in config.memory_layers
                if size
            ]
        else:
            backends = backend
            if len(backends) != len(config.memory_layers):
                raise ValueError(f"{len(backends)} backends were given for {len(config.memory_layers)} memory layers")
        neighbours = config.k if k is None else k
        memories = [
            make_layer_memory(config, made, k=neighbours, device=self.device, values=values) for made in backends
        ]
        return UpperState(layers, memories)

    def _empty_layer(self, batch_size: int) -> LayerState:
        return LayerState.empty(self.config, batch_size, self.device)

    # Computation

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        document_starts: Tensor | None = None,
        *,
        reset: bool = False,
    ) -> ModelOutput:
        """Logits for the token after each of `tokens`.

        More tokens than a segment has are read segment by segment, each finding what the ones before it left in the
        memory. What remains at the end is a segment too, if a short one: text that comes in pieces of any size is for
        a `reader`, which keeps the segment open.

        Args:
            tokens: (B, N) int64.
            state: from the call before, or from `initial_state`; None is a new one, with an exact memory of the
                configuration's size.
            document_starts: (B,) bool; a marked row begins a new document with these tokens and forgets the one
                before. None marks no row.
            reset: mark every row.
        """
        if not isinstance(tokens, Tensor):
            raise ValueError(f"{type(tokens).__name__} cannot be read: give model.tokenizer.tensor(text), or tokens")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} cannot be read: want (rows, tokens), at least one")
        if state is None:
            state = self.initial_state(len(tokens))
        elif state.batch_size != len(tokens):
            raise ValueError(f"the state is of {state.batch_size} rows and the tokens are of {len(tokens)}")
        if document_starts is None or reset:
            document_starts = torch.full((len(tokens),), reset, device=tokens.device)
        pieces = []
        for segment in tokens.split(self.config.segment_length, dim=1):
            hidden, trunk_state = self.trunk(segment, state.trunk, document_starts)
            logits, upper_state = self.upper(hidden, state.upper, document_starts)
            state = ModelState(trunk_state, upper_state)
            document_starts = torch.zeros_like(document_starts)
            pieces.append(logits)
        return ModelOutput(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), state)

    def reader(self, batch_size: int = 1, **memory: Any) -> Reader:
        """A reader of text that comes in pieces of any size: `reader.read(tokens)`, see `recollect.model.reading`.

        Args:
            batch_size: B.
            memory: backend, memory_size, k, seed and device, as for `initial_state`.
        """
        from recollect.model.reading import Reader

        return Reader(self, batch_size=batch_size, **memory)

    def generate(self, prompts: str | list[str] | Tensor | list[Tensor], **options: Any) -> Generation:
        """Continues text: `recollect.model.generation.generate` with this model, where the options are told."""
        from recollect.model.generation import generate

        return generate(self, prompts, **options)

    def trunk(self, tokens: Tensor, state: TrunkState, document_starts: Tensor) -> tuple[Tensor, TrunkState]:
        """The residual stream (B, T, W) that enters the first memory layer; arguments as for `forward`."""
        hidden = self.embedding(tokens) * math.sqrt(self.config.width)
        after = []
        for layer, layer_state in zip(self.layers[: self.config.first_upper_layer], state.layers, strict=True):
            hidden, advanced = layer(hidden, layer_state.without(document_starts), None)
            after.append(advanced)
        return hidden, TrunkState(after)

    def upper(self, hidden: Tensor, state: UpperState, document_starts: Tensor) -> tuple[Tensor, UpperState]:
        """Logits (B, T, V) from the trunk's output `hidden` (B, T, W); other arguments as for `forward`."""
        first = self.config.first_upper_layer
        by_layer = dict(zip(self.config.memory_layers, state.memories, strict=False))
        for memory in state.memories:
            eagerly(memory.reset_rows)(document_starts)
        after = []
        for number, layer_state in enumerate(state.layers, start=first):
            hidden, advanced = self.layers[number](hidden, layer_state.without(document_starts), by_layer.get(number))
            after.append(advanced)
        logits = functional.linear(self.final_norm(hidden), self.embedding.weight)
        return logits, UpperState(after, state.memories)
