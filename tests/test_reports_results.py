"""Reading a result folder: what is whole is typed, and what is not is refused with file and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.reports import ReportError, load_results, write_report
from recollect.reports.synthetic import write_synthetic_results

SPECS = ("exact", "degraded:drop=0.5", "faiss-ivf:nlist=64,nprobe=4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_synthetic_results(tmp_path / "results", specs=SPECS, sizes=(512, 2048), tokens_per_document=50)


def _cell(folder: Path, backend: str, size: int) -> Path:
    (path,) = (folder / "cells").glob(f"{backend}-{size}-*.json")
    return path


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_results_are_typed_and_ordered(folder: Path) -> None:
    results = load_results(folder)
    assert results.memory_sizes == (512, 2048)
    assert results.backends == ("exact", "degraded", "faiss-ivf")
    assert results.baseline is not None
    assert results.baseline.spec == "none"
    assert results.num_memories == 16
    reference = results.reference(2048)
    assert reference is not None
    assert reference.spec == "exact"
    assert reference.losses is not None
    assert results.tokens is not None
    assert len(reference.losses) == len(results.tokens) == 1200
    assert {c.status for c in results.not_measured} == {"failed"}
    assert results.absent == ()
    assert results.fill(2048) == pytest.approx(1.0)
    # search plus 128 tokens for each of 16 memories, appended at so many microseconds a key
    assert reference.search_ms is not None
    assert reference.append_us_per_key is not None
    expected = reference.search_ms + reference.append_us_per_key * 128 * 16 / 1000
    assert results.segment_ms(reference) == pytest.approx(expected)


def test_absent_combinations_are_known(folder: Path) -> None:
    _cell(folder, "faiss-ivf", 2048).unlink()
    assert load_results(folder).absent == (("faiss-ivf:nlist=64,nprobe=4", 2048),)


def _remove_run(folder: Path) -> None:
    (folder / "run.json").unlink()


def _truncate_run(folder: Path) -> None:
    (folder / "run.json").write_text((folder / "run.json").read_text()[:40])


def _truncate_cell(folder: Path) -> None:
    path = _cell(folder, "exact", 512)
    path.write_text(path.read_text()[:-20])


def _truncate_losses(folder: Path) -> None:
    path = next((folder / "losses").glob("exact-512-*.npz"))
    path.write_bytes(path.read_bytes()[:300])


def _pickled_losses(folder: Path) -> None:
    path = next((folder / "losses").glob("exact-512-*.npz"))
    np.savez(path, loss=np.array([{"a": 1}], dtype=object), document=np.zeros(1), position=np.zeros(1))


def _remove_losses(folder: Path) -> None:
    next((folder / "losses").glob("exact-512-*.npz")).unlink()


def _other_tokens(folder: Path) -> None:
    path = next((folder / "losses").glob("faiss-ivf-512-*.npz"))
    with np.load(path) as arrays:
        np.savez(path, loss=arrays["loss"], document=arrays["document"], position=arrays["position"] + 1)


def _remove_cells(folder: Path) -> None:
    for path in (folder / "cells").iterdir():
        path.unlink()


def _copy_cell(folder: Path) -> None:
    path = _cell(folder, "exact", 512)
    (folder / "cells" / "copy.json").write_text(path.read_text())


FAULTS: list[tuple[Callable[[Path], None], str, str]] = [
    (_remove_run, "run.json", "recollect compare"),
    (_truncate_run, "run.json", "truncated"),
    (_truncate_cell, "exact-512", "delete it"),
    (_truncate_losses, "exact-512", "truncated"),
    (_pickled_losses, "exact-512", "delete"),
    (_remove_losses, "exact-512", "missing"),
    (_other_tokens, "faiss-ivf-512", "two runs are mixed"),
    (_remove_cells, "cells", "no measurements yet"),
    (_copy_cell, "copy.json", "two runs are mixed"),
    (lambda f: _change(f / "run.json", schema=99), "run.json", "schema 99"),
    (lambda f: _change(_cell(f, "exact", 512), schema=None), "exact-512", "schema None"),
    (lambda f: _change(_cell(f, "exact", 512), k=8), "exact-512", "two runs are mixed"),
    (lambda f: _change(_cell(f, "exact", 512), seed=1), "exact-512", "two runs are mixed"),
    (lambda f: _change(_cell(f, "exact", 512), perplexity=12.0), "exact-512", "not of one measurement"),
    (lambda f: _change(_cell(f, "exact", 512), perplexity=None), "exact-512", "no perplexity"),
    (lambda f: _change(_cell(f, "exact", 512), search_ms=float("nan")), "exact-512", "finite number"),
    (lambda f: _change(_cell(f, "exact", 512), search_ms="fast"), "exact-512", "finite number"),
    (lambda f: _change(_cell(f, "exact", 512), status="done"), "exact-512", "status"),
    (lambda f: _change(_cell(f, "exact", 512), spec=3), "exact-512", "spec"),
    (lambda f: _change(_cell(f, "exact", 512), losses="../../other.npz"), "exact-512", "outside"),
    (
        lambda f: (f / "crossover.json").write_text('{"schema": 1, "rows": [{"search_ms": 1}]}') or None,
        "crossover.json",
        "delete",
    ),
    (lambda f: _change(f / "curves.json", curves=[{"build": "x", "points": [{}]}]), "curves.json", "delete"),
    (lambda f: _change(_cell(f, "exact", 512), noisy="very"), "exact-512", "true or false"),
    (lambda f: (f / "run.json").write_text("[]") and None, "run.json", "no JSON object"),
]


@pytest.mark.parametrize(("spoil", "file", "remedy"), FAULTS)
def test_faults_name_file_and_remedy(folder: Path, spoil: Callable[[Path], None], file: str, remedy: str) -> None:
    spoil(folder)
    with pytest.raises(ReportError) as caught:
        load_results(folder)
    assert file in str(caught.value)
    assert remedy in str(caught.value)


def test_mixed_settings_are_refused(folder: Path) -> None:
    _change(_cell(folder, "exact", 512), settings="aaaa")
    _change(_cell(folder, "exact", 2048), settings="bbbb")
    with pytest.raises(ReportError, match="other settings"):
        load_results(folder)


@pytest.mark.parametrize("name", ["crossover.json", "curves.json", "cell"])
def test_what_another_machine_or_version_measured_is_refused_by_name(folder: Path, name: str) -> None:
    path = _cell(folder, "exact", 512) if name == "cell" else folder / name
    known = json.loads(path.read_text())["provenance"]
    other = known | {"threads": 16, "libraries": known["libraries"] | {"torch": "9.9"}}
    _change(path, provenance=other)
    with pytest.raises(ReportError, match=r"threads 16 against 1; torch 9\.9 against 2\.13\.0") as caught:
        load_results(folder)
    assert path.name in str(caught.value)
    assert "two runs are mixed" in str(caught.value)


def test_results_of_an_earlier_version_are_read(folder: Path) -> None:
    """Before there were percentiles, a reference operation, curves, and a word on where figures come from."""
    new = ("search_ms_p50", "search_ms_p95", "search_ms_p99", "search_ms_cold", "search_first_ms", "searches")
    new += ("append_ms_p50", "append_ms_p95", "append_ms_p99", "reference_ms", "noisy", "provenance")
    for path in [*(folder / "cells").iterdir(), folder / "crossover.json"]:
        content = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in new}))
    (folder / "curves.json").unlink()
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({key: run[key] for key in run if key not in ("code", "device")}))
    files = write_report(folder)
    assert files.curves_csv is None
    assert load_results(folder).curves == ()
    text = files.page.read_text(encoding="utf-8")
    assert "Latency in full" not in text
    assert 'id="pareto-recall"' in text, "of the sweep's points, as it was"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="not a folder"):
        load_results(tmp_path / "nothing")
    with pytest.raises(ReportError, match=r"no run\.json"):
        load_results(tmp_path)


def test_an_error_leaves_the_former_report(folder: Path) -> None:
    page = write_report(folder).page
    before = page.read_bytes()
    _truncate_cell(folder)
    with pytest.raises(ReportError):
        write_report(folder)
    assert page.read_bytes() == before
    assert not list(folder.rglob("*.part"))
