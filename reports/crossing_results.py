"""What `recollect crossover` measured, read from its folder, and what it says: crossings, and sentences.

`crossover.json` holds the run (machine, libraries, seed ...) and the points: one for each index and memory size, with a
row for each number of queries and each recall wanted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.reports.crossing import Crossing, SizedRatio, find_crossing
from recollect.reports.errors import ReportError

SCHEMA = 1
FILE = "crossover.json"

COLUMNS = (
    *("index", "memory_size", "memories", "queries", "recall_wanted", "spec", "recall", "search_ms", "exact_ms"),
    *("ratio", "ratio_low", "ratio_high", "append_ms", "exact_append_ms"),
    *("step_ratio", "step_ratio_low", "step_ratio_high", "rounds", "noisy"),
)
"""Of crossover.csv: a row for each index, memory size, number of queries and recall wanted."""


@dataclass(frozen=True)
class Case:
    """One of the questions: at so many queries a step and this recall, appends counted or not."""

    queries: int
    recall: float
    appends: bool


@dataclass(frozen=True)
class IndexCrossing:
    """Whether and where one index overtakes exact search in one case.

    Attributes:
        index: registry string without the options that were varied.
        backend: its name.
        crossing: of the sizes at which the recall was reached.
        recall: at the largest measured size: of the options that were timed, or the most that any found.
        largest: the largest size that was measured.
        was_clearly_quicker: at some size the whole interval of the ratio lay below 1.
        stopped: why no larger one was.
    """

    case: Case
    index: str
    backend: str
    crossing: Crossing
    recall: float
    largest: int
    was_clearly_quicker: bool
    stopped: str

    @property
    def certain(self) -> bool:
        """It overtakes, and from some measured size on the whole interval says so."""
        return self.crossing.overtakes and self.crossing.high is not None

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        found, ratio = self.crossing, self.crossing.ratio
        return {
            "queries": self.case.queries,
            "recall_wanted": self.case.recall,
            "appends_counted": self.case.appends,
            "index": self.index,
            "outcome": found.outcome,
            "size": found.size,
            "size_low": found.low,
            "size_high": found.high,
            "smallest_measured": found.smallest,
            "largest_measured": self.largest,
            "ratio_at_largest": ratio.value if ratio else None,
            "ratio_low": ratio.low if ratio else None,
            "ratio_high": ratio.high if ratio else None,
            "spec": found.spec or None,
            "recall": self.recall,
            "stopped": self.stopped,
        }


@dataclass(frozen=True)
class CrossoverResults:
    """A run and its points, as they stand in `crossover.json`."""

    run: Mapping[str, Any]
    points: tuple[Mapping[str, Any], ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every question, searches alone before appends counted."""
        return tuple(
            Case(queries, recall, appends)
            for queries in self.run["queries"]
            for recall in self.run["recalls"]
            for appends in (False, True)
        )

    @property
    def indexes(self) -> tuple[str, ...]:
        """The indexes that were measured, in the order of the run."""
        return tuple(dict.fromkeys(str(point["index"]) for point in self.points))

    def points_of(self, index: str) -> list[Mapping[str, Any]]:
        """The points of an index, by size."""
        return sorted((point for point in self.points if point["index"] == index), key=lambda point: point["size"])

    def crossings(self, case: Case) -> tuple[IndexCrossing, ...]:
        """One for each index; those that overtake come first, the certain ones by size at the top."""
        found = [self._crossing(case, index) for index in self.indexes]
        return tuple(sorted(found, key=_rank))

    def _crossing(self, case: Case, index: str) -> IndexCrossing:
        points = self.points_of(index)
        rows = [(point["size"], row) for point in points if (row := row_of(point, case)) is not None]
        if not rows:
            raise ReportError(f"{index} was measured nowhere with {case.queries} queries and recall {case.recall}")
        ratios = [ratio for size, row in rows if (ratio := sized_ratio(size, row, appends=case.appends)) is not None]
        last = rows[-1][1]
        # What was quicker where it still reached the recall has not overtaken anything if it no longer does.
        crossing = find_crossing(ratios) if last["spec"] is not None else Crossing("recall not reached")
        stopped = str(self.run.get("stopped", {}).get(index, ""))
        return IndexCrossing(
            case,
            index,
            str(points[-1]["backend"]),
            crossing,
            recall=float(last["recall"]),
            largest=int(rows[-1][0]),
            was_clearly_quicker=any(ratio.high < 1 for ratio in ratios),
            stopped=stopped,
        )

    def rows(self) -> list[dict[str, Any]]:
        """The lines of crossover.csv."""
        found = []
        for index in self.indexes:
            for point in self.points_of(index):
                for row in point["rows"]:
                    whole = {"index": index, "memory_size": point["size"], "memories": point["memories"], **row}
                    found.append({name: whole.get(name) for name in COLUMNS})
        return found


def load_crossover(folder: str | Path) -> CrossoverResults:
    """Reads a folder that `recollect crossover` wrote.

    Raises:
        ReportError: there is none, or it cannot be read.
    """
    path = Path(folder) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ReportError(f"{path} has schema {content['schema']}, this reads {SCHEMA}: measure again")
        return CrossoverResults(content["run"], tuple(content["points"]))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}; `recollect crossover` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is damaged ({error}): run `recollect crossover` again") from error


