"""Fine-tuning models with memory in transformers.Trainer: what changes, what is learned, what a checkpoint holds."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate, which is not installed")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from recollect.model.checkpoints import CheckpointError  # noqa: E402
from recollect.model.configuration import ConfigurationError  # noqa: E402
from recollect.pretrained.attach import attach_memory  # noqa: E402
from recollect.pretrained.document_segments import DocumentSegments  # noqa: E402
from recollect.pretrained.fine_tuning import FOLDER, MemoryCallback, attached_memory, choose_trainable  # noqa: E402

VOCABULARY, ROWS, SEGMENT = 20, 8, 4
FAMILIES = ("gpt2", "llama")

# Each document says the same four tokens again and again; the fourth is its own, and a segment alone does not tell it.
DOCUMENTS = [[1, 2, 3, 4 + number] * 5 for number in range(ROWS)]


def tiny(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, **changes}
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_positions=32, n_embd=32, n_layer=2, n_head=2, **common, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )
        )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(max_position_embeddings=32, num_attention_heads=4, num_key_value_heads=2, **sizes, **common)
    )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 5,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**{**given, **changes})


def trainer(model: Any, folder: Path, rows: int = ROWS, **changes: Any) -> Trainer:
    train = DocumentSegments(DOCUMENTS, rows=rows, segment_length=SEGMENT, seed=1)
    held_out = DocumentSegments(DOCUMENTS[:5], rows=ROWS, segment_length=SEGMENT, shuffle=False)
    callback = MemoryCallback()
    return Trainer(
        model, arguments(folder, **changes), train_dataset=train, eval_dataset=held_out, callbacks=[callback]
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_on_repetitive_text_falls_further_with_memory(family: str, tmp_path: Path) -> None:
    losses = {}
    for name in ("with memory", "paused"):
        model = tiny(family)
        memory = attach_memory(model, layers="bottom", memory_size=32, k=8, gate="joint_bias")
        with memory.paused() if name == "paused" else contextlib.nullcontext():
            run = trainer(model, tmp_path, max_steps=60)
            run.train()
            losses[name] = run.evaluate()["eval_loss"]
    # Without memory the fourth token of a segment can only be guessed: log(8) / 4 a token.
    assert losses["paused"] > 0.5
    assert losses["with memory"] < losses["paused"] / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", ["gates", "memory_layers", "all"])
def test_only_the_chosen_parameters_change(family: str, trainable: str, tmp_path: Path) -> None:
    model = tiny(family)
    attach_memory(model, layers=[1], memory_size=32, k=8, gate="head")
    before = weights(model)
    chosen = choose_trainable(model, trainable)
    trainer(model, tmp_path, max_steps=3).train()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    gate = {"recollect_memory.gates.1.bias"}
    layer = {name for name in before if ".h.1." in name or ".layers.1." in name}
    assert chosen.total == sum(tensor.numel() for tensor in before.values())
    assert chosen.trainable == sum(before[name].numel() for name in chosen.names)
    assert f"{chosen.trainable:,} of {chosen.total:,}" in str(chosen)
    if trainable == "gates":
        assert changed == set(chosen.names) == gate
    elif trainable == "memory_layers":
        assert set(chosen.names) == gate | layer
        # A bias of the keys moves all logits of a query alike, so nothing is learned about it.
        assert gate <= changed <= gate | layer
        assert len(layer - changed) <= 1
    else:
        assert set(chosen.names) == set(before)
        assert {name.rsplit(".", 1)[0] for name in before} - {name.rsplit(".", 1)[0] for name in changed} == set()


@pytest.mark.parametrize("gate", ["head", "joint_bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gates_gradient_is_the_slope_of_the_loss(family: str, gate: str) -> None:
    model = tiny(family).train()
    # As many neighbours as there are tokens: which ones are found cannot change with the gate below.
    memory = attach_memory(model, layers=[0, 1], memory_size=32, k=8, gate=gate)
    choose_trainable(model, "gates")
    tokens = torch.tensor(DOCUMENTS)

    def loss() -> Tensor:
        memory.reset()
        model(input_ids=tokens[:, :8], use_cache=False)
        return model(input_ids=tokens[:, 8:16], labels=tokens[:, 8:16], use_cache=False).loss

    loss().backward()
    for parameter in memory.parameters():
        assert parameter.grad is not None
        slope = torch.zeros_like(parameter)
        for head in range(len(parameter)):
            with torch.no_grad():
                values = []
                for step in (1e-2, -1e-2):
                    parameter[head] += step
                    values.append(loss().item())
                    parameter[head] -= step
            slope[head] = (values[0] - values[1]) / 2e-2
        assert parameter.grad.abs().max() > 1e-5
        torch.testing.assert_close(parameter.grad, slope, rtol=0.05, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_equals_one_that_never_stopped(family: str, tmp_path: Path) -> None:
    def run(folder: str, **changes: Any) -> tuple[Any, Trainer]:
        model = tiny(family)
        attach_memory(model, layers=[1], memory_size=12, k=4, gate="head")
        made = trainer(
            model,
            tmp_path / folder,
            max_steps=6,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=1,
            **changes,
        )
        return model, made

    whole, uninterrupted = run("whole", save_strategy="steps", save_steps=4)
    uninterrupted.train()
    saved = tmp_path / "whole" / "checkpoint-4"
    assert (saved / FOLDER).is_dir()
    again, resumed = run("whole")
    resumed.train(resume_from_checkpoint=str(saved))
    expected, found = weights(whole), weights(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    histories = [
        [{name: value for name, value in entry.items() if name in ("loss", "eval_loss", "step")} for entry in history]
        for history in (uninterrupted.state.log_history, resumed.state.log_history)
    ]
    assert histories[0][:-1] == histories[1][:-1]
    # The memories do matter: with empty ones the same checkpoint goes another way.
    for file in (saved / FOLDER).rglob("*"):
        if file.is_file():
            file.unlink()
    _, without = run("whole")
    with pytest.raises(CheckpointError, match="no state of a memory"):
        without.train(resume_from_checkpoint=str(saved))


def test_evaluation_leaves_the_training_rows_memories_alone(tmp_path: Path) -> None:
    finals = []
    for evaluate in (False, True):
        model = tiny("llama")
        attach_memory(model, layers=[1], memory_size=32, k=8, gate="head")
        changes = {"eval_strategy": "steps", "eval_steps": 1} if evaluate else {}
        trainer(model, tmp_path, max_steps=6, **changes).train()
        finals.append(weights(model))
        assert attached_memory(model).lengths.sum() == 0  # and none is left behind
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_weights(family: str, tmp_path: Path) -> None:
    finals = []
    for checkpointing in (False, True):
        model = tiny(family)
        attach_memory(model, layers=[1], memory_size=32, k=8, gate="head")
        run = trainer(model, tmp_path, max_steps=4, gradient_checkpointing=checkpointing)
        run.train()
        assert model.is_gradient_checkpointing == checkpointing
        finals.append(weights(model))
    for name, tensor in finals[0].items():
        torch.testing.assert_close(finals[1][name], tensor, msg=name)


def test_bfloat16_autocast_trains_too(tmp_path: Path) -> None:
    model = tiny("llama")
    attach_memory(model, layers=[1], memory_size=32, k=8, gate="head")
    before = weights(model)
    trainer(model, tmp_path, max_steps=3, bf16=True).train()
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())
    assert not torch.equal(weights(model)["recollect_memory.gates.1.bias"], before["recollect_memory.gates.1.bias"])


def test_a_saved_fine_tuned_model_loads_with_its_gates(tmp_path: Path) -> None:
    from recollect.pretrained.attach import load_attached

    model = tiny("llama")
    attach_memory(model, layers=[1], memory_size=32, k=8, gate="head")
    choose_trainable(model, "gates")
    run = trainer(model, tmp_path / "run", max_steps=3)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = load_attached(tmp_path / "saved")
    expected = weights(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(loaded).items())


def test_a_detached_model_has_its_own_forward_again(tmp_path: Path) -> None:
    plain, model = tiny("gpt2"), tiny("gpt2")
    memory = attach_memory(model, layers=[1], memory_size=32, k=8)
    trainer(model, tmp_path)
    memory.detach()
    tokens = torch.tensor(DOCUMENTS)
    assert torch.equal(model.eval()(tokens).logits, plain.eval()(tokens).logits)
    assert "forward" not in vars(model)


def test_what_would_go_wrong_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no memory"):
        trainer(tiny("gpt2"), tmp_path)
    with pytest.raises(ConfigurationError, match="no memory"):
        choose_trainable(tiny("gpt2"), "all")
    model = tiny("gpt2")
    attach_memory(model, layers=[1], memory_size=32, k=8)
    with pytest.raises(ConfigurationError, match="'joint' has nothing to train"):
        choose_trainable(model, "gates")
    with pytest.raises(ConfigurationError, match="gates, memory_layers, all"):
        choose_trainable(model, "layers")
    with pytest.raises(ConfigurationError, match="rows=4 and the Trainer reads 8"):
        trainer(model, tmp_path, rows=4, max_steps=1).train()
    with pytest.raises(ConfigurationError, match="auto_find_batch_size"):
        trainer(model, tmp_path, auto_find_batch_size=True)
    other = [{"input_ids": torch.tensor(document), "labels": torch.tensor(document)} for document in DOCUMENTS]
    run = Trainer(model, arguments(tmp_path), train_dataset=other, callbacks=[MemoryCallback()])
    with pytest.raises(ConfigurationError, match="DocumentSegments"):
        run.train()


def test_a_frozen_population_trains_the_gates_and_stays_as_it_was(tmp_path: Path) -> None:
    from recollect.pretrained.population import collect_keys

    model = tiny("llama")
    keys = collect_keys(model, DOCUMENTS, layers=[1])
    memory = attach_memory(model, layers=[1], memory_size=0, k=8, gate="head", store=keys)
    choose_trainable(model, "gates")
    before = weights(memory)
    trainer(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    assert not torch.equal(weights(memory)["gates.1.bias"], before["gates.1.bias"])
    source = memory._reading.layers[0].store
    assert source is not None
    everything = torch.arange(keys.tokens).expand(2, 1, -1)
    assert torch.equal(source.backend.gather_keys(everything)[:, 0], keys.layer_keys(1))
    assert memory.lengths.sum() == 0


def test_row_memories_kept_frozen_are_neither_emptied_nor_extended(tmp_path: Path) -> None:
    model = tiny("llama")
    memory = attach_memory(model, layers=[1], memory_size=32, k=8, gate="head")
    choose_trainable(model, "gates")
    with torch.no_grad():
        model(torch.tensor(DOCUMENTS))
        memory.flush()
    with memory.frozen():
        trainer(model, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=2).train()
    assert memory.lengths.tolist() == [20] * ROWS
