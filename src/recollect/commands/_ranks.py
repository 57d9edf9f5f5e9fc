"""What a verb does under torchrun: one process speaks for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console


@contextlib.contextmanager
def one_voice(*, interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the other processes in silence where the first says why.

    Args:
        interrupted: what to say after Ctrl-C; the program ends with code 130 then.
    """
    from recollect._user_errors import explain
    from recollect.model.distributed import speaks
    from recollect.model.rank_errors import is_repeated

    try:
        yield
    except KeyboardInterrupt:
        if speaks():
            Console(stderr=True).print(interrupted, style="yellow")
        raise typer.Exit(130) from None
    except Exception as error:
        if is_repeated(error) and explain(error) is not None:
            raise typer.Exit(2) from None
        raise
