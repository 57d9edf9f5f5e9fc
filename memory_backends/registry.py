"""Backends by name: the files of `implementations/`, and third parties by entry point.

A built-in backend is the file `implementations/some_name.py`, which holds one `MemoryBackend` subclass whose `name`
is `some-name`. A third party publishes its class under the entry-point group `recollect.memory_backends`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recollect.memory_backends import implementations
from recollect.memory_backends.base import Capabilities, MemoryBackend
from recollect.memory_backends.errors import CorruptMemory, InvalidSpec, MemoryBackendError, UnknownBackend
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.spec import format_spec, make_options, options_given, parse_spec

ENTRY_POINT_GROUP = "recollect.memory_backends"


@dataclass(frozen=True)
class OptionInfo:
    """One option of a backend: its name, its type as text, its default, whether it may change without a rebuild."""

    name: str
    type: str
    default: Any
    help: str
    changeable: bool


@dataclass(frozen=True)
class BackendInfo:
    """What `recollect backends` tells of a backend; nothing of its library is imported to find out."""

    name: str
    summary: str
    options: tuple[OptionInfo, ...]
    capabilities: Capabilities
    available: bool
    reason: str
    pip_command: str
    sweep: tuple[str, ...]
    recall_floor: float
    one_shared: bool = False


@functools.cache
def _built_in() -> Mapping[str, str]:
    modules = pkgutil.iter_modules(implementations.__path__)
    return {
        module.name.replace("_", "-"): f"{implementations.__name__}.{module.name}"
        for module in modules
        if not module.name.startswith("_")
    }


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        other = "a built-in backend" if point.name in _built_in() else None
        # The same distribution may be listed twice (a checkout beside its installation): that is no clash.
        if point.name in found and found[point.name].value != point.value:
            other = f"{found[point.name].value!r}"
        if other:
            raise MemoryBackendError(
                f"entry point {point.name!r} = {point.value!r} takes the name of {other}: uninstall one of them or "
                "rename it"
            )
        found[point.name] = point
    return found


def backend_names() -> tuple[str, ...]:
    """Every backend's name, built in or third party, sorted."""
    return tuple(sorted({*_built_in(), *_entry_points()}))


def backend_class(name: str) -> type[MemoryBackend]:
    """The class of a backend by its name.

    Raises:
        UnknownBackend: no backend has this name.
    """
    if name in _built_in():
        module = importlib.import_module(_built_in()[name])
        for _, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, MemoryBackend) and member.__module__ == module.__name__ and member.name == name:
                return member
        raise MemoryBackendError(f"{module.__name__} defines no backend class named {name!r}")
    points = _entry_points()
    if name in points:
        loaded = points[name].load()
        if not (inspect.isclass(loaded) and issubclass(loaded, MemoryBackend)):
            raise MemoryBackendError(f"entry point {name!r} is {loaded!r}, which is no subclass of MemoryBackend")
        if loaded.name != name:
            raise MemoryBackendError(f"entry point {name!r} leads to a backend that calls itself {loaded.name!r}")
        return loaded
    names = backend_names()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    offer = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UnknownBackend(f"there is no backend {name!r}; {offer}There are: {', '.join(names)}")


def canonical_spec(spec: str) -> str:
    """The canonical form of a registry string: options sorted, defaults dropped; no library is imported.

    Raises:
        UnknownBackend, InvalidSpec: as `make_backend`.
    """
    cls, options = class_and_options(spec)
    return format_spec(cls.name, options_given(options))


def class_and_options(spec: str) -> tuple[type[MemoryBackend], Any]:
    """The class that a registry string names, and its options; no library is imported.

    Raises:
        UnknownBackend, InvalidSpec: as `make_backend`.
    """
    name, given = parse_spec(spec)
    cls = backend_class(name)
    return cls, make_options(cls.Options, given, name=name)


def capabilities_of(spec: str) -> Capabilities:
    """What is true of the backend that a registry string names; no library is imported."""
    cls, options = class_and_options(spec)
    return cls.capabilities_with(options)


