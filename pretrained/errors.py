"""What goes wrong when a model is given a memory, apart from values that do not fit (`ConfigurationError`)."""

from __future__ import annotations

from recollect.model.configuration import ConfigurationError


class UnsupportedModel(ConfigurationError):
    """The model's family, attention implementation or cache cannot be given a memory."""


class MemoryStateError(ConfigurationError):
    """A call does not fit what the memory holds: other rows, another cache, beams that would have to be stored."""


__all__ = ["MemoryStateError", "UnsupportedModel"]
