"""Which machine, threads, versions, seed and code figures came from, and a refusal to mix what differs in them.

now = describe(threads=2, seed=0)
refuse_mixing(json.loads(path.read_text()).get("provenance"), now, where=path)
write_json(path, {"provenance": now, ...})
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recollect._provenance import Difference, differences, in_words
from recollect._version import __version__

from .environment import commit_of, core_digest, describe_machine, is_changed, library_versions


class MixedResults(ValueError):
    """Figures of two machines, versions or seeds would stand in one file; the message names what differs."""


def describe(*, threads: int | None = None, device: str = "cpu", seed: int | None = None) -> dict[str, Any]:
    """Everything that two measurements must share to be compared, as plain values for JSON.

    Args:
        threads: that torch and the libraries use; None asks torch.
        device: where was measured; the name of an accelerator is looked up.
        seed: None where nothing was drawn.
    """
    machine = describe_machine()
    if device.partition(":")[0] == "cuda":
        import torch

        machine["accelerator"] = torch.cuda.get_device_name(device)
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    commit = commit_of()
    return {
        "recollect": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "libraries": library_versions(),
        "threads": threads,
        "device": device,
        "seed": seed,
        "commit": commit,
        "uncommitted_changes": is_changed() if commit else None,
        "code": core_digest(),
    }


def refuse_mixing(
    former: Mapping[str, Any] | None,
    now: Mapping[str, Any],
    *,
    where: Path | str,
    remedy: str = "give another output, or remove it to measure everything anew",
) -> None:
    """Raises MixedResults where figures described by `former` must not stand beside figures described by `now`.

    Args:
        former: what the file or folder says of the figures in it; None, or what it leaves out, is not compared.
        now: what `describe` says.
        where: that file or folder, for the message.
        remedy: what to do, for the message.
    """
    found = differences(former, now)
    if found:
        raise MixedResults(f"{where} was measured with other settings ({in_words(found)}): {remedy}")


def provenance_in(path: Path | str) -> Mapping[str, Any] | None:
    """What a JSON file says of where its figures come from; None where there is no such file, or it says nothing."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = content.get("provenance") if isinstance(content, Mapping) else None
    return found if isinstance(found, Mapping) else None


__all__ = ["Difference", "MixedResults", "describe", "differences", "in_words", "provenance_in", "refuse_mixing"]
