"""Traces: HDF5 round trip, causal replay, and one memory written for ann-benchmarks."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_text
from torch import Tensor

from recollect.memory_backends import make_backend
from recollect.model.documents import CorpusError
from recollect.model.recording import record, record_layers
from recollect.model.trace import Trace, replay
from recollect.model.trace_export import export_ann_benchmarks, export_every_memory
from recollect.model.trace_file import causal_neighbors, load_trace, load_traces, save_traces
from recollect.model.trunk import compute_trunk

STEPS, ROWS, HEADS, TOKENS, DIM = 6, 2, 3, 4, 5


def make_trace(seed: int = 0) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = torch.randn(3, STEPS, ROWS * HEADS, TOKENS, DIM, generator=generator)
    starts = torch.zeros(STEPS, ROWS, dtype=torch.bool)
    starts[0] = True
    starts[2, 1] = True  # Row 1: two steps of one document, then a longer one.
    lengths = torch.full((STEPS, ROWS), TOKENS)
    lengths[5, 0] = 3
    lengths[1, 1] = 1
    return Trace(queries, keys, values, starts, lengths, torch.tensor([1.0, 2.0, 3.0]), {"corpus": "made up", "k": 4})


def assert_equal(one: Trace, other: Trace) -> None:
    for name in ("queries", "keys", "values", "document_starts", "text_lengths", "logit_scale"):
        left, right = getattr(one, name), getattr(other, name)
        assert torch.equal(left, right), name
        assert left.dtype == right.dtype, name
    assert dict(one.metadata) == dict(other.metadata)


def test_round_trip(tmp_path: Path) -> None:
    trace = make_trace()
    trace.save(tmp_path / "trace.h5")
    assert_equal(load_trace(tmp_path / "trace.h5"), trace)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.h5"]


def loader() -> Any:
    """The loader that the documentation prints."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def searches" in text)
    assert len([line for line in block.splitlines() if line.strip()]) == 12  # of them two import
    assert {line.split()[1] for line in block.splitlines() if line.startswith(("import", "from"))} == {"h5py", "numpy"}
    space: dict[str, Any] = {}
    exec(block, space)
    return space["searches"]


@pytest.mark.parametrize("size", [None, 5, 8, 100])
def test_the_printed_loader_reads_causal_truth(tmp_path: Path, size: int | None) -> None:
    """Document resets, evictions and steps: what it yields is what brute force finds among the keys from before."""
    trace = dataclasses.replace(make_trace(), memory_size=size, layer=3)
    trace.save(tmp_path / "trace.h5", k=6)
    for memory in range(trace.num_memories):
        steps = list(loader()(tmp_path / "trace.h5", 3, memory))
        assert len(steps) == STEPS
        for step, (first, keys, queries, neighbors) in enumerate(steps):
            begin = 2 if memory // HEADS == 1 and step >= 2 else 0
            alive = trace.keys[begin:step, memory].reshape(-1, DIM)
            alive = alive[-size:] if size else alive
            np.testing.assert_array_equal(keys, alive.numpy())
            assert first == step * TOKENS - len(alive)
            np.testing.assert_array_equal(queries, trace.queries[step, memory].numpy())
            scores = queries @ keys.T
            order = np.argsort(-scores, axis=1)[:, :6]
            np.testing.assert_array_equal(neighbors[:, : order.shape[1]], order + first)
            assert (neighbors[:, order.shape[1] :] == -1).all()


def test_layers_share_a_file(tmp_path: Path) -> None:
    low, high = (dataclasses.replace(make_trace(seed), layer=layer, memory_size=9) for seed, layer in ((0, 1), (1, 4)))
    told: list[tuple[int, int]] = []
    save_traces(tmp_path / "t.h5", [high, low], k=2, on_step=lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * STEPS, 2 * STEPS)
    assert [trace.layer for trace in load_traces(tmp_path / "t.h5")] == [1, 4]
    assert_equal(load_trace(tmp_path / "t.h5"), low)
    assert_equal(load_trace(tmp_path / "t.h5", 4), high)
    assert load_trace(tmp_path / "t.h5").memory_size == 9
    with pytest.raises(CorpusError, match="has layers 1, 4, and no layer 2"):
        load_trace(tmp_path / "t.h5", 2)
    with h5py.File(tmp_path / "t.h5") as file:
        assert file["layers/4/neighbors"].shape == (STEPS, ROWS * HEADS, TOKENS, 2)
        assert file["layers/4/scores"].dtype == np.float32
        assert (file.attrs["version"], file.attrs["memory_size"], file.attrs["k"]) == (2, 9, 2)
    with pytest.raises(CorpusError, match="only once"):
        save_traces(tmp_path / "u.h5", [low, low])
    with pytest.raises(CorpusError, match="of one recording"):
        save_traces(tmp_path / "u.h5", [low, dataclasses.replace(high, memory_size=8)])


