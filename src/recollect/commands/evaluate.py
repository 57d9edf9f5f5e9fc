"""`recollect evaluate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recollect.commands._options import (
    BackendOption,
    CheckpointOption,
    CorpusOption,
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
from recollect.commands._printing import flat, print_figures, print_json, progress_of
from recollect.commands._ranks import one_voice
from recollect.commands._values import memory_choice, one_model


def evaluate(
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    store: StoreOption = None,
    corpus: CorpusOption = "stdlib",
    split: Annotated[
        str, typer.Option("--split", help="test, validation, train, or all documents of the corpus.")
    ] = "test",
    backend: BackendOption = "exact",
    memory_size: MemorySizeOption = None,
    k: KOption = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Stop after about this many tokens.")
    ] = 100_000,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the per-token losses into this file (.npz).")
    ] = None,
    layers: LayersOption = None,
    gate: GateOption = None,
    window: WindowOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measures perplexity and next-token accuracy of a model with one memory.

    A Hugging Face model, and any model with a store, is measured with memory and without.

    Under `torchrun` the rows are dealt to its processes, and the figures are those of one process.

    **Examples**

        recollect evaluate

        recollect evaluate --backend faiss-ivf:nlist=64,nprobe=8 --memory-size 8192

        recollect evaluate --memory-size 0 --corpus my_novel.txt --json

        torchrun --nproc-per-node 2 -m recollect evaluate --memory-size 8192

        recollect evaluate --model my-llama --store out/store --corpus my_novel.txt --split all
    """
    from recollect.model.configuration import ConfigurationError
    from recollect.model.distributed import joined, launched, speaks
    from recollect.model.evaluation import EvaluationOptions
    from recollect.model.evaluation import evaluate as run
    from recollect.model.shared_evaluation import evaluate_shared
    from recollect.pretrained.loading import is_pretrained_folder

    folder = one_model(model, checkpoint)
    if store is not None or is_pretrained_folder(folder):
        if launched() > 1:
            raise ConfigurationError(
                f"a Hugging Face model, or one with a store, is evaluated by one process, and {launched()} were "
                "started: run it without torchrun"
            )
        from recollect.pretrained.evaluation import evaluate_with_store

    options = EvaluationOptions(
        checkpoint=folder,
        corpus=corpus,
        split=split,
        backend=backend,
        memory_size=memory_size,
        k=k,
        max_tokens=max_tokens,
        seed=seed,
        device=device,
    )
    with one_voice(), progress_of("evaluating", show=speaks()) as advance:
        if store is not None or is_pretrained_folder(folder):
            comparison = evaluate_with_store(
                options,
                store=store,
                choice=memory_choice(folder, layers=layers, gate=gate, window=window),
                on_segment=advance,
            )
            losses, answer = comparison.result.losses, comparison.as_json()
        else:
            memory_choice(folder, layers=layers, gate=gate, window=window)
            if launched() > 1:
                with joined(device) as ranks:
                    result = evaluate_shared(options, ranks, on_segment=advance)
            else:
                result = run(options, on_segment=advance)
            losses, answer = result.losses, result.as_json()
    if not speaks():
        return
    if output is not None:
        losses.save(output)
    if as_json:
        print_json(answer)
        return
    print_figures("Evaluation", flat(answer))
