"""Which token Ray's processes know each other by: settled when a connection begins, forgotten when it ends.

Ray reads mode and token from the environment (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH), keeps both for the
life of a process, and writes a mode of its own into the environment. So a program that had run Ray here and then joined
a cluster without a token turned away whatever that cluster's processes sent it: their results never came, without an
error on either side.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from typing import Any

NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class Token:
    """What is settled for one connection: `settled` around `ray.init`, `end` after `ray.shutdown`."""

    def __init__(self) -> None:
        self._added: dict[str, str] = {}

    @contextlib.contextmanager
    def settled(self, *, own: bool) -> Iterator[None]:
        """Has Ray read the environment as it is now.

        Args:
            own: the Ray that starts here gets a token of its own, where the environment says nothing. Else Ray writes
                one into the home folder, which outlives it.
        """
        former = {name for name in NAMES if name in os.environ}
        if own and not former:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        try:
            _read_anew()
            yield
        finally:
            self._added = {name: os.environ[name] for name in NAMES if name in os.environ and name not in former}

    def end(self) -> None:
        """Takes back what was added, unless the program has connected to Ray by itself meanwhile."""
        added, self._added = self._added, {}
        ray = sys.modules.get("ray")
        if ray is None or ray.is_initialized():
            return
        for name, value in added.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        _read_anew()


def mode() -> str:
    """Whether this process wants a token of those that call it: 'token' or 'disabled'."""
    library = _library()
    if not hasattr(library, "get_authentication_mode"):
        return "disabled"  # of a Ray that knows no tokens
    return "token" if library.get_authentication_mode() == library.AuthenticationMode.TOKEN else "disabled"


def _read_anew() -> None:
    """Has Ray's library forget mode and token; it reads them again when they are next wanted."""
    library = _library()
    if hasattr(library, "AuthenticationTokenLoader"):
        library.Config.initialize("")  # the mode; Ray does the same where it sets one
        library.AuthenticationTokenLoader.instance().reset_cache()


def _library() -> Any:
    from ray import _raylet

    return _raylet
