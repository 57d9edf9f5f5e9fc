"""Tokenizers: byte-level BPE trained here, or the one of a Hugging Face `AutoTokenizer` folder.

Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, over bytes as in GPT-2) has a token for each of the 256 bytes,
so any text has tokens and comes back from them exactly. Nothing is added to a text: no start and no end token, since
document starts travel beside the tokens (`streams.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.memory_backends.atomic import write_text
from recollect.model.documents import CorpusError

FILE_NAME = "tokenizer.json"
BYTES = 256


class Tokenizer:
    """Text to token ids and back.

    Token ids are `dtype`: uint16 where the vocabulary allows it, int32 otherwise. `digest` is a sha256 of everything
    that decides the ids, so equal digests mean equal streams.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        # Ids need not be dense in a foreign tokenizer, and the model needs a row for the largest.
        self.vocabulary_size: int = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.dtype: np.dtype[np.generic] = np.dtype(np.uint16 if self.vocabulary_size <= 1 << 16 else np.int32)
        self.digest: str = hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def encode(self, text: str) -> NDArray[np.generic]:
        """The ids (N,) of `text`; raises CorpusError for text that UTF-8 cannot hold."""
        return self.encode_many([text])[0]

    def tensor(self, text: str) -> Tensor:
        """The ids of `text` as a model reads them: (1, N) int64."""
        return torch.from_numpy(self.encode(text).astype(np.int64))[None]

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.generic]]:
        """The ids of each text, on all cores."""
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise CorpusError(f"character {error.start} of the text is half a surrogate pair") from error
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are no UTF-8 (a sequence cut within a character) become U+FFFD."""
        ids = [int(token) for token in tokens]
        for token in ids:
            if not 0 <= token < self.vocabulary_size:
                raise CorpusError(f"token {token} is outside the vocabulary of {self.vocabulary_size}")
        return self._inner.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        """The `tokenizers` JSON of this tokenizer, as it is saved and digested."""
        return json.dumps(json.loads(self._inner.to_str()), ensure_ascii=False, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> Path:
        """Writes tokenizer.json into the folder `path`, or `path` itself if it ends in .json; whole or not at all."""
        path = Path(path)
        file = path if path.suffix == ".json" else path / FILE_NAME
        write_text(file, self.to_json())
        return file


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Trains byte-level BPE on `texts`: give the training split alone.

    The vocabulary holds the 256 bytes and the most frequent merges; little text may give fewer than `vocabulary_size`.
    """
    if vocabulary_size < BYTES:
        raise CorpusError(f"a vocabulary of {vocabulary_size} is too small: byte-level BPE needs {BYTES} or more")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(inner)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json, a folder that holds one, or an `AutoTokenizer` folder (which needs transformers).

    Raises CorpusError for a path without a tokenizer, a damaged file, and a tokenizer without a fast form.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (path / "tokenizer_config.json").is_file():
        return _auto_tokenizer(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise CorpusError(f"no tokenizer at {str(path)!r}: want {FILE_NAME}, or a folder that holds it")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8")))
    except Exception as error:  # tokenizers raises bare Exception for any fault in the file.
        raise CorpusError(f"{file} is not a tokenizer that the package tokenizers can read: {error}") from error


def _auto_tokenizer(folder: Path) -> Tokenizer:
    try:
        import transformers
    except ImportError as error:
        raise CorpusError(
            f"{folder} is an AutoTokenizer folder, and the package `transformers` is not installed: "
            "pip install 'recollect[transformers]'"
        ) from error
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # The library raises OSError, ValueError, KeyError and more for a damaged folder.
        raise CorpusError(f"{folder} cannot be read by AutoTokenizer: {error}") from error
    inner = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(inner, tokenizers.Tokenizer):
        raise CorpusError(f"{folder} holds a tokenizer without a fast form ({type(loaded).__name__}): convert it first")
    return Tokenizer(tokenizers.Tokenizer.from_str(inner.to_str()))
