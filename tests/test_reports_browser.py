"""The page in headless Chromium, at desktop and phone width, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import WIDTHS, Visit, browser, visited

from recollect.reports import write_report
from recollect.reports.synthetic import write_synthetic_results

__all__ = ["browser"]  # the fixture


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    return write_report(write_synthetic_results(folder, tokens_per_document=60)).page


@pytest.fixture(scope="module", params=WIDTHS)
def opened(request: pytest.FixtureRequest, browser: Any, path: Path) -> Iterator[Visit]:
    """The page once every figure is drawn."""
    with visited(browser, request.param) as visit:
        visit.page.goto(path.as_uri())
        visit.page.wait_for_selector("html[data-ready=yes]")
        yield visit


def test_no_complaints_and_no_loads(opened: Visit) -> None:
    assert opened.complaints == []
    assert opened.outside() == []
    assert len([a for a in opened.addresses if a.startswith("file:")]) == 1


def test_the_page_does_not_overflow(opened: Visit) -> None:
    opened.assert_it_fits()


def test_every_figure_is_drawn_to_its_width(opened: Visit) -> None:
    page = opened.page
    sizes = page.evaluate(
        "Array.from(document.querySelectorAll('.plot')).map(b => { const s = b.querySelector('svg.marks')"
        ".getBoundingClientRect(); return [b.dataset.figure, b.dataset.drawn, b.clientWidth, s.width, s.height,"
        " b.querySelectorAll('.mark-symbol path, .mark-rect path').length]; })"
    )
    assert len(sizes) == 11
    for name, drawn, room, width, height, marks in sizes:
        assert drawn == "yes", name
        assert 0.9 * room <= width <= room, name
        assert height > 200, name
        assert marks > 5, name


def test_legends_act_on_every_figure(opened: Visit) -> None:
    page = opened.page
    faded = (
        "Array.from(document.querySelectorAll('.mark-symbol path'))"
        ".filter(p => p.getAttribute('opacity') === '0.06').length"
    )
    before = page.evaluate(faded)
    button = page.locator(".legend button[data-backend=hnswlib]").first
    button.click()
    page.wait_for_timeout(300)
    assert page.evaluate(faded) > before
    assert page.evaluate(
        "Array.from(document.querySelectorAll('.legend button[data-backend=hnswlib]'))"
        ".every(b => b.getAttribute('aria-pressed') === 'true')"
    )
    button.click()
    page.wait_for_timeout(300)
    assert page.evaluate(faded) == before


def test_the_table_sorts_and_filters(opened: Visit) -> None:
    page = opened.page
    heading = page.locator("#whole th button", has_text="Search").first
    column = page.evaluate(
        "Array.from(document.querySelectorAll('#whole th')).findIndex(h => h.textContent.startsWith('Search'))"
    )
    values = (
        "c => Array.from(document.querySelectorAll('#whole tbody tr')).map(r => r.cells[c].dataset.value)"
        ".filter(v => v !== '').map(Number)"
    )
    heading.click()
    rising = page.evaluate(values, column)
    assert rising == sorted(rising)
    heading.click()
    assert page.evaluate(values, column) == sorted(rising, reverse=True)
    page.fill("#filter-text", "hnswlib")
    shown = "Array.from(document.querySelectorAll('#whole tbody tr')).filter(r => !r.hidden).length"
    assert page.evaluate(shown) == 8
    page.select_option("#filter-size", "8192")
    assert page.evaluate(shown) == 2
    assert page.inner_text("#filter-count").startswith("2 of ")
    page.fill("#filter-text", "")
    page.select_option("#filter-size", "")


def test_markup_in_results_does_not_run(opened: Visit) -> None:
    page = opened.page
    assert page.evaluate("document.querySelectorAll('script').length") == 3
    assert "<script>alert" in page.inner_text("#missing + .box")
