"""Options that several verbs share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Folder of a checkpoint. Default: the model shipped with recollect."),
]
CorpusOption = Annotated[
    str,
    typer.Option(
        "--corpus",
        help="`stdlib` (the source of Python's standard library), a text file or folder, JSON lines with a `text` "
        "field (.jsonl, also .gz and .xz), or a Hugging Face dataset saved on disk.",
    ),
]
BackendOption = Annotated[
    str, typer.Option("--backend", help="Registry string, such as `exact` or `hnswlib:M=16,ef_search=128`.")
]
MemorySizeOption = Annotated[
    int | None,
    typer.Option("--memory-size", min=0, help="Keys each memory holds; 0 is no memory. Default: the checkpoint's own."),
]
KOption = Annotated[
    int | None, typer.Option("--k", help="Neighbours each query retrieves. Default: the checkpoint's own.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Decides everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where model and memory live: cpu, cuda, cuda:1 ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on standard output.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder of a Hugging Face model or of a checkpoint. Default: the shipped model."),
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Memory store that `recollect memorize` made with this model: a folder, or s3://..."),
]
LayersOption = Annotated[
    str | None,
    typer.Option("--layers", help="Hugging Face models: layers with memory, such as `3,5`, `-2` or `near_top`."),
]
GateOption = Annotated[
    str | None, typer.Option("--gate", help="Hugging Face models: how memory joins attention: joint, head, fixed ...")
]
WindowOption = Annotated[
    int | None,
    typer.Option("--window", min=2, help="Hugging Face models: tokens attended to without memory. Default: all."),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="Where processes run: local (this machine, one after another) or ray (tasks on the machines of a Ray "
        "cluster, wherever there is room; needs the extra 'ray').",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="The Ray cluster to join, as host:port of its head, from one of its machines. Default: Ray is started on "
        "this machine, and ended with the run.",
    ),
]
