"""Hooks of mkdocs: the theme's one script from elsewhere is replaced by our copy, so that the pages work offline."""

from __future__ import annotations

from typing import Any

from mkdocs.utils import get_relative_url

ELSEWHERE = "https://unpkg.com/iframe-worker/shim"
HERE = "assets/iframe-worker.js"


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    return output.replace(ELSEWHERE, get_relative_url(HERE, page.url))


def on_post_template(
    output_content: str, *, template_name: str, config: Any
) -> str:
    return output_content.replace(ELSEWHERE, HERE)
