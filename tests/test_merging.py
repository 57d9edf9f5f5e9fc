"""Which runs have an index: the policy against what it says of itself, for every number of keys."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.memory_backends.merging import MergePolicy, Run

SHAPES = st.builds(
    dict,
    capacity=st.integers(1, 300),
    run_size=st.integers(0, 20),
    part_size=st.integers(0, 120),
    fan_out=st.integers(1, 5),
    smallest=st.integers(1, 4),
    background_from=st.sampled_from([None, 1, 8]),
)


def policy_of(shape: dict[str, int]) -> MergePolicy:
    capacity = shape["capacity"]
    part = min(shape["part_size"], capacity)
    run = min(shape["run_size"], part or capacity)
    return MergePolicy.make(**{**shape, "part_size": part, "run_size": run})


@given(shape=SHAPES)
def test_serving_runs_are_apart_alive_and_few(shape: dict[str, int]) -> None:
    policy = policy_of(shape)
    assert all(larger % smaller == 0 for smaller, larger in itertools.pairwise(policy.sizes))
    for total in range(0, 3 * policy.capacity, 3):
        runs = policy.serving(total)
        edges = [edge for run in runs for edge in (run.start, run.stop)]
        assert edges == sorted(edges)
        assert all(run.start >= max(0, total - policy.capacity) and run.stop <= total for run in runs)
        assert all(len(run) in policy.sizes and run.start % len(run) == 0 for run in runs)
        if policy.sizes:
            fan_outs = [larger // smaller for smaller, larger in itertools.pairwise(policy.sizes)]
            assert len(runs) <= policy.capacity // policy.sizes[-1] + sum(2 * fan_out for fan_out in fan_outs)


@given(shape=SHAPES, settled=st.integers(0, 300))
def test_nothing_changes_before_the_next_change(shape: dict[str, int], settled: int) -> None:
    policy = policy_of(shape)
    until = 0
    before: tuple[list[Run], list[Run]] | None = None
    for total in range(settled, 3 * policy.capacity + settled):
        now = (policy.serving(total, settled), policy.begun(total, settled))
        if total < until:
            assert now == before
        else:
            before, until = now, policy.next_change(total)
            assert until > total


@given(shape=SHAPES)
def test_what_is_begun_serves_later_and_what_serves_was_begun(shape: dict[str, int]) -> None:
    policy = policy_of(shape)
    begun: set[Run] = set()
    served: set[Run] = set()
    end = 3 * policy.capacity
    for total in range(end):
        begun.update(policy.begun(total))
        served.update(policy.serving(total))
    late = {run for run in begun if run.stop + max(policy.lags) >= end}
    assert begun - late <= served
    at_once = {size for size, lag in zip(policy.sizes, policy.lags, strict=True) if not lag}
    assert {run for run in served if len(run) not in at_once} <= begun


@given(shape=SHAPES)
def test_settling_waits_for_nothing(shape: dict[str, int]) -> None:
    policy = policy_of(shape)
    for total in range(0, 2 * policy.capacity, 5):
        assert policy.begun(total, settled=total) == []
        if policy.sizes:
            covered = sum(len(run) for run in policy.serving(total, settled=total))
            # The tail that is not full, and what is left over of the oldest part.
            assert min(total, policy.capacity) - covered < policy.sizes[0] + policy.sizes[-1]


def test_smaller_runs_stay_where_a_merge_failed() -> None:
    policy = MergePolicy(100, (5, 20), (0, 0))
    assert policy.serving(43) == [Run(0, 20), Run(20, 40)]
    assert policy.serving(43, failed={Run(20, 40)}) == [
        Run(0, 20), Run(20, 25), Run(25, 30), Run(30, 35), Run(35, 40)
    ]  # fmt: skip
    assert policy.serving(43, failed={Run(20, 40), Run(25, 30)})[2] == Run(30, 35)


@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [
        (96, (32,)),
        (8192, (2048,)),
        (131_072, (16384,)),
        (262_144, (16384, 65536)),
        (1_000_000, (16384, 131_072)),
        (10_000_000, (16384, 131_072, 1_048_576)),
    ],
)
def test_defaults(capacity: int, sizes: tuple[int, ...]) -> None:
    policy = MergePolicy.make(capacity, background_from=1024)
    assert policy.sizes == sizes
    assert [lag > 0 for lag in policy.lags] == [size >= 1024 for size in sizes]
    assert len(policy.serving(3 * capacity)) < 32
