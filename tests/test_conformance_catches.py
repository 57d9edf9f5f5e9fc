"""The conformance suite finds what goes wrong in practice: each backend here has one fault, most of them seen in the
wild, and the named check must fail on it."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

from recollect.memory_backends import Capabilities, MemoryBackend, Requirement, registry, testing
from recollect.memory_backends.testing import BackendConformance, skip_unless_available


class Honest(MemoryBackend):
    """Brute force over an index of its own, without a fault."""

    name = "honest"
    summary = "brute force over a copy of the keys"
    capabilities = Capabilities(exact=True)

    def __init__(self, *arguments: object, **sizes: object) -> None:
        super().__init__(*arguments, **sizes)  # type: ignore[arg-type]
        self.index = torch.zeros(self.num_memories, self.capacity, self.dim)
        self.counts = [0] * self.num_memories

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        for row, memory in enumerate(memories.tolist()):
            self.index[memory, slots[row]] = keys[row]
            self.counts[memory] = max(self.counts[memory], int(slots[row].max()) + 1)

    def _scores(self, queries: Tensor, memory: int) -> Tensor:
        if self.metric == "l2":
            return -(queries[:, None] - self.index[memory]).square().sum(-1)
        return queries @ self.index[memory].T

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for row, memory in enumerate(memories.tolist()):
            scores = self._scores(queries[row], memory)
            scores[:, self.counts[memory] :] = -torch.inf
            found.append(scores.topk(k))
        scores = torch.stack([one.values for one in found])
        slots = torch.stack([one.indices for one in found])
        return scores, slots.masked_fill(scores == -torch.inf, -1)

    def _reset(self, memories: Tensor) -> None:
        for memory in memories.tolist():
            self.counts[memory] = 0


class ForgetsAllOnOverflow(Honest):
    """memorizing-transformers-pytorch: on overflow it resets its index but not its offsets."""

    name = "forgets-all"

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        for row, memory in enumerate(memories.tolist()):
            if int(slots[row, -1]) < self.counts[memory]:
                self.index[memory] = -1e3
        super()._add(keys, slots, memories)


class MovesTheNextMemory(Honest):
    """memorizing-transformers-pytorch: adding to row 0 moves row 1."""

    name = "moves-next"

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        super()._add(keys, slots, memories)
        if memories.tolist() == [0]:
            self.index[1] = self.index[1].roll(1, 0)


@dataclass(frozen=True)
class ProbeOptions:
    nprobe: int = field(default=8, metadata={"help": "cells to look into"})


class IgnoresItsOption(Honest):
    """memorizing-transformers-pytorch: `nprobe` is ignored."""

    name = "ignores-option"
    Options = ProbeOptions


class SearchesByDistance(Honest):
    """unlimiformer: an index made without a metric searches L2 where attention is inner product."""

    name = "by-distance"
    capabilities = Capabilities(exact=False)
    recall_floor = 0.9

    def _scores(self, queries: Tensor, memory: int) -> Tensor:
        return -(queries[:, None] - self.index[memory]).square().sum(-1)


class AnswersRowZero(Honest):
    """unlimiformer: a missing neighbour (-1) reads row 0."""

    name = "row-zero"

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        scores, slots = super()._search(queries, k, memories)
        return scores, slots.clamp(min=0)


class RaisesWhenShort(Honest):
    """hnswlib: raises when fewer than k are found."""

    name = "raises-when-short"

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        if k > min(self.counts[memory] for memory in memories.tolist()):
            raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")
        return super()._search(queries, k, memories)


class KeepsTheDead(Honest):
    """hnswlib: deleted keys stay; here an overwritten slot still answers with its old key."""

    name = "keeps-the-dead"

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        for row, memory in enumerate(memories.tolist()):
            fresh = slots[row] >= self.counts[memory]
            self.index[memory, slots[row][fresh]] = keys[row][fresh]
            self.counts[memory] = max(self.counts[memory], int(slots[row].max()) + 1)


class PoorAtInnerProducts(Honest):
    """hnswlib issue 74: poor recall by inner product when keys differ in length; here, as if all had length one."""

    name = "poor-inner"
    capabilities = Capabilities(exact=False)
    recall_floor = 0.9

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.index
        self.index = torch.nn.functional.normalize(raw, dim=-1)
        _, slots = super()._search(queries, k, memories)
        self.index = raw
        keys = self.ring.gather(slots, memories)
        scores = (keys * queries[:, :, None]).sum(-1).masked_fill(slots < 0, -torch.inf)
        scores, order = scores.sort(-1, descending=True)
        return scores, slots.gather(-1, order)


class ForgetsToReset(Honest):
    """A new document still finds the old one's keys."""

    name = "forgets-to-reset"

    def _reset(self, memories: Tensor) -> None:
        pass