def test_scores_are_those_of_the_numbered_keys() -> None:
    trace = dataclasses.replace(make_trace(), memory_size=7)
    for step, (numbers, scores) in enumerate(causal_neighbors(trace, 4)):
        keys = trace.keys.transpose(0, 1).reshape(ROWS * HEADS, -1, DIM)
        for memory in range(ROWS * HEADS):
            near = keys[memory][numbers[memory].clamp(min=0)]
            products = (near * trace.queries[step, memory][:, None]).sum(-1)
            known = numbers[memory] >= 0
            torch.testing.assert_close(products[known], scores[memory][known])
            assert torch.isneginf(scores[memory][~known]).all()


def test_the_former_version_is_read(tmp_path: Path) -> None:
    trace = make_trace()
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs.update(format="recollect trace", version=1, metadata='{"corpus": "made up", "k": 4}')
        names = {"lengths": "text_lengths", "scale": "logit_scale"}
        for name in ("queries", "keys", "values", "document_starts", "lengths", "scale"):
            file.create_dataset(name, data=getattr(trace, names.get(name, name)).numpy())
    assert_equal(load_trace(tmp_path / "old.h5"), trace)
    with pytest.raises(CorpusError, match="one layer without a number, and no layer 3"):
        load_trace(tmp_path / "old.h5", 3)


def test_every_layer_is_recorded() -> None:
    model = tiny_model(memory_layers=(1, 2), layers=4)
    trunk = compute_trunk(model, tiny_text())
    recordings = record_layers(model, trunk, memory_size=32, k=4)
    assert list(recordings) == [1, 2]
    only = record(model, trunk)
    for name in ("queries", "keys", "values", "scale"):
        assert torch.equal(getattr(recordings[1], name), getattr(only, name))
        assert getattr(recordings[2], name).shape == getattr(only, name).shape
    # The upper layer asks another question when the lower one finds less.
    poorer = record_layers(model, trunk, memory_size=1, k=1)
    assert torch.equal(poorer[1].queries, recordings[1].queries)
    assert not torch.equal(poorer[2].queries, recordings[2].queries)
    with pytest.raises(ValueError, match="memory_size is 0"):
        record_layers(model, trunk, memory_size=0)


def test_every_memory_is_exported(tmp_path: Path) -> None:
    trace = dataclasses.replace(make_trace(), layer=2)
    files, reasons = export_every_memory([trace], tmp_path, 10, query_steps=2)
    # Row 1's longest document holds 8 keys before its last two steps.
    assert [path.name for path in files] == [f"attention-layer2-row0-head{head}-6-angular.hdf5" for head in range(3)]
    assert [reason[:20] for reason in reasons] == [
        "layer 2: memory 3 ho",
        "layer 2: memory 4 ho",
        "layer 2: memory 5 ho",
    ]
    with h5py.File(files[0]) as file:
        assert file["train_steps"][...].tolist() == [step for step in range(4) for _ in range(TOKENS)]
        assert file["test_steps"][...].tolist() == [4] * 4 + [5] * 3
        assert json.loads(file.attrs["recollect"])["layer"] == 2


def test_sizes_and_defaults() -> None:
    trace = make_trace()
    assert (len(trace), trace.num_memories, trace.rows, trace.heads, trace.dim) == (6, 6, 2, 3, 5)
    plain = Trace(trace.queries, trace.keys, trace.values, trace.document_starts)
    assert (plain.text_lengths == TOKENS).all()
    assert plain.logit_scale.tolist() == [1.0, 1.0, 1.0]


def test_made_of_a_recording() -> None:
    @dataclass(frozen=True)
    class Recording:
        queries: Tensor
        keys: Tensor
        values: Tensor
        document_starts: Tensor
        scale: Tensor

    trace = make_trace()
    recording = Recording(trace.queries, trace.keys, trace.values, trace.document_starts, trace.logit_scale)
    made = Trace.of(recording, lengths=trace.text_lengths, metadata=trace.metadata)
    assert_equal(made, trace)


def test_steps_name_the_memories_to_reset() -> None:
    resets = [step.reset for step in make_trace().steps()]
    assert resets == [(0, 1, 2, 3, 4, 5), (), (3, 4, 5), (), (), ()]


