"""The pages of an ablation in headless Chromium, at desktop and phone width, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_reports_browser import WIDTHS, browser

from recollect.reports import write_ablation_report
from recollect.reports.ablation_synthetic import write_synthetic_ablations

__all__ = ["browser"]  # the fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_synthetic_ablations(tmp_path_factory.mktemp("browser"))
    write_ablation_report(made)
    return made


@pytest.fixture(scope="module", params=WIDTHS)
def opened(request: pytest.FixtureRequest, browser: Any, folder: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """(page, complaints of the console, addresses asked for): over the grids first, then that of memory sizes."""
    context = browser.new_context(viewport={"width": request.param, "height": 844}, offline=True)
    page = context.new_page()
    page.set_default_timeout(240_000)
    complaints: list[str] = []
    addresses: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: addresses.append(r.url))
    page.goto((folder / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.click("h2 a[href='memory/report.html']")
    page.wait_for_selector("html[data-ready=yes]")
    yield page, complaints, addresses
    context.close()


def test_no_complaints_and_no_loads(opened: tuple[Any, list[str], list[str]]) -> None:
    _, complaints, addresses = opened
    assert complaints == []
    assert [a.rsplit("/", 1)[1] for a in addresses if a.startswith("file:")] == ["index.html", "report.html"]
    assert [a for a in addresses if not a.startswith(("file:", "data:", "blob:"))] == []


def test_the_page_does_not_overflow(opened: tuple[Any, list[str], list[str]]) -> None:
    page, *_ = opened
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("Array.from(document.querySelectorAll('.plot')).every(b => b.scrollWidth <= b.clientWidth)")
    beyond = (
        "Array.from(document.querySelectorAll('main *')).filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.box, pre')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert page.evaluate(beyond) == []


def test_every_figure_is_drawn_to_its_width(opened: tuple[Any, list[str], list[str]]) -> None:
    page, *_ = opened
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


def test_the_table_sorts_and_filters(opened: tuple[Any, list[str], list[str]]) -> None:
    page, *_ = opened
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
