"""The corpora of an ablation: one section each, with a tokenizer that all its models share."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from recollect.model.corpus import Corpus, load_corpus
from recollect.model.documents import CorpusError
from recollect.model.evaluation_text import EvaluationText, choose_text
from recollect.model.token_cache import TokenizedDocuments, tokenize
from recollect.model.tokenizer import FILE_NAME, load_tokenizer, train_tokenizer

from ..cells import fingerprint
from .options import AblateError
from .settings import EvaluationSettings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Section:
    """One corpus.

    Attributes:
        name: for tables and files.
        source: 'stdlib' or a path, as `load_corpus` takes it.
        digest: of the whole content.
        split_digests: of each split that has documents.
        longest: UTF-8 bytes of the longest document of each split: no document has more tokens.
    """

    name: str
    source: str
    digest: str
    split_digests: dict[str, str]
    longest: dict[str, int]

    def tokenizer_key(self, vocabulary_size: int) -> str:
        """Names the tokenizer that is trained on the training documents with this vocabulary."""
        return fingerprint({"text": self.split_digests["train"], "vocabulary": vocabulary_size, "version": 1})

    def tokenizer_path(self, output: Path, vocabulary_size: int) -> Path:
        """Where it lies."""
        return output / "tokenizers" / self.tokenizer_key(vocabulary_size) / FILE_NAME


def read_sections(corpora: Iterable[str]) -> tuple[list[Section], dict[str, Corpus]]:
    """The sections that the command line names as 'stdlib', 'path' or 'name=path', and their corpora by name.

    Raises:
        AblateError: two sections have one name, or a name is none.
        CorpusError: a corpus cannot be read, or has no documents to train or to test on.
    """
    sections: list[Section] = []
    loaded: dict[str, Corpus] = {}
    for item in corpora:
        name, separator, source = item.partition("=")
        if not separator:
            source = item
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(item).name.split(".")[0]).strip("-") or "corpus"
        if not _NAME.fullmatch(name):
            raise AblateError(f"corpus {item!r}: {name!r} is no name; write name=path with letters, digits, - and _")
        if name in loaded:
            raise AblateError(f"two corpora are named {name!r}: write name=path to tell them apart")
        corpus = load_corpus(source)
        for split in ("train", "test"):
            corpus.documents(split)
        loaded[name] = corpus
        splits = [split for split in ("train", "validation", "test") if corpus.document_names(split)]
        sections.append(
            Section(
                name=name,
                source=source,
                digest=corpus.digest,
                split_digests={split: corpus.split_digest(split) for split in splits},
                longest={
                    split: max(len(document.text.encode("utf-8")) for document in corpus.documents(split))
                    for split in splits
                },
            )
        )
    return sections, loaded


def make_tokenizer(section: Section, corpus: Corpus, output: Path, vocabulary_size: int) -> Path:
    """The section's tokenizer, trained where it is not there yet."""
    path = section.tokenizer_path(output, vocabulary_size)
    if not path.is_file():
        train_tokenizer((document.text for document in corpus.documents("train")), vocabulary_size).save(path)
    return path


def tokenize_split(
    section: Section, split: str, tokenizer: Path, cache_directory: str | Path | None
) -> TokenizedDocuments:
    """The tokens of one split, from the cache where they are there."""
    return tokenize(load_corpus(section.source), split, load_tokenizer(tokenizer), cache_directory)


def check_corpus(section: Section) -> None:
    """Raises CorpusError where this machine has other text under the section's source than the run was planned with."""
    found = load_corpus(section.source).digest
    if found != section.digest:
        raise CorpusError(
            f"corpus {section.source!r} on machine {platform.node()} has digest {found[:12]}, and the run was planned "
            f"with {section.digest[:12]}: give the corpus as a path, which is sent to every machine"
        )


def evaluation_text(
    documents: TokenizedDocuments, settings: EvaluationSettings, segment_length: int, name: str
) -> EvaluationText:
    """The text of an evaluation: longest documents first; with `fill_tokens` only those that reach beyond them.

    Raises:
        CorpusError: no document is long enough.
    """
    if settings.documents == "sampled":
        documents = _sample(documents, settings)
    if not settings.fill_tokens:
        return choose_text(documents, rows=settings.rows, segment_length=segment_length, max_tokens=settings.max_tokens)
    order = sorted(range(len(documents)), key=lambda place: (-len(documents.arrays[place]), documents.names[place]))
    least = settings.fill_tokens + segment_length
    chosen = [place for place in order if len(documents.arrays[place]) >= least][: settings.rows]
    if not chosen:
        raise CorpusError(
            f"corpus {name!r}: its longest {settings.split} document has {len(documents.arrays[order[0]])} tokens, too "
            f"few to fill a memory with {settings.fill_tokens} tokens and then to score a segment of {segment_length}; "
            "give a corpus of longer documents, or lower evaluation.fill_tokens"
        )
    share = settings.fill_tokens + max(segment_length, settings.max_tokens // len(chosen))
    picked = dataclasses.replace(
        documents,
        names=tuple(documents.names[place] for place in chosen),
        arrays=tuple(documents.arrays[place][:share] for place in chosen),
    )
    return choose_text(picked, rows=len(chosen), segment_length=segment_length, max_tokens=None)


def _sample(documents: TokenizedDocuments, settings: EvaluationSettings) -> TokenizedDocuments:
    """Documents in the order of a hash of their names, until their first tokens are as many as are to be read.

    The hash is of the name alone, so the sample is the same on every machine and does not prefer long documents.
    """
    share = settings.fill_tokens + settings.max_tokens // settings.rows
    order = sorted(
        range(len(documents)), key=lambda place: hashlib.sha256(f"sample:{documents.names[place]}".encode()).digest()
    )
    chosen, left = [], share * settings.rows
    for place in order:
        if left <= 0:
            break
        chosen.append(place)
        left -= min(share, len(documents.arrays[place]))
    return dataclasses.replace(
        documents,
        names=tuple(documents.names[place] for place in chosen),
        arrays=tuple(documents.arrays[place] for place in chosen),
    )


def check_lengths(section: Section, settings: EvaluationSettings, segment_length: int, where: str) -> None:
    """Raises where no document can be long enough, whatever the tokenizer."""
    if settings.split not in section.longest:
        raise CorpusError(f"{where}: corpus {section.name!r} has no {settings.split} documents")
    longest, least = section.longest[settings.split], settings.fill_tokens + segment_length
    if longest < least:
        raise CorpusError(
            f"{where}: the longest {settings.split} document of corpus {section.name!r} has {longest} bytes, so fewer "
            f"than the {least} tokens that evaluation.fill_tokens and one segment take; give longer documents"
        )
