"""`recollect inspect`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recollect.commands._options import (
    BackendOption,
    DeviceOption,
    GateOption,
    JsonOption,
    KOption,
    LayersOption,
    MemorySizeOption,
    ModelOption,
    SeedOption,
    StoreOption,
    WindowOption,
)
from recollect.commands._printing import print_figures, print_json, progress_of
from recollect.commands._values import layers_of, memory_choice


def inspect(
    text: Annotated[
        str | None,
        typer.Argument(help="A text file or folder, JSON lines or dataset. Default: the standard library's test part."),
    ] = None,
    model: ModelOption = None,
    store: StoreOption = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="test, validation, train or all. Default: all of a text that is given."),
    ] = None,
    backend: BackendOption = "exact",
    memory_size: MemorySizeOption = None,
    k: KOption = None,
    layers: LayersOption = None,
    gate: GateOption = None,
    window: WindowOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Stop after about so many tokens.")] = 50_000,
    output: Annotated[Path, typer.Option("--output", help="Folder of the page and its data.")] = Path("out/inspect"),
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Shows what each memory head retrieved, where that changed the prediction, and which kinds of token gained.

    Writes inspection.html, one page for the browser, with inspection.json and tokens.parquet beside it.

    **Examples**

        recollect inspect

        recollect inspect my_novel.txt --output out/novel

        recollect inspect my_novel.txt --model my-llama --store out/store --memory-size 4096
    """
    from recollect.pretrained.inspection import InspectionOptions
    from recollect.pretrained.inspection import inspect as run
    from recollect.reports.inspection import write_inspection

    memory_choice(model, layers=layers, gate=gate, window=window)
    options = InspectionOptions(
        model=None if model == "reference" else model,
        store=store,
        corpus=text or "stdlib",
        split=split or ("test" if text is None else "all"),
        backend=backend,
        memory_size=memory_size,
        k=k,
        layers=layers_of(layers),
        gate=gate,
        window=window,
        max_tokens=max_tokens,
        seed=seed,
        device=device,
    )
    with progress_of("inspecting") as advance:
        run(options, on_segment=advance).save(output)
    files = write_inspection(output)
    if as_json:
        print_json({"page": files.page, "verdict": files.verdict, "kinds": files.kinds})
        return
    gains = [
        f"{row['kind']}: {row['gain']['estimate']:+.2f} nats a token over {row['tokens']} tokens"
        for row in files.kinds
        if row["gain"] is not None
    ]
    print_figures("Inspection", {"page": files.page, "finding": files.verdict, "gain over no memory": gains})
