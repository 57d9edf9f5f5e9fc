"""The report of an ablation: right answers found in made-up grids, honest words, and files that stand alone."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.commands.report import report
from recollect.reports import ReportError, is_ablation, load_ablation, publish_ablation, write_ablation_report
from recollect.reports.ablation import AblationReport
from recollect.reports.ablation_analysis import AblationAnalysis
from recollect.reports.ablation_findings import findings, headline
from recollect.reports.ablation_page import notes
from recollect.reports.ablation_paper import Comparison, comparisons, domain_order, kind_of_text, paper_summary
from recollect.reports.ablation_rows import values
from recollect.reports.ablation_statistics import SeedInterval
from recollect.reports.ablation_synthetic import write_synthetic_ablations, write_synthetic_grid

SMALL: dict[str, Any] = {"documents": 4, "tokens_per_document": 800}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_ablations(tmp_path_factory.mktemp("ablate"))


@pytest.fixture(scope="module")
def written(folder: Path) -> AblationReport:
    return write_ablation_report(folder)


def _analysis(folder: Path) -> AblationAnalysis:
    return AblationAnalysis(load_ablation(folder))


def _interval(low: float, high: float) -> SeedInterval:
    middle = (low + high) / 2
    return SeedInterval(middle, low, high, low, high, (middle,))


def test_true_effects_are_found(folder: Path) -> None:
    analysis = _analysis(folder / "gate")
    truth = {"token": -0.03, "layer": 0.0, "fixed": 0.05}
    for name, effect in truth.items():
        row = analysis.row("code", name)
        assert row is not None
        assert row.percent is not None
        assert row.percent.low is not None
        assert row.percent.high is not None
        assert row.percent.low < 100 * math.expm1(effect) < row.percent.high, name
        assert row.percent.sign == np.sign(effect), name
        assert row.accuracy_difference is not None
        assert row.accuracy_difference.sign == -np.sign(effect), name
        assert row.percent.seeds == 3
    base = analysis.row("code", "head")
    assert base is not None
    assert base.reference is None
    assert base.percent is None
    fixed = analysis.row("code", "fixed")
    assert fixed is not None
    assert fixed.differences["gradient_norm_max"].sign == 1


def test_a_diverged_seed_is_counted_and_left_out_of_differences(folder: Path) -> None:
    analysis = _analysis(folder / "gate")
    row = analysis.row("code", "joint")
    assert row is not None
    assert (row.seeds, row.ok, row.diverged, row.status) == (3, 2, 1, "ok")
    assert row.percent is not None
    assert row.percent.seeds == 2
    told = {finding.question: finding.answer for finding in findings(analysis)}
    assert "`joint` (1 of 3 seeds)" in told["Does it train steadily?"]
    assert "1 diverged" in told["Is anything missing?"]


def test_the_headline_counts_what_is_told_apart(folder: Path) -> None:
    text = headline(_analysis(folder / "gate"))
    assert "of 4 variants 1 is clearly lower in perplexity, 2 clearly higher, 1 undecided" in text
    assert "The lowest is `token`" in text
    assert "The highest is `fixed`" in text


def test_interaction_of_search_pairs(folder: Path) -> None:
    """The index costs 0.06 nats untaught and 0.02 taught: training teaches."""
    analysis = _analysis(folder / "search-pairs")
    told = {finding.question: finding.answer for finding in findings(analysis)}
    answer = told["Does training with an index teach the model to bear its errors?"]
    assert answer.endswith("it does.")
    found = analysis.interaction(
        "code",
        {"hnswlib-hnswlib": 1.0, "hnswlib-exact": -1.0, "exact-hnswlib": -1.0, "exact-exact": 1.0},
        "exact-exact",
    )
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    truth = 100 * (math.exp(0.03) - math.exp(0.01) - math.exp(0.06) + 1)
    assert found.low < truth < found.high < 0


def test_variants_on_other_segments_are_compared_on_the_tokens_that_both_read(tmp_path: Path) -> None:
    folder = write_synthetic_grid(tmp_path, "g", [{"name": "a"}, {"name": "b", "effect": 0.1}], reference="a", **SMALL)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    expected = []
    for seed in range(3):
        paths = {r["variant"]: (folder / r["evaluation"]["losses"]).resolve() for r in rows if r["seed"] == seed}
        with np.load(paths["a"]) as a, np.load(paths["b"]) as b:
            first, second = dict(a), dict(b)
        kept = (second["document"] != 3) & (second["position"] <= 700)
        # The other variant's documents have other numbers, and it read less of them.
        names = second["document_names"][[2, 0, 1]]
        changed = {name: second[name][kept] for name in ("loss", "correct", "position")}
        changed["document"] = np.asarray([1, 2, 0, 0])[second["document"][kept]]
        np.savez(paths["b"], document_names=names, **changed)
        expected.append(np.exp(second["loss"][kept].mean(dtype=float)) / np.exp(first["loss"][kept].mean(dtype=float)))
    found = _analysis(folder).compare("code", "b", "a")
    assert found is not None
    assert found.estimate == pytest.approx(100 * (np.mean(expected) - 1), rel=1e-6)


def test_texts_without_common_tokens_have_no_difference(tmp_path: Path) -> None:
    folder = write_synthetic_grid(tmp_path, "g", [{"name": "a"}, {"name": "b"}], reference="a", **SMALL)
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["variant"] == "b":
            path = (folder / row["evaluation"]["losses"]).resolve()
            with np.load(path) as arrays:
                content = dict(arrays)
            content["document_names"] = np.asarray([f"elsewhere-{n}" for n in range(4)])
            np.savez(path, **content)
    analysis = _analysis(folder)
    row = analysis.row("code", "b")
    assert row is not None
    assert row.percent is None
    assert row.perplexity is not None
    assert any("No difference can be taken for `b`" in note for note in notes(analysis))


def test_one_seed_says_so(tmp_path: Path) -> None:
    folder = write_synthetic_grid(
        tmp_path, "g", [{"name": "a"}, {"name": "b", "effect": 0.1}], reference="a", seeds=(0,), **SMALL
    )
    analysis = _analysis(folder)
    row = analysis.row("code", "b")
    assert row is not None
    assert row.percent is not None
    assert (row.percent.low, row.percent.high) == (row.percent.text_low, row.percent.text_high)
    assert row.differences["step_ms"].low is None
    assert "One seed was run" in " ".join(f.answer for f in findings(analysis))


@pytest.mark.parametrize(
    ("figures", "here", "verdict"),
    [
        ((2.0, 1.8), (-12.0, -8.0), "agrees"),
        ((2.0, 1.8), (2.0, 4.0), "opposite"),
        ((2.0, 1.8), (-3.0, 1.0), "open"),
        ((15.38, 15.38), (-0.4, 0.6), "flat"),
        ((2.38, 2.37), (-3.0, -2.0), "differs"),
        ((2.38, 2.37), (-3.0, 0.5), "open"),
    ],
)
def test_verdicts_beside_the_paper(figures: tuple[float, float], here: tuple[float, float], verdict: str) -> None:
    made = Comparison("x", figures, (40.0, 39.0), _interval(*here))
    assert made.verdict == verdict
    assert ("agree" in paper_summary([made])) or verdict == "open"
    assert made.sentence


def test_table_4_beside_a_memory_grid(folder: Path) -> None:
    made = comparisons(_analysis(folder / "memory"))
    assert [one.paper_figures for one in made] == [(2.26, 2.03), (2.03, 1.87), (12.34, 11.93), (11.93, 11.62)]
    assert [one.verdict for one in made[:3]] == ["agrees"] * 3
    assert made[0].paper == pytest.approx(-10.18, abs=0.01)
    assert comparisons(_analysis(folder / "gate")) == ()


def test_kinds_of_text() -> None:
    names = ("arxiv_math_like", "books", "web", "code", "formal_proofs", "stdlib", "cookery")
    assert [kind_of_text(name) for name in names] == ["arXiv", "PG-19", "C4", "GitHub", "Isabelle", "GitHub", None]


def test_domains_are_ranked(tmp_path: Path) -> None:
    effects = {"books": -0.01, "web": -0.05, "code": -0.1}
    variants = [
        {"name": "none", "evaluation": {"memory_size": 0, "backend": "none"}},
        {"name": "memory", "effects": effects, "evaluation": {"memory_size": 8192}},
    ]
    folder = write_synthetic_grid(
        tmp_path, "domains", variants, reference="none", sections=tuple(effects), paper="domains", **SMALL
    )
    analysis = _analysis(folder)
    text = domain_order(analysis, comparisons(analysis))
    assert "the paper has GitHub, C4, PG-19; here it is GitHub, C4, PG-19 (3 of 3 pairs in the same order)" in text


def test_layers_are_matched_by_depth(tmp_path: Path) -> None:
    """Six layers: the paper's layers 3, 9 and 12 of 12 lie nearest to the second, fifth and last."""
    effects = {0: 0.02, 1: 0.0, 3: -0.02, 4: -0.04, 5: 0.05}
    variants: list[dict[str, Any]] = [
        {"name": f"layer {n}", "effect": e, "settings": {"model": {"layers": 6, "memory_layers": [n]}}}
        for n, e in effects.items()
    ]
    variants.append({"name": "two", "settings": {"model": {"layers": 6, "memory_layers": [1, 4]}}})
    folder = write_synthetic_grid(tmp_path, "layers", variants, reference="layer 3", paper="layers", **SMALL)
    made = comparisons(_analysis(folder))
    assert [one.paper_figures for one in made] == [(2.43, 2.37), (2.40, 2.37)]
    assert "`layer 4` rather than `layer 5`" in made[0].what
    assert "`layer 4` rather than `layer 1`" in made[1].what
    assert [one.verdict for one in made] == ["agrees", "agrees"]


