"""Codes find, whole keys decide: the answer is that of the whole keys, whatever the codes lose."""

from __future__ import annotations

import pytest
import torch

from recollect.memory_backends import coded_search, make_backend
from recollect.memory_backends.key_ring import KeyRing


def keys_of(kind: str, count: int, dim: int) -> torch.Tensor:
    keys = torch.randn(1, count, dim, generator=torch.Generator().manual_seed(0))
    if kind == "one huge":
        keys[:, 7] *= 1e4  # its scale bounds what every code may lose, so that no candidate list is long enough
    if kind == "alike":
        keys = 5 + 1e-3 * keys
    if kind == "equal":
        keys = keys[:, :1].repeat(1, count, 1)
    return keys


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("kind", ["random", "one huge", "alike", "equal"])
def test_answers_are_those_of_whole_keys(monkeypatch: pytest.MonkeyPatch, kind: str, metric: str) -> None:
    monkeypatch.setattr(coded_search, "DECODED_FLOATS", 1024 * 12)
    keys = keys_of(kind, 3000, 12)
    queries = torch.randn(1, 25, 12, generator=torch.Generator().manual_seed(1))
    sizes = {"num_memories": 1, "capacity": 2600, "dim": 12, "metric": metric}
    coded = make_backend("exact:keys_in=temporary,storage=int8", **sizes)  # type: ignore[arg-type]
    whole = make_backend("exact", **sizes)  # type: ignore[arg-type]
    coded.add(keys)
    whole.add(keys)
    found, expected = coded.search(queries, 10), whole.search(queries, 10)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-4)
    if kind != "equal":
        assert (found.slots == expected.slots).float().mean() > 0.99
    torch.testing.assert_close(coded.gather_keys(found.slots), whole.gather_keys(found.slots))


def test_few_rows_of_the_file_are_read_where_codes_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend("exact:keys_in=temporary,storage=int8", num_memories=1, capacity=20_000, dim=16)
    backend.add(keys_of("random", 20_000, 16))

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("the whole file is read")

    monkeypatch.setattr(KeyRing, "chunk", never)
    asked = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(2))
    assert (backend.search(asked, 8).slots >= 0).all()
