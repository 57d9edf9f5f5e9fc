"""`recollect backends`"""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from recollect.commands._options import JsonOption
from recollect.commands._printing import print_json, shown


def backends(as_json: JsonOption = False) -> None:
    """Lists every memory backend: options with defaults, capabilities, whether its library is here.

    And which kernel exact search takes on this machine's CPU.

    **Examples**

        recollect backends

        recollect backends --json
    """
    from recollect.memory_backends import cpu_search, list_backends

    found = list_backends()
    if as_json:
        print_json([dataclasses.asdict(info) for info in found])
        return
    table = Table(title="Memory backends", caption="*: changes without a rebuild (set_search_options)", show_lines=True)
    for column in ("backend", "what it is", "options", "capabilities", "here"):
        table.add_column(column, overflow="fold")
    for info in found:
        options = "\n".join(
            f"{option.name}={shown(option.default)}{'*' if option.changeable else ''}" for option in info.options
        )
        able = info.capabilities
        traits = [
            "exact" if able.exact else "approximate",
            f"{able.eviction} eviction",
            "/".join(able.devices),
            *(["trained"] if able.needs_training else []),
            *([] if able.deterministic else ["not deterministic"]),
            *(["for one shared memory"] if info.one_shared else []),
        ]
        here = "yes" if info.available else info.pip_command
        table.add_row(info.name, info.summary, options or "none", ", ".join(traits), here)
    Console().print(table)
    Console().print(f"exact search on this CPU: {cpu_search.describe()}", markup=False)
