"""The documentation's site: it builds without a warning, names every public name, and needs nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browsing import browser, visited

import recollect

__all__ = ["browser"]  # the fixture

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'recollect[docs]'")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning (a broken link, a name that is not there) fails the build."""
    folder = tmp_path_factory.mktemp("site")
    answer = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


class _Loaded(HTMLParser):
    """Addresses that a page loads by itself: scripts, styles, images, fonts; not what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in {"script", "img", "iframe", "source"}:
            self.found.append(values.get("src") or "")
        if tag == "link" and values.get("rel") not in {"canonical", "next", "prev"}:
            self.found.append(values.get("href") or "")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 8
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        away = [address for address in loaded.found if re.match(r"(https?:)?//", address)]
        assert not away, f"{page.relative_to(site)} loads {away}"
        here = [address for address in loaded.found if address and not address.startswith("data:")]
        missing = [address for address in here if not (page.parent / address.split("?")[0]).exists()]
        assert page.name == "404.html" or not missing, f"{page.relative_to(site)} misses {missing}"
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*['\"]?https?:", style.read_text(encoding="utf-8")), style


def test_every_public_name_has_its_place_in_the_reference() -> None:
    shown = [
        name
        for page in sorted((ROOT / "docs" / "api").glob("*.md"))
        for name in re.findall(r"^::: recollect\.(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(shown) == sorted(set(recollect.__all__) - {"__version__"})


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    there = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    # The results of each grid are a page that docs/ablations.md links to.
    assert sorted(listed) == sorted(path.as_posix() for path in there if path.parts[0] != "ablations")


def test_figures_are_as_their_script_draws_them() -> None:
    folder = ROOT / "docs" / "figures"
    code = (
        "import importlib.util, json; spec = importlib.util.spec_from_file_location('draw', 'docs/figures/draw.py'); "
        "draw = importlib.util.module_from_spec(spec); spec.loader.exec_module(draw); "
        "print(json.dumps({figure.name: figure.svg() for figure in (make() for make in draw.FIGURES)}))"
    )
    drawn = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
    assert sorted(drawn) == sorted(path.stem for path in folder.glob("*.svg"))
    for name, svg in drawn.items():
        assert (folder / f"{name}.svg").read_text(encoding="utf-8") == svg, "run python docs/figures/draw.py"


def test_pages_opened_from_a_disk_search_and_fit_a_telephone(site: Path, browser: Any) -> None:
    with visited(browser, 390) as visit:
        page = visit.page
        for name in ("index", "concepts", "choosing", "api/model"):
            page.goto((site / f"{name}.html").as_uri())
            too_wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
            assert not too_wide, name
        page.click("label.md-header__button[for=__search]")
        page.locator(".md-search__input").press_sequentially("eviction")
        page.wait_for_selector(".md-search-result__item a")
    assert visit.outside() == []
    assert visit.complaints == []
