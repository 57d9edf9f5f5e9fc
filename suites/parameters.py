"""Which specs and memory sizes the suites run: what the backends declare, never what is installed.

A missing library is a skip with its reason, so that results of two machines have the same parameters.
"""

from __future__ import annotations

import json
from pathlib import Path

from .options import MEMORY_SIZES

SPECS_FILE = Path("specs.json")
"""In the folder that `setup_cache` fills, the list as it was when the run began."""


def declared_specs() -> list[str]:
    """The canonical specs of every backend's sweep: exact first, then by backend, in the order of its sweep.

    Without the backends for one shared memory, which no model has for every row and head.
    """
    from recollect.memory_backends import list_backends

    found: dict[str, None] = {}
    for info in sorted(list_backends(), key=lambda info: (info.name != "exact", info.name)):
        found.update(dict.fromkeys(() if info.one_shared else info.sweep))
    return list(found)


def specs_of_run() -> list[str]:
    """`declared_specs()`, read from the run's folder where there is one.

    asv starts a process for each parameter of each benchmark; this spares most of them the import of torch.
    """
    try:
        specs = json.loads(SPECS_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return declared_specs()
    return [str(spec) for spec in specs]


SPECS: list[str] = specs_of_run()

__all__ = ["MEMORY_SIZES", "SPECS", "declared_specs"]
