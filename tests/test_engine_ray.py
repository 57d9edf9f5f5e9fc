"""Sweeps as Ray tasks: the same figures, what is killed or lost is run again, and nothing is left behind.

Two Ray nodes on this host stand for two machines that share no file system (`hosts` and `look` are off).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from ablation_grids import VARIANTS, write_corpus, write_grid

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from recollect.memory_backends.ray_session import SESSION, Placement  # noqa: E402
from recollect.memory_backends.ray_token import mode  # noqa: E402
from recollect.suites import comparison  # noqa: E402
from recollect.suites.ablation import runner  # noqa: E402
from recollect.suites.ablation.options import AblateOptions  # noqa: E402
from recollect.suites.ablation.runner import ablate  # noqa: E402
from recollect.suites.comparison import compare  # noqa: E402
from recollect.suites.engines import Engine, EngineError, Order, make_engine, ray_engine, ray_waiting  # noqa: E402
from recollect.suites.engines.ray_cluster import RayCluster  # noqa: E402
from recollect.suites.engines.ray_engine import RayEngine  # noqa: E402
from recollect.suites.options import CompareOptions  # noqa: E402

KILLED = '''
import os
import signal
from pathlib import Path

from recollect.memory_backends.implementations.exact import Exact


class _Once(Exact):
    sweep = ()

    def _search(self, queries, k, memories):
        try:
            Path(os.environ["KILLED_ONCE"], type(self).name).touch(exist_ok=False)
        except FileExistsError:
            return super()._search(queries, k, memories)
        os.kill(self.victim(), signal.SIGKILL)


class KilledOnce(_Once):
    """Its process is killed from outside, the first time."""

    name = "killed-once"
    victim = staticmethod(os.getpid)


class TaskKilledOnce(_Once):
    """The Ray worker over its process is killed, the first time."""

    name = "task-killed-once"
    victim = staticmethod(os.getppid)
'''
POINTS = "[recollect.memory_backends]\nkilled-once = killed:KilledOnce\ntask-killed-once = killed:TaskKilledOnce\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A corpus, a checkpoint, and backends that are killed once, importable here and on every node."""
    SESSION.end()  # of memories that other modules' tests left open
    assert not ray.is_initialized(), "these tests start a Ray of their own"
    folder = tmp_path_factory.mktemp("sweep")
    corpus = tiny.write_tiny_corpus(folder / "corpus")
    tiny.write_tiny_checkpoint(folder / "checkpoint", corpus)
    others = folder / "third-party"
    about = others / "killed-1.0.dist-info"
    about.mkdir(parents=True)
    (others / "killed.py").write_text(KILLED, encoding="utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: killed\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(POINTS, encoding="utf-8")
    (folder / "once").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(others))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(others), os.environ.get("PYTHONPATH")])))
        patch.setenv("KILLED_ONCE", str(folder / "once"))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder


@pytest.fixture(scope="module")
def options(folder: Path) -> CompareOptions:
    return CompareOptions(
        checkpoint=folder / "checkpoint",
        corpus=str(folder / "corpus"),
        split="all",
        backends=("killed-once", "task-killed-once"),
        memory_sizes=(32,),
        max_tokens=640,
        curve_seconds=0.0,
        crossover_sizes=(),
        output=folder / "out",
        threads=1,
        report=False,
        progress=False,
        cache_directory=folder / "cache",
    )


@pytest.fixture(scope="module")
def local(options: CompareOptions) -> Path:
    """The folder of a comparison that ran on this machine alone."""
    output = Path(options.output).parent / "local"
    compare(options, output=output, backends=("exact",))
    return output


