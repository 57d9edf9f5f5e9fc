"""`recollect memorize`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recollect.commands._options import DeviceOption, JsonOption
from recollect.commands._printing import print_figures, print_json, progress_of
from recollect.commands._values import layers_of


def memorize(
    path: Annotated[Path, typer.Argument(help="A codebase or folder of documents, a text file, or JSON lines.")],
    output: Annotated[
        str,
        typer.Option("--output", help="Folder of the store, or s3://bucket/store; an earlier run in it goes on."),
    ],
    model: Annotated[
        str,
        typer.Option("--model", help="Folder of a Hugging Face model or of a checkpoint, or `reference`."),
    ] = "reference",
    update: Annotated[
        bool, typer.Option("--update", help="Read again what changed, and drop what is gone, by content.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Layers of a Hugging Face model: numbers such as `3,5`, or a name (`near_top`)."),
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Reads a codebase or a folder of documents into a durable memory store.

    Hidden files, files that .gitignore names and files that are not text are passed over and counted. Interrupt it at
    any time: the same command goes on where it stopped.

    **Examples**

        recollect memorize src --output out/store

        recollect memorize src --output out/store --update

        recollect memorize papers --model my-llama --layers 12 --output out/papers

        recollect memorize papers --output s3://bucket/papers
    """
    from recollect.pretrained.memorizing import memorize as run

    with progress_of("memorizing") as advance:
        result = run(
            path,
            model=model,
            output=output,
            update=update,
            layers=layers_of(layers),
            device=device,
            on_document=advance,
        )
    if as_json:
        print_json(result.as_json())
        return
    answer = result.as_json()
    skipped = [f"{count} {reason}" for reason, count in answer.pop("skipped").items()]
    print_figures("Memory store", answer | ({"passed over": ", ".join(skipped)} if skipped else {}))
