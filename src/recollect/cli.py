"""The command line: `recollect backends | train | evaluate | memorize | generate | inspect | compare | ...`.

Answers go to standard output, progress and errors to standard error, so that `--json` can be piped. What a user can
mend (a misspelt option, a missing library, a corpus that is not text, a full disk) ends with exit code 2 and one
message; a traceback is a fault of ours.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from recollect._version import __version__
from recollect.commands.ablate import ablate
from recollect.commands.ann_benchmarks import ann_benchmarks
from recollect.commands.backends import backends
from recollect.commands.compare import compare
from recollect.commands.crossover import crossover
from recollect.commands.evaluate import evaluate
from recollect.commands.generate import generate
from recollect.commands.inspect import inspect
from recollect.commands.memorize import memorize
from recollect.commands.plan import plan
from recollect.commands.report import report
from recollect.commands.runbook import runbook
from recollect.commands.trace import trace
from recollect.commands.train import train
from recollect.commands.tune import tune

app = typer.Typer(
    name="recollect",
    help="Which kNN index should hold a language model's memory, and what does the choice cost in perplexity and time?",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

VERBS = (
    backends,
    train,
    evaluate,
    memorize,
    generate,
    inspect,
    compare,
    crossover,
    tune,
    ablate,
    report,
    plan,
    trace,
    ann_benchmarks,
    runbook,
)

for verb in VERBS:
    app.command()(verb)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"recollect {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; the entry point of the `recollect` command."""
    from recollect._user_errors import explain

    try:
        app()
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to go on", style="yellow")
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        Console(stderr=True, highlight=False).print(message, style="red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
