"""The asv benchmarks: found by asv, with fixed parameters, and with skips that are told from failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import asv.benchmark
import pytest
import tiny
from asv_runner.benchmarks.mark import SkipNotImplemented

from recollect.memory_backends import MemoryBackend, Requirement, list_backends
from recollect.suites import common
from recollect.suites.cells import Cell, CellError, Streaming, load_cell, save_cell
from recollect.suites.footprint import Footprint
from recollect.suites.latency import (
    AppendLatency,
    AppendStepLatency,
    BuildLatency,
    ReferenceLatency,
    SearchLatency,
)
from recollect.suites.options import MEMORY_SIZES
from recollect.suites.parameters import SPECS, declared_specs
from recollect.suites.perplexity import Perplexity
from recollect.suites.recall import Recall
from recollect.suites.streaming import StreamingAppend, StreamingRecall

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = {
    "footprint.Footprint.track_bytes_per_key": "bytes",
    "latency.AppendLatency.track_append": "us",
    "latency.BuildLatency.track_build": "s",
    "latency.AppendStepLatency.track_append_p50": "ms",
    "latency.AppendStepLatency.track_append_p99": "ms",
    "latency.ReferenceLatency.track_reference": "ms",
    "latency.SearchLatency.track_search_p50": "ms",
    "latency.SearchLatency.track_search_p99": "ms",
    "perplexity.Perplexity.track_difference_to_exact": "perplexity",
    "perplexity.Perplexity.track_perplexity": "perplexity",
    "recall.Recall.track_lost_softmax_mass": "share",
    "recall.Recall.track_missed_neighbours": "share",
    "streaming.StreamingAppend.track_worst_append": "us",
    "streaming.StreamingRecall.track_last_missed_neighbours": "share",
    "streaming.StreamingRecall.track_worst_missed_neighbours": "share",
}


def asv_benchmark(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs asv's own runner, as asv does."""
    command = [sys.executable, asv.benchmark.__file__, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)


