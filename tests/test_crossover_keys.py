"""Where keys for crossings come from: how many, of which dimension, and that they are what their source holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_tiny_checkpoint, write_tiny_corpus

from recollect.model.ann_benchmarks import write_ann_benchmarks
from recollect.model.documents import CorpusError
from recollect.model.trace import Trace
from recollect.suites.crossover_keys import FileKeys, ModelKeys, SyntheticKeys, fitted, open_keys


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_more_memories_than_heads_are_turned_and_keep_their_scores() -> None:
    keys, queries = unit(2, 50, 8), unit(2, 9, 8, seed=1)
    held, asked = fitted(keys, 5, 8), fitted(queries, 5, 8)
    assert torch.equal(held[:2], keys)
    for memory in range(5):
        scores = queries[memory % 2] @ keys[memory % 2].T
        torch.testing.assert_close(asked[memory] @ held[memory].T, scores, atol=1e-5, rtol=0)
    assert not torch.allclose(held[2], keys[0], atol=0.1)
    assert not torch.allclose(held[2], held[4], atol=0.1)


def test_a_larger_dimension_averages_the_scores_of_heads() -> None:
    keys, queries = unit(3, 40, 8), unit(3, 7, 8, seed=1)
    held, asked = fitted(keys, 3, 16), fitted(queries, 3, 16)
    expected = (queries[1] @ keys[1].T + queries[2] @ keys[2].T) / 2
    torch.testing.assert_close(asked[1] @ held[1].T, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [3, 8, 20, 40])
def test_any_dimension_has_vectors_of_length_1(dim: int) -> None:
    made = fitted(unit(2, 30, 8), 3, dim)
    assert made.shape == (3, 30, dim)
    torch.testing.assert_close(made.norm(dim=-1), torch.ones(3, 30))


def test_synthetic_keys_are_the_same_wherever_one_begins() -> None:
    source = SyntheticKeys(24, seed=3)
    keys, queries = source.stream(0, 5000)
    later, asked = source.stream(4000, 500)
    assert torch.equal(keys[:, 4000:4500], later)
    assert torch.equal(queries[:, 4000:4500], asked)
    assert not torch.equal(SyntheticKeys(24, seed=4).stream(0, 10)[0], keys[:, :10])
    held, asked = source.take(6, 300, 20)
    assert held.shape == (6, 300, 24)
    assert asked.shape == (6, 20, 24)


def test_synthetic_queries_are_of_another_distribution_than_keys() -> None:
    keys, queries = SyntheticKeys().stream(0, 4096)
    near = (keys[0] @ keys[0].T).fill_diagonal_(-1).topk(32).values[:, -1].mean()
    asked = (queries[0] @ keys[0].T).topk(32).values[:, -1].mean()
    assert asked < near - 0.1


def test_keys_of_a_model_follow_its_text(tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    checkpoint = write_tiny_checkpoint(tmp_path / "model", corpus)
    source = ModelKeys(tmp_path / "keys", checkpoint, corpus)
    held = source.longest(10**9, 0)
    assert held > 500
    keys, queries = source.take(3, 400, 20)
    assert keys.shape[:2] == (3, 400)
    assert queries.shape == (3, 20, source.dim)
    files = sorted((tmp_path / "keys").iterdir())
    assert len(files) == 1
    written = files[0].stat().st_mtime_ns
    again = ModelKeys(tmp_path / "keys", checkpoint, corpus)
    assert again.digest == source.digest
    assert torch.equal(again.take(3, 400, 20)[0], keys)
    assert files[0].stat().st_mtime_ns == written, "what was recorded is found again"
    with pytest.raises(CorpusError, match="longer text"):
        source.take(3, held, 1)


def test_a_trace_gives_the_row_with_the_most_text(tmp_path: Path) -> None:
    keys, queries = unit(4, 4, 6, 8), unit(4, 4, 6, 8, seed=1)  # 4 steps, 2 rows of 2 heads, 6 tokens
    lengths = torch.tensor([[6, 6], [2, 6], [0, 6], [0, 3]])
    starts = torch.zeros(4, 2, dtype=torch.bool)
    Trace(queries, keys, keys, starts, lengths=lengths).save(tmp_path / "trace.hdf5")
    source = FileKeys(tmp_path / "trace.hdf5")
    held, asked = source.take(2, 15, 6)
    torch.testing.assert_close(held[1], torch.cat([keys[0, 3], keys[1, 3], keys[2, 3, :3]]))
    torch.testing.assert_close(asked[0], torch.cat([queries[2, 2, 3:], queries[3, 2, :3]]))
    with pytest.raises(CorpusError, match="15 keys"):
        source.take(2, 16, 6)


def test_a_file_of_ann_benchmarks(tmp_path: Path) -> None:
    train, test = unit(60, 8).numpy() * 3, unit(5, 8, seed=1).numpy()
    write_ann_benchmarks(tmp_path / "a.hdf5", train, test, 4, metric="cosine")
    source = FileKeys(tmp_path / "a.hdf5")
    held, asked = source.take(2, 60, 12)
    torch.testing.assert_close(held.norm(dim=-1), torch.ones(2, 60))
    assert len(torch.unique(asked[0], dim=0)) == 5, "queries begin anew where they end"
    same = np.sort(held[0].numpy(), axis=0)
    np.testing.assert_allclose(same, np.sort(train / 3, axis=0), atol=1e-6)
    write_ann_benchmarks(tmp_path / "b.hdf5", train, test, 4, metric="l2")
    with pytest.raises(CorpusError, match="Euclidean"):
        FileKeys(tmp_path / "b.hdf5")


def test_what_cannot_be_had_is_told(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="'synthetic'"):
        open_keys("models", tmp_path)
    (tmp_path / "text.hdf5").write_text("no HDF5")
    with pytest.raises(CorpusError, match="HDF5"):
        open_keys(str(tmp_path / "text.hdf5"), tmp_path)
    write_ann_benchmarks(tmp_path / "a.hdf5", unit(60, 8).numpy(), unit(5, 8).numpy(), 4, metric="cosine")
    with pytest.raises(CorpusError, match="leave out --dim"):
        open_keys(str(tmp_path / "a.hdf5"), tmp_path, dim=16)
