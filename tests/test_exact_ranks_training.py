"""Training with memories over the ranks: the losses of `exact`, and a run that goes on with fewer processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_jobs import run
from tiny import write_tiny_corpus

from recollect.model.documents import split_of_name
from recollect.model.training import train
from recollect.model.training_options import TrainingOptions

STEPS, SAVED, STOPPED = 6, 3, 4


class Stopped(RuntimeError):
    """Stands for whatever ends a run."""


def options(folder: Path, backend: str, name: str) -> TrainingOptions:
    return TrainingOptions.preset(
        "tiny", folder / name, corpus=str(folder / "corpus"), batch_size=4, steps=STEPS, backend=backend,
        validate_every=SAVED, save_every=SAVED, cache_directory=folder / "cache", progress=False, memory_size=48,
    )  # fmt: skip


def trained(folder: Path, backend: str, name: str, stop: bool) -> list[float]:
    """The loss of each step; a run that is stopped has saved its state before."""
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        if stop and step == STOPPED:
            raise Stopped

    try:
        result = train(options(folder, backend, name), on_step=on_step)
    except Stopped:
        return losses
    assert result.validation_perplexity is not None
    return [*losses, result.validation_perplexity]


def on_ranks(rank: int, size: int, folder: Path, backend: str, name: str, stop: bool) -> list[float]:
    return trained(folder, backend, name, stop)


def test_losses_are_those_of_exact_also_on_fewer_processes_than_before(tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    name = next(f"v{n}.txt" for n in range(1000) if split_of_name(f"v{n}.txt") == "validation")
    (corpus / name).write_text((corpus / "document0.txt").read_text(encoding="utf-8").title(), encoding="utf-8")
    alone = trained(tmp_path, "exact", "alone", False)
    # Which rows have read how much differs from rank to rank: documents begin when they like.
    both = run(2, on_ranks, tmp_path, "exact-ranks", "both", True)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone[:STOPPED], rel=1e-4)
    further = trained(tmp_path, "exact-ranks", "both", False)
    assert further == pytest.approx(alone[SAVED:], rel=1e-4)
