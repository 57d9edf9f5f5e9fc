"""`recollect generate`"""

from __future__ import annotations

import sys
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
from recollect.commands._printing import print_json
from recollect.commands._values import memory_choice, prompt_of


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; `-` reads standard input.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Continue the text of this file, which may be far longer than a window."),
    ] = None,
    model: ModelOption = None,
    store: StoreOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; 1 draws as the model says.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw from the k likeliest tokens alone.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the fewest tokens with this probability together.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End when this text appears; repeatable.")] = None,
    backend: BackendOption = "exact",
    memory_size: MemorySizeOption = None,
    k: KOption = None,
    layers: LayersOption = None,
    gate: GateOption = None,
    window: WindowOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continues a text with memory, writing it to standard output as it comes.

    **Examples**

        recollect generate "import "

        recollect generate --file chapter.txt --model my-llama --store out/store --temperature 0.8 --seed 1

        cat chapter.txt | recollect generate - --max-new-tokens 50
    """
    import dataclasses

    from recollect.pretrained.evaluation import MemoryChoice
    from recollect.pretrained.generation import GenerationOptions, continue_text

    choice = memory_choice(model, layers=layers, gate=gate, window=window) or MemoryChoice()
    options = GenerationOptions(
        model=model,
        store=store,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=tuple(stop or ()),
        memory=dataclasses.replace(choice, backend=backend, memory_size=memory_size, k=k, seed=seed),
        device=device,
    )

    def tell(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    made = continue_text(prompt_of(prompt, file), options, on_text=None if as_json else tell)
    if as_json:
        print_json(dataclasses.asdict(made))
    else:
        sys.stdout.write("\n")