def test_replay_is_causal() -> None:
    """Every query finds what brute force finds among the keys that came before, and nothing else."""
    trace = make_trace()
    backend = make_backend("exact", num_memories=trace.num_memories, capacity=64, dim=trace.dim)
    backend.add(torch.randn(trace.num_memories, 3, trace.dim))  # Left over from before: the first step empties it.
    for step, found in replay(trace, backend, k=4):
        for memory in range(trace.num_memories):
            first = 2 if memory // HEADS == 1 and step.number >= 2 else 0
            earlier = trace.keys[first : step.number, memory].reshape(-1, DIM)
            scores = step.queries[memory] @ earlier.T
            want = scores.topk(min(4, scores.shape[1]), dim=1).values
            torch.testing.assert_close(found.scores[memory, :, : want.shape[1]], want)
            assert (found.slots[memory, :, want.shape[1] :] == -1).all()
    assert backend.lengths.tolist() == [24, 24, 24, 16, 16, 16]


def test_replay_refuses_another_shape() -> None:
    backend = make_backend("exact", num_memories=2, capacity=64, dim=DIM)
    with pytest.raises(CorpusError, match="2 memories of dimension 5, the trace 6 of 5"):
        next(replay(make_trace(), backend, 4))


@pytest.mark.parametrize("memory", [0, 4])
def test_export_holds_keys_before_queries(tmp_path: Path, memory: int) -> None:
    trace = make_trace()
    written = export_ann_benchmarks(trace, tmp_path / "m.hdf5", memory, k=5, query_steps=2, augment=False)
    first = 0 if memory == 0 else 2
    keys = trace.keys[first:4, memory].reshape(-1, DIM)
    queries = trace.queries[4:6, memory].reshape(-1, DIM)[: 7 if memory == 0 else 8]  # Row 0 ends in padding.
    with h5py.File(tmp_path / "m.hdf5") as file:
        np.testing.assert_array_equal(file["train"], keys.numpy())
        np.testing.assert_array_equal(file["test"], queries.numpy())
        best = (queries @ keys.T).topk(5, dim=1)
        np.testing.assert_array_equal(file["neighbors"], best.indices.numpy())
        np.testing.assert_allclose(file["distances"], -best.values.numpy(), rtol=1e-5)
        assert file.attrs["distance"] == "ip"
    assert written.test.shape == tuple(queries.shape)


def test_export_of_a_smaller_memory_holds_the_newest_keys(tmp_path: Path) -> None:
    trace = make_trace()
    written = export_ann_benchmarks(trace, tmp_path / "m.hdf5", 1, k=3, query_steps=2, memory_size=6, augment=False)
    np.testing.assert_array_equal(written.train, trace.keys[:4, 1].reshape(-1, DIM)[-6:].numpy())


def test_export_refuses(tmp_path: Path) -> None:
    trace = make_trace()
    with pytest.raises(CorpusError, match="memory is 6: the trace has memories 0 to 5"):
        export_ann_benchmarks(trace, tmp_path / "m.hdf5", 6)
    with pytest.raises(CorpusError, match="holds 8 keys before its last 4 steps of text: too few for k 100"):
        export_ann_benchmarks(trace, tmp_path / "m.hdf5", 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keys", torch.zeros(STEPS, 6, TOKENS, 2), "keys of a trace have the shape of its queries"),
        ("queries", torch.zeros(STEPS, 6, 0, DIM), "none of them 0"),
        ("document_starts", torch.zeros(STEPS, 4, dtype=torch.bool), "B a divisor of M 6"),
        ("lengths", torch.zeros(STEPS, 3), "lengths are"),
        ("scale", torch.ones(2), r"scale \(H,\)"),
    ],
)
def test_shapes_are_checked(name: str, value: Tensor, message: str) -> None:
    trace = make_trace()
    parts = {
        part: getattr(trace, part) for part in ("queries", "keys", "values", "document_starts", "lengths", "scale")
    }
    with pytest.raises(CorpusError, match=message):
        Trace(**{**parts, name: value})


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.h5"
    with pytest.raises(CorpusError, match="no such trace"):
        load_trace(path)
    make_trace().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorpusError, match="cannot be read as a trace"):
        load_trace(path)
    path.write_bytes(content)
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 99
    with pytest.raises(CorpusError, match="a trace of version 99"):
        load_trace(path)
    with h5py.File(path, "a") as file:
        file.attrs["format"] = "other"
    with pytest.raises(CorpusError, match="no trace of recollect"):
        load_trace(path)
    path.write_bytes(content)
    with h5py.File(path, "a") as file:
        del file["layers/0/keys"]
    with pytest.raises(CorpusError, match="cannot be read as a trace"):
        load_trace(path)


def test_failed_write_keeps_the_earlier_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.h5"
    trace = make_trace()
    trace.save(path)
    broken = Trace(trace.queries, trace.keys, trace.values, trace.document_starts, metadata={"x": object()})
    with pytest.raises(TypeError):
        broken.save(path)
    assert_equal(load_trace(path), trace)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.h5"]
