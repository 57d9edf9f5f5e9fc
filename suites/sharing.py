"""Measuring specs that differ in search options alone over one index, built once.

At every segment each spec searches with its own options, and the last of them appends: so every spec searches the very
keys that it would search alone, and what building costs is paid once for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import MemoryBackend
from recollect.memory_backends.registry import backend_class, build_spec
from recollect.memory_backends.spec import make_options, parse_spec
from recollect.model.recording import ObservedBackend


def build_key(spec: str) -> str:
    """What is the same for specs that can share an index: the name and the options that are fixed at building."""
    return build_spec(spec)


def search_options(spec: str) -> dict[str, Any]:
    """The options of a spec that may change without a rebuild, defaults included."""
    name, given = parse_spec(spec)
    cls = backend_class(name)
    options = make_options(cls.Options, given, name=name)
    return {key: getattr(options, key) for key in cls.search_options}


class SharedBackend(ObservedBackend):
    """One of several that watch the same backend; only the one that `appends` changes it.

    Every one searches before any appends, within a segment. `options` are set before each of its searches.
    """

    def __init__(self, backend: MemoryBackend, *, options: dict[str, Any], appends: bool, **observers: Any) -> None:
        super().__init__(backend, **observers)
        self.options_of_search = options
        self.appends = appends

    def prepare(self) -> None:
        """Sets this one's search options."""
        if self.options_of_search:
            self.backend.set_search_options(**self.options_of_search)

    def add(self, keys: Tensor, *, memories: Iterable[int] | Tensor | None = None) -> Tensor:
        """Appends, or says which slots the keys will get from the one that does."""
        if self.appends:
            return super().add(keys, memories=memories)
        if memories is not None:
            raise ValueError("a shared backend is appended to all its memories at once")
        new, capacity = keys.shape[1], self.backend.capacity
        slots = (self.backend.ring.totals[:, None] + torch.arange(new)) % capacity
        slots[:, : max(0, new - capacity)] = -1
        return slots.to(keys.device)
