"""The pages of an ablation in headless Chromium, at desktop and phone width, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import WIDTHS, Visit, browser, visited

from recollect.reports import write_ablation_report
from recollect.reports.ablation_synthetic import write_synthetic_ablations

__all__ = ["browser"]  # the fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_synthetic_ablations(tmp_path_factory.mktemp("browser"))
    write_ablation_report(made)
    return made


@pytest.fixture(scope="module", params=WIDTHS)
def opened(request: pytest.FixtureRequest, browser: Any, folder: Path) -> Iterator[Visit]:
    """The page over the grids first, then that of memory sizes."""
    with visited(browser, request.param) as visit:
        visit.page.goto((folder / "index.html").as_uri())
        assert visit.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        visit.page.click("h2 a[href='memory/report.html']")
        visit.page.wait_for_selector("html[data-ready=yes]")
        yield visit


def test_no_complaints_and_no_loads(opened: Visit) -> None:
    assert opened.complaints == []
    assert opened.outside() == []
    assert [a.rsplit("/", 1)[1] for a in opened.addresses if a.startswith("file:")] == ["index.html", "report.html"]


def test_the_page_does_not_overflow(opened: Visit) -> None:
    opened.assert_it_fits()


def test_every_figure_is_drawn_to_its_width(opened: Visit) -> None:
    page = opened.page
    sizes = page.evaluate(
        "Array.from(document.querySelectorAll('.plot')).map(b => { const s = b.querySelector('svg.marks')"
        ".getBoundingClientRect(); return [b.dataset.figure, b.dataset.drawn, b.clientWidth, s.width,"
        " b.querySelectorAll('.mark-symbol path').length]; })"
    )
    assert [name for name, *_ in sizes] == ["memory-difference", "memory-axis", "memory-cost"]
    for name, drawn, room, width, marks in sizes:
        assert drawn == "yes", name
        assert 0.9 * room <= width <= room, name
        assert marks >= 8, name


def test_the_table_sorts_and_filters(opened: Visit) -> None:
    page = opened.page
    shown = "Array.from(document.querySelectorAll('#whole tbody tr')).filter(r => !r.hidden)"
    assert page.evaluate(f"{shown}.length") == 10
    page.select_option("#filter-size", "books")
    page.fill("#filter-text", "8192")
    assert page.evaluate(f"{shown}.map(r => r.cells[0].textContent + ' ' + r.cells[1].textContent)") == ["books 8192"]
    page.fill("#filter-text", "")
    page.locator("#whole th button", has_text="Perplexity").first.click()
    column = page.evaluate(
        "Array.from(document.querySelectorAll('#whole th')).findIndex(h => h.textContent.startsWith('Perplexity'))"
    )
    values = page.evaluate(f"{shown}.map(r => Number(r.cells[{column}].dataset.value))")
    assert values == sorted(values)
    page.select_option("#filter-size", "")
