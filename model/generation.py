"""Continuing text: the prompt is read into the memory segment by segment, then tokens are chosen one at a time.

    model = MemorizingTransformer.from_pretrained("reference")
    print(model.generate("import ", max_new_tokens=40).text)

What is generated is read like any other text (`reading.py`): it fills the open segment and enters the memory with it.
So a generated text has exactly the probabilities that the model would give it if it read the whole at once.

Letters: B batch rows, N tokens given, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recollect.model.reading import Reader
from recollect.model.sampling import GenerationError, Sampling
from recollect.model.tokenizer import Tokenizer
from recollect.model.transformer import MemorizingTransformer, ModelState

OnToken = Callable[[int, int, str], None]
Prompts = str | Sequence[str] | Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Generation:
    """Continuations of one or several prompts.

    Attributes:
        tokens: for each prompt the new tokens (n,) int64, without the prompt; a stop token is the last of them.
        texts: for each prompt the new text; empty without a tokenizer. The last character may be cut within and is then
            U+FFFD.
        stopped: for each prompt whether a stop ended it, rather than `max_new_tokens`.
    """

    tokens: list[Tensor]
    texts: list[str]
    stopped: list[bool]

    @property
    def text(self) -> str:
        """The new text of the first prompt."""
        if not self.texts:
            raise GenerationError("this model has no tokenizer, so there are tokens and no text; set model.tokenizer")
        return self.texts[0]


def generate(
    model: MemorizingTransformer,
    prompts: Prompts,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | int | Sequence[str | int] = (),
    backend: str = "exact",
    memory_size: int | None = None,
    k: int | None = None,
    on_token: OnToken | None = None,
    state: ModelState | None = None,
) -> Generation:
    """Continues each prompt. Rows are independent: a prompt continues as it would alone.

    Args:
        model: set to evaluation mode meanwhile.
        prompts: a text, several texts (these need `model.tokenizer`), tokens (N,) or (B, N), or several of (N,). Each
            is the beginning of a document and may be far longer than a segment: its keys fill the memory.
        max_new_tokens: for each prompt.
        temperature, top_k, top_p: as in `Sampling`; the default takes the likeliest token.
        seed: prompt number i is drawn with seed + i, so that it comes out the same in any batch.
        stop: token ids, and texts (with a tokenizer): a prompt ends with the token that is one of the ids, or that
            makes one of the texts appear in the new text.
        backend, memory_size, k: of the memory, as for `initial_state`; `memory_size=0` is none.
        on_token: called as `on_token(prompt number, token, new text)` for each new token. A token that ends within a
            character has no text yet, and without a tokenizer there never is any.
        state: of as many rows as there are prompts, to begin with instead of an empty memory; it is spent afterwards,
            and `backend`, `memory_size` and `k` have no effect.

    Raises:
        GenerationError: an empty prompt, text without a tokenizer, tokens outside the vocabulary, or an impossible
            option.
        MemoryBackendError: a backend that does not exist or whose library is missing.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={max_new_tokens} must be at least 1")
    stop_ids, stop_texts = _stops(stop, model.tokenizer)
    rows = [
        _Row(prompt, max_new_tokens, seed + number, stop_ids, stop_texts, model.tokenizer)
        for number, prompt in enumerate(_prompt_tokens(prompts, model))
    ]
    was_training = model.training
    model.eval()
    try:
        if state is None:
            reader = model.reader(len(rows), backend=backend, memory_size=memory_size, k=k)
        else:
            reader = Reader(model, state)
        _run(reader, rows, sampling, on_token)
    finally:
        model.train(was_training)
    return Generation(
        tokens=[torch.tensor(row.tokens[row.prompt_length :], dtype=torch.int64) for row in rows],
        texts=[row.text(final=True) for row in rows] if model.tokenizer is not None else [],
        stopped=[row.stopped for row in rows],
    )


