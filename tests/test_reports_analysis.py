"""Crossover, Pareto front, advice and the words made of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from recollect.reports import load_results
from recollect.reports.advice import runs_of_sizes, within
from recollect.reports.analysis import Analysis, analyse
from recollect.reports.contents import notes, tables
from recollect.reports.crossover import Crossover, Timing, Workload, find_crossovers, workloads
from recollect.reports.curves import front_of, quickest_reaching, time_points
from recollect.reports.findings import findings, outcome
from recollect.reports.pareto import pareto_front
from recollect.reports.synthetic import SPECS, write_synthetic_results


def _series(backend: str, times: dict[int, float], recall: float = 0.95, spread: float | None = 0.01) -> list[Timing]:
    return [
        Timing(backend, backend, n, ms, None if spread is None else ms * (1 - spread), ms * (1 + (spread or 0)), recall)
        for n, ms in times.items()
    ]


def _cross(times: dict[int, float], recall: float = 0.95, floor: float | None = 0.9) -> Crossover:
    exact = _series("exact", {1000: 1.0, 10000: 10.0, 100000: 100.0}, recall=1.0)
    (found,) = find_crossovers(Workload("w", 1, 1, 1, (*exact, *_series("other", times, recall))), floor)
    return found


def test_crossover_is_interpolated_on_logarithmic_axes() -> None:
    # Slope 0.5 against slope 1: 10 ms * (n / 10000) ** 0.5 * sqrt(10) meets 10 ms * n / 10000 at n = 100000.
    found = _cross({1000: 2.0, 10000: 20 / 10**0.5 * 10**0.25, 100000: 20.0 * 10**0.5 / 10**0.5})
    assert found.outcome == "at"
    straight = _cross({1000: 2.0, 10000: 10.0 * 2**0.5, 100000: 100.0 / 2**0.5})
    assert straight.outcome == "at"
    assert straight.size == pytest.approx(10000 * 10**0.5)
    assert straight.ratio == pytest.approx(2**0.5)
    assert straight.clear


def test_crossover_outcomes() -> None:
    assert _cross({1000: 0.5, 10000: 5.0, 100000: 50.0}).outcome == "from the start"
    assert _cross({1000: 2.0, 10000: 20.0, 100000: 200.0}).outcome == "never"
    assert _cross({1000: 0.5, 10000: 5.0, 100000: 200.0}).outcome == "not lasting"
    assert _cross({1000: 0.5, 10000: 5.0}, recall=0.5).outcome == "no floor"
    assert _cross({1000: 0.5, 10000: 5.0}, recall=0.5, floor=None).outcome == "from the start"
    barely = _cross({1000: 0.995, 10000: 9.95, 100000: 99.5})
    assert barely.overtakes
    assert not barely.clear
    assert "within the spread" in outcome(barely)
    assert outcome(_cross({1000: 2.0, 10000: 20.0})) == "not up to 10,000 keys"


def test_the_quickest_spec_with_enough_recall_stands_for_a_backend() -> None:
    exact = _series("exact", {1000: 1.0, 10000: 10.0}, recall=1.0)
    careless = [Timing("ivf:p=1", "ivf", n, 0.1, None, None, 0.3) for n in (1000, 10000)]
    careful = [Timing("ivf:p=9", "ivf", n, ms, None, None, 0.95) for n, ms in ((1000, 2.0), (10000, 4.0))]
    workload = Workload("w", 1, 1, 1, (*exact, *careless, *careful))
    (found,) = find_crossovers(workload, 0.9)
    assert found.spec == "ivf:p=9"
    assert found.outcome == "at"
    (anything,) = find_crossovers(workload, None)
    assert anything.spec == "ivf:p=1"


def test_instruments_are_not_timed_against_exact() -> None:
    exact = _series("exact", {1000: 1.0}, recall=1.0)
    assert find_crossovers(Workload("w", 1, 1, 1, (*exact, *_series("degraded", {1000: 0.1})))) == ()


def test_pareto_front() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (4.0, 1.0), (2.5, 3.0), (3.0, 1.0)]
    assert pareto_front(points, lambda p: p[0], lambda p: p[1]) == [(1.0, 5.0), (2.5, 3.0), (3.0, 1.0)]
    assert pareto_front([(1.0, None), (None, 2.0)], lambda p: p[0], lambda p: p[1]) == []
    assert pareto_front([], lambda p: p, lambda p: p) == []


def _analysis(folder: Path, times: dict[str, tuple[float, float]] | None = None, **settings: object) -> Analysis:
    """An analysis of a synthetic folder; times: (search_ms, append_us_per_key) by spec, the same at every size."""
    chosen = tuple(times) if times else ("exact", "degraded:drop=0.5", "degraded:drop=0.05", "scann:leaves_to_search=4")
    options = {"specs": chosen, "sizes": (512, 8192), "tokens_per_document": 60, "with_crossover": False} | settings
    write_synthetic_results(folder, **options)  # type: ignore[arg-type]
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        if times and cell["spec"] in times and cell["status"] == "ok":
            ms, append = times[cell["spec"]]
            cell |= {"search_ms": ms, "search_ms_low": ms * 0.95, "search_ms_high": ms * 1.05}
            cell["append_us_per_key"] = append
            path.write_text(json.dumps(cell))
    return analyse(load_results(folder))


def test_exact_differs_from_itself_by_nothing(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path)
    for size in (512, 8192):
        exact = analysis.exact(size)
        assert exact is not None
        assert exact.difference is not None
        assert (exact.difference.low, exact.difference_point, exact.difference.high) == (0.0, 0.0, 0.0)
    half = next(r for r in analysis.at(8192) if r.cell.spec == "degraded:drop=0.5")
    assert half.difference is not None
    assert half.difference.low > 0
    assert half.perplexity is not None
    assert half.perplexity.low < (half.cell.perplexity or 0.0) < half.perplexity.high
    baseline = analysis.baseline
    assert baseline is not None
    assert baseline.difference is None


def test_advice_keeps_exact_when_nothing_is_quicker(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path, {"exact": (1.0, 0.1), "faiss-flat": (2.0, 0.1), "hnswlib:ef_search=128": (9.0, 9.0)})
    assert {c.row.cell.spec for c in analysis.advice.by_size} == {"exact"}
    headline = findings(analysis)[0].answer
    assert headline.startswith("From 512 to 8,192 keys take `exact`")
    assert "no other index is clearly quicker" in headline
    assert "`faiss-flat`" in headline, "the nearest is named"


def test_advice_asks_for_a_clear_gain(tmp_path: Path) -> None:
    slightly = _analysis(tmp_path / "a", {"exact": (1.0, 0.1), "faiss-flat": (0.97, 0.1)})
    assert {c.row.cell.spec for c in slightly.advice.by_size} == {"exact"}
    assert any("too little" in c.because for c in slightly.advice.by_size)
    clearly = _analysis(tmp_path / "b", {"exact": (1.0, 0.1), "faiss-flat": (0.5, 0.1)})
    assert {c.row.cell.spec for c in clearly.advice.by_size} == {"faiss-flat"}
    assert "times quicker than exact search" in findings(clearly)[0].answer


def test_advice_counts_appends(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path, {"exact": (10.0, 0.1), "faiss-flat": (1.0, 100.0)})
    assert analysis.cost_name == "search and append"
    assert {c.row.cell.spec for c in analysis.advice.by_size} == {"exact"}


def test_advice_judges_by_the_upper_end_of_the_interval(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path, {"exact": (10.0, 0.1), "scann:leaves_to_search=4": (1.0, 0.1)})
    by_tolerance = {c.tolerance: c.row.cell.spec for c in analysis.advice.by_size if c.memory_size == 8192}
    row = next(r for r in analysis.at(8192) if r.cell.backend == "scann")
    exact = analysis.exact(8192)
    assert exact is not None
    assert not within(row, exact, 0.01)
    assert within(row, exact, 0.05)
    assert by_tolerance == {0.01: "exact", 0.05: row.cell.spec, None: row.cell.spec}


def test_advice_never_names_instruments(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path, {"exact": (10.0, 0.1), "degraded:drop=0.05": (0.1, 0.1)})
    advised = [c.row for c in analysis.advice.by_size] + [r.row for r in analysis.advice.ladder]
    assert "degraded" not in {row.cell.backend for row in advised}


def test_the_ladder_rises_in_time_and_falls_in_perplexity(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path, specs=tuple(SPECS), sizes=(512, 2048, 8192))
    ladder = analysis.advice.ladder
    assert ladder[0].row.cell.spec == "none"
    assert len(ladder) > 2
    for before, after in itertools.pairwise(ladder):
        assert after.cost_ms > before.cost_ms
        assert (after.row.cell.perplexity or 0.0) <= 0.99 * (before.row.cell.perplexity or 0.0)


def test_sizes_with_one_choice_are_joined(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path, {"exact": (1.0, 0.1), "faiss-flat": (2.0, 0.1)}, sizes=(512, 2048, 8192))
    choices = [c for c in analysis.advice.by_size if c.tolerance == 0.01]
    assert [[c.memory_size for c in group] for group in runs_of_sizes(choices)] == [[512, 2048, 8192]]


def test_findings_answer_each_question(tmp_path: Path) -> None:
    answers = {f.question: f.answer for f in findings(_analysis(tmp_path, with_crossover=True))}
    assert "lower" in answers["What does a memory bring?"]
    assert "twin" in answers["What does a memory bring?"]
    assert "recall 0.80 +" in answers["What does a missed neighbour cost?"]
    assert "one memory, 512 queries" in answers["When does an approximate index overtake exact search?"]
    assert "1 was skipped and 2 failed" in answers["Is anything missing?"]


def test_without_losses_there_are_differences_but_no_intervals(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path, with_losses=False)
    row = next(r for r in analysis.at(8192) if r.cell.spec == "degraded:drop=0.5")
    assert row.difference is None
    assert row.difference_point is not None
    assert row.difference_point > 0
    assert analysis.advice.by_size


def test_without_exact_nothing_is_judged(tmp_path: Path) -> None:
    analysis = _analysis(tmp_path, {"faiss-flat": (2.0, 0.1), "hnswlib:ef_search=128": (9.0, 9.0)})
    assert analysis.advice.by_size == ()
    assert "not measured" in findings(analysis)[0].answer
    assert all(r.difference_point is None for r in analysis.measured)


def test_workloads_are_not_mixed(tmp_path: Path) -> None:
    results = load_results(write_synthetic_results(tmp_path, tokens_per_document=20))
    found = workloads(results)
    assert [(w.num_memories, w.queries) for w in found] == [(16, 128), (1, 512)]


def test_times_of_a_busy_machine_are_called_doubtful(tmp_path: Path) -> None:
    steady = _analysis(tmp_path / "a", {"exact": (1.0, 0.1), "degraded:drop=0.5": (1.2, 0.1)})
    assert not any("doubtful" in note for note in notes(steady))
    busy = _analysis(tmp_path / "b", {"exact": (2.0, 0.1), "degraded:drop=0.5": (1.2, 0.1)})
    assert any("doubtful at 512, 8,192 keys" in note for note in notes(busy))


def test_memories_that_the_text_does_not_fill_are_named(tmp_path: Path) -> None:
    _analysis(tmp_path)
    for path in (tmp_path / "cells").glob("exact-8192-*.json"):
        cell = json.loads(path.read_text())
        path.write_text(json.dumps(cell | {"key_bytes": cell["key_bytes"] / 4}))
    assert any("of 8,192 keys 25 %" in note for note in notes(analyse(load_results(tmp_path))))


def test_fronts_and_wanted_recalls_use_every_point_of_the_curves(tmp_path: Path) -> None:
    specs = ("exact", "degraded:drop=0.5", "scann:leaves_to_search=4", "pynndescent")
    analysis = analyse(load_results(write_synthetic_results(tmp_path, specs=specs, sizes=(8192,))))
    points = time_points(analysis)
    assert len(points) == 1 + 5 + 5, "the instrument has no curve, and no spec counts twice"
    best = front_of(points, "recall")
    assert any("effort=" in point.spec for point in best), "a point that is no spec of the sweep"
    assert [p.ms for p in best] == sorted(p.ms for p in best)
    assert [p.recall for p in best] == sorted(p.recall for p in best)
    assert {p.backend for p in front_of(points, "share")} <= {"exact", "scann"}
    reached = {one.recall: one.point for one in quickest_reaching(points, (8192,))}
    for recall, point in reached.items():
        assert point is not None
        assert point.recall >= recall
        assert point.ms == min(p.ms for p in points if p.recall >= recall)
    assert reached[0.999] is not None
    assert reached[0.999].spec == "exact"


def test_where_there_is_no_curve_the_specs_own_points_stand(tmp_path: Path) -> None:
    specs = ("exact", "scann:leaves_to_search=4")
    folder = write_synthetic_results(tmp_path, specs=specs, sizes=(8192,), with_curves=False)
    analysis = analyse(load_results(folder))
    assert {(p.spec, p.ratio) for p in time_points(analysis)} == {(spec, None) for spec in specs}
    assert "reaching:curves" not in tables(analysis)


def test_a_noisy_machine_is_told(tmp_path: Path) -> None:
    quiet = analyse(load_results(write_synthetic_results(tmp_path / "a", specs=("exact",), sizes=(512,))))
    assert not any("noisy" in note for note in notes(quiet))
    specs = ("exact", "pynndescent")
    noisy = analyse(load_results(write_synthetic_results(tmp_path / "b", specs=specs, sizes=(512,))))
    (told,) = (note for note in notes(noisy) if "noisy" in note)
    assert "1 of 2 measurements and 5 of 6 points" in told
    marks = {line[2]: line[1] for line in tables(noisy)["latency"].lines}
    assert marks == {"`exact`": "quiet", "`pynndescent`": "noisy"}
