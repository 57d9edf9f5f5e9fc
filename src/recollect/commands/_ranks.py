"""What a verb does under torchrun: one process speaks for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Ends the other processes in silence where the first says why; without torchrun nothing changes."""
    from recollect.model.distributed import is_repeated, speaks

    try:
        yield
    except KeyboardInterrupt:
        if speaks():
            raise
        raise typer.Exit(130) from None
    except Exception as error:
        if is_repeated(error):
            raise typer.Exit(2) from None
        raise
