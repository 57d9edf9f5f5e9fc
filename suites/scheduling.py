"""Where a thread's time went: it ran, or others had its core, or it slept until something came.

    before = moment()
    ...
    spent = between(before, moment())

A benchmark whose processes are pinned to a core each cannot tell by the clock whether one waits for the other, or for
the core because another program has it. The kernel can: Linux counts for every thread how long it was ready to run and
did not (the second number of /proc/thread-self/schedstat, Documentation/scheduler/sched-stats.rst). A reference
operation beside it (`recollect.suites.noise`) does not see this: while only one process is at work, a program that may
run anywhere moves to another core.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SCHEDSTAT = Path("/proc/thread-self/schedstat")

DISTURBED_SHARE = 0.05
"""A measurement is called disturbed when other programs had a thread's core for more than this share of its time."""


@dataclass(frozen=True)
class Moment:
    """Clocks of the calling thread and its process, in seconds, each from a start of its own.

    Attributes:
        wall: elapsed time.
        thread: the thread's processor time.
        process: the processor time of all threads of the process.
        queued: how long the thread was ready to run and had no core; None where the system does not tell.
    """

    wall: float
    thread: float
    process: float
    queued: float | None


@dataclass(frozen=True)
class Spent:
    """Where a stretch of a thread's time went, in seconds. The parts add up to `wall`.

    Attributes:
        wall: the whole.
        ran: the thread computed.
        helpers: its process's other threads had its core, as those that send and receive for torch.distributed do.
        others: other programs had its core; None where the system does not tell, and `asleep` then holds it as well.
        asleep: it waited for something, such as another process.
    """

    wall: float
    ran: float
    helpers: float
    others: float | None
    asleep: float

    @property
    def others_share(self) -> float:
        """Part of the time that other programs took, 0 where it is not known."""
        return (self.others or 0.0) / self.wall if self.wall > 0 else 0.0


def moment() -> Moment:
    """All clocks now."""
    return Moment(time.perf_counter(), time.thread_time(), time.process_time(), queued_seconds())


def between(before: Moment, after: Moment) -> Spent:
    """What a thread did from one moment to another. Both must be of the same thread.

    That a core was queued for is charged to the process's own other threads first, as far as they ran at all. So what
    is left for other programs is the least that they can have taken, where every thread is pinned to the same core.
    """
    wall, ran = after.wall - before.wall, after.thread - before.thread
    if before.queued is None or after.queued is None:
        return Spent(wall, ran, 0.0, None, max(0.0, wall - ran))
    queued = min(after.queued - before.queued, max(0.0, wall - ran))
    helpers = min(queued, max(0.0, after.process - before.process - ran))
    return Spent(wall, ran, helpers, queued - helpers, max(0.0, wall - ran - queued))


def queued_seconds(path: Path = SCHEDSTAT) -> float | None:
    """How long the calling thread has been ready to run without a core; None where the system keeps no account."""
    try:
        ran, queued, slices = (int(number) for number in path.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return None
    return queued / 1e9 if ran or slices else None


def disturbed(spent: Iterable[Spent]) -> bool:
    """Whether in any of these stretches other programs took more than `DISTURBED_SHARE` of the time."""
    return any(each.others_share > DISTURBED_SHARE for each in spent)
