"""Hooks of mkdocs: figures become part of their page, and the theme's one script from elsewhere is our own copy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.utils import get_relative_url

ELSEWHERE = "https://unpkg.com/iframe-worker/shim"
HERE = "assets/iframe-worker.js"
_FIGURE = re.compile(r'<img src="figures/([\w-]+)\.svg"[^>]*>')


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    figures = Path(config["docs_dir"]) / "figures"
    return _FIGURE.sub(
        lambda found: (figures / f"{found[1]}.svg").read_text(encoding="utf-8"),
        html,
    )


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    return output.replace(ELSEWHERE, get_relative_url(HERE, page.url))


def on_post_template(
    output_content: str, *, template_name: str, config: Any
) -> str:
    return output_content.replace(ELSEWHERE, HERE)
