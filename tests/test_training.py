"""Training: it learns, it stops and goes on without a trace, and it refuses what it can't do."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import recollect.model.training as training
from recollect.model.checkpoints import CheckpointError, load_checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.optimizers import learning_rate_share, make_optimizers
from recollect.model.training import TrainingDiverged, train
from recollect.model.training_options import TrainingOptions
from recollect.model.transformer import MemorizingTransformer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small documents whose lines repeat; enough of them that each split of the fixed rule has some."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        lines = [f"name_{number}_{(number * line) % 7} = value({line % 5})\n" for line in range(40 + number)]
        (folder / f"document{number}.txt").write_text("".join(lines))
    return folder


def options(corpus: Path, output: Path, model_changes: dict[str, Any] | None = None, **changes: Any) -> TrainingOptions:
    values: dict[str, Any] = {
        "corpus": str(corpus),
        "steps": 12,
        "batch_size": 2,
        "warmup_steps": 2,
        "validate_every": 6,
        "validation_tokens": 200,
        "save_every": 5,
        "cache_directory": output.parent / "cache",
        "progress": False,
        "threads": 1,
    }
    preset = TrainingOptions.preset("tiny", output, **{**values, **changes})
    model = preset.model.replace(
        **{"vocabulary_size": 300, "memory_size": 24, "qk_convolution_width": 3, "xl_cache": 8, **(model_changes or {})}
    )
    return TrainingOptions.preset("tiny", output, **{**values, "model": model, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).model.state_dict()


def log_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / training.LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "step_ms"} for line in lines]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step: the streams and the memory have moved on, the weights have not."""
    plain, calls = training.training_loss, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        answer = plain(*arguments)
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return answer

    monkeypatch.setattr(training, "training_loss", interrupted)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw"},
        {"precision": "bfloat16"},
        {"backend": "hnswlib"},
        {"model_changes": {"eviction": "most_used", "memory_size": 64}},
        {"model_changes": {"memory_key": "hidden", "eviction": "most_used", "memory_size": 64}},
    ],
    ids=str,
)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    try:
        train(options(corpus, tmp_path / "whole", **changes))
    except ImportError as error:
        pytest.skip(str(error))
    interrupt_at(8, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(options(corpus, tmp_path / "broken", **changes))
    monkeypatch.undo()
    assert (tmp_path / "broken" / "training").is_dir()
    torch.manual_seed(99)  # whatever happens between must not matter
    train(options(corpus, tmp_path / "broken", **changes))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert log_lines(tmp_path / "broken") == log_lines(tmp_path / "whole")
    assert not (tmp_path / "broken" / "training").exists()


def test_a_killed_run_goes_on_from_its_last_save(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(options(corpus, tmp_path / "whole"))
    plain_step, calls = training._step, iter(range(100))

    def killed(*arguments: Any) -> None:
        if next(calls) == 8:
            raise SystemExit("killed")  # nothing is saved at this moment: step 5 was the last save
        plain_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", killed)
        with pytest.raises(SystemExit):
            train(options(corpus, tmp_path / "killed"))
    train(options(corpus, tmp_path / "killed"))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a process that a shell started in the background ignores it from birth."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stopped(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after its first save."""
    interrupt_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(options(corpus, tmp_path / "run"))
    monkeypatch.undo()
    return tmp_path / "run"


def test_other_options_do_not_go_on_with_a_stopped_run(corpus: Path, stopped: Path) -> None:
    with pytest.raises(CheckpointError, match="seed=0, not 1"):
        train(options(corpus, stopped, seed=1))
    assert train(options(corpus, stopped, seed=1, resume=False)).steps == 12


def test_it_stops_at_the_end_of_the_step(stopped: Path) -> None:
    assert log_lines(stopped)[-1]["step"] == 4
    assert json.loads((stopped / "training" / "state.json").read_text())["progress"]["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "name",
    [
        "state.safetensors",
        "state.json",
        "optimizer0.safetensors",
        "rows0-2/state.safetensors",
        "rows0-2/memory0/memory.json",
    ],
)
def test_a_damaged_training_state_is_refused(corpus: Path, stopped: Path, name: str) -> None:
    file = stopped / "training" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError):
        train(options(corpus, stopped))


def test_a_finished_model_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    result = train(options(corpus, tmp_path / "run"))
    assert result.tokens == 12 * 2 * 16
    assert result.validation_perplexity is not None
    assert json.dumps(result.as_json())
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="finished model already"):
        train(options(corpus, tmp_path / "run"))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_it_learns_and_the_memory_helps(corpus: Path, tmp_path: Path) -> None:
    result = train(options(corpus, tmp_path / "run", steps=150, validate_every=150, save_every=0))
    first = next(line["loss"] for line in log_lines(tmp_path / "run"))
    assert result.loss < 0.6 * first
    assert result.validation_perplexity is not None
    assert result.validation_perplexity < 60


def test_training_goes_on_from_a_checkpoint_with_another_memory(corpus: Path, tmp_path: Path) -> None:
    train(options(corpus, tmp_path / "first"))
    changes = {"checkpoint": tmp_path / "first", "steps": 1, "warmup_steps": 0, "validate_every": 0}
    changes |= {"matrix_learning_rate": 1e-12, "other_learning_rate": 1e-12, "memory_size": 0}
    train(options(corpus, tmp_path / "second", **changes))
    first, second = (load_checkpoint(tmp_path / name) for name in ("first", "second"))
    assert second.config == first.config.replace(memory_size=0)
    assert second.tokenizer.digest == first.tokenizer.digest
    assert second.metadata["started_from"] == first.digest
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], tensor)
    with pytest.raises(ConfigurationError, match="brings its own"):
        options(corpus, tmp_path / "third", checkpoint=tmp_path / "first", tokenizer=tmp_path / "first")


def test_one_document_is_training_text(corpus: Path, tmp_path: Path) -> None:
    result = train(options(corpus / "document7.txt", tmp_path / "run"))
    assert result.validation_perplexity is None


def test_divergence_is_an_error_that_says_what_to_do(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = training.training_loss

    def broken(*arguments: Any) -> Any:
        loss, state = plain(*arguments)
        return loss * torch.nan, state

    monkeypatch.setattr(training, "training_loss", broken)
    with pytest.raises(TrainingDiverged, match="lower the learning rates"):
        train(options(corpus, tmp_path / "run"))


def test_a_tokenizer_that_does_not_fit_is_refused(corpus: Path, tmp_path: Path) -> None:
    model = options(corpus, tmp_path / "run").model
    train(options(corpus, tmp_path / "run", steps=1, validate_every=0))
    small = options(corpus, tmp_path / "small", model=model.replace(vocabulary_size=256), tokenizer=tmp_path / "run")
    with pytest.raises(ConfigurationError, match="more than vocabulary_size=256"):
        train(small)


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    shares = [learning_rate_share(step, steps=100, warmup_steps=10, decay_share=0.5) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:51] == [1.0] * 42
    assert shares[75] == pytest.approx(0.5)
    assert 0.0 < shares[99] <= 0.02


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = MemorizingTransformer(options(Path("corpus"), Path("out")).model)
    found = make_optimizers(model, "muon", matrix_learning_rate=1e-3, other_learning_rate=1e-2, weight_decay=0.1)
    counts = [sum(len(group["params"]) for group in part.param_groups) for part in found.parts]
    assert counts[0] == 6 * model.config.layers
    assert sum(counts) == len(list(model.parameters()))
    with pytest.raises(ConfigurationError, match="muon, adamw"):
        make_optimizers(model, "sgd", matrix_learning_rate=1.0, other_learning_rate=1.0, weight_decay=0.0)