def test_neighbours_hardly_matter(tmp_path: Path) -> None:
    variants = [
        {"name": "none", "effect": 0.5, "evaluation": {"memory_size": 0, "k": 32, "backend": "none"}},
        *({"name": f"k{k}", "effect": e, "evaluation": {"k": k}} for k, e in ((32, 0.0), (128, 0.0), (256, 0.1))),
    ]
    folder = write_synthetic_grid(
        tmp_path,
        "neighbours",
        variants,
        reference="k32",
        paper="neighbours",
        seed_spread=1e-4,
        token_spread=0.02,
        **SMALL,
    )
    made = comparisons(_analysis(folder))
    assert [one.figures[0] for one in made] == [made[0].figures[0]] * 2
    assert made[0].figures[0] < 45, "compared with k 32, not with no memory"
    assert [one.verdict for one in made] == ["flat", "differs"]


def test_the_table_has_every_interval(written: AblationReport) -> None:
    gate = next(grid for grid in written.grids if grid.page.parent.name == "gate")
    with gate.table_csv.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == ["head", "token", "layer", "fixed", "joint"]
    for row in rows:
        assert float(row["perplexity_low"]) < float(row["perplexity"]) < float(row["perplexity_high"])
        if row["variant"] != "head":
            assert float(row["percent_low"]) < float(row["difference_percent"]) < float(row["percent_high"])
            assert float(row["difference_text_low"]) >= float(row["difference_low"])
            assert row["spikes_difference"]
            assert 0.9 < float(row["step_ms_ratio"]) < 1.1
    assert rows[0]["difference_percent"] == ""
    wanted = {
        *("section", "variant", "summary", "kind", "reference", "status", "seeds", "diverged", "accuracy", "reason"),
        *("accuracy_difference", "gradient_norm_median", "gradient_norm_max", "step_ms", "memory_bytes", "cache_bytes"),
        *("parameters", "training_tokens", "evaluation_tokens", "backend", "memory_size", "k"),
    }
    assert wanted <= set(rows[0])


