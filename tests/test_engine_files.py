"""What travels between machines, which machines may measure together, and how a death is judged: all without Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from recollect.memory_backends.atomic import atomic_folder
from recollect.suites.engines import EngineError, Losses, make_engine
from recollect.suites.engines.files import Mirror, Needed, lay_down, list_needed, read_array, relocate, take_in
from recollect.suites.engines.machines import Machine, apart, check_versions, choose_kind, name_machines, unlike
from recollect.suites.engines.node import (
    boot_identity,
    judge_death,
    memory_kills,
    missing_here,
    remove_scratch,
    run_order,
    scratch_folder,
)

HARDWARE = {"cpu": "One", "cores": 4, "ram_gib": 8.0, "os": "Linux", "python": "3.12.1"}


def described(**changes: Any) -> dict[str, Any]:
    return {
        "recollect": "1.0",
        "code": "a",
        "training": "b",
        "commit": None,
        "libraries": {"torch": "2.9.0", "numpy": "2.3.0"},
        "machine": HARDWARE,
        "host_name": "here",
        "host": "boot",
        **changes,
    }


def machine(node: str, *, cpus: int = 4, **changes: Any) -> Machine:
    return Machine(node, node, cpus, 0, described(**changes))


def content_of(needed: Needed) -> bytes:
    return bytes(read_array(needed.path).tobytes())


def test_paths_of_one_machine_become_those_of_another() -> None:
    moves = [("/out/.workload", "/tmp/needs/.workload"), ("/out", "/tmp/orders/1")]
    task = {"workload": "/out/.workload", "cells": [{"path": "/out/cells/a.json"}], "n": 1, "other": "/outside"}
    assert relocate(task, moves) == {
        "workload": "/tmp/needs/.workload",
        "cells": [{"path": "/tmp/orders/1/cells/a.json"}],
        "n": 1,
        "other": "/outside",
    }


def test_files_are_laid_down_once_and_checked(tmp_path: Path) -> None:
    source = tmp_path / "model"
    (source / "trunk").mkdir(parents=True)
    (source / "trunk" / "a.bin").write_bytes(b"12345")
    (source / "about.json").write_text(json.dumps({"checkpoint": str(source)}), encoding="utf-8")
    (source / ".hidden").write_text("no", encoding="utf-8")
    (source / "run.log").write_text("no", encoding="utf-8")
    needed = list_needed([source])
    assert sorted(Path(file.path).name for file in needed) == ["a.bin", "about.json"]
    assert missing_here(needed) == []
    there = tmp_path / "there"
    moves = [(str(source), str(there / "model"))]
    asked: list[str] = []

    def fetch(file: Needed) -> bytes:
        asked.append(Path(file.path).name)
        return content_of(file)

    lay_down(needed, there, moves, fetch, rewritten=("about.json",))
    assert (there / "model" / "trunk" / "a.bin").read_bytes() == b"12345"
    assert json.loads((there / "model" / "about.json").read_text()) == {"checkpoint": str(there / "model")}
    lay_down(needed, there, moves, fetch, rewritten=("about.json",))
    assert sorted(asked) == ["a.bin", "about.json"], "what is there is not sent again"
    (source / "trunk" / "a.bin").write_bytes(b"54321")
    with pytest.raises(ValueError, match="changed while it was sent"):
        lay_down(needed, tmp_path / "elsewhere", [(str(source), str(tmp_path / "elsewhere"))], fetch)


def test_another_file_under_the_same_path_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (needed,) = list_needed([path])
    path.write_bytes(b"12346")
    assert not needed.is_here()
    path.write_bytes(b"12345")
    assert needed.is_here(), "the same content written anew is the same file"
    path.unlink()
    assert missing_here([needed]) == [str(path)]


def test_a_mirror_gives_results_in_the_order_of_their_writing(tmp_path: Path) -> None:
    worked, output = tmp_path / "worked", tmp_path / "output"
    worked.mkdir()
    (worked / "there").write_text("before", encoding="utf-8")
    mirror = Mirror(worked)
    assert list(mirror.changes()) == []

    for number, name in enumerate(("z-losses", "a-cell")):
        (worked / name).write_text(name, encoding="utf-8")
        os.utime(worked / name, ns=(number * 1000, number * 1000))
    (worked / ".a-cell.x.partial").write_text("half", encoding="utf-8")
    changes = list(mirror.changes())
    assert [name for name, _ in changes] == ["z-losses", "a-cell"]
    for name, content in changes:
        take_in(output, name, content)
    assert (output / "a-cell").read_text() == "a-cell"
    (worked / "a-cell").unlink()
    (change,) = mirror.changes()
    assert change == ("a-cell", None)
    take_in(output, *change)
    assert not (output / "a-cell").exists()
    with pytest.raises(ValueError, match="outside"):
        take_in(output, "../elsewhere", b"")


def test_a_training_state_travels_as_a_whole(tmp_path: Path) -> None:
    worked, output = tmp_path / "worked", tmp_path / "output"
    state = worked / "checkpoints" / "a" / "training"
    mirror = Mirror(worked, whole=("training",))
    for step in (1, 2):
        with atomic_folder(state) as folder:
            (folder / "rows0-2").mkdir()
            (folder / "rows0-2" / "memory").write_text(f"memory of step {step}", encoding="utf-8")
            if step == 1:
                (folder / "old").write_text("only once", encoding="utf-8")
            (folder / "state.json").write_text(f"step {step}", encoding="utf-8")
            assert list(mirror.changes()) == [], "what is being written is nobody's yet"
        ((name, content),) = mirror.changes()
        assert name == "checkpoints/a/training"
        take_in(output, name, content)
        there = output / "checkpoints" / "a" / "training"
        assert (there / "state.json").read_text() == f"step {step}"
        assert (there / "rows0-2" / "memory").read_text() == f"memory of step {step}"
    assert not (there / "old").exists()
    shutil.rmtree(state)
    ((name, content),) = mirror.changes()
    assert (name, content) == ("checkpoints/a/training", None)
    take_in(output, name, content)
    assert not there.exists()


def test_only_like_machines_measure_together() -> None:
    small = {**HARDWARE, "cores": 2}
    other = {**HARDWARE, "cpu": "Other"}
    machines = [machine("a"), machine("b"), machine("c", machine=small), machine("d", machine=other)]
    chosen, left = choose_kind(machines, None, small)
    assert [one.node for one in chosen] == ["a", "b"], "the kind that most are of"
    assert [one.node for one in left] == ["c", "d"]
    assert [one.node for one in choose_kind(machines, other, small)[0]] == ["d"], "the kind of earlier results"
    assert [one.node for one in choose_kind(machines[2:], None, other)[0]] == ["d"], "this machine's, else"
    assert unlike(chosen) == []
    assert unlike([machines[0], machines[2]]) == ["a and c: usable cores 4 against 2"]


def test_a_machine_to_itself_is_no_neighbour_on_the_same_host() -> None:
    machines = [machine("a"), machine("b"), machine("c", host="second"), machine("d", host="third", cpus=2)]
    assert [one.node for one in apart(machines)] == ["a", "c"]
    assert [one.node for one in apart(machines, hosts=False)] == ["a", "b", "c"]
    named = name_machines([("abcdef01", 1, 0, described()), ("abcdef02x", 1, 0, described(host_name="other"))])
    assert [one.name for one in named] == ["here", "other"]
    named = name_machines([("abcdef01", 1, 0, described()), ("abcxyz02", 1, 0, described())])
    assert [one.name for one in named] == ["here/abcdef", "here/abcxyz"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"libraries": {"torch": "2.8.0", "numpy": "2.3.0"}}, r"torch 2\.8\.0 \(here 2\.9\.0\)"),
        ({"libraries": {"torch": "2.9.0"}}, "no numpy"),
        ({"recollect": "0.9"}, r"recollect 0\.9 \(here 1\.0\)"),
        ({"code": "changed", "commit": "f" * 40}, "other code of recollect 1.0 .commit ffffffffffff; here digest a"),
    ],
)
def test_other_versions_are_refused_by_name(changes: dict[str, Any], told: str) -> None:
    check_versions(machine("a"), described())
    with pytest.raises(EngineError, match=told) as error:
        check_versions(machine("far", **changes), described())
    assert "machine far" in str(error.value)


def test_who_was_killed_from_outside_is_run_again_and_who_had_no_memory_is_not() -> None:
    died = {"event": "died", "reason": "it was ended by SIGKILL"}
    assert judge_death(died, -signal.SIGKILL, 0)["event"] == "lost"
    assert judge_death(died, -signal.SIGTERM, 0)["event"] == "lost"
    assert judge_death(died, -signal.SIGSEGV, 0) == died, "a crash is the task's own"
    assert judge_death(died, 1, 0) == died
    told = judge_death(died, -signal.SIGKILL, 1)
    assert told["event"] == "died"
    assert "no memory left" in told["reason"]
    assert memory_kills() >= 0
    assert boot_identity()


def test_what_is_lost_again_and_again_is_given_up() -> None:
    losses = Losses(most=3)
    assert [losses.again("a"), losses.again("b"), losses.again("a"), losses.again("a")] == [True, True, True, False]
    assert losses.told("a", "gone") == "gone (3 times)"
    assert losses.told("b", "gone") == "gone"


def test_an_order_on_a_machine_without_the_folder_sends_its_results(tmp_path: Path) -> None:
    """A task that fails at once: what travels, and what is told, without the cost of a measurement."""
    output = tmp_path / "output"
    output.mkdir()
    order = {
        "task": {"kind": "cells", "workload": str(output / ".workload"), "output": str(output), "provenance": {"k": 4}},
        "output": str(output),
        "mark": ".no-such-mark",
        "look": True,
        "run": tmp_path.name,
        "threads": 1,
        "log": str(output / "logs" / "x.log"),
        "timeout": 60.0,
        "device": "cpu",
        "needs": [],
        "resumes": (),
        "rewritten": (),
        "machines": {"node": {"name": "far", "machine": HARDWARE}},
    }
    events = list(run_order(order, "node", content_of))
    assert events[0]["event"] == "placed"
    assert events[-1]["event"] == "died"
    assert "FileNotFoundError" in events[-1]["reason"], "nothing was prepared there"
    assert list(output.iterdir()) == []
    assert scratch_folder(tmp_path.name, "node").is_dir()
    remove_scratch(tmp_path.name, "node")
    assert not scratch_folder(tmp_path.name, "node").exists()


def test_engines_are_named() -> None:
    with pytest.raises(EngineError, match="engine 'slurm' is unknown; choose one of local, ray"):
        make_engine("slurm", output=Path("out"), threads=1, note=print)
    with pytest.raises(EngineError, match="is of a Ray cluster: give --engine ray"):
        make_engine("local", output=Path("out"), threads=1, note=print, address="10.0.0.1:6379")
