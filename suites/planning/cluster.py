"""The plan of memories in shards over machines: how many of them, bytes, network, time, and what recall is known of.

A *copy* is a whole set of memories, spread over the shards of its machines; further copies answer further questions,
and take every new key as well. Letters as in `answer`; M memories, N machines of a copy, S shards of a copy, R copies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recollect.memory_backends.registry import capabilities_of

from .amounts import PlanError, bytes_text
from .answer import SCHEMA
from .calibration import Calibration, Point
from .cluster_bytes import Moved, moved_by_step
from .cluster_costs import CallLaw, ClusterCosts
from .laws import Estimate
from .needed_bytes import Placement, bytes_of, placements_of
from .planning import cost_of_memory, laws_of, standing_index
from .question import Question

DEFAULT_NETWORK = 10e9 / 8
"""Bytes a second between machines: 10 Gbit/s."""
BUSY = 0.7
"""Share of its time that a shard, or the process that asks, may be busy: beyond it calls wait for each other."""
MORE = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
"""Times the fewest machines that hold a copy: sizes of a copy that are tried."""
MOST_MACHINES = 10_000_000
MOST_COPIES = 64
ROUNDING = 1e-9


@dataclass(frozen=True)
class ClusterQuestion:
    """Memories, and the machines that are to hold them.

    Attributes:
        asked: the memories; its `machine_bytes` is the main memory of each machine.
        machines: how many there are; None for as few as will do.
        machine_cores: of each.
        network: bytes a second in and out of each.
        queries_per_second: of all memories together; None where the rate does not matter.
        recall: share of the true neighbours that must be found; None where any will do.

    Raises:
        PlanError: a number is out of range.
    """

    asked: Question
    machines: int | None = None
    machine_cores: int = 1
    network: float = DEFAULT_NETWORK
    queries_per_second: float | None = None
    recall: float | None = None

    def __post_init__(self) -> None:
        for name in ("machines", "machine_cores", "network", "queries_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlanError(f"{name} is {value}; it must be above 0")
        if self.recall is not None and not 0 < self.recall <= 1:
            raise PlanError(f"recall is {self.recall}; it must be above 0 and at most 1")

    @property
    def steps_per_second(self) -> float | None:
        """Steps that the rate of queries comes to: one asks Q queries of each memory."""
        if self.queries_per_second is None:
            return None
        return self.queries_per_second / (self.asked.memories * self.asked.queries)


@dataclass(frozen=True)
class Recall:
    """What is known of the share of neighbours found.

    Attributes:
        value: as it was found.
        at_keys: in an index of so many keys.
        known: whether that covers a shard's index; otherwise nobody has measured one of its size.
    """

    value: float
    at_keys: int
    known: bool


@dataclass(frozen=True)
class ClusterBackend:
    """One backend in every shard.

    Attributes:
        spec: canonical registry string of a shard's backend.
        placement: how shards keep their keys.
        machines, shards, copies: N, S, R.
        shard_keys: of each memory in a shard.
        machine_memory: bytes of main memory of a machine: keys, index and processes.
        index_known: whether an index is counted in it.
        fits: within the machine's main memory.
        moved: bytes of a step.
        search, append: seconds of a shard's own work in a step.
        calls: seconds that sharding itself takes in a step.
        network: seconds that the bytes of a step take on the network.
        step: all of it.
        loads: seconds of a step's search, which copies divide, and of its appends, which each makes: of a shard, and of
            the process that asks a copy.
        busy: share of its time that a shard works at the wanted rate, and that the process that asks does; None where
            no rate is wanted.
        most_steps: steps a second that all copies together can take.
        enough: whether that is what was wanted.
        recall: what is known.
        meets: whether it meets the wanted recall, as far as that is known.
        refill_seconds: to fill a machine's shards again, and to notice that it is gone.
        measured: the smallest and the largest index that its costs were measured of.
        reason: why there is no more than a spec.
    """

    spec: str
    placement: Placement | None = None
    machines: int = 0
    shards: int = 0
    copies: int = 0
    shard_keys: int = 0
    machine_memory: int = 0
    index_known: bool = True
    fits: bool = False
    moved: Moved | None = None
    search: Estimate | None = None
    append: Estimate | None = None
    calls: Estimate | None = None
    network: float = 0.0
    step: Estimate | None = None
    loads: tuple[tuple[float, float], ...] = ()
    busy: tuple[float, ...] | None = None
    most_steps: float = 0.0
    enough: bool = True
    recall: Recall | None = None
    meets: bool = False
    refill_seconds: float = 0.0
    measured: tuple[int, int] = (0, 0)
    reason: str = ""

    @property
    def all_machines(self) -> int:
        """Of all copies."""
        return self.machines * self.copies

    @property
    def works(self) -> bool:
        """Whether it does what was asked."""
        return not self.reason and self.fits and self.enough and self.meets


@dataclass(frozen=True)
class ClusterPlan:
    """The answer.

    Attributes:
        question: what was asked.
        calibration, costs: of what machines the measurements are, in a line each.
        warnings: what must be known of them.
        key_bytes, value_bytes: of all memories as float32 and as values are kept: they stay with whoever asks.
        backends: exact first.
        verdicts, assumptions: sentences.
    """

    question: ClusterQuestion
    calibration: str
    costs: str
    warnings: tuple[str, ...]
    key_bytes: int
    value_bytes: tuple[int, int]
    backends: tuple[ClusterBackend, ...]
    verdicts: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary; times in seconds, sizes in bytes, rates a second."""
        content = dataclasses.asdict(self)
        for one, entry in zip(self.backends, content["backends"], strict=True):
            entry["placement"] = None if one.placement is None else str(one.placement)
            entry |= {"all_machines": one.all_machines, "works": one.works}
            if one.moved is not None:
                moved = {"sent": one.moved.sent, "received": one.moved.received}
                entry["moved"] |= {"between_processes": one.moved.between_processes, **moved}
        memories, keys = self.question.asked.memories, self.question.asked.all_keys
        content["question"]["asked"] |= {"memories": memories, "all_keys": keys}
        content["question"]["steps_per_second"] = self.question.steps_per_second
        return {"schema": SCHEMA, "kind": "cluster", **content}