def classes_of(spec: str) -> tuple[type[MemoryBackend], ...]:
    """The classes that a registry string needs: its backend's own, and those of the backends that it is made of."""
    cls, options = class_and_options(spec)
    inner = (each for source in cls.sources_with(options) for each in classes_of(source))
    return tuple(dict.fromkeys((cls, *inner)))


def check_available(spec: str) -> None:
    """Raises BackendUnavailable, with the pip command, if a library that a registry string needs is missing."""
    for cls in classes_of(spec):
        cls.check_available()


def build_spec(spec: str) -> str:
    """The canonical registry string without search options: the same for specs that can share one built index."""
    cls, options = class_and_options(spec)
    return format_spec(cls.name, cls.build_options(options))


def make_backend(
    spec: str,
    *,
    num_memories: int,
    capacity: int,
    dim: int,
    metric: str = "inner_product",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> MemoryBackend:
    """Makes the backend that a registry string names.

    Args:
        spec: such as "exact" or "faiss-ivf:nlist=256,nprobe=16".
        num_memories: M, how many independent memories it holds.
        capacity: C, how many keys each of them keeps.
        dim: D, the dimension of a key.
        metric: "inner_product", "l2" or "cosine".
        device: where the memory lives.
        seed: decides everything random.

    Raises:
        UnknownBackend: no backend has this name; the message offers the nearest.
        InvalidSpec: the string or an option is wrong; the message names it and what would do.
        BackendUnavailable: its library is not installed; the message holds the pip command.
        InvalidInput, UnsupportedOperation: a number, metric or device does not do.
    """
    cls, options = class_and_options(spec)
    # What a subclass's own __init__ makes must be as usable outside inference mode as what the base class makes.
    with torch.inference_mode(False):
        return cls(
            options, num_memories=num_memories, capacity=capacity, dim=dim, metric=metric, device=device, seed=seed
        )


def load_backend(directory: str | Path, *, device: str | torch.device = "cpu") -> MemoryBackend:
    """The memory that `MemoryBackend.save` wrote into a folder.

    Raises:
        CorruptMemory: the folder is truncated, altered, or holds no memory.
    """
    from recollect.memory_backends.storage import read_header, restore_backend

    directory = Path(directory)
    header = read_header(directory)
    try:
        backend = make_backend(
            header["spec"],
            num_memories=header["num_memories"],
            capacity=header["capacity"],
            dim=header["dim"],
            metric=header["metric"],
            device=device,
            seed=header["seed"],
        )
        restore_backend(backend, directory, header)
    except (KeyError, TypeError) as error:
        raise CorruptMemory(f"{directory} has a header without a usable {error}; save the memory again") from error
    except (InvalidSpec, UnknownBackend) as error:
        raise CorruptMemory(f"{directory} names a backend that is not here: {error}") from error
    return backend


def describe_backend(name: str) -> BackendInfo:
    """What there is to say about one backend."""
    cls = backend_class(name)
    missing = cls.missing_requirements()
    hints = typing.get_type_hints(cls.Options)
    shared = {field.name for field in dataclasses.fields(KeyStorageOptions)}
    options = tuple(
        OptionInfo(
            name=field.name,
            type=_type_name(hints[field.name]),
            default=None if field.default is dataclasses.MISSING else field.default,
            help=str(field.metadata.get("help", "")),
            changeable=field.name in cls.search_options,
        )
        for field in sorted(dataclasses.fields(cls.Options), key=lambda field: field.name in shared)  # its own first
    )
    return BackendInfo(
        name=name,
        summary=cls.summary,
        options=options,
        capabilities=cls.capabilities,
        available=not missing,
        reason=cls.unavailable_reason(missing) if missing else "",
        pip_command=" ".join(["pip install", *(f"'{need.pip}'" for need in cls.requires)]) if cls.requires else "",
        sweep=tuple(dict.fromkeys(canonical_spec(spec) for spec in cls.sweep or (name,))),
        recall_floor=cls.recall_floor,
        one_shared=cls.one_shared,
    )


def list_backends() -> tuple[BackendInfo, ...]:
    """Every backend, sorted by name."""
    return tuple(describe_backend(name) for name in backend_names())


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)