@pytest.fixture(scope="module", autouse=True)
def _no_asv() -> Iterator[None]:
    """Comparisons here write no files for asv, which takes seconds to say what benchmarks there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison._Comparison, "_write_asv", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two nodes of one CPU each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def cells_in(output: Path) -> dict[str, dict[str, Any]]:
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (output / "cells").glob("*.json")]
    return {cell["spec"]: cell for cell in cells}


def separate(name: str, **given: Any) -> Engine:
    """The engine, with nodes of this host as machines that share nothing."""
    return RayEngine(**given, hosts=False, look=False) if name == "ray" else make_engine(name, **given)


def test_a_comparison_on_two_machines_gives_the_figures_of_one(
    folder: Path, options: CompareOptions, local: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "make_engine", separate)
    far = dataclasses.replace(options, output=folder / "far", engine="ray", address=cluster.address)
    result = compare(far)
    assert result.failed == ()
    assert result.measured == 4
    here, there = cells_in(local), cells_in(folder / "far")
    for spec in ("none", "exact"):
        for name in ("perplexity", "recall_at_k", "softmax_mass", "tokens", "fingerprint", "settings"):
            assert there[spec][name] == here[spec][name], (spec, name)
    for spec in ("killed-once", "task-killed-once"):
        assert there[spec]["perplexity"] == here["exact"]["perplexity"]
        told = [note for note in result.notes if note.startswith(f"{spec}, 32 keys")]
        assert len(told) == 1, result.notes
        assert "measured again" in told[0]
    assert "SIGKILL" in " ".join(result.notes)
    machines = {cell["provenance"]["host"] for cell in there.values()}
    assert len(machines) == 2, "both machines measured"
    run = json.loads((folder / "far" / "run.json").read_text(encoding="utf-8"))
    assert run["engine"] == "ray"
    assert set(run["machines"]) == machines
    assert sum(run["machines"].values()) == 4
    assert {name: run["machine"][name] for name in ("cpu", "cores", "python")} == {
        name: there["exact"]["provenance"]["machine"][name] for name in ("cpu", "cores", "python")
    }
    assert not list((folder / "far").glob(".sweep-*"))
    assert not ray.is_initialized(), "the cluster is left"
    again = compare(dataclasses.replace(far, engine="local", address=None, backends=("killed-once",)))
    assert (again.measured, again.reused) == (0, 3), "a run that one engine began, the other goes on with"


def test_a_grid_on_two_machines_gives_the_figures_of_one(
    folder: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = AblateOptions(
        grids=(write_grid(folder, VARIANTS),),
        corpora=(f"words={write_corpus(folder / 'words')}",),
        output=folder / "grid",
        timing=False,
        progress=False,
        report=False,
        cache_directory=folder / "cache",
    )
    first = ablate(dataclasses.replace(options, variants=("none",)))
    assert (first.trained, first.evaluated) == (1, 1)
    monkeypatch.setattr(runner, "make_engine", separate)
    far = dataclasses.replace(options, engine="ray", address=cluster.address)
    result = ablate(far)
    assert result.failed == ()
    assert (result.trained, result.evaluated, result.reused) == (1, 2, 2), "what was trained here is gone on with"
    alone = ablate(dataclasses.replace(far, output=folder / "grid-far", variants=("none",)))
    assert alone.trained == 1
    rows = [rows_of(folder / name / "tiny") for name in ("grid", "grid-far")]
    assert rows[0]["none"]["evaluation"]["perplexity"] == rows[1]["none"]["evaluation"]["perplexity"]
    assert rows[1]["none"]["training"]["machine"] != rows[0]["none"]["training"]["machine"]
    assert {row["status"] for row in rows[0].values()} == {"ok"}
    assert not list((folder / "grid").rglob("*.partial"))


def rows_of(grid: Path) -> dict[str, dict[str, Any]]:
    lines = (grid / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["variant"]: row for row in map(json.loads, lines)}


def test_what_a_former_ray_of_this_process_settled_is_forgotten(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    lease = SESSION.lease("local", Placement(), 0, "nothing", 60.0)  # what a memory begins with
    assert mode() == "token"
    SESSION.give_back(lease)
    assert not [name for name in os.environ if name.startswith("RAY_AUTH_")]
    assert not (tmp_path / ".ray").exists(), "a token outlived its Ray"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # as this cluster has it
    with separate("ray", output=tmp_path, threads=1, note=print, address=cluster.address) as engine:
        assert mode() == "disabled"
        engine.settle(None)  # hears of every machine, the way that it hears of orders
        assert engine.places(alone=True, threads=1) == 2


def test_a_cluster_whose_answers_do_not_arrive_is_told(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # wanted here of whoever calls, and the cluster's processes have none
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setattr(ray_waiting, "ARRIVAL_SECONDS", 0.5)
    monkeypatch.setattr(ray_engine, "ORPHAN_SECONDS", 0.0)
    with RayEngine(output=tmp_path, threads=1, note=print, address=cluster.address) as engine:
        with pytest.raises(EngineError, match=r"node .* does not reach this program.*RAY_AUTH_MODE.*'token'"):
            engine.settle(None)

        def tell() -> Iterator[dict[str, str]]:
            yield {"event": "end"}

        stream = ray.remote(tell).options(num_returns="streaming").remote()
        order = Order(task={}, output=tmp_path, threads=1, log=tmp_path / "log", timeout=1.0)
        event = engine._listen(stream, order, print)
    assert event["event"] == "lost"
    assert "does not reach this program" in event["reason"]


def test_ray_of_its_own_goes_on_with_a_local_run_and_leaves_nothing(
    options: CompareOptions, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of a cluster that is gone
    mark = str(local)
    monkeypatch.setenv("SWEEP_MARK", mark)
    own = dataclasses.replace(options, output=local, engine="ray", backends=("degraded:drop=0.5",))
    result = compare(own)
    assert (result.measured, result.reused) == (1, 2)
    assert cells_in(local)["degraded:drop=0.5"]["provenance"]["host"] == socket.gethostname()
    assert not ray.is_initialized()
    until = time.monotonic() + 10
    while (left := processes_of(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    assert not list(Path("/tmp").glob(f"recollect-ray-{os.getpid()}-*"))


def processes_of(mark: str) -> list[str]:
    """Other processes that inherited a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("SWEEP_MARK") == mark:
                found.append(process.name())
    return found


def test_an_address_that_does_not_answer_is_told_in_time() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match=r"no Ray cluster answers at .* within 1 s"):
        RayCluster(f"127.0.0.1:{port}", deadline=1.0).start()
    for address, told in (("ray://10.0.0.1:10001", "Ray's client"), ("somewhere", "want host:port")):
        with pytest.raises(EngineError, match=told):
            RayCluster(address).start()
    assert not ray.is_initialized()


def test_a_gpu_of_its_own_is_asked_for_by_cuda_alone(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="give --device cuda"):
        RayEngine(output=tmp_path, threads=1, note=print, device="cuda:1")
