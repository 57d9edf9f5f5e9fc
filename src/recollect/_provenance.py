"""Whether two sets of figures came about alike: what each says of its machine, threads, versions, seed and code.

Rooms that may not import each other share this: those that measure write the description, those that report compare it.
Only what both descriptions name is compared, so a file of an earlier version is not refused for what it leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPARED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("machine", "cpu"), "processor"),
    (("machine", "cores"), "usable cores"),
    (("machine", "accelerator"), "accelerator"),
    (("machine", "python"), "Python"),
    (("threads",), "threads"),
    (("device",), "device"),
    (("seed",), "seed"),
    (("k",), "k"),
    (("checkpoint", "digest"), "checkpoint"),
    (("text",), "text"),
)
"""Entries of a description that must be equal, with the words for them; libraries and code are compared besides."""

SHORT = 12
"""Characters of a digest that are shown."""


@dataclass(frozen=True)
class Difference:
    """One thing that two descriptions say differently."""

    name: str
    one: str
    other: str

    def __str__(self) -> str:
        return f"{self.name} {self.one} against {self.other}"


def differences(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> tuple[Difference, ...]:
    """What two descriptions (`suites.provenance.describe`, run.json) say differently; empty where one is missing."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return ()
    found = []
    for path, name in COMPARED:
        mine, others = _entry(one, path), _entry(other, path)
        if mine is not None and others is not None and mine != others:
            found.append(Difference(name, _shown(mine), _shown(others)))
    mine, others = one.get("libraries"), other.get("libraries")
    if isinstance(mine, Mapping) and isinstance(others, Mapping):
        found += [
            Difference(library, str(mine[library]), str(others[library]))
            for library in sorted(set(mine) & set(others))
            if mine[library] != others[library]
        ]
    code, other_code = one.get("code"), other.get("code")
    if code is not None and other_code is not None and code != other_code:
        found.append(Difference("code", _commit(one), _commit(other)))
    return tuple(found)


def in_words(found: Sequence[Difference]) -> str:
    """The differences in one line."""
    return "; ".join(str(difference) for difference in found)


def _entry(content: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = content
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    text = str(value)
    return text[:SHORT] if len(text) >= 32 and " " not in text else text


def _commit(content: Mapping[str, Any]) -> str:
    """The commit of a description, and whether its code differs from it."""
    commit, code = content.get("commit"), str(content.get("code"))
    if not commit:
        return f"of digest {code[:SHORT]}"
    return f"of commit {str(commit)[:SHORT]}" + (" with changes" if content.get("uncommitted_changes") else "")
