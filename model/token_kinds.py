"""What kind of thing a token is part of: a rare word, a name, a definition, a citation, a number, white space.

Wu et al. 2022 looked at single documents and found that memory is used for rare words: proper names, references,
citations, function names, whose first use lies too far back for local attention. To test that on any text, each token
is given one kind, by fixed rules that read the text and never the losses. The rules serve prose, LaTeX, Isabelle and
program code alike; they are patterns, not parsers, and misjudge some tokens of every kind.

A token belongs to the span of text that its first character other than white space lies in.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS: dict[str, str] = {
    "definition": "a name where it is first defined: def, class, assignment, \\newcommand, \\label, lemma",
    "defined name": "a name or word that was defined earlier in the same document",
    "name": "any other name: CamelCase, snake_case, letters with digits, capitals, capitalised within a sentence",
    "citation": "a reference: \\cite and \\ref, author and year, URL, RFC 822, Theorem 3.1, :func:`...`",
    "number": "a number",
    "rare word": "a lower-case word that the background text has less than 20 times in a million words",
    "common word": "any other word",
    "punctuation": "anything else that is not white space",
    "whitespace": "white space alone",
}
"""The kinds in the order of their precedence in tables, and what each is."""

FIRST, NEAR, FAR, NONE = 0, 1, 2, 3
OCCURRENCES = ("first", "near", "far", "none")
"""Whether the token's word stood earlier in its document: never; where local attention still sees it; only farther
back, where memory alone reaches; 'none' for white space and punctuation."""

RARE_PER_MILLION = 20.0
# Without a background text, a word that the tokenizer cuts into more pieces than this share of the text's words, and
# into at least so many, was rare in the tokenizer's own training text.
RARE_SHARE, RARE_PIECES = 0.8, 3

WORD = re.compile(r"[^\W\d_][\w]*(?:['’][^\W\d_]+)?|_+[^\W_]\w*")
_NUMBER = re.compile(r"\b0[xXbBoO][\da-fA-F_]+\b|\b\d[\d_]*(?:[.,]\d+)*(?:[eE][+-]?\d+)?[jJlL]?\b")
_MODIFIERS = r"(?:(?:export|public|private|protected|static|async|pub|abstract|final|inline|default|cdef|cpdef)\s+)*"
_DEFINING = (
    "def|class|function|fn|func|struct|enum|trait|interface|module|namespace|"
    "lemma|theorem|corollary|proposition|definition|abbreviation|fun|primrec|inductive|datatype|record|locale|"
    "type_synonym|Lemma|Theorem|Definition|Fixpoint|Inductive"
)
_DEFINITIONS = (
    re.compile(rf"^[ \t]*{_MODIFIERS}(?:{_DEFINING})\s+(?:\([^)\n]*\)\s*)?([^\W\d][\w']*)", re.MULTILINE),
    re.compile(r"^[ \t]*([^\W\d]\w*)\s*(?::[^=\n]{1,60})?=(?![=>])", re.MULTILINE),
    re.compile(r"^[ \t]*#[ \t]*define[ \t]+([^\W\d]\w*)", re.MULTILINE),
    re.compile(r"\\(?:(?:re)?newcommand|DeclareMathOperator|newtheorem|def)\*?\s*\{?\\?([A-Za-z@]+)"),
    re.compile(r"\\label\{([^}\n]+)\}"),
)
_CITATIONS = re.compile(
    r"\\(?:[a-zA-Z]*cite[a-zA-Z]*|[a-zA-Z]*ref)\*?(?:\[[^\]\n]*\])*\{[^}\n]+\}"
    r"|https?://[^\s)>\]}\"']+"
    r"|:[a-z:]+:`[^`\n]+`"
    r"|\b(?:RFC|PEP|ISO|IEEE|arXiv|doi|bpo|gh|GH|[Ii]ssue|[Bb]ug|SF|[Ss]ection|Sec\.|[Cc]hapter|Theorem|Lemma|Definition|"
    r"Proposition|Corollary|Equation|Remark|Fig\.|[Ff]igure|[Tt]able)[ ~:-]?#?\d[\w./-]*"
    r"|(?<=[a-z] )\[[1-9]\d{0,2}(?:, ?[1-9]\d{0,2})*\]"
    r"|\b[A-Z][\w'’-]+(?: et al\.?| (?:and|&) [A-Z][\w'’-]+)?,? \(?(?:1[89]|20)\d\d[a-z]?\)?(?!\d)"
)
_MONTHS = re.compile(
    r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec|Python|Since|In|By|Copyright|Version|Until|From|Of|On)", re.I
)
_NOT_NAMES = frozenset(["of", "that", "is", "the", "for", "in", "and", "to", "a", "an", "or", "if", "with", "on", "as"])
_SENTENCE_START = re.compile(r"(?:^|[.!?:][\"')\]”’]*\s|\n\s*\n?|[\"“‘(*#>-]\s*)$")


@dataclass(frozen=True)
class WordCounts:
    """How often each word stands in a background text, lower case; `total` words in all."""

    counts: dict[str, int]
    total: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordCounts:
        """Counts the words of `texts`."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(word.lower() for word in WORD.findall(text))
        return cls(dict(counts), sum(counts.values()))

    def is_rare(self, word: str) -> bool:
        return self.counts.get(word.lower(), 0) * 1e6 < RARE_PER_MILLION * self.total


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    kind: str
    word: str  # what counts as the same word when it comes again; empty for none


