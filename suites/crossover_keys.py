"""Keys and queries of attention for memories of any number, size and dimension, to measure searches with.

Three sources:

* the keys and queries of a model with memory on real text (`ModelKeys`, the default: the shipped model on the source
  of Python's standard library). They are recorded a chunk at a time, as far as a measurement needs them, and kept;
* a generator (`SyntheticKeys`), which needs no model: its text says what it draws;
* a file (`FileKeys`): a trace, or keys and queries in the layout of ann-benchmarks.

A model has few heads of one dimension. Where other numbers are asked for:

* memory m belongs to head m mod H. From the second round on (m >= H) its keys and queries are turned by a random
  rotation of the memory's own: inner products, neighbours and recall are those of the head, the numbers an index sees
  are others;
* a larger dimension puts the vectors of several heads for the same token end to end, so a score is the mean of those
  heads' scores; what is left over is removed by a rotation of which the first coordinates are kept. A smaller dimension
  is such a projection alone. All vectors get length 1 again, as the model's have.

Queries always come after every key, as in a stream. Letters: H heads of the source, M memories, N keys, Q queries,
D dimension asked for, E dimension of the source.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from recollect.model.ann_benchmarks import load_ann_benchmarks
from recollect.model.checkpoints import load_checkpoint, reference_checkpoint
from recollect.model.documents import CorpusError
from recollect.model.evaluation_text import EVERYTHING, EvaluationText, load_documents
from recollect.model.recording import record
from recollect.model.streams import IGNORED
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.trace_file import FORMAT as TRACE_FORMAT
from recollect.model.trace_file import load_trace
from recollect.model.trunk import compute_trunk

from .workload import read_tensors, save_tensors

CHUNK_SEGMENTS = 128
"""Segments of text that are recorded at once."""

SPLITS = ("test", "validation", "train")
"""Where text is taken from, in this order: what the model never saw comes first."""

SYNTHETIC_DIMENSION = 64


class KeySource(ABC):
    """Where keys and queries come from.

    Attributes:
        description: one sentence for who reads the result.
        digest: names the content: equal digests give equal keys.
        dim: D that keys have where no dimension is asked for.
        available: positions of the stream (a key and a query each), None where there is no end.
    """

    description: str
    digest: str
    dim: int
    fixed_dimension = False
    """Only `dim` can be had."""

    @abstractmethod
    def stream(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and queries (H, count, E) of positions `first` on, float32."""

    def longest(self, keys: int, queries: int) -> int:
        """How many keys, `keys` at most, are followed by so many queries."""
        return keys

    def take(self, memories: int, keys: int, queries: int, dim: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys (M, N, D) and the queries after them (M, Q, D).

        Raises:
            CorpusError: the source holds too few.
        """
        longest = self.longest(keys, queries)
        if longest < keys:
            raise CorpusError(
                f"{self.description}: {longest} keys with {queries} queries after them, {keys} are needed; give a "
                "longer text or file, or keys='synthetic', which has no end"
            )
        held, _ = self.stream(0, keys)
        _, asked = self.stream(keys, queries)
        wanted = self.dim if dim is None else dim
        return fitted(held, memories, wanted), fitted(asked, memories, wanted)


def fitted(vectors: Tensor, memories: int, dim: int) -> Tensor:
    """Vectors (H, N, E) of a source's heads for M memories of dimension D (M, N, D); the module's text says how."""
    heads, count, held = vectors.shape
    pieces = math.ceil(dim / held)
    made = torch.empty(memories, count, dim)
    for memory in range(memories):
        parts = [vectors[(memory + piece) % heads].roll(61 * (piece // heads), 0) for piece in range(pieces)]
        joined = torch.cat(parts, dim=-1)
        if pieces * held != dim or memory >= heads:
            joined = joined @ _rotation(pieces * held, memory // heads)[:, :dim]
        # Whole vectors keep their length, whatever it is.
        made[memory] = joined if (pieces, held) == (1, dim) else normalize(joined, dim=-1)
    return made


def _rotation(size: int, number: int) -> Tensor:
    """A random orthogonal matrix (E, E), the same for the same number."""
    generator = torch.Generator().manual_seed(number)
    matrix, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (matrix * upper.diagonal().sign()).float()


class ModelKeys(KeySource):
    """What the heads of a model's first memory layer append and ask on a text.

    Args:
        folder: where recorded chunks are kept.
        checkpoint: of the model; None is the shipped one.
        corpus: as for `load_corpus`.
    """

    def __init__(self, folder: Path, checkpoint: str | Path | None = None, corpus: str | Path = "stdlib") -> None:
        loaded = load_checkpoint(reference_checkpoint() if checkpoint is None else checkpoint)
        self._model = loaded.model.eval()
        self._tokenizer = loaded.tokenizer
        config = loaded.config
        if not config.memory_layers:
            raise CorpusError(f"the model in {checkpoint} has no memory layer, so it has no keys: choose another one")
        self._segment = config.segment_length
        self._corpus = corpus
        self._folder = folder
        self._texts: list[Tensor] = []
        self._starts: list[Tensor] = []
        self._splits = list(SPLITS)
        self._chunks: dict[int, dict[str, Tensor]] = {}
        first = self._next_split()
        if first is None:
            self._splits, first = [], load_documents(corpus, EVERYTHING, loaded.tokenizer)
            self._append(first)
        self.dim = config.head_dim
        self.digest = hashlib.sha256(f"1:{loaded.digest}:{first.digest}:{CHUNK_SEGMENTS}".encode()).hexdigest()[:16]
        name = "the shipped model" if checkpoint is None else f"the model in {checkpoint}"
        self.description = f"keys and queries of {config.heads} heads of {name} on {corpus!s}"

    def _next_split(self) -> TokenizedDocuments | None:
        """Takes in the next split that has documents; None where there is none."""
        while self._splits:
            split = self._splits.pop(0)
            try:
                documents = load_documents(self._corpus, split, self._tokenizer)
            except CorpusError:
                if self._splits or self._texts:
                    continue
                return None
            self._append(documents)
            return documents
        return None

    def _append(self, documents: TokenizedDocuments) -> None:
        for array in documents.arrays:
            whole = len(array) // self._segment
            if whole:
                tokens = np.asarray(array[: whole * self._segment]).astype(np.int64)
                self._texts.append(torch.from_numpy(tokens).view(whole, self._segment))
                starts = torch.zeros(whole, dtype=torch.bool)
                starts[0] = True
                self._starts.append(starts)

    def longest(self, keys: int, queries: int) -> int:
        """As in the base class. Only what is needed is read: the training documents take some seconds."""
        while self._splits and self._held() < keys + queries:
            self._next_split()
        return max(0, min(keys, self._held() - queries))

    def _held(self) -> int:
        return sum(len(text) for text in self._texts) * self._segment

    def stream(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """As in the base class, recorded where it is not there yet."""
        size = CHUNK_SEGMENTS * self._segment
        chunks = [self._chunk(number) for number in range(first // size, -(-(first + count) // size))]
        start = first - first // size * size
        keys, queries = (
            normalize(torch.cat([chunk[name] for chunk in chunks], dim=1)[:, start : start + count].float(), dim=-1)
            for name in ("keys", "queries")
        )
        return keys, queries

    def _chunk(self, number: int) -> dict[str, Tensor]:
        if number not in self._chunks:
            path = self._folder / f"{self.digest}-{number}.safetensors"
            if not path.is_file():
                save_tensors(path, self._record(number))
            self._chunks[number] = read_tensors(path)
        return self._chunks[number]

    @torch.no_grad()
    def _record(self, number: int) -> dict[str, Tensor]:
        tokens, starts = torch.cat(self._texts), torch.cat(self._starts)
        part = slice(number * CHUNK_SEGMENTS, (number + 1) * CHUNK_SEGMENTS)
        tokens, starts = tokens[part][:, None], starts[part][:, None]
        zeros = torch.zeros(len(tokens), 1, dtype=torch.int64)
        text = EvaluationText(
            tokens=tokens,
            targets=torch.full_like(tokens, IGNORED),
            document_starts=starts,
            document_index=zeros,
            position=zeros,
            lengths=zeros + self._segment,
            document_names=("stream",),
            document_tokens=(tokens.numel(),),
            corpus=str(self._corpus),
            split="stream",
            digest=f"{self.digest}:{number}",
        )
        recorded = record(self._model, compute_trunk(self._model, text, model_digest=self.digest))
        # Half precision is enough for data, and halves the file.
        return {name: getattr(recorded, name).transpose(0, 1).flatten(1, 2).half() for name in ("keys", "queries")}


class SyntheticKeys(KeySource):
    """Random keys and queries with the coarse statistics of the shipped model's, in any dimension, without a model.

    Vectors have length 1. Before that a key is `0.55 a + x` and a query `0.4 b + y`, where a and b are unit vectors
    with cosine 0.85, x and y Gaussian of mean squared length 0.75 and 0.85 whose variance falls exponentially from the
    first direction to the last (to a tenth half-way), the same directions for both. Half of the variance of x belongs
    to its topic: a run of 64 tokens shares it, there are 512 topics, and they come back in random order. A quarter of
    the variance of y is that of a topic too.
    """

    TOPICS, RUN = 512, 64

    def __init__(self, dim: int | None = None, *, seed: int = 0) -> None:
        self.dim = SYNTHETIC_DIMENSION if dim is None else dim
        self._seed = seed
        self.digest = f"synthetic-1-{self.dim}-{seed}"
        self.description = f"random keys and queries with the coarse statistics of attention's, seed {seed}"
        self.heads = 4

    def stream(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """As in the base class. Position n is the same whatever is asked for."""
        keys, queries = (torch.empty(self.heads, count, self.dim) for _ in range(2))
        for head in range(self.heads):
            for block in range(first // 4096, -(-(first + count) // 4096)):
                start, stop = max(first, block * 4096), min(first + count, (block + 1) * 4096)
                made = self._block(head, block)
                part, place = slice(start - first, stop - first), slice(start - block * 4096, stop - block * 4096)
                keys[head, part], queries[head, part] = made[0][place], made[1][place]
        return keys, queries

    def _block(self, head: int, block: int) -> tuple[Tensor, Tensor]:
        dim = self.dim
        fixed = torch.Generator().manual_seed(self._seed * 1_000_003 + head)
        shares = torch.exp(-2 * math.log(10) * torch.arange(dim) / dim)
        spread = (shares / shares.sum()).sqrt()
        first, other = normalize(torch.randn(2, dim, generator=fixed), dim=-1)
        other = normalize(other - (other @ first) * first, dim=-1)
        mean_key, mean_query = first, 0.85 * first + math.sqrt(1 - 0.85**2) * other
        topics = torch.randn(self.TOPICS, dim, generator=fixed) * spread
        drawn = torch.Generator().manual_seed(((self._seed * 1_009 + head) * 1_000_003 + block + 1) % 2**62)
        which = torch.randint(self.TOPICS, (2, 4096 // self.RUN), generator=drawn).repeat_interleave(self.RUN, dim=1)
        noise = torch.randn(2, 4096, dim, generator=drawn) * spread
        key = 0.55 * mean_key + math.sqrt(0.75) * (math.sqrt(0.5) * topics[which[0]] + math.sqrt(0.5) * noise[0])
        query = 0.4 * mean_query + math.sqrt(0.85) * (math.sqrt(0.25) * topics[which[1]] + math.sqrt(0.75) * noise[1])
        return normalize(key, dim=-1), normalize(query, dim=-1)


class FileKeys(KeySource):
    """Keys and queries of a file: a trace of `recollect trace`, or HDF5 in the layout of ann-benchmarks.

    Of a trace, the row with the most text, its documents one after the other. Of ann-benchmarks' files `train` are the
    keys and `test` the queries, both in a fixed random order; every memory holds the same keys, each turned by a
    rotation of its own. Angular distance becomes the inner product of unit vectors.

    Raises:
        CorpusError: it is neither, or its distance is Euclidean.
    """

    fixed_dimension = True

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        self._keys, self._queries = self._read(path)
        self.dim = self._keys.shape[2]
        content = hashlib.sha256(path.read_bytes() if path.stat().st_size < 2**31 else str(path.stat()).encode())
        self.digest = content.hexdigest()[:16]
        self.description = f"keys and queries of {path.name}"

    def _read(self, path: Path) -> tuple[Tensor, Tensor]:
        self._is_benchmark = not _is_trace(path)
        if not self._is_benchmark:
            trace = load_trace(path)
            lengths = trace.text_lengths
            row = int(lengths.sum(0).argmax())
            text = torch.arange(trace.queries.shape[2]) < lengths[:, row, None]  # (S, T)
            heads = slice(row * trace.heads, (row + 1) * trace.heads)
            keys, queries = (
                getattr(trace, name)[:, heads].transpose(0, 1)[:, text].float() for name in ("keys", "queries")
            )
            return keys, queries
        data = load_ann_benchmarks(path)
        if data.metric == "l2":
            raise CorpusError(
                f"{path} is of Euclidean distance, and attention's memories are searched by inner product: give a file "
                "of angular or inner-product distance, or run `recollect ann-benchmarks`, which searches by any of them"
            )
        generator = torch.Generator().manual_seed(0)
        held, asked = (torch.from_numpy(np.asarray(part)) for part in (data.train, data.test))
        held = held[torch.randperm(len(held), generator=generator)]
        asked = asked[torch.randperm(len(asked), generator=generator)]
        if data.metric == "cosine":
            held, asked = normalize(held, dim=-1), normalize(asked, dim=-1)
        return held[None], asked[None]

    def longest(self, keys: int, queries: int) -> int:
        """As in the base class."""
        held = self._keys.shape[1] - (0 if self._is_benchmark else queries)
        return max(0, min(keys, held))

    def stream(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """As in the base class. A benchmark's queries begin anew where they end."""
        if not self._is_benchmark:
            return self._keys[:, first : first + count], self._queries[:, first : first + count]
        places = torch.arange(first, first + count) % self._queries.shape[1]
        return self._keys[:, first : first + count], self._queries[:, places]


def _is_trace(path: Path) -> bool:
    if not path.is_file():
        raise CorpusError(f"no such file: {str(path)!r}; keys are 'model', 'synthetic', or a trace or HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            return bool(file.attrs.get("format") == TRACE_FORMAT)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read as HDF5 ({error}): is it cut short, or another file?") from error


def open_keys(
    keys: str,
    folder: Path,
    *,
    dim: int | None = None,
    checkpoint: str | Path | None = None,
    corpus: str | Path = "stdlib",
    seed: int = 0,
) -> KeySource:
    """The source of a name: 'model', 'synthetic', or a file.

    Raises:
        CorpusError: there is no such file, or it is of another dimension than asked for.
    """
    source: KeySource
    if keys == "model":
        source = ModelKeys(folder, checkpoint, corpus)
    elif keys == "synthetic":
        source = SyntheticKeys(dim, seed=seed)
    else:
        source = FileKeys(keys)
        if dim is not None and dim != source.dim:
            raise CorpusError(f"{keys} holds vectors of dimension {source.dim}, not {dim}: leave out --dim")
    return source
