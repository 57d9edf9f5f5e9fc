"""Plans for clusters from costs with known laws: bytes, times, machines, what is known of recall, and bad input."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from typer.testing import CliRunner

from recollect.cli import app
from recollect.suites.environment import backend_digest, describe_machine
from recollect.suites.planning.amounts import PlanError, parse_per_second, parse_rate, rate_text
from recollect.suites.planning.calibration import Calibration, Point
from recollect.suites.planning.cluster import BUSY, ClusterPlan, ClusterQuestion, plan_on_cluster, recall_of
from recollect.suites.planning.cluster_bytes import moved_by_step
from recollect.suites.planning.cluster_costs import (
    CallPoint,
    ClusterCosts,
    Recovered,
    costs_path,
    find_costs,
    fit_calls,
    read_costs,
)
from recollect.suites.planning.needed_bytes import Placement, bytes_of
from recollect.suites.planning.question import Question

GIB = 2**30
EXACT_MS, IVF_MS, APPEND_US = 1e-3, 0.05, 2.0
"""Of a search for 512 queries: exact for each key, faiss-ivf for each square root of a key; of appending a key."""
CALL, SHARD, BYTE = 1e-3, 2e-4, 1e-9
PROCESS_BYTES = 200 * 2**20
LARGEST = 65536


def calibration(threads: int = 1) -> Calibration:
    found = Calibration.here(threads=threads, device="cpu", clock="wall")
    found.date = "2026-11-25T00:00:00+00:00"
    for spec, recalls in (("exact", [1.0] * 5), ("faiss-ivf", [0.99, 0.98, 0.96, 0.97, 0.9])):
        for keys, recall in zip((4096, 8192, 16384, 32768, LARGEST), recalls, strict=True):
            search = EXACT_MS * keys if spec == "exact" else IVF_MS * keys**0.5
            found.points.append(
                Point(
                    spec=spec,
                    keys=keys,
                    dim=64,
                    queries=512,
                    k=32,
                    build_seconds=1e-6 * keys,
                    append_us=APPEND_US,
                    longest_append_ms=5.0,
                    search_ms=search,
                    recall=recall,
                    index_bytes=0,
                    reference_ms=5.0,
                    noisy=False,
                    code=backend_digest(spec),
                )
            )
    return found


def costs(**changes: Any) -> ClusterCosts:
    points = [
        CallPoint(
            kind=kind,
            shards=shards,
            memories=1,
            count=512,
            dim=64,
            k=32,
            each=each,
            once=once,
            sharded_ms=1 + 1e3 * (CALL + SHARD * shards + BYTE * (shards * each + once)),
            alone_ms=1.0,
            noisy=False,
        )
        for kind in ("search", "append")
        for shards, each, once in ((1, 10**5, 10**5), (2, 10**6, 10**5), (4, 10**5, 10**7), (2, 0, 10**6), (4, 10, 10))
    ]
    recovered = Recovered(100_000, 64, 0.5, 1.5, 0.5, 0)
    made = ClusterCosts(describe_machine(), {"ray": "2.60.0"}, 1, PROCESS_BYTES, recovered, points, date="2026-11-26")
    return dataclasses.replace(made, **changes)


def question(**changes: Any) -> ClusterQuestion:
    fields = {field.name for field in dataclasses.fields(ClusterQuestion)}
    memory = {"keys": 10**6, "dim": 64, "machine_bytes": 24 * GIB, "heads": 8, "values": "none"}
    asked = Question(**{**memory, **{name: value for name, value in changes.items() if name not in fields}})
    return ClusterQuestion(asked, **{name: value for name, value in changes.items() if name in fields})


def plan(**changes: Any) -> ClusterPlan:
    return plan_on_cluster(question(**changes), calibration(), costs(), [])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))


class TestBytes:
    def test_of_a_step(self) -> None:
        moved = moved_by_step(memories=8, keys=10**6, dim=64, queries=512, appended=256, k=32, shards=6, machines=3)
        assert moved.queries == 8 * 512 * 64 * 4
        assert moved.answers == 6 * 8 * 512 * 32 * 8
        assert moved.keys == 8 * 256 * 64 * 4
        assert moved.counts == 8 * 6 * 24
        assert moved.between_processes == 6 * moved.queries + moved.answers + moved.keys + moved.counts
        assert moved.sent == 3 * moved.queries + moved.keys + moved.counts
        assert moved.received == moved.answers

    def test_slots_beyond_two_thousand_million_keys_take_eight_bytes(self) -> None:
        sizes: dict[str, int] = {"memories": 1, "dim": 4, "queries": 1, "appended": 1, "k": 10, "machines": 1}
        assert moved_by_step(keys=2**32 - 2, shards=2, **sizes).answers == 2 * 10 * 8
        assert moved_by_step(keys=2**32, shards=2, **sizes).answers == 2 * 10 * 12

    @given(keys=st.integers(1, 200), shards=st.integers(1, 40), k=st.integers(1, 50))
    def test_a_shard_answers_with_no_more_than_it_has(self, keys: int, shards: int, k: int) -> None:
        shards = min(shards, keys)
        each = [len(range(shard, keys, shards)) for shard in range(shards)]
        moved = moved_by_step(memories=1, keys=keys, dim=1, queries=1, appended=1, k=k, shards=shards, machines=1)
        assert moved.answers == 8 * sum(min(k, here) for here in each)

    def test_of_a_machine(self) -> None:
        (exact, _) = plan(machines=4, machine_cores=2).backends
        keys = 10**6 // 8
        planned = bytes_of("exact", Placement(), memories=8, keys=keys, dim=64)
        assert (exact.shards, exact.shard_keys) == (8, keys)
        assert exact.machine_memory == 2 * (planned.keys + PROCESS_BYTES) == 2 * (8 * keys * 256 + PROCESS_BYTES)


class TestTimes:
    def test_are_those_of_the_laws(self) -> None:
        exact, ivf = plan(machines=4, network=1e9).backends
        assert exact.search is not None
        assert exact.append is not None
        assert exact.calls is not None
        assert exact.step is not None
        assert exact.moved is not None
        assert ivf.search is not None
        assert exact.search.value == pytest.approx(8 * 1e-3 * EXACT_MS * 250_000, rel=1e-3)
        assert ivf.search.value == pytest.approx(8 * 1e-3 * IVF_MS * 500, rel=0.02)
        assert exact.append.value == pytest.approx(8 * 512 / 4 * 1e-6 * APPEND_US, rel=1e-3)
        search = CALL + 4 * SHARD + BYTE * (4 * exact.moved.queries + exact.moved.answers)
        append = CALL + 4 * SHARD + BYTE * exact.moved.keys
        assert exact.calls.value == pytest.approx(search + append, rel=1e-3)
        assert exact.network == (exact.moved.sent + exact.moved.received) / 1e9
        parts = exact.search.value + exact.append.value + exact.calls.value + exact.network
        assert exact.step.value == pytest.approx(parts)
        assert exact.step.low < exact.step.value < exact.step.high
        assert exact.step.beyond == pytest.approx(250_000 / LARGEST)

    def test_refilling_is_bound_by_the_slower_of_two_rates(self) -> None:
        (fast, _) = plan(machines=4, network=1e12).backends
        assert fast.refill_seconds == pytest.approx(2.0 + 8 * 250_000 / 200_000)
        (slow, _) = plan(machines=4, network=1e6).backends
        assert slow.refill_seconds == pytest.approx(2.0 + 8 * 250_000 * 256 / 1e6)
        (wide, _) = plan(machines=4, network=1e12, dim=128).backends
        assert wide.refill_seconds == pytest.approx(2.0 + 8 * 250_000 / 100_000)

    @given(
        keys=st.integers(10**4, 10**11),
        heads=st.integers(1, 16),
        cores=st.integers(1, 64),
        gib=st.integers(4, 512),
    )
    def test_fewest_machines(self, keys: int, heads: int, cores: int, gib: int) -> None:
        memory = gib * GIB + cores * PROCESS_BYTES
        (exact,) = plan(keys=keys, heads=heads, machine_cores=cores, machine_bytes=memory, backends=("exact",)).backends
        assert exact.fits
        assert exact.machine_memory <= memory
        assert exact.shards * exact.shard_keys >= keys
        if exact.machines > 1:
            (fewer,) = plan(
                keys=keys,
                heads=heads,
                machine_cores=cores,
                machine_bytes=memory,
                machines=exact.machines - 1,
                backends=("exact",),
            ).backends
            assert not fewer.fits

    def test_more_keys_or_questions_never_take_fewer_machines_or_less_time(self) -> None:
        for name, values in (
            ("keys", [10**5, 10**6, 10**8, 10**9, 10**11]),
            ("queries_per_second", [1e3, 1e5, 1e6, 1e7]),
            ("heads", [1, 2, 8]),
        ):
            found = [plan(**{name: value}).backends for value in values]
            for fewer, more in pairwise(found):
                for one, other in zip(fewer, more, strict=True):
                    assert one.all_machines <= other.all_machines
        steps = [plan(keys=10**7, machines=machines).backends[0].step for machines in (1, 2, 4, 8)]
        for slower, quicker in pairwise(steps):
            assert slower is not None
            assert quicker is not None
            assert quicker.value < slower.value


class TestRates:
    def test_copies_take_what_one_cannot(self) -> None:
        # Two steps a second of 8 memories of 512 queries; one copy of one machine takes fewer.
        rate = 2 * 8 * 512
        one = plan(keys=100_000, queries_per_second=rate, backends=("exact",)).backends[0]
        assert one.enough
        assert one.busy is not None
        assert max(one.busy) <= BUSY + 1e-9
        assert one.search is not None
        assert one.append is not None
        work = 2 * one.search.value / one.copies + 2 * one.append.value
        assert one.busy[0] == pytest.approx(work)
        assert one.most_steps >= 2
        assert one.all_machines > 1
        few = plan(keys=100_000, queries_per_second=100 * rate, machines=2, backends=("exact",))
        assert not few.backends[0].enough
        assert not few.backends[0].works
        assert any("takes at most" in line for line in few.verdicts)

    def test_given_machines_serve_as_copies_or_shards_whichever_is_quicker(self) -> None:
        (idle,) = plan(keys=10**6, machines=8, backends=("exact",)).backends
        assert (idle.machines, idle.copies) == (8, 1)
        asked = {"keys": 10**6, "machines": 8, "backends": ("faiss-ivf",)}
        rate = 0.95 * plan(**asked, queries_per_second=1).backends[0].most_steps
        (busy,) = plan(**asked, queries_per_second=2 * rate * 8 * 512).backends
        assert busy.copies > 1
        assert busy.enough

    def test_who_asks_may_be_the_bound(self) -> None:
        # A small memory is searched at once; calling its shards takes longer, and only further copies help.
        (one,) = plan(keys=200, heads=1, queries_per_second=512 * 300, backends=("exact",)).backends
        assert one.busy is not None
        assert one.busy[0] < one.busy[1] <= BUSY + 1e-9
        assert one.copies > 1

    def test_fewer_shards_than_cores_where_calls_are_dear(self) -> None:
        cheap, dear = (
            plan_on_cluster(
                question(keys=10**5, heads=1, machines=1, machine_cores=16, backends=("exact",)),
                calibration(),
                costs(points=[dataclasses.replace(p, sharded_ms=1 + times * p.beyond_ms) for p in costs().points]),
                [],
            ).backends[0]
            for times in (0.01, 100)
        )
        assert cheap.shards > dear.shards == 1


class TestRecall:
    def test_is_known_up_to_the_largest_measured_index(self) -> None:
        measured = calibration()
        assert dataclasses.astuple(recall_of("exact", measured, 10**9)) == (1.0, 10**9, True)  # type: ignore[call-overload]
        between = recall_of("faiss-ivf", measured, 10_000)
        assert between is not None
        assert (between.value, between.known) == (0.96, True), "the lower of the two sizes around"
        beyond = recall_of("faiss-ivf", measured, LARGEST + 1)
        assert beyond is not None
        assert (beyond.value, beyond.at_keys, beyond.known) == (0.9, LARGEST, False)
        assert recall_of("hnswlib", measured, 100) is None

    def test_decides_which_backends_do(self) -> None:
        wanted = plan(keys=10**9, recall=0.95, machine_bytes=256 * GIB)
        exact, ivf = wanted.backends
        assert exact.works
        assert not ivf.works
        assert "faiss-ivf" not in next(line for line in wanted.verdicts if line.startswith("fewest machines"))
        lower = plan(keys=10**9, recall=0.9, machine_bytes=256 * GIB)
        assert any(line.startswith("CANNOT BE KNOWN: what faiss-ivf finds") for line in lower.verdicts)
        none = plan(keys=10**9, recall=0.95, machine_bytes=256 * GIB, backends=("faiss-ivf",))
        assert any("found 0.900 of the neighbours, and 0.95 are wanted" in line for line in none.verdicts)


class TestWords:
    def test_everything_assumed_is_said(self) -> None:
        said = "\n".join(plan(keys=10**11, heads=1, machine_bytes=256 * GIB, machine_cores=32).assumptions)
        for part in (
            "1000 µs, 200 µs a shard and 1.00 ns a byte",
            "10 Gbit/s",
            "70 %",
            "200 MiB",
            "65,536 keys",
            "at 200,000 keys of dimension 64 a second",
            "times beyond the largest",
            "0 of 100,000 keys lost",
        ):
            assert part in said

    def test_what_does_not_fit_says_what_is_lacking(self) -> None:
        tight = plan(machine_bytes=PROCESS_BYTES, backends=("exact",))
        assert "no number of machines" in tight.backends[0].reason
        small = plan(keys=10**9, machines=2, backends=("exact",))
        assert any("exact takes" in line and "on each of 2 machines" in line for line in small.verdicts)
        unmeasured = plan(backends=("hnswlib",))
        assert "recollect plan --measure --backend" in unmeasured.backends[0].reason

    def test_as_json(self) -> None:
        content = json.loads(json.dumps(plan(keys=10**9, machine_bytes=64 * GIB, queries_per_second=1000).as_json()))
        assert content["kind"] == "cluster"
        (exact, _) = content["backends"]
        assert exact["moved"]["sent"] > 0
        assert exact["placement"] == "keys as float32"
        assert exact["all_machines"] == exact["machines"] * exact["copies"]
        assert content["question"]["steps_per_second"] == pytest.approx(1000 / 4096)


class TestCosts:
    def test_calls_are_fitted(self) -> None:
        law = costs().law("search")
        assert (law.call, law.shard, law.byte) == pytest.approx((CALL, SHARD, BYTE), rel=1e-6)
        assert law.spread == pytest.approx(0, abs=1e-6)
        with pytest.raises(PlanError, match="--measure-cluster"):
            fit_calls(costs().points[:4])
        with pytest.raises(PlanError, match="different shards"):
            fit_calls([costs().points[0]] * 8)

    def test_files(self, tmp_path: Path) -> None:
        path = tmp_path / "costs.json"
        costs().save(path)
        assert read_costs(path) == costs()
        found, words = find_costs(path)
        assert found.process_bytes == PROCESS_BYTES
        assert words == []
        with pytest.raises(PlanError, match="there are no cluster costs"):
            read_costs(tmp_path / "none.json")
        for text, match in (("{", "not readable"), ('{"format": "other"}', "no cluster costs"),
                            ('{"format": "recollect-cluster-costs", "version": 9}', "version 9"),
                            ('{"format": "recollect-cluster-costs", "version": 1}', "incomplete")):  # fmt: skip
            path.write_text(text, encoding="utf-8")
            with pytest.raises(PlanError, match=match):
                read_costs(path)

    def test_of_another_machine_are_refused_unless_named(self) -> None:
        other = costs(machine={**describe_machine(), "cpu": "another"})
        other.save(costs_path())
        with pytest.raises(PlanError, match="another machine"):
            find_costs()
        _, words = find_costs(costs_path())
        assert any(word.startswith("NOT THIS MACHINE") for word in words)

    def test_those_that_ship_are_used_and_named(self) -> None:
        found, words = find_costs()
        assert found.shipped
        assert found.recovered.lost == 0
        assert found.law("search").byte >= 0
        assert found.law("append").shard >= 0
        assert words[0].startswith("NOT THIS MACHINE: costs of sharding ship")


class TestCommand:
    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})

    @pytest.mark.parametrize("keys", ["1e9", "1e11"])
    def test_prints_a_plan(self, keys: str, tmp_path: Path) -> None:
        output = tmp_path / "plan.txt"
        costs().save(costs_path())
        result = self.run(
            "--keys", keys, "--dim", "128", "--heads", "2", "--machines", "auto", "--machine-memory", "512GiB",
            "--machine-cores", "32", "--network", "25Gbit", "--queries-per-second", "1000", "--recall", "0.9",
            "--backend", "exact", "--backend", "faiss-ivf", "--output", str(output),
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        text = output.read_text(encoding="utf-8")
        for part in ("What follows", "What is assumed", "25 Gbit/s", "fewest machines", "bytes sent a step"):
            assert part in text

    def test_as_json(self) -> None:
        costs().save(costs_path())
        result = self.run("--keys", "10M", "--heads", "1", "--machines", "2", "--backend", "exact", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["backends"][0]["machines"] == 2

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--machines", "0"),
            ("--machines", "some"),
            ("--machine-cores", "0"),
            ("--network", "fast"),
            ("--network", "0Gbit"),
            ("--queries-per-second", "0"),
            ("--queries-per-second", "-5"),
            ("--recall", "1.5"),
            ("--recall", "0"),
            ("--cluster-costs", "nowhere.json"),
        ],
    )
    def test_bad_input_is_named(self, option: str, value: str) -> None:
        result = self.run("--keys", "1M", "--machines", "2", option, value)
        assert result.exit_code != 0
        said = result.output + (repr(result.exception) if result.exception else "")
        assert value.lstrip("-") in said


def test_rates() -> None:
    assert parse_rate("10Gbit", "x") == parse_rate("10 Gbit/s", "x") == parse_rate("1.25GB/s", "x") == 1.25e9
    assert parse_rate("1GiB", "x") == GIB
    assert parse_per_second("20k", "x") == parse_per_second("2e4", "x") == 20_000
    assert parse_per_second("0.5", "x") == 0.5
    assert rate_text(1.25e9) == "10 Gbit/s"
    for text in ("", "Gbit", "10", "10 apples", "-1Gbit"):
        with pytest.raises(PlanError, match="--network"):
            parse_rate(text, "--network")
