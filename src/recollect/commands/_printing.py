"""How answers reach standard output, for a person or for a program."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def shown(value: Any) -> str:
    """A default as a user would write it in a registry string."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def print_json(answer: Any) -> None:
    """Writes an answer for a program to standard output."""
    sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | set | frozenset) else str(value)


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """One level of dictionaries inside a dictionary, named by dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            result[key] = value
    return result


def print_figures(title: str, figures: dict[str, Any]) -> None:
    """Writes an answer for a person to standard output."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in figures.items():
        if isinstance(value, list | tuple):
            text = "\n".join(_one_line(item) for item in value)
        else:
            text = f"{value:.5g}" if isinstance(value, float) else str(value)
        table.add_row(key.replace("_", " "), text)
    Console().print(table)


def _one_line(item: Any) -> str:
    return ", ".join(f"{key}: {value}" for key, value in item.items()) if isinstance(item, dict) else str(item)


@contextlib.contextmanager
def progress_of(what: str, *, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields the function that takes how much is done and how much there is."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(f"{what} (loading)", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield advance


@contextlib.contextmanager
def steps_of(first: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error for work of several steps, on a terminal; elsewhere a line for each step.

    Yields the function that takes what is being done, how much of it is done, and how much there is.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, last = progress.add_task(first, total=None), first

        def tell(what: str, done: int, total: int) -> None:
            nonlocal last
            if what != last and not console.is_terminal:
                console.print(what, highlight=False, markup=False, soft_wrap=True)
            last = what
            progress.update(task, description=what, completed=done, total=total)

        yield tell


def figure(value: Any) -> str:
    """A figure as people read it: four places, whole numbers grouped."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_rows(
    title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, str]], *, notes: Sequence[str] = ()
) -> None:
    """A table with a row for each measurement to standard output, and notes below it.

    Args:
        columns: their headings by name, in order; the first stands left, the others right.
    """
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(columns.values()):
        table.add_column(heading, justify="right" if number else "left", no_wrap=bool(number), overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def ray_kept_quiet(engine: str) -> Iterator[None]:
    """Keeps what Ray's nodes tell off standard output, which is for the answer; what matters of it is told anyway."""
    if engine != "ray":
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
