"""The parts of distributed training that need no second process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_text

from recollect.memory_backends import make_backend
from recollect.memory_backends.assembling import Piece, assemble_backend
from recollect.memory_backends.errors import CorruptMemory, InvalidInput
from recollect.memory_backends.threads import share_of_cores
from recollect.model.configuration import ConfigurationError
from recollect.model.distributed import Ranks, joined, launched, speaks
from recollect.model.evaluation import replay
from recollect.model.rank_errors import is_lost
from recollect.model.shared_evaluation import merge_losses, rows_of
from recollect.model.shared_optimizers import deal
from recollect.model.trunk import compute_trunk


def test_rows_are_dealt_in_order() -> None:
    assert [Ranks(rank, 4).rows(8) for rank in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [Ranks(rank, 4).some_rows(6) for rank in range(4)] == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert [Ranks(rank, 4).some_rows(2) for rank in range(4)] == [(0, 0), (0, 1), (1, 1), (1, 2)]
    with pytest.raises(ConfigurationError, match="batch_size=2 rows cannot be dealt evenly to 4 processes"):
        Ranks(0, 4).rows(2)


def test_without_a_launcher_there_is_a_job_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == 1
    assert speaks()
    with joined() as ranks:
        assert (ranks.first, ranks.several, ranks.rows(5)) == (True, False, (0, 5))
        assert ranks.sum([1.5, 2.0]) == [1.5, 2.0]
        assert ranks.all("this") == ["this"]
        assert ranks.from_first(lambda: 3) == 3
    with pytest.raises(ConfigurationError, match="deadline=0"), joined(deadline=0):
        pass


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not speaks()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match="there are 2 CUDA devices"), joined("cuda"):
        pass
    with pytest.raises(ConfigurationError, match="'cuda:1' is one device"), joined("cuda:1"):
        pass


def test_only_errors_of_the_transport_mean_that_a_rank_is_lost() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:61331"
    assert is_lost(RuntimeError(gloo))
    assert is_lost(torch.distributed.DistBackendError("NCCL error"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost(ValueError(gloo))


def test_cores_are_shared_by_those_who_may_use_them() -> None:
    assert share_of_cores(range(8), [range(8), range(8)]) == 4
    assert share_of_cores([0], [[0], [1]]) == 1
    assert share_of_cores(range(4), [range(4), range(4, 8)]) == 4
    assert share_of_cores(range(2), [range(2)] * 4) == 1
    assert share_of_cores(range(6), [range(6), range(2)]) == 5


def test_costs_are_dealt_evenly() -> None:
    owners = deal([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2)
    assert owners == [0, 1, 1, 1, 1, 1]
    assert deal([1.0], 3) == [0]


def test_losses_of_rows_are_put_together_in_reading_order() -> None:
    model, text = tiny_model(), tiny_text(rows=3)
    whole = replay(model, compute_trunk(model, text)).losses
    parts = []
    for start, stop in ((0, 1), (1, 3)):
        losses = replay(model, compute_trunk(model, rows_of(text, start, stop))).losses
        parts.append((start, stop, losses.loss, losses.correct))
    merged = merge_losses(text, parts)
    torch.testing.assert_close(torch.from_numpy(merged.loss), torch.from_numpy(whole.loss), rtol=1e-4, atol=1e-5)
    for name in ("document", "position", "correct"):
        assert (getattr(merged, name) == getattr(whole, name)).all()


SPECS = ("exact", "exact:storage=bfloat16", "exact:storage=int8", "faiss-flat", "hnswlib", "rerank:source='exact'")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("metric", ["inner_product", "cosine"])
def test_a_memory_is_put_together_from_saved_ones(tmp_path: Path, spec: str, metric: str) -> None:
    """Memories that have turned over, of which one was reset, in another order of owners than they were saved in."""
    try:
        saved = [make_backend(spec, num_memories=2, capacity=20, dim=8, metric=metric, seed=3) for _ in range(2)]
    except ImportError as error:
        pytest.skip(str(error))
    for number, backend in enumerate(saved):
        for _ in range(4):
            backend.add(torch.randn(2, 7, 8))
        backend.reset([1 - number])
        backend.add(torch.randn(2, 3, 8))
        backend.save(tmp_path / str(number))
    pieces = [Piece(tmp_path / "0", 1, 2), Piece(tmp_path / "1", 0, 2)]
    assembled = assemble_backend(pieces, first_memory=1)
    assert assembled.first_memory == 1
    assert assembled.lengths.tolist() == [3, 3, 20]
    queries = torch.randn(3, 5, 8)
    found = assembled.search(queries, 20)
    wanted = (saved[0].search(queries[:1], 20, memories=[1]), saved[1].search(queries[1:], 20))
    torch.testing.assert_close(found.slots, torch.cat([part.slots for part in wanted]))
    torch.testing.assert_close(found.scores, torch.cat([part.scores for part in wanted]))
    new = torch.randn(3, 4, 8)
    slots = torch.cat([saved[0].add(new[:1].expand(2, -1, -1))[1:], saved[1].add(new[1:])])
    assert torch.equal(assembled.add(new), slots)


def test_what_cannot_be_put_together_is_refused(tmp_path: Path) -> None:
    for name, capacity in (("one", 8), ("other", 9)):
        backend = make_backend("exact", num_memories=2, capacity=capacity, dim=4)
        backend.add(torch.randn(2, 5, 4))
        backend.save(tmp_path / name)
    with pytest.raises(InvalidInput, match="has capacity=9 and"):
        assemble_backend([Piece(tmp_path / "one", 0, 1), Piece(tmp_path / "other", 0, 1)])
    with pytest.raises(InvalidInput, match="2 to 2 are not among them"):
        assemble_backend([Piece(tmp_path / "one", 2, 3)])
    with pytest.raises(InvalidInput, match="at least one piece"):
        assemble_backend([])
    file = tmp_path / "one" / "keys.bin"
    raw = bytearray(file.read_bytes())
    raw[3] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(CorruptMemory, match="checksum"):
        assemble_backend([Piece(tmp_path / "one", 0, 1)])
    file.write_bytes(bytes(raw[:-4]))
    with pytest.raises(CorruptMemory, match="truncated"):
        assemble_backend([Piece(tmp_path / "one", 0, 1)])


def test_random_numbers_belong_to_a_memory_of_the_whole_job() -> None:
    """Memory 2 of four in one process hides what memory 0 of the second of two processes hides."""
    keys, queries = torch.randn(4, 40, 8), torch.randn(4, 6, 8)
    whole = make_backend("degraded:drop=0.5,fill=false", num_memories=4, capacity=64, dim=8, seed=1)
    half = make_backend("degraded:drop=0.5,fill=false", num_memories=2, capacity=64, dim=8, seed=1)
    whole.add(keys)
    half.add(keys[2:])
    wanted = whole.search(queries, 10).slots[2:]
    assert not torch.equal(half.search(queries[2:], 10).slots, wanted)
    half.number_from(2)
    assert torch.equal(half.search(queries[2:], 10).slots, wanted)