def row_of(point: Mapping[str, Any], case: Case) -> Mapping[str, Any] | None:
    """The row of a point that a case is about; None where it was not measured there."""
    for row in point["rows"]:
        if row["queries"] == case.queries and row["recall_wanted"] == case.recall:
            found: Mapping[str, Any] = row
            return found
    return None


def sized_ratio(size: int, row: Mapping[str, Any], *, appends: bool) -> SizedRatio | None:
    """The ratio to exact search that a row holds, None where no options reached the recall."""
    if row["spec"] is None:
        return None
    name = "step_ratio" if appends else "ratio"
    return SizedRatio(int(size), row[name], row[f"{name}_low"], row[f"{name}_high"], str(row["spec"]))


def _rank(found: IndexCrossing) -> tuple[float, float, str]:
    crossing = found.crossing
    if crossing.overtakes:
        return float(not found.certain), crossing.size or 0.0, found.index
    return 2.0, crossing.ratio.value if crossing.ratio else float("inf"), found.index


# Sentences ---------------------------------------------------------------------------------------------------------


def answer(case: Case, crossings: Sequence[IndexCrossing]) -> str:
    """What was found in one case, as a sentence or two for a person; registry strings stand between backticks."""
    how = "with the step's appends counted" if case.appends else "searches alone"
    head = f"{plural(case.queries, 'query', 'queries')} a step, recall at least {case.recall:g}, {how}: "
    return head + _verdict(crossings)


def _verdict(crossings: Sequence[IndexCrossing]) -> str:
    if not crossings:
        return "no index was measured."
    first = crossings[0]
    found = first.crossing
    if not found.overtakes:
        return _nobody(crossings)
    assert found.size is not None
    assert found.ratio is not None
    if found.outcome == "from the start":
        text = (
            f"already at {found.smallest:,} keys, the smallest memory measured, `{first.index}` is quicker than exact"
        )
        text += f" search{'' if found.high == found.smallest else ', though not beyond the noise there'}. "
    elif any(one.crossing.overtakes and (one.crossing.size or 0) < found.size for one in crossings):
        # Others may be quicker at smaller sizes, as far as noise lets see.
        text = (
            f"from about {rounded(found.size)} keys on{_interval(found)} `{first.index}` is quicker than exact search; "
        )
        text += "below that no index is, beyond the noise. "
    else:
        text = f"up to about {rounded(found.size)} keys exact search is quicker than every index measured"
        text += f"{_interval(found)}; from there on `{first.index}` is quicker. "
    noise = "" if found.clear else ", which is within the noise"
    text += f"At {found.ratio.size:,} keys it takes {_ratio(found.ratio)} the time of exact search{noise}"
    return f"{text}, as `{found.spec}` (recall {first.recall:.3f})."


def _nobody(crossings: Sequence[IndexCrossing]) -> str:
    reaching = [one for one in crossings if one.crossing.ratio is not None]
    if not reaching:
        best = max(crossings, key=lambda one: one.recall)
        return (
            f"no index measured reaches this recall at its largest memory; `{best.index}` comes nearest with "
            f"{best.recall:.3f} at {best.largest:,} keys. Exact search stays."
        )
    nearest = reaching[0]
    ratio = nearest.crossing.ratio
    assert ratio is not None
    sizes = sorted({one.largest for one in crossings})
    reach = f"{sizes[0]:,} keys" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,} keys, by index"
    text = f"no index overtakes exact search as far as it was measured ({reach}); `{nearest.index}` comes nearest with "
    text += f"{_ratio(ratio)} the time of exact search at {ratio.size:,} keys"
    lost = [one.index for one in reaching if one.crossing.outcome == "not lasting" and one.was_clearly_quicker]
    if lost:
        text += f" (quicker at some smaller memories, which did not last: {', '.join(f'`{one}`' for one in lost)})"
    return text + "."


def _interval(crossing: Crossing) -> str:
    if crossing.low is not None and crossing.high is not None:
        return f" (interval {rounded(crossing.low)} to {rounded(crossing.high)})"
    if crossing.high is not None:
        return f" (at most {rounded(crossing.high)})"
    if crossing.low is not None:
        return f" (at least {rounded(crossing.low)}; noise leaves open how much later)"
    return " (within the noise)"


def _ratio(ratio: SizedRatio) -> str:
    return f"{ratio.value:.2f} times ({ratio.low:.2f} to {ratio.high:.2f})"


def rounded(size: float) -> str:
    """A size to two significant digits, as a person says it."""
    digits = max(0, len(str(int(size))) - 2)
    return f"{round(size, -digits):,.0f}"


def plural(number: int, one: str, several: str) -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else several}"


def answers(results: CrossoverResults, cases: Iterable[Case] | None = None) -> tuple[str, ...]:
    """A sentence for each case."""
    return tuple(answer(case, results.crossings(case)) for case in (results.cases if cases is None else cases))
