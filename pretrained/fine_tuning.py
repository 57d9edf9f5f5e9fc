"""Fine-tuning a Hugging Face model together with its memory, in `transformers.Trainer`.

    attach_memory(model, layers="near_top", gate="head")
    print(choose_trainable(model, "gates"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir="out", per_device_train_batch_size=4),
        train_dataset=DocumentSegments(texts, tokenizer=tokenizer, rows=4, segment_length=512),
        callbacks=[MemoryCallback()],
    )
    trainer.train()

A memory layer's keys and values enter the memory without a gradient, as in Wu et al. 2022, section 3.1; gradients reach
the gate, the queries, and everything below through the layer's own attention.

Letters: B batch rows, T tokens of a segment.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from recollect.model.checkpoints import CheckpointError
from recollect.model.configuration import ConfigurationError
from recollect.pretrained.attach import AttachedMemory
from recollect.pretrained.document_segments import DocumentSegments
from recollect.pretrained.families import causal_model, family_of
from recollect.pretrained.reading_state import ReadingState, exchange, load_reading, save_reading

TRAINABLE = ("gates", "memory_layers", "all")
FOLDER = "recollect_memory"
"""Where a Trainer's checkpoint holds what the rows had read."""


@dataclass(frozen=True)
class TrainableParameters:
    """What `choose_trainable` has chosen.

    Attributes:
        kind: "gates", "memory_layers" or "all".
        trainable: how many numbers change in training.
        total: how many the model has, its gates included.
        names: the parameters that change, as `model.named_parameters` calls them.
    """

    kind: str
    trainable: int
    total: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.kind}, {self.trainable / self.total:.3%})"


def choose_trainable(model: nn.Module, trainable: str) -> TrainableParameters:
    """Sets which parameters of a model with memory are trained, by their `requires_grad`; all others are frozen.

    Args:
        model: a model that has a memory.
        trainable: "gates": only how memory and local attention are joined, a few numbers a layer. "memory_layers": the
            gates and the whole layers that have a memory. "all": everything.

    Raises:
        ConfigurationError: the model has no memory, the choice is unknown, or its gates have nothing to train.
    """
    handle = attached_memory(model)
    if trainable not in TRAINABLE:
        raise ConfigurationError(f"trainable={trainable!r} is unknown; choose one of {', '.join(TRAINABLE)}")
    gates = {id(parameter) for parameter in handle.parameters()}
    if trainable == "gates" and not gates:
        raise ConfigurationError(
            f"trainable='gates': the gate {handle.settings.gate!r} has nothing to train; attach the memory with "
            "gate='head' or 'joint_bias', or train 'memory_layers'"
        )
    layers = decoder_layers(model)
    chosen = gates | {id(parameter) for number in handle.settings.layers for parameter in layers[number].parameters()}
    names, counts, total = [], 0, 0
    for name, parameter in model.named_parameters():
        wanted = {"gates": gates, "memory_layers": chosen}.get(trainable)
        parameter.requires_grad_(wanted is None or id(parameter) in wanted)
        total += parameter.numel()
        if parameter.requires_grad:
            names.append(name)
            counts += parameter.numel()
    return TrainableParameters(trainable, counts, total, tuple(names))


