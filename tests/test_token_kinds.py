"""Kinds of token: on texts whose kinds anyone can tell."""

from __future__ import annotations

import re

import pytest

from recollect.model.token_kinds import KINDS, OCCURRENCES, WordCounts, token_kinds

CODE = '''# See RFC 2822 and :func:`os.path`.
class HTTPServer(TCPServer):
    def server_bind(self):
        """Override the method, as Smith et al. 2010 say."""
        total = 0x1F + 12.5
        return self.server_bind(total)
'''
LATEX = r"\begin{lemma}\label{lem:one} By \cite{wu22} and Theorem 3.1, see \ref{lem:one}.\end{lemma}"
PROSE = "Then Anna went home. The palace was dark. Anna saw Moscow in 1812, as https://example.org/a says."
ISABELLE = 'lemma foo_bar: "x"\n  by (rule foo_bar)\n'


def words(text: str, background: WordCounts | None = None) -> list[tuple[str, str, str]]:
    """(word, kind, occurrence) with every word, number and mark a token of its own."""
    offsets = [match.span() for match in re.finditer(r" ?\w+|\s+|[^\w\s]", text)]
    kinds, occurrences = token_kinds(text, offsets, [0] * len(offsets), background)
    names = list(KINDS)
    return [
        (text[start:end].strip(), names[kind], OCCURRENCES[occurrence])
        for (start, end), kind, occurrence in zip(offsets, kinds, occurrences, strict=True)
    ]


def kinds_in(text: str, word: str, background: WordCounts | None = None) -> list[str]:
    return [kind for found, kind, _ in words(text, background) if found == word]


@pytest.mark.parametrize(
    ("text", "word", "kinds"),
    [
        (CODE, "RFC", ["citation"]),
        (CODE, "Smith", ["citation"]),
        (CODE, "HTTPServer", ["definition"]),
        (CODE, "TCPServer", ["name"]),
        (CODE, "server_bind", ["definition", "defined name"]),
        (CODE, "total", ["definition", "defined name"]),
        (CODE, "0x1F", ["number"]),
        (CODE, "self", ["common word", "common word"]),
        (LATEX, "lem", ["definition", "citation"]),
        (LATEX, "wu22", ["citation"]),
        (LATEX, "Theorem", ["citation"]),
        (PROSE, "Anna", ["name", "name"]),
        (PROSE, "Then", ["common word"]),
        (PROSE, "The", ["common word"]),
        (PROSE, "Moscow", ["name"]),
        (PROSE, "1812", ["number"]),
        (PROSE, "example", ["citation"]),
        (ISABELLE, "foo_bar", ["definition", "defined name"]),
        (ISABELLE, "lemma", ["common word"]),
    ],
)
def test_kinds(text: str, word: str, kinds: list[str]) -> None:
    assert kinds_in(text, word) == kinds


def test_rare_words_are_rare_in_the_background() -> None:
    background = WordCounts.of(["the palace " + "was dark " * 100_000])
    assert kinds_in("The palace was dark. A quokka.", "palace", background) == ["rare word"]
    assert kinds_in("The palace was dark. A quokka.", "dark", background) == ["common word"]
    assert kinds_in("The palace was dark. A quokka.", "quokka", background) == ["rare word"]


def test_without_a_background_words_in_many_pieces_are_rare() -> None:
    text = "extraordinary word"
    offsets = [(0, 5), (5, 9), (9, 13), (13, 18)]
    kinds, _ = token_kinds(text, offsets, [0] * 4)
    assert [list(KINDS)[kind] for kind in kinds] == ["rare word"] * 3 + ["common word"]


def test_every_token_of_a_word_shares_its_occurrence() -> None:
    text = "quokka and quokka and quokka"
    offsets = [(0, 3), (3, 6), (6, 10), (10, 14), (14, 17), (17, 21), (21, 25), (25, 28)]
    # The second quokka is tokens 3 and 4: seen as long as local attention reaches back to its end.
    for visible, last in ((4, "near"), (5, "far")):
        _, occurrences = token_kinds(text, offsets, [0] * 6 + [visible] * 2)
        expected = ["first", "first", "first", "near", "near", "near", last, last]
        assert [OCCURRENCES[seen] for seen in occurrences] == expected


def test_white_space_and_punctuation() -> None:
    found = words("a  (b)\n")
    assert [kind for _, kind, _ in found] == [
        *("common word", "whitespace", "punctuation", "common word", "punctuation", "whitespace")
    ]
    assert {seen for word, _, seen in found if word in ("", "(", ")")} == {"none"}


def test_parts_of_one_character_are_told_apart_from_nothing() -> None:
    kinds, _ = token_kinds("é!", [(0, 1), (0, 1), (1, 2)], [0, 0, 0])
    assert [list(KINDS)[kind] for kind in kinds] == ["common word", "common word", "punctuation"]
