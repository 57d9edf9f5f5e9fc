"""`recollect trace`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recollect.commands._options import (
    CheckpointOption,
    CorpusOption,
    DeviceOption,
    JsonOption,
    KOption,
    MemorySizeOption,
)
from recollect.commands._printing import print_figures, print_json, steps_of


def trace(
    output: Annotated[Path, typer.Option("--output", help="HDF5 file to write.")],
    checkpoint: CheckpointOption = None,
    corpus: CorpusOption = "stdlib",
    split: Annotated[
        str, typer.Option("--split", help="test, validation, train, or all documents of the corpus.")
    ] = "test",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Tokens to record, over all rows.")] = 24_576,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Documents read side by side.")] = 2,
    ann_benchmarks: Annotated[
        str | None,
        typer.Option(
            "--ann-benchmarks",
            metavar="MEMORY|all",
            help="Write this one memory (row * heads + head) in the HDF5 layout of ann-benchmarks, with its true "
            "neighbours, instead of the whole trace; `all` writes every memory into the folder --output.",
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Only this memory layer. Default: all; of one MEMORY, the lowest.")
    ] = None,
    memory_size: MemorySizeOption = None,
    k: KOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Records what the memory layers ask and store on real text, so that any index can be measured on it.

    The file holds, for every layer and head, queries, keys and values step by step, where documents start, and the true
    neighbours of every query among the keys that came before it: h5py and numpy read it. Its format is described in the
    documentation, under 'Data of others, and ours'.

    **Examples**

        recollect trace --output out/trace.hdf5

        recollect trace --ann-benchmarks 0 --k 100 --output out/attention-keys.hdf5

        recollect trace --ann-benchmarks all --k 100 --output out/attention
    """
    from recollect.model.checkpoints import load_checkpoint, reference_checkpoint
    from recollect.model.documents import CorpusError
    from recollect.model.evaluation_text import choose_text, load_documents
    from recollect.model.recording import record_layers
    from recollect.model.trace import Trace
    from recollect.model.trace_export import export_ann_benchmarks, export_every_memory
    from recollect.model.trace_file import save_traces
    from recollect.model.trunk import compute_trunk

    if ann_benchmarks not in (None, "all") and not str(ann_benchmarks).isdecimal():
        raise typer.BadParameter(
            f"{ann_benchmarks!r} is neither a memory's number nor 'all'", param_hint="--ann-benchmarks"
        )
    loaded = load_checkpoint(checkpoint or reference_checkpoint(), device=device)
    config = loaded.model.config
    size, neighbors = config.memory_size if memory_size is None else memory_size, k or config.k
    documents = load_documents(corpus, split, loaded.tokenizer)
    text = choose_text(documents, rows=rows, segment_length=config.segment_length, max_tokens=max_tokens)
    metadata = {"corpus": corpus, "split": split, "checkpoint": str(checkpoint or "reference")}
    with steps_of("reading the text") as tell:
        trunk = compute_trunk(loaded.model, text, on_segment=lambda done: tell("the trunk", done, text.segments))
        recordings = record_layers(
            loaded.model, trunk, memory_size=size, on_segment=lambda done, total: tell("recording", done, total)
        )
        traces = [
            Trace.of(recording, lengths=text.lengths, metadata=metadata, layer=number, memory_size=size)
            for number, recording in recordings.items()
        ]
        chosen = [trace for trace in traces if layer in (None, trace.layer)]
        if not chosen:
            has = ", ".join(str(trace.layer) for trace in traces)
            raise CorpusError(f"layer {layer} has no memory: the model's memory layers are {has}")
        left_out: list[str] = []
        if ann_benchmarks is None:
            save_traces(output, chosen, k=neighbors, on_step=lambda done, total: tell("true neighbours", done, total))
        elif ann_benchmarks == "all":
            files, left_out = export_every_memory(
                chosen, output, neighbors, on_memory=lambda done, total: tell("true neighbours", done, total)
            )
            if not files:
                raise CorpusError(f"no memory could be written: {left_out[0]}")
        else:
            export_ann_benchmarks(chosen[0], output, int(ann_benchmarks), neighbors)
    one = chosen[0]
    answer = {
        "output": str(output),
        "layers": [trace.layer for trace in chosen],
        "steps": len(one),
        "memories": one.num_memories,
        "rows": one.rows,
        "heads": one.heads,
        "dimension": one.dim,
        "memory_size": size,
        "neighbors": neighbors,
        "tokens": int(one.text_lengths.sum()),
        "left_out": left_out,
    }
    if as_json:
        print_json(answer)
    else:
        print_figures("Trace", {name: value for name, value in answer.items() if value != []})
