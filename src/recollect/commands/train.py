"""`recollect train`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recollect.commands._options import CorpusOption, DeviceOption, JsonOption
from recollect.commands._printing import print_figures, print_json
from recollect.commands._ranks import one_voice


def train(
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the checkpoint; an interrupted run in it goes on.")
    ],
    preset: Annotated[
        str, typer.Option("--preset", help="reference, reference-twin (never a memory), laptop, tiny or paper.")
    ] = "laptop",
    corpus: CorpusOption = "stdlib",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Start from these weights and their tokenizer: fine-tune.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Registry string of the memory trained with. Default: exact.")
    ] = None,
    memory_size: Annotated[
        int | None, typer.Option("--memory-size", min=0, help="Keys each memory holds while training; 0 is none.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Segments each batch row reads.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens to read in all, instead of --steps.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows read side by side.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="tokenizer.json or AutoTokenizer folder. Default: trained on the corpus."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides weights, order of documents, backend.")] = None,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", min=0, help="Steps between saves, from which a run that ended goes on; 0: none."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of each process. Default: its share of the cores.")
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            "--parallel", help="Under torchrun: ddp (default, whole models) or fsdp (each process a share of weights)."
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option("--deadline", help="Under torchrun: seconds until a silent process is given up. Default: 300."),
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Trains a memorizing transformer and writes a checkpoint.

    Interrupt it at any time: the same command goes on where it stopped, and ends with the same weights.

    Under `torchrun` the rows of each batch are dealt to its processes, one for each device or core: `--batch-size` is
    that of all together, and a run may go on with another number of processes.

    **Examples**

        recollect train --preset tiny --output out/tiny

        recollect train --preset reference --output out/reference

        recollect train --corpus my_texts.jsonl.xz --memory-size 8192 --steps 5000 --output out/mine

        torchrun --nproc-per-node 2 --max-restarts 3 -m recollect train --preset tiny --output out/two
    """
    from recollect.model.configuration import ConfigurationError
    from recollect.model.distributed import speaks
    from recollect.model.training import TrainingOptions
    from recollect.model.training import train as run

    given: dict[str, Any] = {
        "corpus": corpus,
        "checkpoint": checkpoint,
        "memory_size": memory_size,
        "backend": backend,
        "steps": steps,
        "batch_size": batch_size,
        "tokenizer": tokenizer,
        "seed": seed,
        "device": device,
        "save_every": save_every,
        "threads": threads,
        "parallel": parallel,
        "deadline": deadline,
    }
    options = TrainingOptions.preset(preset, output)
    changes = {name: value for name, value in given.items() if value is not None}
    if max_tokens is not None:
        if steps is not None:
            raise ConfigurationError(
                f"--steps {steps} and --max-tokens {max_tokens} both say how long to train: give one"
            )
        per_step = (batch_size or options.batch_size) * options.model.segment_length
        changes["steps"] = max(1, max_tokens // per_step)
    with one_voice(interrupted="interrupted; run the same command again to go on"):
        answer = run(TrainingOptions.preset(preset, output, **changes)).as_json()
    if not speaks():
        return
    if as_json:
        print_json(answer)
    else:
        print_figures("Training", answer)