def plan_on_cluster(
    question: ClusterQuestion, calibration: Calibration, costs: ClusterCosts, warnings: list[str]
) -> ClusterPlan:
    """The plan for memories in shards.

    Args:
        question: what is asked.
        calibration: measured costs of one memory.
        costs: measured costs of sharding.
        warnings: what must be known of both.

    Raises:
        PlanError: the costs of sharding cannot be told from what was measured.
    """
    from .cluster_words import cluster_assumptions, cluster_verdicts

    specs = question.asked.backends or calibration.specs
    every = sorted(dict.fromkeys(specs), key=lambda spec: (spec != "exact", spec))
    calls = Calls(costs.law("search"), costs.law("append"))
    size = question.asked.all_keys * question.asked.dim
    values = {"float32": (4 * size, 0), "bfloat16": (2 * size, 0), "file": (0, 4 * size), "none": (0, 0)}
    plan = ClusterPlan(
        question=question,
        calibration=calibration.described(),
        costs=costs.described(),
        warnings=tuple(warnings),
        key_bytes=4 * size,
        value_bytes=values[question.asked.values],
        backends=tuple(_planned(spec, question, calibration, costs, calls) for spec in every),
    )
    return dataclasses.replace(
        plan,
        verdicts=tuple(cluster_verdicts(plan)),
        assumptions=tuple(cluster_assumptions(plan, calibration, costs)),
    )


@dataclass(frozen=True)
class Calls:
    """What sharding itself costs, for each call."""

    search: CallLaw
    append: CallLaw


def _planned(
    spec: str, question: ClusterQuestion, calibration: Calibration, costs: ClusterCosts, calls: Calls
) -> ClusterBackend:
    try:
        return _Planner(spec, question, calibration, costs, calls).plan()
    except PlanError as error:
        return ClusterBackend(spec, reason=str(error))


