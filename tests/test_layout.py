"""The rooms and the one way that imports run between them, read from the files themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("memory_backends", "model", "pretrained", "suites", "reports")
MAY_IMPORT = {
    "memory_backends": {"memory_backends"},
    "model": {"model", "memory_backends"},
    "pretrained": {"pretrained", "model", "memory_backends"},
    # The comparison ends by writing its report: it hands a folder to `reports`, which knows nothing of the suites.
    "suites": {"suites", "pretrained", "model", "memory_backends", "reports"},
    "reports": {"reports"},
}
LINES_AT_MOST = 500


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """The absolute dotted names that a file imports anywhere, relative imports resolved."""
    package = ("recollect", *path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def rooms_of(names: set[str]) -> set[str]:
    parts = (name.split(".") for name in names)
    return {part[1] for part in parts if part[0] == "recollect" and len(part) > 1 and part[1] in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    files = python_files(room)
    assert files
    for path in files:
        wrong = rooms_of(imported_names(path)) - MAY_IMPORT[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_imported_by_their_installed_name(room: str) -> None:
    for path in python_files(room):
        bare = {name.split(".")[0] for name in imported_names(path)} & set(ROOMS)
        assert not bare, f"{path.relative_to(ROOT)} imports {sorted(bare)} without 'recollect.'"


def test_reports_never_import_torch() -> None:
    for path in python_files("reports"):
        assert not {name for name in imported_names(path) if name.split(".")[0] == "torch"}, path


def test_implementations_do_not_import_each_other() -> None:
    folder = "recollect.memory_backends.implementations"
    for path in python_files("memory_backends/implementations"):
        others = {name for name in imported_names(path) if name.startswith(folder)}
        assert not others, f"{path.relative_to(ROOT)} imports {sorted(others)}"


def test_files_stay_readable() -> None:
    places = [*ROOMS, "src/recollect", "tests", "benchmarks"]
    long = {}
    for place in places:
        for path in (ROOT / place).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > LINES_AT_MOST:
                long[str(path.relative_to(ROOT))] = lines
    assert not long


def test_package_links_lead_to_the_rooms() -> None:
    for room in ROOMS:
        link = ROOT / "src" / "recollect" / room
        assert link.resolve() == (ROOT / room).resolve()
