"""What importing costs and pulls in, each seen in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "faiss",
    "scann",
    "hnswlib",
    "pynndescent",
    "numba",
    "transformers",
    "datasets",
    "tensorflow",
    "altair",
    "pandas",
    "ray",
    "asv",
)


def modules_after(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(answer.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import recollect",
        "from recollect import make_backend, list_backends, MemorizingTransformer; list_backends()",
        "from recollect import make_backend; make_backend('exact', num_memories=1, capacity=4, dim=2)",
    ],
)
def test_no_heavy_library_comes_along(statement: str) -> None:
    assert not modules_after(statement) & set(HEAVY)


def test_import_alone_does_not_load_torch() -> None:
    assert "torch" not in modules_after("import recollect")


def test_reports_load_without_torch() -> None:
    assert "torch" not in modules_after("import recollect.reports")


def test_command_line_help_loads_nothing_heavy() -> None:
    assert not modules_after("import recollect.cli") & {*HEAVY, "torch"}