def test_numbers_of_probes_and_systems_are_columns(tmp_path: Path) -> None:
    probe = {
        "staleness": {"numbers": {"overlap_after_16_updates": 0.9, "perplexity_rise_percent_after_16_updates": 1.5}}
    }
    recall = {"index_recall": {"numbers": {"recall_hnswlib": 0.5, "key_length_variation": 0.3}}}
    folder = write_synthetic_grid(tmp_path, "g", [{"name": "a", "probes": {**probe, **recall}}], reference="a", **SMALL)
    analysis = _analysis(folder)
    (row,) = analysis.measured
    assert values(row)["staleness_overlap_after_16_updates"] == pytest.approx(0.9)
    told = {finding.question: finding.answer for finding in findings(analysis)}
    assert "after 16 updates old keys lead to 90 % of the same neighbours" in told["What does age do to the keys?"]
    assert "hnswlib 0.50" in told["What do indexes find among these keys?"]
    assert "vary by 30 %" in told["What do indexes find among these keys?"]


def test_pages_stand_alone(written: AblationReport) -> None:
    assert written.page.name == "index.html"
    index = written.page.read_text(encoding="utf-8")
    for grid in written.grids:
        assert f'href="{grid.page.parent.name}/report.html"' in index
        page = grid.page.read_text(encoding="utf-8")
        assert "default-src 'none'" in page
        for address in re.findall(r'href="([^"#]+)"', page):
            assert (grid.page.parent / address).is_file(), address
        assert len(grid.figures) >= 4
        assert all(path.stat().st_size > 3000 for path in grid.figures)
    gate = next(grid for grid in written.grids if grid.page.parent.name == "gate").page.read_text(encoding="utf-8")
    assert "made up <b>" not in gate
    assert "made up &lt;b&gt;diverged" in gate


