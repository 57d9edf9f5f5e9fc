"""How the ranks of a job end together: one of them says why, and names the one that failed or is lost.

A rank that fails posts its reason in the launcher's store before it ends. A rank whose communication breaks looks there
first. Where nothing is posted it calls the roll: every rank answers from a thread of its own, also while it waits for
the others, and who does not answer was killed or stopped. The lowest rank that is alive speaks.

Letters: W ranks.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

GRACE_SECONDS = 5.0
"""How long the roll is called."""
ANSWER_SECONDS = 0.5
"""How often a rank looks whether it is called."""
_SETTLING_SECONDS = 1.0
_LOST = ("gloo/", "Connection ", "Timed out waiting", "Broken pipe", "NCCL error")
"""What the errors of torch.distributed say where another process is gone or silent; gloo raises plain RuntimeErrors."""
_ROLL = "roll call"


class RankError(RuntimeError):
    """Another process of the job failed, was killed, or was silent for longer than the deadline."""


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone or silent."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _LOST)


def is_repeated(error: BaseException) -> bool:
    """Whether another rank tells the same, so that this one can end in silence."""
    return bool(getattr(error, "_told_by_another_rank", False))


class Notices:
    """What the ranks of one job tell each other as they end.

    Args:
        store: of torch.distributed, shared by the ranks and new to them.
        rank, count: this rank and W.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self.rank, self.count = store, rank, count
        self._left = threading.Event()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Answers the roll call within."""
        thread = threading.Thread(target=self._answer, name="recollect-roll-call", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._left.set()
            thread.join()

    def _answer(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store went with the process that kept it
            while not self._left.wait(ANSWER_SECONDS):
                if self._store.check([_ROLL]):
                    self._store.set(f"here/{self.rank}", "1")
                    return

    def explain(self, error: BaseException, deadline: float) -> BaseException:
        """The error that this rank should raise, once the others can know of it.

        Args:
            error: what was raised here.
            deadline: seconds that a rank waits for the others, for the message.
        """
        failed = self._posted("failed")
        kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if not is_lost(error) and not (failed and kind == "interrupted"):
            # A launcher that interrupts this rank because another failed is not why all end; anything else is.
            self._post(kind, text=str(error) or type(error).__name__)
            # Ranks that all raise the same may still be reading what this one sent; its end could cut them short.
            self._until(lambda: len(self._posted(kind)) == self.count, _SETTLING_SECONDS)
            return self._marked(error, speaker=self.rank == 0)
        called = None
        if not failed and not self._posted("interrupted") and not self._posted("lost"):
            called = self._call_the_roll(error, deadline)
            failed = self._posted("failed")
        interrupted, lost = self._posted("interrupted"), self._posted("lost")
        if failed or interrupted:
            culprit = min(failed or interrupted)
            how = f"failed: {failed[culprit]['text']}" if failed else "was interrupted"
            return self._marked(RankError(f"rank {culprit} of {self.count} {how}"), speaker=self.rank == 0)
        found = lost[min(lost)] if lost else called or {"text": _short(error), "silent": []}
        alive = set(range(self.count)) - set(found["silent"])
        return self._marked(RankError(found["text"]), speaker=self.rank == min(alive))

    def _call_the_roll(self, error: BaseException, deadline: float) -> dict[str, Any]:
        """Finds out who is there; what there is to post of those who are not."""
        self._set(_ROLL, "1")
        self._set(f"here/{self.rank}", "1")
        self._until(lambda: len(self._here()) == self.count or bool(self._posted("failed")), GRACE_SECONDS)
        silent = [rank for rank in range(self.count) if rank not in self._here()]
        who = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}" if silent else "the connection to a rank"
        text = (
            f"{who} of {self.count} {'are' if len(silent) > 1 else 'is'} lost: killed, stopped, or silent for the "
            f"{deadline:g} seconds of the deadline ({_short(error)}). The run goes on from its last saved state when "
            "the same command is given again; `torchrun --max-restarts 3` does that by itself"
        )
        if not self._posted("lost") and not self._posted("failed"):
            self._post("lost", text=text, silent=silent)
        return {"text": text, "silent": silent}

    def _marked(self, error: BaseException, *, speaker: bool) -> BaseException:
        error._told_by_another_rank = not speaker  # type: ignore[attr-defined]
        return error

    # The store --------------------------------------------------------------------------------------------------------

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(key, value)

    def _post(self, kind: str, **content: Any) -> None:
        self._set(f"{kind}/{self.rank}", json.dumps(content))

    def _posted(self, kind: str) -> dict[int, dict[str, Any]]:
        """What ranks posted of a kind, this one's own included."""
        found = {}
        with contextlib.suppress(RuntimeError):
            for rank in range(self.count):
                if self._store.check([f"{kind}/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"{kind}/{rank}"))
        return found

    def _here(self) -> set[int]:
        here = {self.rank}
        with contextlib.suppress(RuntimeError):
            here |= {rank for rank in range(self.count) if self._store.check([f"here/{rank}"])}
        return here

    def _until(self, done: Any, seconds: float) -> None:
        latest = time.monotonic() + seconds
        while not done() and time.monotonic() < latest:
            time.sleep(0.02)


def _short(error: BaseException) -> str:
    """The first sentence of what torch.distributed says, without the place in its source."""
    first = str(error).strip().splitlines()[0]
    return re.sub(r"^\[[^\]]*\] *", "", first).partition(". This is")[0][:200]
