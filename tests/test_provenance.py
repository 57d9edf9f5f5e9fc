"""Where figures come from: what a description holds, what differs between two, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from recollect.memory_backends.atomic import write_json
from recollect.suites.environment import commit_of
from recollect.suites.provenance import MixedResults, describe, differences, in_words, provenance_in, refuse_mixing

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

NOW: dict[str, Any] = {
    "machine": {"cpu": "Some Processor", "cores": 2, "python": "3.11.7"},
    "libraries": {"torch": "2.13.0", "hnswlib": "0.8.0"},
    "threads": 2,
    "device": "cpu",
    "seed": 0,
    "commit": "a" * 40,
    "uncommitted_changes": False,
    "code": "c" * 64,
}

# Taken before results named where they come from; the entry goes when the file is taken again.
UNNAMED = {
    "import_time.json": "names Python alone",
    "training_step.json": "names torch and threads alone",
    "training_step_peers.json": "names torch and threads alone",
    "trunk_sharing.json": "names the architecture alone",
}


def test_a_description_names_everything_that_decides_a_figure() -> None:
    described = describe(threads=3, seed=7)
    assert set(described["machine"]) >= {"cpu", "cores", "ram_gib", "os", "python"}
    assert {"torch", "numpy"} <= set(described["libraries"])
    assert (described["threads"], described["seed"], described["device"]) == (3, 7, "cpu")
    assert described["commit"] == commit_of()
    assert len(described["code"]) == 64
    json.dumps(described, allow_nan=False)
    assert describe()["threads"] >= 1, "asked of torch"
    assert differences(described, json.loads(json.dumps(described))) == ()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("machine", "cpu"), "Another", "processor Some Processor against Another"),
        (("machine", "cores"), 8, "usable cores 2 against 8"),
        (("machine", "python"), "3.12.1", "Python 3.11.7 against 3.12.1"),
        (("threads",), 1, "threads 2 against 1"),
        (("seed",), 3, "seed 0 against 3"),
        (("device",), "cuda", "device cpu against cuda"),
        (("libraries", "hnswlib"), "0.9.0", "hnswlib 0.8.0 against 0.9.0"),
        (("code",), "d" * 64, "code of commit aaaaaaaaaaaa against of commit aaaaaaaaaaaa"),
    ],
)
def test_each_thing_that_differs_is_named(path: tuple[str, ...], value: object, says: str) -> None:
    other = copy.deepcopy(NOW)
    place = other
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert in_words(differences(NOW, other)) == says
    with pytest.raises(MixedResults, match=r"kept\.json was measured with other settings") as error:
        refuse_mixing(NOW, other, where="kept.json", remedy="give another output")
    assert says in str(error.value)
    assert "give another output" in str(error.value)


def test_what_decides_no_figure_is_not_compared() -> None:
    other = copy.deepcopy(NOW) | {"commit": "b" * 40, "date": "later"}
    other["libraries"]["scann"] = "1.4.2"
    assert differences(NOW, other) == (), "the same code at another commit, and a library that the other lacks"
    refuse_mixing(NOW, other, where="x")
    refuse_mixing(None, NOW, where="x")
    assert differences({"threads": 2}, NOW) == (), "what an earlier version left out is not compared"


def test_changed_code_is_told_with_its_commits() -> None:
    other = NOW | {"commit": "b" * 40, "code": "d" * 64, "uncommitted_changes": True}
    assert (
        in_words(differences(NOW, other)) == "code of commit aaaaaaaaaaaa against of commit bbbbbbbbbbbb with changes"
    )


def test_a_file_says_where_it_comes_from(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"provenance": NOW, "rows": []})
    assert provenance_in(tmp_path / "a.json") == NOW
    assert provenance_in(tmp_path / "missing.json") is None
    (tmp_path / "b.json").write_text("[1")
    assert provenance_in(tmp_path / "b.json") is None


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_result_names_its_machine(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    machine = (content.get("provenance") or {}).get("machine") or content.get("machine")
    found = machine.get("cpu") if isinstance(machine, dict) else machine
    found = found or content.get("cpu") or content.get("processor")
    named = found and found not in ("x86_64", "AMD64", "aarch64", "arm64")
    if path.name in UNNAMED:
        assert not named, f"{path.name} names its machine now: take it off the list"
        return
    assert named, f"{path.name} does not say which machine it was measured on: add suites.provenance.describe() to it"