def test_asv_finds_every_benchmark(tmp_path: Path) -> None:
    done = asv_benchmark("discover", str(ROOT / "suites"), "found.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {item["name"]: item for item in json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))}
    assert {name: item["unit"] for name, item in found.items()} == BENCHMARKS
    for item in found.values():
        remade = item["name"].startswith("latency.") and "Reference" not in item["name"]
        assert item["version"] == ("2" if remade else "1"), "explicit, so that an edited comment discards no results"
        assert item["timeout"] >= 300
        assert item["param_names"] == ["spec", "memory_size"]
        assert item["params"] == [[repr(spec) for spec in declared_specs()], [repr(size) for size in MEMORY_SIZES]]
    assert len({item["setup_cache_key"] for item in found.values()}) == 1, "one preparation serves all"


def test_asv_checks_the_suite(tmp_path: Path) -> None:
    done = asv_benchmark("check", str(ROOT / "suites"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_backend_of_a_row_and_head_is_in_the_parameters() -> None:
    for info in list_backends():
        assert not info.one_shared or not set(info.sweep) & set(SPECS)
        assert info.one_shared or set(info.sweep) <= set(SPECS), f"{info.name} declares {info.sweep}"
    assert SPECS[0] == "exact"
    assert len(SPECS) == len(set(SPECS))


def test_parameters_do_not_depend_on_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = declared_specs()
    nothing = (Requirement("no_such_library_at_all", "no-such-library"),)
    monkeypatch.setattr(MemoryBackend, "missing_requirements", classmethod(lambda cls: nothing))
    assert declared_specs() == before


def test_figures_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(
        "x",
        "x",
        512,
        4,
        "ok",
        recall_at_k=0.75,
        softmax_mass=0.5,
        perplexity=21.0,
        search_ms=2.0,
        search_ms_p50=2.0,
        search_ms_p99=6.0,
        append_ms_p50=7.0,
        append_ms_p99=8.0,
        reference_ms=9.0,
        append_us_per_key=3.0,
        build_seconds=4.0,
        bytes_per_key=256.0,
        streaming=Streaming((0.5, 1.0, 1.5), (0.9, 0.6, 0.8), (1.0, 5.0, 2.0), (1.0, 1.0, 1.0)),
    )
    exact = Cell("exact", "exact", 512, 4, "ok", perplexity=20.0)
    monkeypatch.setattr(common, "read_or_measure", lambda folder, spec, size: exact if spec == "exact" else cell)

    def figure(kind: type[common.CellBenchmark], method: str) -> float:
        benchmark = kind()
        benchmark.setup("x", 512)
        return float(getattr(benchmark, method)("x", 512))

    assert figure(Recall, "track_missed_neighbours") == pytest.approx(0.25)
    assert figure(Recall, "track_lost_softmax_mass") == pytest.approx(0.5)
    assert figure(SearchLatency, "track_search_p50") == 2.0
    assert figure(SearchLatency, "track_search_p99") == 6.0
    assert figure(AppendStepLatency, "track_append_p50") == 7.0
    assert figure(AppendStepLatency, "track_append_p99") == 8.0
    assert figure(ReferenceLatency, "track_reference") == 9.0
    assert figure(AppendLatency, "track_append") == 3.0
    assert figure(BuildLatency, "track_build") == 4.0
    assert figure(Footprint, "track_bytes_per_key") == 256.0
    assert figure(Perplexity, "track_perplexity") == 21.0
    assert figure(Perplexity, "track_difference_to_exact") == 1.0
    assert figure(StreamingAppend, "track_worst_append") == 5.0
    assert figure(StreamingRecall, "track_worst_missed_neighbours") == pytest.approx(0.4)
    assert figure(StreamingRecall, "track_last_missed_neighbours") == pytest.approx(0.2)


def test_a_missing_library_is_a_skip_and_a_failure_is_none(tmp_path: Path) -> None:
    skipped = Cell("a", "a", 512, 4, "skipped", reason="pip install a", fingerprint=common.FINGERPRINT)
    failed = Cell("b", "b", 512, 4, "failed", reason="it broke", fingerprint=common.FINGERPRINT)
    for cell in (skipped, failed):
        save_cell(tmp_path, cell)
    with pytest.raises(SkipNotImplemented, match="pip install a"):
        common.read_or_measure(tmp_path, "a", 512)
    with pytest.raises(CellError, match="it broke"):
        common.read_or_measure(tmp_path, "b", 512)


def test_a_figure_that_is_missing_raises_rather_than_reading_as_skipped() -> None:
    benchmark = SearchLatency()
    benchmark.cell = Cell("x", "x", 512, 4, "ok", search_ms_p50=float("nan"))
    with pytest.raises(CellError, match="search_ms_p50 = nan"):
        benchmark.track_search_p50("x", 512)


def test_asv_measures_a_cell_once_and_reads_it_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tiny.write_tiny_corpus(tmp_path / "corpus")
    for name, value in {
        "RECOLLECT_SUITE_CHECKPOINT": str(tiny.write_tiny_checkpoint(tmp_path / "checkpoint", corpus)),
        "RECOLLECT_SUITE_CORPUS": str(corpus),
        "RECOLLECT_SUITE_SPLIT": "all",
        "RECOLLECT_SUITE_MAX_TOKENS": "640",
        "RECOLLECT_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "asv"
    folder.mkdir()
    suites = str(ROOT / "suites")
    name = "recall.Recall.track_missed_neighbours"
    done = asv_benchmark("setup_cache", suites, name, "{}", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    place = SPECS.index("degraded:drop=0.3") * len(MEMORY_SIZES)
    figures = {}
    for benchmark in (
        name,
        "footprint.Footprint.track_bytes_per_key",
        "perplexity.Perplexity.track_difference_to_exact",
    ):
        done = asv_benchmark("run", suites, f"{benchmark}-{place}", "{}", "None", "result.json", cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        figures[benchmark] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert figures[name] == pytest.approx(0.3, abs=0.15)
    assert figures["footprint.Footprint.track_bytes_per_key"] == 64.0
    assert abs(figures["perplexity.Perplexity.track_difference_to_exact"]) < 100
    cells = sorted(path.name.rsplit("-", 2)[0] for path in (folder / "cells").iterdir())
    assert cells == ["degraded-drop-0.3", "exact"], "one cell for each spec that was asked for, and no other"
    cell = load_cell(folder, "degraded:drop=0.3", MEMORY_SIZES[0], common.FINGERPRINT)
    assert cell is not None
    assert 1 - figures[name] == pytest.approx(cell.recall_at_k)
