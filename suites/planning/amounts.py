"""Numbers as people write them on a command line, and back."""

from __future__ import annotations

import contextlib
import math
import re

from recollect.memory_backends.options import parse_bytes as parse_size

_NUMBER = re.compile(r"\s*(?P<number>\d[\d_,]*(?:\.\d+)?(?:[eE]\+?\d{1,3})?)\s*(?P<unit>[A-Za-z]*)\s*\Z")
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_COUNTS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_RATE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]+?)(?:/s|ps)?\s*\Z")
_BIT_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_BYTES = {"": 1, "b": 1}
_BYTES |= {
    f"{prefix}{end}": factor for prefix, factor in _COUNTS.items() if prefix not in ("", "b") for end in ("b", "")
}


class PlanError(ValueError):
    """A plan that cannot be made as asked; the message names the value and the remedy."""


def parse_count(text: str, what: str) -> int:
    """A whole number of at least 1 from text such as 1e9, 10M, 64k (64,000) or 64Ki (65,536).

    Raises:
        PlanError: it is none; the message calls it `what`.
    """
    match = _NUMBER.match(text)
    factor = _COUNTS.get(match["unit"].lower()) if match else None
    if match is not None and factor is not None:
        number = re.sub("[_,]", "", match["number"])
        # Whole numbers stay whole: a float would round those above 2^53.
        value = int(number) * factor if number.isdigit() else float(number) * factor
        if 1 <= value < 2**63 and value == int(value):
            return int(value)
    raise PlanError(
        f"{what} is {text!r}; it must be a whole number of at least 1, such as 65536, 1e9, 10M or 64k (64Ki is 65536)"
    )


def parse_bytes(text: str, what: str) -> int:
    """A number of bytes from text such as 24GiB, 24GB (24e9) or 1.5TiB.

    Raises:
        PlanError: it is none; the message calls it `what`.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise PlanError(f"{what}: {error}") from None


def parse_per_second(text: str, what: str) -> float:
    """A rate above zero from text such as 20000, 1e6, 20k or 0.5; the message of PlanError calls it `what`."""
    match = _NUMBER.match(text)
    factor = _COUNTS.get(match["unit"].lower()) if match else None
    if match is not None and factor is not None:
        value = float(re.sub("[_,]", "", match["number"])) * factor
        if 0 < value < math.inf:
            return value
    raise PlanError(f"{what} is {text!r}; write a number above zero, such as 500, 2e4 or 20k")


def parse_rate(text: str, what: str) -> float:
    """Bytes a second from text such as 10Gbit, 25Gbit/s, 1.25GB/s or 1GiB/s.

    Raises:
        PlanError: it is none; the message calls it `what`.
    """
    match = _RATE.match(text)
    if match is not None:
        bits = _BIT_RATES.get(match["unit"].lower())
        if bits is not None and float(match["number"]) > 0:
            return float(match["number"]) * bits / 8
        with contextlib.suppress(ValueError):
            return float(parse_size(f"{match['number']}{match['unit']}"))
    raise PlanError(f"{what} is {text!r}; write it as 10Gbit, 25Gbit/s, 1.25GB/s or 800MiB/s, above zero")


def seconds_text(seconds: float) -> str:
    """A duration for a person: 3.2 ms, 41 s, 2.5 h, 14 days, 3.1 years."""
    for least, unit, name in ((1e-3, 1e-3, "ms"), (0.0, 1e-6, "µs")):
        if least <= seconds < 1:
            return f"{_three(seconds / unit)} {name}"
    for most, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h"), (86400 * 730, 86400, "days")):
        if seconds < most:
            return f"{_three(seconds / unit)} {name}"
    return f"{_three(seconds / (86400 * 365.25))} years"


def rate_text(bytes_per_second: float) -> str:
    """Bytes a second for a person, as networks are called: 10 Gbit/s."""
    for unit, name in ((1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if 8 * bytes_per_second >= unit:
            return f"{_three(8 * bytes_per_second / unit)} {name}"
    return f"{_three(8 * bytes_per_second)} bit/s"


def bytes_text(size: float) -> str:
    """Bytes for a person: 1.5 GiB."""
    for unit, name in ((2**50, "PiB"), (2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{_three(size / unit)} {name}"
    return f"{size:.0f} bytes"


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