class _Planner:
    """Plans one backend.

    Raises:
        PlanError: it was not measured.
    """

    def __init__(
        self, spec: str, question: ClusterQuestion, calibration: Calibration, costs: ClusterCosts, calls: Calls
    ) -> None:
        self.spec = spec
        self.question = question
        self.asked = question.asked
        self.calibration = calibration
        self.costs = costs
        self.calls = calls
        self.laws = laws_of(spec, calibration)
        self.placement = placements_of(spec)[0]
        most = max(1, question.machine_cores // calibration.threads)
        # Fewer shards than a machine has room for make fewer calls.
        self.per_machine = sorted({most, *(2**power for power in range(most.bit_length()))})

    def plan(self) -> ClusterBackend:
        """The cheapest way that does what is asked; where none does, the one that comes nearest."""
        tried = list(self._ways())
        if not tried:
            least = bytes_text(self._machine_memory(MOST_MACHINES, 1)[0])
            raise PlanError(
                f"no number of machines with {bytes_text(self.asked.machine_bytes)} of main memory holds it: what "
                f"remains of a share is {least}, the process of its shard among it. Give more --machine-memory"
            )
        working = [one for one in tried if one.fits and one.enough]
        if not working:
            return max(tried, key=lambda one: (one.fits, one.most_steps, -one.all_machines))
        if self.question.machines is not None:
            return min(working, key=_step)
        return min(working, key=lambda one: (one.all_machines, _step(one)))

    def _ways(self) -> Iterator[ClusterBackend]:
        """Sizes and numbers of copies that are worth a look."""
        for here in self.per_machine:
            yield from self._ways_with(here)

    def _ways_with(self, here: int) -> Iterator[ClusterBackend]:
        given = self.question.machines
        if given is not None:
            most = 1 if self.question.queries_per_second is None else min(given, MOST_COPIES)
            for copies in range(1, most + 1):
                yield self.of(given // copies, copies, here)
            return
        fewest = self._fewest(here)
        for machines in dict.fromkeys(math.ceil(fewest * times) for times in MORE) if fewest else ():
            if machines <= max(fewest, self.asked.keys):
                one = self.of(machines, 1, here)
                copies = self._copies_for(one)
                yield one if copies == 1 else self.of(machines, copies, here)

    def _fewest(self, here: int) -> int:
        """Machines that hold one copy with so many shards on each; 0 where no number of them does."""
        low, high = 0, 1
        while not self._fits(high, here):
            low, high = high, 2 * high
            if high > MOST_MACHINES:
                return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(middle, here) else (middle, high)
        return high

    def _fits(self, machines: int, here: int) -> bool:
        return self._machine_memory(machines, here)[0] <= self.asked.machine_bytes

    def _shards(self, machines: int, here: int) -> tuple[int, int]:
        """S, and the keys of each memory in the fullest shard."""
        shards = min(self.asked.keys, machines * here)
        return shards, -(-self.asked.keys // shards)

    def _machine_memory(self, machines: int, here: int) -> tuple[int, bool]:
        """Bytes of main memory of a machine, and whether the index is among them."""
        shards, keys = self._shards(machines, here)
        sizes = {"memories": self.asked.memories, "keys": keys, "dim": self.asked.dim}
        planned = bytes_of(self.spec, self.placement, **sizes)
        index = planned.index
        if index is None:
            index = standing_index(self.calibration.of(self.spec), dataclasses.replace(self.asked, keys=keys))
        of_shard = planned.keys + (index or 0) + self.costs.process_bytes
        return -(-shards // machines) * of_shard, index is not None

    def _copies_for(self, one: ClusterBackend) -> int:
        """Copies of a size that take the wanted rate together; 1 where no number of them does."""
        rate = self.question.steps_per_second
        if rate is None:
            return 1
        # Each copy takes all appends, so where these alone are too many, further copies do not help.
        needed = [1]
        for divided, repeated in one.loads:
            room = BUSY - rate * repeated
            needed.append(math.ceil(rate * divided / room - ROUNDING) if room > 0 else 1)
        return max(needed)

    def of(self, machines: int, copies: int, here: int) -> ClusterBackend:
        """Figures of one way, with `here` shards on a machine."""
        asked, rate = self.asked, self.question.steps_per_second
        shards, keys = self._shards(machines, here)
        cost = cost_of_memory(
            self.spec,
            self.calibration,
            keys=keys,
            dim=asked.dim,
            queries=asked.queries,
            k=min(asked.k, keys),
            laws=self.laws,
        )
        search = cost.search * asked.memories
        # A step's new keys are dealt out over the shards.
        append = cost.append * (asked.memories * asked.queries / (shards * min(asked.queries, keys)))
        moved = moved_by_step(
            memories=asked.memories,
            keys=asked.keys,
            dim=asked.dim,
            queries=asked.queries,
            appended=asked.queries,
            k=asked.k,
            shards=shards,
            machines=machines,
        )
        asking = self.calls.search.at(shards, moved.queries * shards + moved.answers)
        appending = self.calls.append.at(shards, moved.keys)
        calls = asking + appending
        loads = ((search.value, append.value), (asking.value, appending.value))
        network = (moved.sent + moved.received) / self.question.network
        memory, index_known = self._machine_memory(machines, here)
        most = min(copies * BUSY / (divided + copies * repeated) for divided, repeated in loads)
        recall = recall_of(self.spec, self.calibration, keys)
        return ClusterBackend(
            spec=self.spec,
            placement=self.placement,
            machines=machines,
            shards=shards,
            copies=copies,
            shard_keys=keys,
            machine_memory=memory,
            index_known=index_known,
            fits=memory <= asked.machine_bytes,
            moved=moved,
            search=search,
            append=append,
            calls=calls,
            network=network,
            step=search + append + calls + Estimate(network, network, network, 1.0),
            loads=loads,
            busy=None if rate is None else tuple(rate * (part / copies + whole) for part, whole in loads),
            most_steps=most,
            enough=rate is None or rate <= most * (1 + ROUNDING),
            recall=recall,
            meets=self.question.recall is None or (recall is not None and recall.value >= self.question.recall),
            refill_seconds=self._refill_seconds(-(-shards // machines) * keys * asked.memories),
            measured=cost.measured,
        )

    def _refill_seconds(self, keys: int) -> float:
        """From the end of a machine that held so many keys until another has them, at the slower of two rates."""
        known = self.costs.recovered
        rate = known.keys_per_second * known.dim / self.asked.dim
        on_network = self.question.network / (4 * self.asked.dim)
        return known.detection_seconds + known.away_seconds + keys / min(rate, on_network)


def _step(one: ClusterBackend) -> float:
    return math.inf if one.step is None else one.step.value


def recall_of(spec: str, calibration: Calibration, keys: int) -> Recall | None:
    """What is known of the recall of an index of so many keys, of each memory.

    Between two measured sizes it is the lower of the two; beyond the largest nobody knows. Searching every shard for k
    neighbours finds at least the share of the true ones that a shard's own index finds.
    """
    points = _by_size(calibration.of(spec))
    if not points:
        return None
    if capabilities_of(spec).exact:
        return Recall(1.0, keys, known=True)
    below = [point for point in points if point.keys <= keys] or points[:1]
    above = [point for point in points if point.keys >= keys]
    if not above:
        return Recall(points[-1].recall, points[-1].keys, known=False)
    return min(
        (Recall(point.recall, point.keys, known=True) for point in (below[-1], above[0])), key=lambda one: one.value
    )


def _by_size(points: list[Point]) -> list[Point]:
    """Points of the dimension that most were taken at, smallest first."""
    dims = [point.dim for point in points]
    most = max(dims, key=dims.count, default=0)
    return sorted((point for point in points if point.dim == most), key=lambda point: point.keys)
