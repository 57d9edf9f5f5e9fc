"""What the results in an ablation's folder come from, and a refusal to add to them what comes from elsewhere.

Weights and losses are equal only between equal threads, versions and code, and times only between equal machines. Where
someone goes on all the same (`mix`), the folder keeps what differed, and its pages say so.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json

from ..environment import training_digest
from ..provenance import describe, differences, in_words
from .jobs import read_record
from .options import AblateError

FILE = "provenance.json"


def settle(
    output: Path,
    *,
    threads: int,
    device: str,
    mix: bool,
    machine: Mapping[str, Any] | None = None,
    unlike: Sequence[str] = (),
) -> None:
    """Compares what lies in `output` with what this run would add, and notes the latter.

    Args:
        output: the folder.
        threads, device, mix: as of `AblateOptions`.
        machine: that trains and evaluates; None is this one.
        unlike: what differs between the machines of this run, in words.

    Raises:
        AblateError: they differ, and `mix` is not set.
    """
    now = {**describe(threads=threads, device="cpu" if machine else device), "code": training_digest()}
    now |= {"device": device, "machine": {**now["machine"], **(machine or {})}}
    known = read_record(output / FILE) or {}
    former = known.get("provenance") or _of_grids(output)
    mixed = list(known.get("mixed", []))
    found = differences(former, now)
    if found and not mix:
        raise AblateError(
            f"{output} holds results measured with other settings ({in_words(found)}): give another --output, or go on "
            "all the same with --mix, which the folder's pages then tell"
        )
    mixed += [text for text in unlike if text not in mixed]
    if found:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        mixed.append(f"from {date} on: {in_words(found)}")
    write_json(output / FILE, {"schema": 1, "provenance": now, "mixed": mixed})


def machine_of(output: Path) -> Mapping[str, Any] | None:
    """The machine that the results of a folder come from; None where there are none, or they do not say."""
    known = (read_record(output / FILE) or {}).get("provenance") or _of_grids(output) or {}
    found = known.get("machine")
    return found if isinstance(found, Mapping) else None


def mixed_in(output: Path) -> list[str]:
    """What differs between the results of a folder, in words; empty where nothing does."""
    return [str(text) for text in (read_record(output / FILE) or {}).get("mixed", [])]


def _of_grids(output: Path) -> Mapping[str, Any] | None:
    """What a folder of an earlier version says: the run.json of one of its grids."""
    for path in sorted(output.glob("*/run.json")):
        record = read_record(path)
        if record is not None:
            return {name: record.get(name) for name in ("machine", "libraries", "threads")}
    return None
