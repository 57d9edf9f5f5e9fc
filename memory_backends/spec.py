"""The grammar of registry strings, and how their options become a frozen dataclass.

    spec    = name [":" option ("," option)*]
    option  = key "=" value
    value   = bare | "'" quoted "'"

`faiss-ivf:nlist=256,nprobe=16` names the backend `faiss-ivf` and two of its options. A bare value has no comma,
quote or blank; a quoted one may hold anything, a quote being written twice. The canonical form sorts the options and
drops those that equal their default: it is a backend's identity in tests, in benchmark parameters and in reports.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from recollect.memory_backends.errors import InvalidSpec, UnsupportedOperation

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")
_OPTION = re.compile(
    r"\s*(?P<key>[A-Za-z_]\w*)\s*=\s*(?:'(?P<quoted>(?:[^']|'')*)'|(?P<bare>[^\s,']*))\s*(?:(?P<comma>,)|\Z)"
)
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Splits a registry string into its name and its options as written.

    Raises:
        InvalidSpec: the string does not follow the grammar or gives an option twice.
    """
    if not isinstance(text, str):
        raise InvalidSpec(f"a backend is named by a string such as 'exact', got {text!r}")
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    if not NAME.match(name):
        raise InvalidSpec(f"{text!r} does not begin with a backend's name: write 'name' or 'name:key=value,key=value'")
    options: dict[str, str] = {}
    if colon and not rest.strip():
        raise InvalidSpec(f"{text!r} has no option after the colon: write {name!r} alone or '{name}:key=value'")
    position, more = 0, bool(colon)
    while more:
        match = _OPTION.match(rest, position)
        if match is None or (match["quoted"] is None and not match["bare"]):
            raise InvalidSpec(
                f"{text!r} is not understood from {rest[position:]!r} on: options are 'key=value' with commas between "
                "them, and a value with a comma, a blank or a quote stands in single quotes"
            )
        key = match["key"]
        if key in options:
            raise InvalidSpec(f"{text!r} gives the option {key!r} twice")
        options[key] = match["quoted"].replace("''", "'") if match["quoted"] is not None else match["bare"]
        position, more = match.end(), match["comma"] is not None
    return name, options


def format_spec(name: str, options: Mapping[str, Any]) -> str:
    """The registry string of a name and options, sorted by option name."""
    if not options:
        return name
    return name + ":" + ",".join(f"{key}={_format_value(value)}" for key, value in sorted(options.items()))


def _format_value(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if text and not re.search(r"[\s,']", text):
        return text
    return "'" + text.replace("'", "''") + "'"


def make_options(options_type: type, given: Mapping[str, Any], *, name: str) -> Any:
    """An instance of a backend's frozen options dataclass from text or Python values.

    Raises:
        InvalidSpec: an option is unknown (the nearest names are offered), ill-typed, or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(options_type)}
    hints = typing.get_type_hints(options_type)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3, cutoff=0.5)
            offer = f"did you mean {' or '.join(map(repr, near))}?" if near else _list_options(name, fields)
            raise InvalidSpec(f"{name!r} has no option {key!r}; {offer}")
        values[key] = _convert(value, hints[key], name=name, key=key)
    try:
        return options_type(**values)
    except InvalidSpec:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidSpec(f"{name!r}: {error}") from error


def with_search_options(options: Any, changes: Mapping[str, Any], can_change: Collection[str], *, name: str) -> Any:
    """A backend's options with some of those changed that need no rebuild.

    Raises:
        InvalidSpec: an option is unknown or ill-typed.
        UnsupportedOperation: an option is none of `can_change`.
    """
    current = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    changed = make_options(type(options), {**current, **changes}, name=name)
    fixed = sorted(set(changes) - set(can_change))
    if fixed:
        can = ", ".join(can_change) or "none"
        raise UnsupportedOperation(
            f"{name!r} can't change {', '.join(fixed)} once it is made (it can change: {can}); "
            "make a new backend with make_backend"
        )
    return changed


def options_given(options: Any) -> dict[str, Any]:
    """The options that differ from their defaults."""
    given = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default if field.default is not dataclasses.MISSING else None
        if value != default:
            given[field.name] = value
    return given


def _list_options(name: str, fields: Mapping[str, Any]) -> str:
    return f"its options are {', '.join(sorted(fields))}" if fields else f"{name!r} takes no options"


def _convert(value: Any, hint: Any, *, name: str, key: str) -> Any:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in arguments):
            return None
        errors = []
        for candidate in arguments:
            if candidate is not type(None):
                try:
                    return _convert(value, candidate, name=name, key=key)
                except InvalidSpec as error:
                    errors.append(error)
        raise errors[0]
    if typing.get_origin(hint) is typing.Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(item) for item in arguments], n=1)
        offer = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidSpec(f"{name!r}: {key}={value!r} is not one of {', '.join(map(repr, arguments))}{offer}")
    problem = InvalidSpec(f"{name!r}: {key}={value!r} is not {_describe(hint)}")
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        raise problem
    if hint in (int, float):
        if isinstance(value, bool):
            raise problem
        try:
            converted = hint(value)
        except (TypeError, ValueError):
            raise problem from None
        if hint is int and not isinstance(value, str) and converted != value:
            raise problem
        if hint is float and not (converted == converted and abs(converted) != float("inf")):
            raise problem
        return converted
    if hint is str:
        if isinstance(value, str):
            return value
        raise problem
    raise InvalidSpec(f"{name!r}: option {key!r} has a type that no registry string can hold: {hint!r}")


def _describe(hint: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}.get(hint, str(hint))
