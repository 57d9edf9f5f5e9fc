"""A log on an object store, which a small server on this machine plays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_s3 import fake_s3

from recollect.memory_backends.errors import StoreMissing, StoreUnreachable, WriteConflict
from recollect.memory_backends.key_log import KeyLog

pytest.importorskip("lance")

ADDRESS = "s3://bucket/some/log"


def test_a_log_lives_on_an_object_store() -> None:
    keys = torch.randn(2, 70, 4, generator=torch.Generator().manual_seed(0))
    with fake_s3() as (objects, options):
        with KeyLog.create(ADDRESS, num_memories=2, capacity=50, dim=4, storage_options=options) as log:
            log.append(keys)
            with KeyLog.open(ADDRESS, options) as other:
                other.append(keys[:1, :5], [1])
                with pytest.raises(WriteConflict, match="an overlap"):
                    log.append(keys[:1, :5], [1])
            log.reset([0])
            log.prune()
            assert log.totals.tolist() == [0, 75]
        with KeyLog.open(ADDRESS, options) as log:
            (part,) = log.read(1)
            assert part[0].tolist() == list(range(25, 75))
            assert torch.equal(part[2], torch.cat([keys[1, 25:], keys[0, :5]]))
            assert log.verify() == 50
        assert all(name.startswith("bucket/some/log/") for name in objects.content)
        assert not any(b"a-very-secret-key" in content for content in objects.content.values())
        with pytest.raises(WriteConflict):
            KeyLog.create(ADDRESS, num_memories=2, capacity=50, dim=4, storage_options=options)
        with pytest.raises(StoreMissing):
            KeyLog.open("s3://bucket/nothing", options)
        log = KeyLog.open(ADDRESS, options)
        objects.refuse = True
        with pytest.raises(StoreUnreachable, match=r"access was refused.*AWS_ACCESS_KEY_ID") as told:
            log.append(keys)
        assert "a-very-secret-key" not in str(told.value)
        objects.refuse = False
        objects.content.clear()
        with pytest.raises(StoreMissing):
            list(log.read(1))


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with fake_s3() as (objects, options):
        for name, value in options.items():
            monkeypatch.setenv(name.upper(), value)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        with KeyLog.create(ADDRESS, num_memories=1, capacity=5, dim=2) as log:
            log.append(torch.ones(1, 3, 2))
        assert KeyLog.open(ADDRESS).totals.tolist() == [3]
        assert objects.requests > 3
