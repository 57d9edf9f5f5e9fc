"""Plans from calibrations with known laws: bytes, times, what fits, and which calibration is taken or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from recollect.cli import app
from recollect.memory_backends import InvalidSpec, make_backend
from recollect.memory_backends.testing import skip_unless_available, vectors
from recollect.suites.environment import backend_digest
from recollect.suites.planning import measuring
from recollect.suites.planning.amounts import PlanError
from recollect.suites.planning.calibration import (
    Calibration,
    Point,
    calibration_path,
    find_calibration,
    read_calibration,
    shipped_path,
)
from recollect.suites.planning.measuring import Effort, KeyStream, default_specs, measure, without_larger
from recollect.suites.planning.needed_bytes import Placement, bytes_of, placements_of
from recollect.suites.planning.planning import plan_on_one_machine
from recollect.suites.planning.question import Question

SPECS = ("exact", "faiss-ivfpq", "hnswlib")
EXACT_MS, IVF_MS = 1e-3, 0.05
"""Of a search: exact for each key, faiss-ivfpq for each square root of a key."""
GIB = 2**30


def synthetic(**changes: Any) -> Calibration:
    found = Calibration.here(threads=1, device="cpu", clock="wall")
    found.date = "2026-11-25T00:00:00+00:00"
    for spec in SPECS:
        for dim in (64, 128):
            for keys in (4096, 8192, 16384, 32768, 65536):
                search = EXACT_MS * keys if spec == "exact" else IVF_MS * keys**0.5
                point = Point(
                    spec=spec,
                    keys=keys,
                    dim=dim,
                    queries=512,
                    k=32,
                    build_seconds=1e-6 * keys * dim / 64,
                    append_us=2.0,
                    longest_append_ms=5.0,
                    search_ms=search * dim / 64,
                    recall=1.0,
                    index_bytes=0,
                    reference_ms=5.0,
                    noisy=False,
                    code=backend_digest(spec),
                )
                found.points.append(point)
    return dataclasses.replace(found, **changes)


def question(**changes: Any) -> Question:
    return Question(**{"keys": 10**6, "dim": 64, "machine_bytes": 24 * GIB, "heads": 8, "layers": 2, **changes})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))


class TestPlans:
    def test_times_are_those_of_the_law_for_all_memories(self) -> None:
        plan = plan_on_one_machine(question(), synthetic(), [])
        exact, ivfpq = (one for one in plan.backends if one.spec in ("exact", "faiss-ivfpq"))
        assert exact.cost is not None
        assert ivfpq.cost is not None
        assert exact.cost.search.value == pytest.approx(16 * 1e-3 * EXACT_MS * 10**6, rel=1e-3)
        assert ivfpq.cost.search.value == pytest.approx(16 * 1e-3 * IVF_MS * 10**3, rel=0.02)
        assert exact.cost.append.value == pytest.approx(16 * 512 * 2e-6, rel=1e-3)
        assert exact.cost.build.value == pytest.approx(16 * 1.0, rel=1e-3)
        assert exact.cost.step.beyond == pytest.approx(10**6 / 65536)
        longer = plan_on_one_machine(question(queries=1024, k=64, dim=128), synthetic(), []).backends[0]
        assert longer.cost is not None
        assert longer.cost.search.value == pytest.approx(2 * 2 * 2 * exact.cost.search.value, rel=1e-3)

    def test_bytes_are_counted(self) -> None:
        plan = plan_on_one_machine(question(values="bfloat16"), synthetic(), [])
        keys = 16 * 10**6
        assert plan.key_bytes["keys as float32"] == (keys * 64 * 4, 0)
        assert plan.key_bytes["keys as int8"] == (keys * 68, 0)
        assert plan.key_bytes["keys as int8, whole ones in a file"] == (keys * 68, keys * 256)
        assert plan.value_bytes == (keys * 128, 0)
        ivfpq = next(one for one in plan.backends if one.spec == "faiss-ivfpq")
        # m = 64 / 4 codes of a byte, an id and a place; a thousand cells; the codebook.
        assert ivfpq.index_bytes is not None
        assert ivfpq.index_bytes >= 16 * (10**6 * (16 + 8 + 8) + 1000 * 256 + 256 * 256)
        assert ivfpq.standing_bytes == 0, "as the points have it"
        assert ivfpq.fits[0].memory_bytes == keys * 256 + keys * 128 + ivfpq.index_bytes

    @pytest.mark.parametrize("spec", ["faiss-ivf", "faiss-ivfpq", "hnswlib", "faiss-hnsw", "scann", "rerank"])
    def test_a_built_memory_takes_no_more_than_was_planned(self, spec: str) -> None:
        skip_unless_available(spec)
        memory = make_backend(spec, num_memories=2, capacity=2048, dim=32)
        memory.add(vectors(2, 2048, 32))
        memory.wait()
        planned = bytes_of(spec, Placement(), memories=2, keys=2048, dim=32)
        stats = memory.stats()
        assert planned.keys == stats.key_bytes
        assert planned.index is not None
        assert 0.1 * planned.index < stats.index_bytes <= planned.index

    def test_where_keys_may_lie(self) -> None:
        assert len(placements_of("exact")) == 6
        assert placements_of("exact:storage=int8") == (Placement("int8"),)
        assert placements_of("faiss-ivf:keys_in=temporary") == (Placement("float32", in_file=True),)

    def test_what_fits_is_said_and_what_would(self) -> None:
        small = plan_on_one_machine(question(), synthetic(), [])
        assert any(line.startswith("fits in 24 GiB") and "exact (7.63 GiB)" in line for line in small.verdicts)
        large = plan_on_one_machine(question(keys=8 * 10**6, values="file"), synthetic(), [])
        (said,) = (line for line in large.verdicts if line.startswith("does not fit in 24 GiB"))
        assert "fits with" in said
        assert "exact with keys as bfloat16" in said or "exact with keys as int8" in said
        huge = plan_on_one_machine(question(keys=10**9), synthetic(), [])
        (said,) = (line for line in huge.verdicts if line.startswith("does not fit in 24 GiB"))
        assert "nothing does" in said
        assert "such machines" in said
        assert any(line.startswith("exact needs 4.44 h") for line in huge.verdicts)
        assert any("15,259 times beyond" in line for line in huge.verdicts)
        assert any("square root of the keys" in line for line in huge.assumptions)

    def test_what_was_not_measured_has_bytes_and_the_command_for_its_time(self) -> None:
        plan = plan_on_one_machine(question(backends=("hnswlib:ef_search=256", "exact")), synthetic(), [])
        exact, other = plan.backends
        assert exact.cost is not None
        assert other.cost is None
        assert 'recollect plan --measure --backend "hnswlib:ef_search=256"' in other.reason
        assert other.index_bytes

    def test_a_plan_as_json(self) -> None:
        content = json.loads(json.dumps(plan_on_one_machine(question(), synthetic(), ["a word"]).as_json()))
        names = {"schema", "question", "calibration", "warnings", "key_bytes", "value_bytes", "backends", "verdicts"}
        assert names < set(content)
        assert content["question"]["memories"] == 16
        (exact, *_) = content["backends"]
        assert {"build", "append", "search", "longest", "step", "recall", "measured", "laws"} == set(exact["cost"])
        assert {"value", "low", "high", "beyond"} == set(exact["cost"]["step"])
        assert {"placement", "memory_bytes", "file_bytes", "fits"} == set(exact["fits"][0])

    def test_bad_questions(self) -> None:
        with pytest.raises(PlanError, match="heads is 0"):
            question(heads=0)
        with pytest.raises(PlanError, match="values is 'float64'"):
            question(values="float64")
        with pytest.raises(InvalidSpec, match="nlits"):
            question(backends=("faiss-ivf:nlits=3",))


class TestCalibrations:
    def test_a_file_holds_it_all(self, tmp_path: Path) -> None:
        synthetic().save(tmp_path / "one.json")
        assert read_calibration(tmp_path / "one.json") == synthetic()

    def test_this_machine_s_own_comes_first_and_the_shipped_one_says_so(self) -> None:
        shipped, words = find_calibration()
        assert shipped.shipped
        assert any("NOT THIS MACHINE: no costs were measured here" in word for word in words)
        synthetic().save(calibration_path())
        own, words = find_calibration()
        assert not own.shipped
        assert not words

    def test_another_machine_s_is_refused_unless_it_is_named(self) -> None:
        machine = {**synthetic().machine, "cpu": "A quicker one"}
        synthetic(machine=machine).save(calibration_path())
        with pytest.raises(PlanError, match=r"of another machine \(cpu is .* and was 'A quicker one' there\)"):
            find_calibration()
        found, words = find_calibration(calibration_path())
        assert found.machine["cpu"] == "A quicker one"
        assert any(word.startswith("NOT THIS MACHINE") for word in words)

    def test_other_libraries_changed_code_and_noise_are_named(self) -> None:
        found = synthetic(libraries={"torch": "1.0"})
        found.points[0] = dataclasses.replace(found.points[0], noisy=True)
        found.points[-10:] = [dataclasses.replace(point, code="other") for point in found.points[-10:]]
        found.save(calibration_path())
        words = " ".join(find_calibration()[1])
        assert "torch 1.0" in words
        assert "changed since the measurement of hnswlib" in words
        assert "busy at 1 of 30" in words

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not readable JSON"),
            ("[]", "no calibration"),
            ('{"format": "recollect-calibration", "version": 99}', "version 99"),
            ('{"format": "recollect-calibration", "version": 1}', "incomplete"),
        ],
    )
    def test_what_is_none_is_told(self, content: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(PlanError, match=message) as caught:
            read_calibration(tmp_path / "bad.json")
        assert "recollect plan --measure" in str(caught.value)
        with pytest.raises(PlanError, match="there is no calibration"):
            read_calibration(tmp_path / "nowhere.json")

    def test_a_device_without_a_calibration(self) -> None:
        with pytest.raises(PlanError, match="--measure --device cuda"):
            find_calibration(device="cuda")

    def test_the_shipped_one_is_of_a_named_machine_and_plans(self) -> None:
        shipped = read_calibration(shipped_path())
        assert shipped.machine["cpu"]
        assert {"exact", "faiss-ivf", "hnswlib", "scann"} <= set(shipped.specs)
        plan = plan_on_one_machine(question(keys=10**9, dim=128), shipped, [])
        assert all(one.cost is not None for one in plan.backends if one.spec in ("exact", "faiss-ivf", "hnswlib"))


class TestMeasuring:
    effort = Effort(("exact", "approx-topk"), sizes=(256, 512, 1024), other=((256, 16),), dim=8, queries=64, k=4)

    def test_it_takes_what_is_not_there_and_writes_each_point(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, told = tmp_path / "one.json", []
        small = dataclasses.replace(self.effort, sizes=(256, 512), retries=0)
        measure(small, path, threads=1, on_point=lambda done, total, what: told.append((done, total)))
        assert told[-1] == (6, 6)
        taken = []
        real = measuring.measure_point
        monkeypatch.setattr(
            measuring,
            "measure_point",
            lambda spec, keys, dim, **rest: taken.append(keys) or real(spec, keys, dim, **rest),
        )
        found, notes = measure(dataclasses.replace(self.effort, retries=0), path, threads=1)
        assert taken == [1024, 1024]
        assert notes == []
        assert read_calibration(path) == found
        for point in found.points:
            assert point.recall > 0.9
            assert min(point.build_seconds, point.append_us, point.search_ms, point.longest_append_ms) > 0
        found, notes = measure(dataclasses.replace(small, retries=0), path, threads=2)
        assert "measured anew" in notes[0]
        assert found.threads == 2
        assert len(found.points) == 6

    def test_a_point_that_a_busy_machine_spoilt_is_taken_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, references = measuring.measure_point, iter([5.0, 5.0, 9.0, 5.0, 4.9])
        monkeypatch.setattr(
            measuring,
            "measure_point",
            lambda *rest, **more: dataclasses.replace(real(*rest, **more), reference_ms=next(references)),
        )
        one = dataclasses.replace(self.effort, specs=("exact",), other=(), sizes=(256, 512, 1024), retries=2)
        found, _ = measure(one, tmp_path / "one.json", threads=1)
        assert sorted(point.reference_ms for point in found.points) == [5.0, 5.0, 5.0]

    def test_what_would_take_too_long_is_left_out(self, tmp_path: Path) -> None:
        impatient = dataclasses.replace(self.effort, specs=("exact",), patience=0.0, retries=0)
        found, notes = measure(impatient, tmp_path / "one.json", threads=1)
        assert len(found.points) == 1
        assert all("left out" in note for note in notes)

    def test_sizes_and_specs(self) -> None:
        assert default_specs()[0] == "exact"
        assert "degraded" not in default_specs()
        assert without_larger(Effort(("exact",)), 20_000).sizes == (4096, 8192, 16384, 20_000)
        with pytest.raises(PlanError, match="the largest size is 5000"):
            without_larger(Effort(("exact",)), 5000)

    def test_keys_are_unit_vectors_that_come_again(self) -> None:
        stream = KeyStream(8, 0)
        keys = stream.keys(64, 32)
        assert (keys.norm(dim=-1) - 1).abs().max() < 1e-5
        assert (keys == KeyStream(8, 0).keys(64, 32)).all()
        assert stream.queries(64, 5).shape == (1, 5, 8)


class TestCommand:
    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["plan", *arguments])

    def test_a_table(self) -> None:
        synthetic().save(calibration_path())
        answer = self.run("--keys", "1e9", "--dim", "128", "--heads", "8", "--machine-memory", "24GiB")
        assert answer.exit_code == 0, answer.output
        for words in ("8 memories of 1,000,000,000 keys", "3.73 TiB", "What follows", "What is assumed", "exact needs"):
            assert words in answer.output
        assert "NOT THIS MACHINE" not in answer.output

    def test_json_and_files(self, tmp_path: Path) -> None:
        synthetic().save(calibration_path())
        one, other = tmp_path / "plan.json", tmp_path / "plan.txt"
        answer = self.run("--keys", "64Ki", "--backend", "exact", "--json", "--output", str(one))
        assert json.loads(answer.stdout)["question"]["keys"] == 65536
        assert json.loads(one.read_text()) == json.loads(answer.stdout)
        assert self.run("--keys", "64Ki", "--output", str(other)).exit_code == 0
        assert "What is assumed" in other.read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "give --keys"),
            (("--keys", "lots"), "--keys is 'lots'"),
            (("--keys", "1e6", "--heads", "0"), "--heads is '0'"),
            (("--keys", "1e6", "--machine-memory", "much"), "--machine-memory"),
            (("--keys", "1e6", "--values", "int8"), "values is 'int8'"),
            (("--measure", "--clock", "sun"), "--clock is 'sun'"),
            (("--measure", "--largest", "100"), "the largest size is 100"),
        ],
    )
    def test_errors_are_the_user_s_to_mend(self, arguments: tuple[str, ...], message: str) -> None:
        answer = self.run(*arguments)
        assert isinstance(answer.exception, PlanError)
        assert message in str(answer.exception)
