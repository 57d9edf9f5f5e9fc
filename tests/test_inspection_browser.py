"""The page of an inspection in headless Chromium, at desktop and phone width, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import WIDTHS, Visit, browser, visited
from tiny import write_tiny_checkpoint, write_tiny_corpus

from recollect.pretrained.inspection import InspectionOptions, inspect
from recollect.reports.inspection import write_inspection

__all__ = ["browser"]  # the fixture


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    corpus = write_tiny_corpus(folder / "corpus")
    (corpus / "strange.txt").write_text("caf\u00e9 \U0001f600 x_y = 1\n\tif alpha:    # long " * 60, encoding="utf-8")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", corpus)
    options = InspectionOptions(model=checkpoint, corpus=str(corpus), split="all", memory_size=128, k=4)
    inspect(options).save(folder / "out")
    return write_inspection(folder / "out").page


@pytest.fixture(params=WIDTHS)
def opened(request: pytest.FixtureRequest, browser: Any, path: Path) -> Iterator[Visit]:
    with visited(browser, request.param) as visit:
        visit.page.goto(path.as_uri())
        visit.page.wait_for_selector("html[data-ready=yes]")
        yield visit


def test_it_loads_alone_and_fits(opened: Visit) -> None:
    page, complaints, addresses = opened.page, opened.complaints, opened.addresses
    assert complaints == []
    assert len(addresses) == 1
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    beyond = (
        "Array.from(document.querySelectorAll('main *')).filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.box, pre')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert page.evaluate(beyond) == []
    inside = (
        "Array.from(document.querySelectorAll('.chart .track i')).filter(e => { const t = e.parentElement"
        ".getBoundingClientRect(), b = e.getBoundingClientRect();"
        " return b.right < t.left - 12 || b.left > t.right + 12; }).length"
    )
    assert page.evaluate(inside) == 0


def test_the_text_is_the_document(opened: Visit, path: Path) -> None:
    page = opened.page
    corpus = path.parent.parent / "corpus"
    for number in range(page.evaluate("document.getElementById('passage').options.length")):
        page.select_option("#passage", str(number))
        name = page.evaluate("document.getElementById('passage').selectedOptions[0].textContent").split(",")[0]
        shown = page.evaluate("document.getElementById('text').textContent")
        whole = (corpus / name).read_text(encoding="utf-8")
        assert len(shown) > 500
        # A character of several tokens stands once a token that begins it.
        plain = shown.replace("\u00e9", "").replace("\U0001f600", "")
        assert plain in whole.replace("\u00e9", "").replace("\U0001f600", "")


def test_the_keyboard_goes_everywhere(opened: Visit) -> None:
    page, complaints = opened.page, opened.complaints
    chosen = "Number(document.querySelector('.text-pane .chosen').dataset.place)"
    page.focus("#text")
    page.keyboard.press("End")
    last = page.evaluate(chosen)
    assert last == page.evaluate("document.querySelectorAll('.text-pane span').length") - 1
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(chosen) == last - 1
    page.keyboard.press("ArrowUp")
    assert page.evaluate(chosen) < last - 1
    here = page.evaluate(chosen)
    page.keyboard.press("Enter")
    there = page.evaluate(chosen)
    assert there < here
    page.keyboard.press("Escape")
    assert page.evaluate(chosen) == here
    page.keyboard.press("Home")
    assert page.evaluate(chosen) == 0
    active = page.evaluate("document.getElementById('text').getAttribute('aria-activedescendant')")
    assert active == "token-0"
    assert complaints == []


def test_a_token_tells_what_was_retrieved(opened: Visit) -> None:
    page = opened.page
    page.select_option("#passage", "0")
    place = page.evaluate("document.querySelectorAll('.text-pane span').length") - 5
    page.evaluate(f"document.getElementById('token-{place}').click()")
    detail = page.inner_text("#detail")
    assert "Layer 1, head 0" in detail
    assert "Layer 1, head 1" in detail
    assert "% memory" in detail
    assert "tokens back, weight" in detail
    assert page.evaluate("document.querySelectorAll('.text-pane .source').length") > 0
    page.locator("#detail button").first.click()
    assert page.evaluate("Number(document.querySelector('.text-pane .chosen').dataset.place)") < place


def test_colours_and_the_strongest_tokens(opened: Visit) -> None:
    page, complaints = opened.page, opened.complaints
    colours = "Array.from(document.querySelectorAll('.text-pane span')).map(s => s.style.backgroundColor).join()"
    seen = set()
    for option in page.evaluate("Array.from(document.getElementById('colour').options).map(o => o.value)"):
        page.select_option("#colour", option)
        seen.add(page.evaluate(colours))
    assert len(seen) == page.evaluate("document.getElementById('colour').options.length")
    button = page.locator(".strongest button").first
    token = button.locator("mark").inner_text()
    button.click()
    assert page.inner_text(".text-pane .chosen").strip() == token.replace("\u23ce", "").strip()
    assert complaints == []
