"""Waiting for what tasks of Ray tell, and noticing where it can never come.

A task's result may come with the word that it has ended; what it tells on the way, its process sends by a connection of
its own to the program that asked. Where that is shut off (by a firewall, or because the two disagree about tokens), Ray
waits for ever and says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from recollect.memory_backends.ray_token import mode

ARRIVAL_SECONDS = 10.0
"""What a task has told may be on its way for so long after the word that it has ended."""
LOOK_SECONDS = 1.0

SHUT_OFF = (
    "ran what it was asked, but what it answers does not reach this program: let it connect to this machine (any port, "
    "through whatever firewall is between them), and start both with the same RAY_AUTH_MODE and token"
)


def is_mute(ray: Any, stream: Any) -> bool:
    """Whether a task has ended and what it told last has not come, nor will."""
    if not ray.wait([stream.completed()], timeout=0)[0]:
        return False
    # Not fetched: something large that is there, if far away, is only slow.
    return not ray.wait([stream], timeout=ARRIVAL_SECONDS, fetch_local=False)[0]


def await_first(ray: Any, streams: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
    """Waits until every task has told something.

    Returns:
        The streams of those that did not within `seconds`, and of those that never will; then it has waited no longer.
    """
    until = time.monotonic() + seconds
    waiting = list(streams)
    while waiting:
        left = until - time.monotonic()
        if left <= 0:
            return waiting, []
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=min(LOOK_SECONDS, left))
        mute = [stream for stream in waiting if is_mute(ray, stream)]
        if mute:
            return waiting, mute
    return [], []


def shut_off(where: str) -> str:
    """What is wrong with a machine that is heard by nobody, and the remedy."""
    return f"{where} {SHUT_OFF} (here it is {mode()!r})"
