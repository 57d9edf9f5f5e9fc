"""What the class of a backend says of itself before one is made: what is true with which options, which libraries."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any, ClassVar

from recollect.memory_backends.errors import BackendUnavailable
from recollect.memory_backends.records import Capabilities, Requirement
from recollect.memory_backends.spec import options_given


class Declared:
    """The class methods of `MemoryBackend`; what they read is declared there."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    requires: ClassVar[tuple[Requirement, ...]]
    search_options: ClassVar[tuple[str, ...]]

    # What depends on options ------------------------------------------------------------------------------------------

    @classmethod
    def capabilities_with(cls, options: Any) -> Capabilities:
        """What is true of a backend with these options; of most, what its class declares."""
        return cls.capabilities

    @classmethod
    def sources_with(cls, options: Any) -> tuple[str, ...]:
        """Registry strings of the backends that one with these options is made of; of most, none."""
        return ()

    @classmethod
    def keeps_keys(cls, options: Any) -> bool:
        """Whether one with these options holds all raw keys itself, as most do."""
        return True

    @classmethod
    def build_options(cls, options: Any) -> dict[str, Any]:
        """Of the options given, what is fixed once the backend is made; equal for those that can share an index."""
        return {name: value for name, value in options_given(options).items() if name not in cls.search_options}

    # Libraries --------------------------------------------------------------------------------------------------------

    @classmethod
    def missing_requirements(cls) -> tuple[Requirement, ...]:
        """The libraries that are not installed here, found without importing them."""
        return tuple(need for need in cls.requires if importlib.util.find_spec(need.module.partition(".")[0]) is None)

    @classmethod
    def check_available(cls) -> None:
        """Raises BackendUnavailable, with the pip command, if a library is missing."""
        missing = cls.missing_requirements()
        if missing:
            raise BackendUnavailable(cls.unavailable_reason(missing))

    @classmethod
    def unavailable_reason(cls, missing: tuple[Requirement, ...]) -> str:
        """The sentence that says what is missing and which command brings it."""
        modules = ", ".join(need.module for need in missing)
        command = " ".join(f"'{need.pip}'" for need in missing)
        return f"backend {cls.name!r} needs {modules}, which is not installed: pip install {command}"

    @classmethod
    def import_library(cls, module: str) -> ModuleType:
        """Imports a library when it is used.

        Raises:
            BackendUnavailable: it is not installed, or is installed and does not load here.
        """
        try:
            return importlib.import_module(module)
        except ImportError as error:
            needs = tuple(need for need in cls.requires if need.module.partition(".")[0] == module.partition(".")[0])
            raise BackendUnavailable(
                f"{cls.unavailable_reason(needs or (Requirement(module, module),))} ({error})"
            ) from error
