"""What every public method of a backend goes through: the lock, plain tensors, and errors in the user's words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from recollect.memory_backends.errors import ClosedMemory
from recollect.memory_backends.out_of_memory import as_out_of_memory, ran_out

if TYPE_CHECKING:
    from recollect.memory_backends.base import MemoryBackend

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Backend = TypeVar("Backend", bound="MemoryBackend")
Method = Callable[Concatenate[Backend, Arguments], Result]


def plain_tensors(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Runs a function outside inference mode and without gradients, whatever mode the caller is in.

    A memory outlives the caller's mode: what is written under `torch.inference_mode()` could not be changed outside
    it, nor by a worker thread, since the mode is a thread's own.
    """

    @functools.wraps(method)
    def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.no_grad():
            return method(*arguments, **named)

    return wrapped


def reads(method: Method[Backend, Arguments, Result]) -> Method[Backend, Arguments, Result]:
    """A public method that leaves the memory as it is: it runs beside others of its kind."""

    @functools.wraps(method)
    def wrapped(self: Backend, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.no_grad(), self._lock.reading:
            return _call(method, self, *arguments, **named)

    return wrapped


def writes(method: Method[Backend, Arguments, Result]) -> Method[Backend, Arguments, Result]:
    """A public method that changes the memory: it runs alone."""

    @functools.wraps(method)
    def wrapped(self: Backend, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.no_grad(), self._lock.writing:
            return _call(method, self, *arguments, **named)

    return wrapped


def _call(method: Callable[..., Result], backend: MemoryBackend, /, *arguments: Any, **named: Any) -> Result:
    if backend._refusal is not None:
        raise type(backend._refusal)(*backend._refusal.args)
    try:
        return method(backend, *arguments, **named)
    except (MemoryError, RuntimeError) as error:
        if ran_out(error):
            raise as_out_of_memory(error, f"for {method.__name__}() of a {backend.spec!r} memory") from error
        raise


def closed_error(name: str) -> ClosedMemory:
    """What a closed backend answers with."""
    return ClosedMemory(f"this {name!r} memory is closed; make a new one, or load_backend() what was saved")


def full_precision(device: torch.device) -> torch.autocast:
    """No autocast, in which a product would be taken in bfloat16 and neighbours be wrong in silence."""
    return torch.autocast(device.type, enabled=False)