def attached_memory(model: Any) -> AttachedMemory:
    """The memory of a model; raises ConfigurationError where there is none."""
    handle = getattr(model, "recollect_memory", None)
    if not isinstance(handle, AttachedMemory):
        raise ConfigurationError(f"this {type(model).__name__} has no memory: call attach_memory(model) first")
    return handle


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a model, from the bottom."""
    inner = causal_model(model)
    layers: nn.ModuleList = getattr(inner.base_model, family_of(inner).layers)
    return layers


class MemoryCallback(TrainerCallback):
    """What a Trainer must know of a memory; give it in `callbacks`, with `DocumentSegments` as its datasets.

    * A row forgets at the start of a document, as the batch's `document_starts` say (memories that the handle keeps
      frozen, and an attached store, stay as they are).
    * Evaluation in the middle of training reads with memories of its own.
    * Checkpoints hold the rows' memories beside the weights, so that a resumed run goes on as if it had not stopped.
    * Gradient checkpointing spares the memory layers: reading them twice would retrieve twice.

    Args:
        resume_from: the checkpoint folder whose memories a resumed run takes up; None is the Trainer's own
            `checkpoint-<step>` in its output folder.

    Raises, from the Trainer's constructor or `train`:
        ConfigurationError: the model has no memory, or the Trainer would tear the documents apart (another batch size
            than the dataset's rows, several processes or devices, another kind of dataset).
        CheckpointError: a run is resumed whose memories were not saved.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = None if resume_from is None else Path(resume_from)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        attached_memory(model)
        if args.world_size > 1 or args.n_gpu > 1:
            raise ConfigurationError(
                "the rows' memories live in one process and on one device: start the Trainer with one of each "
                "(CUDA_VISIBLE_DEVICES=0, or a smaller --nproc_per_node)"
            )
        if args.auto_find_batch_size:
            raise ConfigurationError("auto_find_batch_size would change the number of rows: set the batch size instead")
        DocumentForward.install(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        _check_dataset("train", kwargs["train_dataloader"])
        documents = DocumentForward.install(model)
        documents.begin()
        if state.global_step:
            folder = self.resume_from
            if folder is None and isinstance(args.resume_from_checkpoint, str):
                folder = Path(args.resume_from_checkpoint)
            if folder is None:
                folder = _checkpoint(args, state)
            load_reading(attached_memory(model)._reading, folder / FOLDER)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_dataset("eval", kwargs["eval_dataloader"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_only_model:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} should hold the Trainer's checkpoint, beside which memories are saved")
        DocumentForward.install(kwargs["model"]).turn_to_training()
        save_reading(attached_memory(kwargs["model"])._reading, folder / FOLDER)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        DocumentForward.install(kwargs["model"]).end()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_dataset(kind: str, loader: Any) -> None:
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, DocumentSegments):
        raise ConfigurationError(
            f"{kind}_dataset is of type {type(dataset).__name__}: with a memory the rows of a batch go on where the "
            "batch before left off, which DocumentSegments sees to"
        )
    size = getattr(loader, "total_batch_size", None) or loader.batch_size
    if size != dataset.rows:
        raise ConfigurationError(
            f"{kind}_dataset has rows={dataset.rows} and the Trainer reads {size} at a time: make "
            f"per_device_{kind}_batch_size and rows the same"
        )
    if kind == "train":
        dataset.set_epoch(0)  # whatever another run left; the Trainer sets later ones itself


class DocumentForward:
    """The forward of a model with memory that also takes `document_starts` and keeps evaluation apart from training.

    It stands as the instance's own `forward`, with a signature that names what it takes: a Trainer drops the columns
    of a batch that the signature lacks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.running = False
        """Between the beginning and the end of a training run."""
        self.evaluating = False
        self._aside = ReadingState()
        own = inspect.signature(type(model).forward)
        kept = [parameter for name, parameter in own.parameters.items() if name not in ("self", "shift_labels")]
        rest = [parameter for parameter in kept if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        named = [parameter for parameter in kept if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
            for name in ("shift_labels", "document_starts")
        ]
        self.__signature__ = own.replace(parameters=[*named, *added, *rest])

    @classmethod
    def install(cls, model: Any) -> DocumentForward:
        """The one of this model, made and put in its place when there is none."""
        handle = attached_memory(model)
        present = vars(model).get("_recollect_documents")
        if present is None or present.handle is not handle:
            present = cls(model)
            present.handle = handle
            model._recollect_documents = present
            model.forward = present
        return present

    handle: AttachedMemory

    def __call__(self, *args: Any, document_starts: Tensor | None = None, **kwargs: Any) -> Any:
        model = self.model
        if getattr(model, "recollect_memory", None) is not self.handle:  # detached: the class's own forward is back
            for name in ("forward", "_recollect_documents"):
                vars(model).pop(name, None)
            return type(model).forward(model, *args, **kwargs)
        if self.running and model.training == self.evaluating:
            self.turn_to_training() if model.training else self._turn_to_evaluation()
        if document_starts is not None:
            self._start(document_starts)
            kwargs.setdefault("use_cache", False)  # a segment is all that is in sight
        if model.training:
            layers = decoder_layers(model)
            for number in self.handle.settings.layers:
                layers[number].gradient_checkpointing = False
        return self._trainable(type(model).forward(model, *args, **kwargs))

    def _trainable(self, output: Any) -> Any:
        """`output`, with a gradient of zero for the gates where nothing else trains and every memory is still empty."""
        if self.model.training and torch.is_grad_enabled():
            nothing = [0.0 * gate.sum() for gate in self.handle.parameters() if gate.requires_grad]
            for name in ("loss", "logits"):
                value = getattr(output, name, None)
                if nothing and isinstance(value, Tensor) and not value.requires_grad:
                    setattr(output, name, value + sum(nothing))
        return output

    def begin(self) -> None:
        """A training run begins, with empty memories unless they are kept frozen."""
        self.running, self.evaluating, self._aside = True, False, ReadingState()
        if not self.handle._reading.frozen:
            self.handle.reset()

    def end(self) -> None:
        """It is over: memories are empty again, unless they are kept frozen."""
        self.turn_to_training()
        self.running = False
        if not self.handle._reading.frozen:
            self.handle.reset()

    def turn_to_training(self) -> None:
        """Takes up the training rows' memories where an evaluation has put them aside."""
        if self.evaluating:
            self.evaluating = False
            if not self.handle._reading.frozen:
                exchange(self.handle._reading, self._aside)
                self._aside = ReadingState()

    def _turn_to_evaluation(self) -> None:
        self.evaluating = True
        if not self.handle._reading.frozen:
            self._aside = exchange(self.handle._reading, ReadingState())

    def _start(self, starts: Tensor) -> None:
        """Rows marked in `starts` (B,) bool begin a document."""
        reading = self.handle._reading
        if reading.frozen or reading.paused:
            return
        if bool(starts.all()):
            self.handle.reset()
        elif bool(starts.any()):
            self.handle.reset(starts)


__all__ = ["DocumentForward", "MemoryCallback", "TrainableParameters", "attached_memory", "choose_trainable"]
