"""Headless Chromium for tests of pages: `browser` is the fixture, `visited` a page that is watched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (1280, 390)
"""A desktop's and a telephone's, in pixels."""


def _missing(reason: str) -> None:
    """A skip on a user's machine, a failure where everything is meant to be installed."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((path for name in names if (path := shutil.which(name))), None)
    if executable is None:
        _missing("no Chromium here; on Debian: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("no playwright here; pip install playwright")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield opened
        opened.close()


@dataclass
class Visit:
    """A page without a network, what its console complained of, and the addresses that it asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def outside(self) -> list[str]:
        """Addresses that are not on this disk or in the page itself."""
        return [a for a in self.addresses if not a.startswith(("file:", "data:", "blob:"))]

    def assert_it_fits(self) -> None:
        """Nothing is wider than the window, except in boxes that scroll by themselves."""
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        plots = "Array.from(document.querySelectorAll('.plot')).every(b => b.scrollWidth <= b.clientWidth)"
        assert self.page.evaluate(plots)
        beyond = (
            "Array.from(document.querySelectorAll('main *')).filter(e => e.getBoundingClientRect().right > innerWidth"
            " + 1 && !e.closest('.box, pre')).map(e => e.outerHTML.slice(0, 80))"
        )
        assert self.page.evaluate(beyond) == []


@contextmanager
def visited(browser: Any, width: int) -> Iterator[Visit]:
    """An empty page of this width."""
    context = browser.new_context(viewport={"width": width, "height": 844}, offline=True)
    page = context.new_page()
    page.set_default_timeout(240_000)  # a machine that trains a model meanwhile takes its time
    visit = Visit(page)
    page.on("console", lambda m: visit.complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.on("request", lambda request: visit.addresses.append(request.url))
    yield visit
    context.close()
