"""Runbooks of big-ann-benchmarks' streaming track (NeurIPS 2023), as far as a first-in first-out memory follows them.

A runbook is YAML: a data set's name, and below it steps numbered from 1, each with an `operation`:

    insert, start, end    keys `start` to before `end` of the data set come
    delete, start, end    those keys go
    search                all queries of the data set are searched
    replace               keys change in place: no memory does that, so it is refused

and `max_pts`, the most keys that are alive at once (https://github.com/harsha-simhadri/big-ann-benchmarks,
`neurips23/streaming`). A memory forgets the oldest keys as new ones come, so it follows a sliding window: deletes take
the oldest keys, and whenever a search comes after deletes the same number of keys is alive. A delete of everything is a
reset.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recollect.memory_backends.atomic import write_text
from recollect.model.documents import CorpusError

OPERATIONS = ("insert", "delete", "search", "replace")
Ranges = tuple[tuple[int, int], ...]
"""Keys from a place to before another, oldest first."""


@dataclass(frozen=True)
class RunbookStep:
    """One step; `start` and `end` are 0 for a search."""

    number: int
    operation: str
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Runbook:
    """The steps for one data set, and the most keys alive at once."""

    dataset: str
    steps: tuple[RunbookStep, ...]
    max_pts: int

    @property
    def last_key(self) -> int:
        """One beyond the last key that any step names."""
        return max((step.end for step in self.steps), default=0)


@dataclass(frozen=True)
class FifoStep:
    """A step as a memory follows it.

    Attributes:
        number, operation, start, end: of the runbook's step. A delete that empties the memory is the operation 'reset',
            any other is 'evict', which takes place by itself as keys come.
        alive: the keys alive after it, oldest first.
    """

    number: int
    operation: str
    start: int
    end: int
    alive: Ranges

    @property
    def alive_keys(self) -> int:
        """How many keys are alive after it."""
        return sum(end - start for start, end in self.alive)


def load_runbook(path: str | Path, dataset: str | None = None) -> Runbook:
    """Reads the steps for a data set, the only one of the file where none is named.

    Raises:
        CorpusError: no such file, no YAML, no such data set, or a step that is not understood, by its number.
    """
    path = Path(path).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorpusError(f"no such runbook: {str(path)!r}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} is not YAML: {error}") from error
    books = {str(name): book for name, book in content.items() if isinstance(book, dict)} if _is(content) else {}
    if not books:
        raise CorpusError(f"{path} is no runbook: want a data set's name, and below it steps numbered from 1")
    if dataset is None and len(books) > 1:
        raise CorpusError(f"{path} has steps for {', '.join(books)}: name one with --dataset")
    name = next(iter(books)) if dataset is None else dataset
    if name not in books:
        raise CorpusError(f"{path} has no steps for {name!r}; it has {', '.join(books)}")
    book = books[name]
    numbers = sorted(number for number in book if isinstance(number, int))
    if numbers != list(range(1, len(numbers) + 1)) or not numbers:
        missing = next((number for number in range(1, len(numbers) + 2) if number not in book), 1)
        raise CorpusError(f"{path}: steps are numbered from 1 without a gap, and step {missing} is missing")
    steps = tuple(_step(path, number, book[number]) for number in numbers)
    return Runbook(name, steps, int(book.get("max_pts") or _most_alive(steps)))


def _is(content: Any) -> bool:
    return isinstance(content, dict)


def _step(path: Path, number: int, entry: Any) -> RunbookStep:
    operation = entry.get("operation") if _is(entry) else None
    if operation not in OPERATIONS:
        raise CorpusError(f"{path}, step {number}: operation {operation!r} is none of {', '.join(OPERATIONS)}")
    if operation in ("search", "replace"):
        return RunbookStep(number, operation)
    start, end = entry.get("start"), entry.get("end")
    if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end:
        raise CorpusError(
            f"{path}, step {number}: {operation} needs start and end, 0 <= start < end; got {start}, {end}"
        )
    return RunbookStep(number, operation, start, end)


def _most_alive(steps: tuple[RunbookStep, ...]) -> int:
    alive = most = 0
    for step in steps:
        alive += {"insert": 1, "delete": -1}.get(step.operation, 0) * (step.end - step.start)
        most = max(most, alive)
    return most


def as_fifo(runbook: Runbook) -> tuple[int, list[FifoStep]]:
    """The capacity of a memory that follows a runbook, and the steps as it follows them.

    Raises:
        CorpusError: it is no sliding window; the step that shows it is named.
    """
    alive: deque[tuple[int, int]] = deque()
    came = 0
    exactly: dict[int, int] = {}
    at_least: dict[int, int] = {}
    found = []
    for step in runbook.steps:
        operation = step.operation
        if operation == "replace":
            raise CorpusError(
                f"step {step.number} replaces keys: a memory never changes a key, it only forgets the oldest"
            )
        if operation == "insert":
            for start, end in alive:
                if step.start < end and start < step.end:
                    raise CorpusError(
                        f"step {step.number} inserts keys {max(start, step.start)} and on, which are alive"
                    )
            _append(alive, step.start, step.end)
            came += step.end - step.start
        elif operation == "delete":
            _forget_oldest(alive, step)
            operation = "evict" if alive else "reset"
            came = came if alive else 0
        held = sum(end - start for start, end in alive)
        if operation == "search":
            (at_least if came == held else exactly)[step.number] = held
        found.append(FifoStep(step.number, operation, step.start, step.end, tuple(alive)))
    return _capacity(runbook, exactly, at_least), found


def _append(alive: deque[tuple[int, int]], start: int, end: int) -> None:
    if alive and alive[-1][1] == start:
        alive[-1] = (alive[-1][0], end)
    else:
        alive.append((start, end))


def _forget_oldest(alive: deque[tuple[int, int]], step: RunbookStep) -> None:
    start = step.start
    while start < step.end:
        if not alive or alive[0][0] != start:
            oldest = f"the oldest alive is {alive[0][0]}" if alive else "none is alive"
            raise CorpusError(
                f"step {step.number} deletes keys {step.start} to {step.end - 1}, and {oldest}: a memory forgets the "
                "oldest first, so only sliding windows can be replayed (such as the msturing-10M_slidingwindow_runbook)"
            )
        _, end = alive.popleft()
        if end > step.end:
            alive.appendleft((step.end, end))
        start = min(end, step.end)


def _capacity(runbook: Runbook, exactly: dict[int, int], at_least: dict[int, int]) -> int:
    if not exactly and not at_least:
        raise CorpusError("the runbook never searches: there is nothing to measure")
    for number, held in {**exactly, **at_least}.items():
        if held == 0:
            raise CorpusError(f"step {number} searches when no key is alive")
    first, capacity = next(iter(exactly.items()), (0, max(at_least.values(), default=0)))
    for number, held in exactly.items():
        if held != capacity:
            raise CorpusError(
                f"step {number} searches {held} keys after deletes, and step {first} {capacity}: a memory that forgets "
                "the oldest as new ones come always holds the same number then; delete as many as come between searches"
            )
    for number, held in at_least.items():
        if held > capacity:
            raise CorpusError(
                f"step {number} searches {held} keys, and step {first} {capacity} after deletes: a memory that "
                f"small would have forgotten the oldest of {held}"
            )
    return capacity


def sliding_window(dataset: str, *, keys: int, window: int | None = None, step: int | None = None) -> Runbook:
    """A runbook that fills a window and slides it over a data set, in the order of the track's own sliding windows.

    Args:
        keys: of the data set; those that fill no whole step at its end are left out.
        window: keys alive at each search, a multiple of `step`; about half of them when None.
        step: keys that come, and go, between two searches; a hundredth of the window, or somewhat less, when None.

    Raises:
        CorpusError: numbers that do not fit.
    """
    if step is None:
        most = max((keys // 2 if window is None else window) // 100, 1)
        step = next(size for size in range(most, 0, -1) if window is None or window % size == 0)
    if window is None:
        window = max(keys // 2 // step, 1) * step
    if not 1 <= step <= window <= keys or window % step:
        raise CorpusError(
            f"a window of {window} keys in steps of {step} over {keys} keys does not fit: want step <= window <= keys, "
            "and the window a multiple of the step"
        )
    steps: list[tuple[str, int, int]] = []
    for start in range(0, keys - step + 1, step):
        if start >= window:
            steps += [("search", 0, 0), ("delete", start - window, start - window + step)]
        steps.append(("insert", start, start + step))
    steps.append(("search", 0, 0))
    numbered = tuple(RunbookStep(number, *one) for number, one in enumerate(steps, start=1))
    return Runbook(dataset, numbered, window)


def write_runbook(path: str | Path, runbook: Runbook) -> None:
    """Writes a runbook as the track does; whole or not at all."""
    book: dict[Any, Any] = {
        step.number: {"operation": step.operation}
        | ({} if step.operation == "search" else {"start": step.start, "end": step.end})
        for step in runbook.steps
    }
    book["max_pts"] = runbook.max_pts
    write_text(Path(path), yaml.safe_dump({runbook.dataset: book}, sort_keys=False))