def token_kinds(
    text: str,
    offsets: Sequence[tuple[int, int]] | NDArray[np.integer],
    visible_from: Sequence[int] | NDArray[np.integer],
    background: WordCounts | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Kind and occurrence of every token of a document.

    Args:
        text: of the document.
        offsets: (N, 2) each token's first character and the one after its last.
        visible_from: (N,) for each token the first token that local attention sees when it is predicted.
        background: decides which words are rare; without one, words that the tokenizer cuts into unusually many pieces
            are.

    Returns:
        kinds (N,): places in `KINDS`; occurrences (N,): places in `OCCURRENCES`.
    """
    spans = _spans(text)
    starts = [span.start for span in spans]
    pieces = [_span_of(text, int(start), int(end), spans, starts) for start, end in offsets]
    lengths = Counter(place for place in pieces if place is not None)
    counts = [count for place, count in lengths.items() if spans[place].kind == "word"]
    many = max(RARE_PIECES, int(np.quantile(counts, RARE_SHARE)) + 1) if counts else RARE_PIECES
    names = list(KINDS)
    kinds = np.full(len(pieces), names.index("punctuation"), dtype=np.int8)
    occurrences = np.full(len(pieces), NONE, dtype=np.int8)
    last_seen: dict[str, int] = {}
    for number, place in enumerate(pieces):
        start, end = (int(value) for value in offsets[number])
        if start < end and text[start:end].isspace():
            kinds[number] = names.index("whitespace")
            continue
        if place is None:
            continue
        span = spans[place]
        kind = span.kind
        if kind == "word":
            rare = background.is_rare(span.word) if background is not None else lengths[place] >= many
            kind = "rare word" if rare and len(span.word) > 2 else "common word"
        kinds[number] = names.index(kind)
        first_piece = number == 0 or pieces[number - 1] != place
        if first_piece:
            before = last_seen.get(span.word)
            seen = FIRST if before is None else NEAR if before >= int(visible_from[number]) else FAR
        occurrences[number] = seen
        if number + 1 == len(pieces) or pieces[number + 1] != place:
            last_seen[span.word] = number
    return kinds, occurrences


def _span_of(text: str, start: int, end: int, spans: Sequence[_Span], starts: Sequence[int]) -> int | None:
    """The place of the span that a token belongs to."""
    while start < end and text[start].isspace():
        start += 1
    place = bisect_right(starts, start) - 1
    return place if place >= 0 and start < end and start < spans[place].end else None


def _spans(text: str) -> list[_Span]:
    """Words, names, numbers and citations of a text, in order and without overlap."""
    cited = [match for match in _CITATIONS.finditer(text) if not _MONTHS.match(match.group())]
    defined = {match.start(1): match.end(1) for pattern in _DEFINITIONS for match in pattern.finditer(text)}
    mid_sentence = _capitalised_within_sentences(text)
    known: set[str] = set()
    spans: list[_Span] = []
    labels = {start: end for start, end in defined.items() if not WORD.fullmatch(text[start:end])}
    words = [match.span() for pattern in (WORD, _NUMBER) for match in pattern.finditer(text)]
    # Where two begin at one place, a label goes before a citation, and that before a word.
    found = sorted(
        [(start, 0, end) for start, end in labels.items()]
        + [(match.start(), 1, match.end()) for match in cited]
        + [(start, 2, end) for start, end in words]
    )
    reached = 0
    for start, order, end in found:
        if start < reached:
            continue
        reached, word = end, text[start:end]
        if order == 1:
            kind = "citation"
        elif order == 2 and word[0].isdigit():
            kind = "number"
        elif word in known:
            kind = "defined name"
        elif start in defined and word not in _NOT_NAMES:
            known.add(word)
            kind = "definition"
        else:
            kind = "name" if _is_name(word, mid_sentence) else "word"
        spans.append(_Span(start, end, kind, word))
    return spans


def _is_name(word: str, mid_sentence: set[str]) -> bool:
    plain = word.partition("'")[0].partition("’")[0]
    if len(plain) < 2:
        return False
    if "_" in plain or any(mark.isdigit() for mark in plain) or plain.isupper():
        return True
    return any(mark.isupper() for mark in plain[1:]) or plain in mid_sentence


def _capitalised_within_sentences(text: str) -> set[str]:
    """Words that stand with a capital where no sentence begins: proper names wherever they stand."""
    found = set()
    for match in re.finditer(r"\b[A-Z][a-z]+\w*", text):
        if not _SENTENCE_START.search(text[max(0, match.start() - 6) : match.start()] or "\n\n"):
            found.add(match.group())
    return found
