"""Continuing a text with memory, token by token: a Hugging Face model or a checkpoint, with a store or without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import canonical_spec
from recollect.model.generation import generate as generate_from_checkpoint
from recollect.model.sampling import GenerationError, Sampling
from recollect.pretrained.evaluation import MemoryChoice, attach_choice
from recollect.pretrained.loading import (
    PretrainedFolder,
    device_of,
    is_pretrained_folder,
    load_own,
    load_pretrained,
)
from recollect.pretrained.store import MemoryStore
from recollect.pretrained.stored_memory import state_over_store


@dataclass(frozen=True)
class GenerationOptions:
    """What `continue_text` runs.

    Attributes:
        model: folder of a Hugging Face model or of a checkpoint; None is the shipped model.
        store: folder or address of a memory store made with that model.
        max_new_tokens: at most.
        temperature, top_k, top_p: as in `recollect.model.sampling.Sampling`; the default takes the likeliest token.
        stop: texts; the first that appears ends the continuation.
        memory: backend, memory_size, k and seed, and what only a Hugging Face model can be told.
        device: where the model runs.
    """

    model: str | Path | None = None
    store: str | Path | None = None
    max_new_tokens: int = 200
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    memory: MemoryChoice = field(default_factory=MemoryChoice)
    device: str = "cpu"


@dataclass(frozen=True)
class Continuation:
    """What came after a prompt: text, its tokens, how many tokens the prompt had, and whether a stop ended it."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped: bool


def continue_text(
    prompt: str, options: GenerationOptions, *, on_text: Callable[[str], None] | None = None
) -> Continuation:
    """Reads a prompt of any length into the memory and continues it.

    Args:
        prompt: the beginning of a document.
        options: what to run.
        on_text: called with each new piece of text as soon as it is certain.

    Raises:
        GenerationError: an empty prompt or an impossible option.
        StoreError, CheckpointError, ConfigurationError, MemoryBackendError: what was asked for cannot be had.
    """
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    if options.max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={options.max_new_tokens} must be at least 1")
    if any(not text for text in options.stop):
        raise GenerationError("an empty text cannot stop a generation: it appears in every text")
    if not prompt:
        raise GenerationError("the prompt is empty: give at least a line break")
    canonical_spec(options.memory.backend)
    store = None if options.store is None else MemoryStore.open(options.store)
    if is_pretrained_folder(options.model):
        assert options.model is not None
        folder = load_pretrained(options.model, options.device)
        attach_choice(folder, options.memory, store)
        return _continue_pretrained(folder, prompt, options, sampling, on_text or _ignore)
    return _continue_checkpoint(prompt, options, store, on_text or _ignore)


def _ignore(text: str) -> None:
    pass


def _continue_checkpoint(
    prompt: str, options: GenerationOptions, store: MemoryStore | None, on_text: Callable[[str], None]
) -> Continuation:
    checkpoint, memory = load_own(options.model, options.device), options.memory
    named: dict[str, Any] = {"backend": memory.backend, "memory_size": memory.memory_size, "k": memory.k}
    state = None
    if store is not None:
        state = state_over_store(checkpoint, store, 1, seed=memory.seed, **named)
    tokens = torch.from_numpy(checkpoint.tokenizer.encode(prompt).astype("int64"))
    checkpoint.model.tokenizer = checkpoint.tokenizer
    made = generate_from_checkpoint(
        checkpoint.model,
        tokens,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=memory.seed,
        stop=options.stop,
        on_token=lambda row, token, text: on_text(text),
        state=state,
        **named,
    )
    return Continuation(made.text, tuple(made.tokens[0].tolist()), len(tokens), made.stopped[0])


def _continue_pretrained(
    folder: PretrainedFolder,
    prompt: str,
    options: GenerationOptions,
    sampling: Sampling,
    on_text: Callable[[str], None],
) -> Continuation:
    import transformers

    device = device_of(folder.model)
    encoded = torch.from_numpy(folder.tokenizer.encode(prompt).astype("int64"))
    tokens = torch.cat([torch.tensor(folder.prefix, dtype=torch.int64), encoded])[None].to(device)
    teller = _Teller(folder, options.stop, on_text)
    given: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # top_k=0 and top_p=1 are transformers' words for none; its defaults would cut the tail unasked.
        given = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
        }
    if folder.model.generation_config.pad_token_id is None and folder.model.generation_config.eos_token_id is None:
        given["pad_token_id"] = 0
    verbosity = transformers.utils.logging.get_verbosity()
    # It would warn that the text is longer than the model's positions, which is what the memory is for.
    transformers.utils.logging.set_verbosity_error()
    stack = contextlib.ExitStack()
    stack.callback(transformers.utils.logging.set_verbosity, verbosity)
    with stack, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.memory.seed)
        made = folder.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=options.max_new_tokens,
            streamer=teller,
            stopping_criteria=transformers.StoppingCriteriaList([teller.stops]),
            **given,
        )
    new = tuple(int(token) for token in made[0, tokens.shape[1] :])
    return Continuation(teller.text, new, tokens.shape[1], len(new) < options.max_new_tokens or teller.stopped)


class _Teller:
    """Tells text as it comes, and whether one of the stops has come; a streamer in transformers' sense."""

    def __init__(self, folder: PretrainedFolder, stop: tuple[str, ...], on_text: Callable[[str], None]) -> None:
        self._folder, self._stop, self._on_text = folder, stop, on_text
        self._tokens: list[int] = []
        self._prompt_seen = False
        # Some decoders strip the space before the first word of what they are given: decode behind a known token.
        anchor = folder.tokenizer.encode("a")
        self._anchor = [int(token) for token in anchor]
        self._anchor_text = folder.tokenizer.decode(self._anchor)
        self.text = ""
        self.stopped = False

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then each new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens += [int(token) for token in value.flatten()]
        special = self._special()
        known = [token for token in self._tokens if token not in special]
        text = self._folder.tokenizer.decode(self._anchor + known)[len(self._anchor_text) :]
        whole = text.rstrip("\ufffd")  # a character that later tokens may complete
        self._tell(whole)
        self.stopped = any(stop in text for stop in self._stop)

    def end(self) -> None:
        """Nothing more comes."""

    def stops(self, input_ids: Tensor, scores: Any, **named: Any) -> Tensor:
        """transformers' stopping criterion: (1,) bool."""
        return torch.tensor([self.stopped], device=input_ids.device)

    def _tell(self, whole: str) -> None:
        if len(whole) > len(self.text) and whole.startswith(self.text):
            self._on_text(whole[len(self.text) :])
            self.text = whole

    def _special(self) -> set[int]:
        """Tokens that begin or end a text and are not part of it."""
        ends = self._folder.model.generation_config.eos_token_id
        listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return {*listed, *self._folder.prefix}