def _run(reader: Reader, rows: list[_Row], sampling: Sampling, on_token: OnToken | None) -> None:
    """Reads and chooses until every row has ended.

    All rows begin together and are read in step. Each step reads as many tokens as the shortest row still going has
    left; a row that has come to its end gets a new token. So prompts of unequal length need no padding within them, and
    rows that ended no longer hold the others back: from there on theirs is filled up with token 0, which nothing sees.
    """
    device = reader.model.device
    while going := [row for row in rows if not row.ended]:
        begin = reader.position
        end = min(len(row.tokens) for row in going)
        piece = torch.zeros(len(rows), end - begin, dtype=torch.int64)
        for number, row in enumerate(rows):
            known = row.tokens[begin:end]
            piece[number, : len(known)] = torch.tensor(known, dtype=torch.int64)
        logits = reader.read(piece.to(device), last_only=True)[:, -1]
        for number, row in enumerate(rows):
            if row.ended or len(row.tokens) > end:
                continue
            token = sampling.choose(logits[number], row.generator)
            new_text = row.add(token)
            if on_token is not None:
                on_token(number, token, new_text)


class _Row:
    """One prompt and what follows it."""

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        seed: int,
        stop_ids: set[int],
        stop_texts: list[str],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.generator = torch.Generator().manual_seed(seed)
        self.stopped = False
        self._longest = len(prompt) + max_new_tokens
        self._stop_ids = stop_ids
        self._stop_texts = stop_texts
        self._tokenizer = tokenizer
        self._told = 0

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.tokens) >= self._longest

    def add(self, token: int) -> str:
        """Takes a new token and gives the text that is certain now and was not before."""
        self.tokens.append(token)
        text = self.text() if self._tokenizer is not None else ""
        self.stopped = token in self._stop_ids or any(stop in text for stop in self._stop_texts)
        if self.ended and self._tokenizer is not None:
            text = self.text(final=True)
        new, self._told = text[self._told :], max(self._told, len(text))
        return new

    def text(self, *, final: bool = False) -> str:
        """The new text; unless it is final, without a character at its end that later tokens may complete."""
        assert self._tokenizer is not None
        text = self._tokenizer.decode(self.tokens[self.prompt_length :])
        return text if final else text.rstrip("\ufffd")


def _prompt_tokens(prompts: Prompts, model: MemorizingTransformer) -> list[list[int]]:
    """The tokens of each prompt."""
    parts: Iterable[Any]
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() == 1):
        parts = [prompts]
    elif isinstance(prompts, Tensor) and prompts.dim() != 2:
        raise GenerationError(f"prompts of shape {tuple(prompts.shape)} are no tokens: want (N,) or (rows, N)")
    else:
        parts = prompts
    found = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            if model.tokenizer is None:
                raise GenerationError("this model has no tokenizer: give tokens, or set model.tokenizer")
            tokens = [int(token) for token in model.tokenizer.encode(part)]
        else:
            tokens = [int(token) for token in part]
        if not tokens:
            raise GenerationError(f"prompt {number} is empty: give at least one token, such as a line break")
        wrong = [token for token in tokens if not 0 <= token < model.config.vocabulary_size]
        if wrong:
            raise GenerationError(
                f"prompt {number} has token {wrong[0]}: this model's tokens are 0 to {model.config.vocabulary_size - 1}"
            )
        found.append(tokens)
    if not found:
        raise GenerationError("there is no prompt to continue")
    return found


def _stops(stop: str | int | Sequence[str | int], tokenizer: Tokenizer | None) -> tuple[set[int], list[str]]:
    """The token ids and the texts at which a row ends."""
    given = [stop] if isinstance(stop, str | int) else list(stop)
    texts = [item for item in given if isinstance(item, str)]
    if "" in texts:
        raise GenerationError("an empty text cannot stop a generation: it appears in every text")
    if texts and tokenizer is None:
        raise GenerationError("this model has no tokenizer, so it can stop at token ids and not at texts")
    return {item for item in given if not isinstance(item, str)}, texts
