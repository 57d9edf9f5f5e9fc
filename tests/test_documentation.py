"""What the documentation shows is so: code runs, commands exist with the options shown, outputs come out."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "text", "toml", "json"}
_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for _, found, body in _FENCE.findall(text) if found == language]


def with_language(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


def run(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments, "-c", code] if code else [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("page", with_language("python"))
def test_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mktestdocs = pytest.importorskip("mktestdocs", reason="mktestdocs is not installed: pip install 'recollect[test]'")
    monkeypatch.chdir(tmp_path)
    mktestdocs.check_md_file(fpath=ROOT / page, memory=True)
    printed = capsys.readouterr().out
    # The source of the standard library, which some pages read, is that of one version of Python.
    for output in blocks(page, "text") if sys.version_info[:2] == (3, 11) else []:
        assert output in printed, f"{page} shows another output"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """A language that is not known here, or one with attributes behind it, would be a block that no test runs."""
    fences = re.findall(r"^ *```(.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}


def commands() -> list[tuple[str, str]]:
    """Every line that a page tells to type, with the page."""
    lines = [
        (page, line.strip().removeprefix("$ "))
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    shown = [(page, code) for page in PAGES for code in re.findall(r"`(recollect [^`]+)`", (ROOT / page).read_text())]
    return [(page, line) for page, line in [*lines, *shown] if line and not line.startswith("#")]


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_can_be_typed_as_it_is_shown(page: str, command: str) -> None:
    from recollect.cli import app

    for part in command.split(" && "):
        program, *arguments = shlex.split(part)
        program = program.rpartition("/")[2]
        if program == "torchrun":  # what it starts on every process
            program, *arguments = arguments[arguments.index("-m") + 1 :]
        if program == "recollect":
            verbs: Any = typer.main.get_command(app)
            context = verbs.make_context("recollect", list(arguments), resilient_parsing=True)
            if arguments[0].startswith("-"):
                continue
            name, verb, rest = verbs.resolve_command(context, list(arguments))
            if not {"--help", "..."} & set(rest) and not any(argument.isupper() for argument in rest):
                verb.make_context(name, rest, parent=context)  # reads and checks the options, and runs nothing
        elif program == "tox":
            environments = (ROOT / "tox.ini").read_text()
            wanted = [arguments[place + 1] for place, argument in enumerate(arguments) if argument == "-e"]
            assert all(f"[testenv:{name}]" in environments for name in wanted)
        elif program in {"python", "python3", "pytest"}:
            files = [argument.partition("::")[0] for argument in arguments if argument.endswith((".py", ".md"))]
            assert all((ROOT / file).is_file() for file in files)
        else:
            assert program in {"pip", "pre-commit", "asv", "mkdocs", "git", "ray"} or "=" in program, command


@pytest.mark.parametrize("page", with_language("toml"))
def test_toml_is_toml(page: str) -> None:
    for block in blocks(page, "toml"):
        assert tomllib.loads(block)


@pytest.mark.parametrize("command", ["tox run -e compare", "tox run"])
def test_the_readme_shows_the_commands_that_do_all_the_setting_up(command: str) -> None:
    line = f"python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/{command}\n"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_backend_passes_the_conformance_suite(tmp_path: Path) -> None:
    examples = blocks("docs/adding-a-backend.md", "python")
    (backend,) = (block for block in examples if "class NumpyFlat" in block)
    (suite,) = (block for block in examples if "class TestNumpyFlat" in block)
    (tmp_path / "numpy_flat.py").write_text(backend)
    (tmp_path / "test_numpy_flat.py").write_text(suite)
    about = tmp_path / "numpy_flat-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy-flat\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[recollect.memory_backends]\nnumpy-flat = numpy_flat:NumpyFlat\n")
    answer = run("", tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_numpy_flat.py")
    assert answer.returncode == 0, answer.stdout
    assert " passed" in answer.stdout


def test_the_gain_of_each_kind_of_token_is_as_it_was_measured() -> None:
    page = (ROOT / "docs/token-kinds.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs/inspection/reference.json").read_text(encoding="utf-8"))

    def shown(gain: dict[str, float]) -> str:
        return f"{gain['estimate']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})".replace("-", "−")

    for row in measured["kinds"]:
        far = row["occurrences"].get("far")
        behind = f"{far['tokens']:,} | {shown(far['gain'])}" if far else " | "
        line = f"| {row['kind']} | {row['tokens']:,} | {shown(row['gain_over_twin'])} | {behind} |".replace("  ", " ")
        assert line in page.replace("  ", " ")
    for figure in (f"{measured['tokens']:,}", f"{measured['perplexity']:.2f}", f"{measured['perplexity_twin']:.2f}"):
        assert figure in page
