"""Curves on the recorded workload: which specs share one, what is measured, and what is kept of an earlier run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from recollect.memory_backends import describe_backend, make_backend
from recollect.model.recording import record
from recollect.suites.cells import Cell
from recollect.suites.curve_stage import measure_curves, plan_curves
from recollect.suites.engines import Bench, Order
from recollect.suites.engines.local import LocalEngine
from recollect.suites.oracle import Judge
from recollect.suites.progress import Reporter
from recollect.suites.workload import Workload, WorkloadSettings, prepare_workload
from recollect.suites.workload_curves import curve_build, curve_setting, measure_workload_curve

SIZE = 64


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("curves")
    corpus = tiny.write_tiny_corpus(folder / "corpus")
    checkpoint = tiny.write_tiny_checkpoint(folder / "checkpoint", corpus)
    settings = WorkloadSettings(
        str(checkpoint), str(corpus), "all", 2, 640, (SIZE,), cache_directory=str(folder / "cache")
    )
    return prepare_workload(folder / "workload", settings)


def test_a_build_is_what_the_curve_does_not_vary() -> None:
    assert curve_build("hnswlib:M=4,ef_search=16") == "hnswlib:M=4"
    assert curve_setting("hnswlib:M=4,ef_search=16") == {"ef_search": 16}
    assert curve_build("exact") == "exact"
    assert curve_setting("exact") == {}
    first, second = (f"rerank:candidates=64,source='approx-topk:buckets={n}'" for n in (64, 128))
    assert curve_build(first) != curve_build(second), "another source is another build"


def test_the_points_are_those_of_the_model_s_own_searches(workload: Workload) -> None:
    """`approx-topk` depends on nothing but its keys, so a replay beside finds the very same."""
    recording = record(workload.model, workload.trunk)
    specs = ["approx-topk:recall_target=0.5", "approx-topk"]
    curve = measure_workload_curve(workload, recording, specs, SIZE, seconds=60.0)
    assert (curve["build"], curve["memory_size"], len(curve["segments"])) == ("approx-topk", SIZE, 4)
    points = {point["spec"]: point for point in curve["points"]}
    assert {"approx-topk:recall_target=0.5", "approx-topk"} <= set(points), "the specs' own points are on the curve"
    judge = Judge(workload.oracle(SIZE), workload.text.is_text)
    memory = make_backend(
        "approx-topk:recall_target=0.5", num_memories=recording.num_memories, capacity=SIZE, dim=recording.dim
    )
    for number, queries in enumerate(recording.queries):
        memory.reset(recording.document_starts[number].repeat_interleave(recording.heads).nonzero().flatten())
        judge(memory, queries, workload.k, memory.search(queries, workload.k))
        memory.add(recording.keys[number])
    where = torch.zeros(judge.weight.shape, dtype=torch.bool)
    where[curve["segments"]] = True
    point = points["approx-topk:recall_target=0.5"]
    assert point["recall_at_k"] == pytest.approx(judge.mean(judge.recall, where))
    assert point["softmax_mass"] == pytest.approx(judge.mean(judge.mass, where))
    assert point["exact_ratio"] > 0
    assert point["samples"] == 4 * 3


def test_a_curve_has_more_points_than_the_sweep(workload: Workload) -> None:
    if not describe_backend("faiss-ivf").available:
        pytest.skip(describe_backend("faiss-ivf").reason)
    recording = record(workload.model, workload.trunk)
    curve = measure_workload_curve(workload, recording, ["faiss-ivf:nlist=16,nprobe=2"], SIZE, seconds=0.01)
    assert curve["build"] == "faiss-ivf:nlist=16"
    assert len(curve["segments"]) == 1, "the time is spent after the first"
    assert "faiss-ivf:nlist=16,nprobe=2" in {point["spec"] for point in curve["points"]}
    assert len(curve["points"]) > 1
    json.dumps(curve, allow_nan=False)


def cells(*specs: str) -> list[Cell]:
    return [Cell(spec, spec.partition(":")[0], SIZE, 4, "ok") for spec in specs]


def test_what_is_planned() -> None:
    skipped = Cell("scann", "scann", SIZE, 4, "skipped")
    found = cells("none", "degraded", "approx-topk", "approx-topk:recall_target=0.8", "exact")
    planned = plan_curves([*found, skipped], {"seed": 0}, seconds=1.0)
    assert [(curve.build, curve.specs) for curve in planned] == [
        ("exact", ("exact",)),
        ("approx-topk", ("approx-topk", "approx-topk:recall_target=0.8")),
    ]
    marks = {curve.fingerprint for seed in (0, 1) for curve in plan_curves(found, {"seed": seed}, seconds=1.0)}
    assert len(marks) == 4


def test_what_is_there_is_kept_and_what_differs_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(engine: LocalEngine, order: Order, on_event: Any) -> dict[str, Any]:
        ran.append([curve["specs"][0] for curve in order.task["curves"]])
        for index, curve in enumerate(order.task["curves"]):
            if curve["specs"] == ["approx-topk"] and len(ran) == 2:
                return {"event": "died", "reason": "ended by SIGSEGV"}
            entry = {"build": curve["specs"][0], "memory_size": SIZE, "points": [{}], "reason": ""}
            on_event({"event": "done", "index": index, "curve": entry, "machine": "here"})
        return {"event": "end"}

    monkeypatch.setattr(LocalEngine, "run", run)

    def measure(settings: dict[str, Any], threads: int) -> str:
        planned = plan_curves(cells("exact", "approx-topk"), settings, seconds=1.0)
        with Reporter(False) as reporter:
            return measure_curves(
                tmp_path,
                planned,
                lambda: tmp_path,
                seconds=1.0,
                provenance={"threads": threads},
                reporter=reporter,
                expect=lambda left: None,
                bench=Bench(LocalEngine(), tmp_path, threads, 1.0),
                checkpoint=tmp_path,
            )

    assert measure({"threads": 1}, 1) == ""
    assert ran == [["exact"], ["approx-topk"]]
    kept = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert [curve["reason"] for curve in kept] == ["", "ended by SIGSEGV"]
    assert measure({"threads": 1}, 1) == ""
    assert ran[2:] == [["approx-topk"]], "what failed is tried again, the rest is kept"
    note = measure({"threads": 2}, 2)
    assert ran[3:] == [["exact"], ["approx-topk"]]
    assert "2 curves had other settings (threads 1 against 2)" in note