class KeepsTheCallersTensor(Honest):
    """It keeps what it was handed, which the caller goes on to change."""

    name = "keeps-callers"

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        super()._add(keys, slots, memories)
        if keys.shape[1] == 70:
            self.index, self.counts = keys, [70] * len(keys)


class DependsOnTheClock(Honest):
    """It draws from the global generator what its own seed should decide."""

    name = "unseeded"

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        super()._add(keys + 0.1 * torch.randn_like(keys), slots, memories)


class AddsPiecemeal(Honest):
    """It sees only the first key of each call: the others it would index later."""

    name = "piecemeal"

    def _add(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        super()._add(keys[:, :1], slots[:, :1], memories)


FAULTS: dict[type[Honest], tuple[str, ...]] = {
    ForgetsAllOnOverflow: ("test_slots_across_wraparound",),
    MovesTheNextMemory: ("test_others_are_left_alone",),
    IgnoresItsOption: ("test_every_option_takes_effect_or_raises",),
    SearchesByDistance: ("test_recall_floor[inner_product]",),
    AnswersRowZero: ("test_more_neighbours_than_keys", "test_one_memory_empty"),
    RaisesWhenShort: ("test_more_neighbours_than_keys", "test_random_history"),
    KeepsTheDead: ("test_evicted_is_never_returned", "test_overwritten_slot_answers_with_its_new_key"),
    PoorAtInnerProducts: ("test_recall_floor[inner_product]",),
    ForgetsToReset: ("test_random_history",),
    KeepsTheCallersTensor: ("test_input_is_left_alone",),
    DependsOnTheClock: ("test_same_seed_same_answer",),
    AddsPiecemeal: ("test_slots_across_wraparound",),
}
"""Each faulty backend and the checks that must find it."""


class Checks(BackendConformance):
    """The suite, to be called check by check; not collected, since its name does not begin with Test."""

    examples: ClassVar[int] = 60


def run(check: str, name: str, folder: Path) -> None:
    """Runs one check on a backend, as pytest would."""
    checks = Checks()
    method, _, metric = check.partition("[")
    function = getattr(checks, method)
    wanted = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    values = {"spec": name, "metric": metric.rstrip("]"), "tmp_path": folder}
    if "backend" in wanted:
        values["backend"] = checks.make(name)
    function(**{one: values[one] for one in wanted})


@pytest.fixture(autouse=True)
def _published(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        importlib.metadata.EntryPoint(cls.name, f"{__name__}:{cls.__name__}", registry.ENTRY_POINT_GROUP)
        for cls in (Honest, *FAULTS)
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: found)
    monkeypatch.setenv("CI", "true")
    # A fault need only be found here; to shrink the history that shows it takes longer than all the rest.
    monkeypatch.setattr(testing, "settings", functools.partial(settings, phases=[Phase.generate]))


@pytest.mark.parametrize("check", sorted({check for checks in FAULTS.values() for check in checks}))
def test_nothing_is_found_where_nothing_is(check: str, tmp_path: Path) -> None:
    run(check, "honest", tmp_path)


@pytest.mark.parametrize(("fault", "check"), [(fault, check) for fault, checks in FAULTS.items() for check in checks])
def test_fault_is_found(fault: type[Honest], check: str, tmp_path: Path) -> None:
    # Faults show as failed assertions, but for the one that raises an error of its own.
    expected = RuntimeError if fault is RaisesWhenShort else AssertionError
    with pytest.raises(expected):
        run(check, fault.name, tmp_path)


def test_missing_library_is_a_skip_and_in_ci_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Honest, "requires", (Requirement("a_library_nobody_has", "a-library-nobody-has"),))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="pip install 'a-library-nobody-has'"):
        skip_unless_available("honest")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="pip install 'a-library-nobody-has'"):
        skip_unless_available("honest")