def test_markdown_has_parts_and_tables(written: AblationReport) -> None:
    for grid in written.grids:
        text = grid.markdown.read_text(encoding="utf-8")
        opened = re.findall(r"\[start:(\w+)\]", text)
        assert {"findings", "quality", "machine"} <= set(opened)
        assert opened == re.findall(r"\[end:(\w+)\]", text)
        block: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line.startswith("|"):
                block.append(line)
            elif block:
                assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block}) == 1, block[0]
                block = []


def test_what_the_documentation_keeps(written: AblationReport, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ablations" / "prose").mkdir(parents=True)
    (tmp_path / "ablations" / "prose" / "gate.txt").write_text("What a gate is.")
    paths = publish_ablation(folder, tmp_path / "ablations")
    names = {str(path.relative_to(tmp_path / "ablations")) for path in paths}
    assert {
        "summary.txt",
        "gate/results.md",
        "gate/results.csv",
        "gate/run.json",
        "memory/figures/memory-axis.svg",
    } <= names
    assert not any(name.endswith((".html", ".npz", ".png")) for name in names)
    assert "[gate](#gate)" in (tmp_path / "ablations" / "summary.txt").read_text(encoding="utf-8")
    text = (tmp_path / "ablations" / "grids.txt").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Memory {#memory}",
        "## Gate {#gate}",
        "## Search pairs {#search-pairs}",
    ]
    assert "What a gate is." in text
    for address in re.findall(r"\]\((ablations/[^)]*)\)", text):
        assert (tmp_path / address).is_file(), address


def test_an_unfinished_grid_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = write_synthetic_grid(tmp_path, "g", [{"name": "a"}, {"name": "b"}], reference="a", **SMALL)
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])
    analysis = _analysis(folder)
    row = analysis.row("code", "b")
    assert row is not None
    assert row.ok == 1
    assert "2 not run yet" in " ".join(f.answer for f in findings(analysis))
    assert "not finished" in write_ablation_report(folder).page.read_text(encoding="utf-8")
    path.unlink()
    empty = write_ablation_report(folder)
    assert "6 not run yet" in empty.page.read_text(encoding="utf-8")
    assert empty.grids[0].figures == ()
    assert not list((folder / "figures").iterdir()), "figures that these results do not have must not stay behind"


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no ablation grid"):
        write_ablation_report(tmp_path)
    folder = write_synthetic_grid(tmp_path, "g", [{"name": "a"}], reference="a", **SMALL)
    assert is_ablation(folder)
    assert is_ablation(tmp_path)
    losses = next((tmp_path / "evaluations").glob("*.npz"))
    kept = losses.read_bytes()
    losses.write_bytes(kept[:100])
    with pytest.raises(ReportError, match=losses.name):
        write_ablation_report(folder)
    losses.write_bytes(kept)
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines()
    for wrong, message in (
        ('{"variant": "zzz", "seed": 0, "status": "skipped"}', "does not plan"),
        ('{"variant": "a", "seed": 0, "status": "fine"}', "unknown"),
        ('{"variant": "a", "seed": 0, "status": "ok"}', "perplexity is None"),
        ('{"seed": 0}', "not as it should be"),
        ("nonsense}", "not JSON"),
    ):
        path.write_text("\n".join([*lines, wrong]))
        with pytest.raises(ReportError, match=message):
            load_ablation(folder)
    path.write_text("\n".join(lines))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "schema": 9}))
    with pytest.raises(ReportError, match="schema 9"):
        load_ablation(folder)


def test_the_verb_recognises_an_ablation(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recollect", "report", str(folder / "gate"), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["page"] == str(folder / "gate" / "report.html")
    with pytest.raises(ReportError, match="--publish"):
        report(tmp_path, publish=tmp_path / "docs")
    with pytest.raises(ReportError, match="two folders"):
        report(tmp_path, output=folder)
