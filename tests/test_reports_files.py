"""What is written: the table, the Markdown, the figures, and a page that is whole, escaped and loads nothing."""

from __future__ import annotations

import base64
import csv
import json
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from recollect.reports import ReportFiles, load_results, write_report
from recollect.reports.analysis import analyse
from recollect.reports.figures import figures
from recollect.reports.page import code, json_for_html
from recollect.reports.rows import COLUMNS, escape_markdown, shown
from recollect.reports.style import KNOWN, marks, svg_path
from recollect.reports.synthetic import SPECS, write_synthetic_results

CONTRACT = [
    *("spec", "backend", "memory_size", "k", "recall_at_k", "softmax_mass"),
    *("perplexity", "perplexity_difference", "difference_low", "difference_high"),
    *("search_ms", "append_us_per_key", "build_seconds", "bytes_per_key", "status", "reason"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    folder = tmp_path_factory.mktemp("report")
    return write_report(write_synthetic_results(folder, tokens_per_document=60))


class _Page(HTMLParser):
    """Collects tags, addresses and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside in ("script", "style") else self.text).append(data)


@pytest.fixture(scope="module")
def page(written: ReportFiles) -> _Page:
    parser = _Page()
    parser.feed(written.page.read_text(encoding="utf-8"))
    return parser


def test_table_has_the_contract_first(written: ReportFiles) -> None:
    with written.table_csv.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == COLUMNS
    assert COLUMNS[: len(CONTRACT)] == CONTRACT
    assert len(rows) == 1 + 4 * (len(SPECS) + 1)
    none = [r for r in rows if r["memory_size"] == "0"]
    assert [r["spec"] for r in none] == ["none"]
    assert none[0]["perplexity_difference"] == ""
    figures = [c for c in CONTRACT if c not in ("spec", "backend", "memory_size", "k", "status", "reason")]
    for row in rows:
        if row["status"] != "ok":
            assert row["reason"]
            assert all(row[c] == "" for c in figures)
        elif row["backend"] != "none":
            assert all(np.isfinite(float(row[c])) for c in figures)
            assert float(row["difference_low"]) <= float(row["perplexity_difference"]) <= float(row["difference_high"])
        if row["spec"] == "exact":
            assert float(row["perplexity_difference"]) == 0


def test_parquet_holds_the_same(written: ReportFiles) -> None:
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet", reason="results.parquet needs pyarrow")
    assert written.table_parquet is not None
    table = pyarrow_parquet.read_table(written.table_parquet).to_pylist()
    with written.table_csv.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["spec"] for r in table] == [r["spec"] for r in rows]
    for mine, other in zip(table, rows, strict=True):
        assert (mine["perplexity"] is None) == (other["perplexity"] == "")
        if mine["perplexity"] is not None:
            assert mine["perplexity"] == pytest.approx(float(other["perplexity"]), rel=1e-5)


def test_every_point_of_every_curve_is_in_a_table(written: ReportFiles) -> None:
    assert written.curves_csv is not None
    with written.curves_csv.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    points = load_results(written.page.parent).curves
    assert len(rows) == len(points) > 4 * len(SPECS)
    for row, point in zip(rows, points, strict=True):
        assert (row["spec"], int(row["memory_size"])) == (point.spec, point.memory_size)
        assert float(row["search_ms"]) == pytest.approx(point.search_ms, rel=1e-5)
        assert row["noisy"] == ("yes" if point.backend == "pynndescent" else "no")


def test_figures_are_drawn(written: ReportFiles) -> None:
    names = {path.stem for path in written.figures}
    assert names == {
        *("recall-perplexity", "mass-perplexity", "perplexity-memory", "latency-memory", "latency-larger-1"),
        *("curves", "pareto-perplexity", "pareto-recall", "pareto-mass", "footprint", "streaming"),
    }
    for path in written.figures:
        content = path.read_bytes()
        if path.suffix == ".svg":
            root = ElementTree.fromstring(content)
            assert float(root.attrib["width"]) > 300
            groups = [g for g in root.iter() if re.search("mark-(symbol|rect)", g.attrib.get("class", ""))]
            assert sum(len(group) for group in groups) >= 9, f"{path.name} is empty"
            assert b"exact" in content, "the legend, or the labels, name the backends"
        else:
            assert content.startswith(b"\x89PNG")
            width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
            assert width > 800
            assert height > 300
            assert len(content) > 20_000, "a blank picture would pack into less"


def test_page_loads_nothing(written: ReportFiles, page: _Page) -> None:
    loading = {"src", "srcset", "data", "poster", "background", "action", "formaction", "ping", "manifest"}
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in loading & set(attributes):
            assert str(attributes[name]).startswith("data:"), (tag, name, attributes[name])
        if tag == "a":
            assert re.fullmatch(r"#[\w-]+|(results|curves)\.csv|figures/[\w-]+\.(svg|png)", str(attributes["href"]))
    text = written.page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    css = (written.page.parent / "report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in css
    assert "@import" not in css
    data = json.loads(next(s for s in page.scripts if s.startswith("{")))
    assert "http" not in json.dumps(data)


def test_addresses_lead_somewhere(written: ReportFiles, page: _Page) -> None:
    identities = {a["id"] for _, a in page.tags if "id" in a}
    for tag, attributes in page.tags:
        if tag != "a":
            continue
        address = str(attributes["href"])
        assert address[1:] in identities if address.startswith("#") else (written.page.parent / address).is_file()


def test_figures_follow_the_schema_of_vega_lite() -> None:
    """The figures are put together by hand from altair's panels, so altair checks the whole."""
    import altair

    specs = ("exact", "degraded:drop=0.5", "hnswlib:ef_search=128")
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic_results(Path(folder), specs=specs, sizes=(512, 2048), tokens_per_document=20)
        made = figures(analyse(load_results(folder)))
    assert len(made) == 11
    for figure in made:
        for standalone in (True, False):
            specification = figure.specification(standalone=standalone)
            altair.ConcatChart.from_dict(specification, validate=True)
            shown = [record for records in specification["datasets"].values() for record in records]
            assert any("spec" in record for record in shown), f"{figure.name} has no data"
            assert "legend" not in json.dumps(specification["concat"]).replace('"legend": null', "") or standalone


def test_page_is_written_for_everyone(page: _Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption")
    assert ("html", {"lang": "en"}) in page.tags
    plots = [a for _, a in page.tags if a.get("class") == "plot"]
    assert len(plots) == 11
    assert all(len(str(a["data-alternative"])) > 20 for a in plots)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    viewport = next(a for tag, a in page.tags if tag == "meta" and a.get("name") == "viewport")
    assert viewport["content"] == "width=device-width, initial-scale=1"


def test_texts_of_the_results_are_escaped(written: ReportFiles, page: _Page) -> None:
    """The synthetic folder has a spec and a reason full of markup."""
    text = written.page.read_text(encoding="utf-8")
    assert '<b>"fast"</b>' not in text
    assert "<script>alert" not in text
    assert 'alert("x")' in "".join(page.text), "as text it is there"
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3
    markdown = written.markdown.read_text(encoding="utf-8")
    assert "<script>" not in re.sub(r"`[^`]*`", "", markdown)


def test_hostile_json_cannot_leave_its_element() -> None:
    hostile = {"spec": "</script><script>alert(1)</script>&\u2028<!--"}
    text = str(json_for_html(hostile))
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == hostile
    with pytest.raises(ValueError):
        json_for_html(float("nan"))


def test_code_escapes_before_it_marks() -> None:
    assert str(code("take `<b>` & go")) == "take <code>&lt;b&gt;</code> &amp; go"


def test_markdown_stays_a_table(written: ReportFiles) -> None:
    assert escape_markdown("a|b\n<i>*`") == "a\\|b &lt;i&gt;\\*'"
    block: list[str] = []
    for line in [*written.markdown.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
        elif block:
            widths = {len(re.findall(r"(?<!\\)\|", row)) for row in block}
            assert len(widths) == 1, block[0]
            block = []


def test_numbers_as_shown() -> None:
    assert shown(None, 2) == ""
    assert shown(-0.0004, 3) == "0.000"
    assert shown(-1234.5678, 2) == "−1,234.57"
    assert shown("ok", None) == "ok"


def test_output_elsewhere_leaves_the_results_alone(tmp_path: Path) -> None:
    specs = ("exact", "degraded:drop=0.5")
    folder = write_synthetic_results(tmp_path / "in", specs=specs, sizes=(512,), tokens_per_document=20)
    before = sorted(p for p in folder.rglob("*"))
    (tmp_path / "out" / "figures").mkdir(parents=True)
    former, mine = tmp_path / "out" / "figures" / "latency-larger-7.svg", tmp_path / "out" / "figures" / "mine.svg"
    former.write_text("<svg/>")
    mine.write_text("kept")
    files = write_report(folder, output=tmp_path / "out")
    assert files.page == tmp_path / "out" / "report.html"
    assert sorted(p for p in folder.rglob("*")) == before
    assert not former.exists(), "a figure that these results do not have must not stay behind"
    assert mine.exists()


def test_third_parties_get_marks_of_their_own() -> None:
    found = marks(["exact", "zeta", "alpha"])
    assert len({m.colour for m in found.values()} | {m.colour for m in KNOWN.values()}) == len(KNOWN) + 2
    assert len({(m.colour, m.shape) for m in KNOWN.values()}) == len(KNOWN)
    assert len({m.shape for m in KNOWN.values()}) == len(KNOWN)
    assert all(svg_path(m).startswith("M") for m in [*KNOWN.values(), *found.values()])


def test_stills_stand_in_where_scripts_do_not_run(page: _Page) -> None:
    stills = [str(a["src"]) for tag, a in page.tags if tag == "img"]
    assert len(stills) == 11
    assert base64.b64decode(stills[0].split(",")[1]).startswith(b"<svg")


def test_reports_need_neither_torch_nor_the_other_rooms() -> None:
    program = (
        "import sys, recollect.reports.page, recollect.reports.figures, recollect.reports.writing\n"
        "others = ('torch', 'recollect.model', 'recollect.memory_backends', 'recollect.suites')\n"
        "print([name for name in sys.modules if name.startswith(others)])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
