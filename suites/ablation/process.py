"""What a process of an ablation does: one training, and the evaluations and probes of its checkpoint.

Started by the runner through `recollect.suites.worker`; everything is written as soon as it is there, whole or not at
all, so that a process that is killed loses at most the evaluation it was at, and a training goes on where its state was
last saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json
from recollect.model.allocation import keep_freed_memory
from recollect.model.checkpoints import CONFIG, Checkpoint, load_checkpoint
from recollect.model.configuration import ModelConfig
from recollect.model.evaluation_text import EvaluationText
from recollect.model.token_cache import TokenizedDocuments
from recollect.model.training import LOG, SNAPSHOTS, TrainingDiverged, train
from recollect.model.training_options import TrainingOptions

from .evaluating import Evaluated, Trunks
from .jobs import DIVERGED, EVALUATIONS, TRAINED, missing_snapshots
from .sections import Section, check_corpus, evaluation_text, tokenize_split
from .settings import EvaluationSettings
from .stability import read_log, summarise_log
from .starting import adapted_start
from .timing import timing_path, write_timing

SCRATCH = "retrained"
"""Folder in the output of trainings that are repeated for their snapshots."""

Tell = Callable[..., None]


def run(task: dict[str, Any], tell: Tell) -> None:
    """Runs one task of the runner: trains if the checkpoint is not there, then evaluates what is not evaluated."""
    keep_freed_memory()
    if "timings" in task:
        _time(task, tell)
        return
    work = _Work(task, tell)
    if not work.train():
        return
    for index, job in enumerate(task["evaluations"]):
        tell("start", index=index, what=job["label"])
        try:
            record = work.evaluate(job)
        except OSError:
            raise
        except Exception as error:
            tell("failed", index=index, digest=job["digest"], reason=f"{type(error).__name__}: {error}")
            continue
        write_json(work.output / EVALUATIONS / f"{job['digest']}.json", record)
        tell("done", index=index, digest=job["digest"])


def _time(task: dict[str, Any], tell: Tell) -> None:
    """Times training steps beside those of their references."""
    for index, job in enumerate(task["timings"]):
        tell("start", index=index, what=job["label"])
        try:
            path = timing_path(Path(task["output"]), job["digest"])
            write_timing(path, job["this"], job["reference"], machine=str(task.get("host", "")))
        except OSError:
            raise
        except Exception as error:
            tell("failed", index=index, digest=job["digest"], reason=f"{type(error).__name__}: {error}")
            continue
        tell("done", index=index, digest=job["digest"])


class _Work:
    """One training's process.

    Args:
        task: from the runner: output, section, training, evaluations, cache_directory.
        tell: reports an event.
    """

    def __init__(self, task: dict[str, Any], tell: Tell) -> None:
        self.task, self.tell = task, tell
        self.output = Path(task["output"])
        self.section = Section(**task["section"])
        self.options = _options(task["training"]["options"])
        self.folder = self.options.output
        self.host = str(task.get("host", ""))
        self._documents: dict[str, TokenizedDocuments] = {}
        self._texts: dict[str, EvaluationText] = {}
        self.trunks = Trunks()
        self._told = 0.0

    def train(self) -> bool:
        """Trains unless that was done; False where the training diverged."""
        if (self.folder / TRAINED).is_file():
            return self._retake_snapshots()
        began = time.perf_counter()
        options = self.options
        self.tell("step", what="training", done=0, of=options.steps)
        if (self.folder / CONFIG).is_file():  # killed between the checkpoint and its record
            self._record(None)
            return True
        if self.task.get("elsewhere"):
            check_corpus(self.section)
        if self.task["training"]["start"] is not None:
            options = adapted_start(options, self.output)
        try:
            train(options, on_step=self._on_step)
        except TrainingDiverged as error:
            steps = read_log(self.folder / LOG)
            write_json(
                self.folder / DIVERGED,
                {
                    "reason": str(error),
                    "diverged_at": int(steps[-1]["step"]) + 1 if steps else 1,
                    "machine": self.host,
                    **summarise_log(self.folder / LOG),
                },
            )
            self.tell("diverged", digest=self.task["training"]["digest"], reason=str(error))
            return False
        self._record(time.perf_counter() - began)
        self.tell("trained", digest=self.task["training"]["digest"])
        return True

    def _retake_snapshots(self) -> bool:
        """Trains a finished model once more for the snapshots that another grid wants of it; its own files stay."""
        steps = missing_snapshots(self.options)
        if steps:
            scratch = self.output / SCRATCH / self.folder.name
            options = dataclasses.replace(self.options, output=scratch, snapshots=tuple(steps))
            shutil.rmtree(scratch, ignore_errors=True)
            if self.task["training"]["start"] is not None:
                options = adapted_start(options, self.output)
            train(options, on_step=self._on_step)
            for step in steps:
                target = self.folder / SNAPSHOTS / str(step)
                target.parent.mkdir(exist_ok=True)
                os.replace(scratch / SNAPSHOTS / str(step), target)
            shutil.rmtree(scratch)
            self.tell("trained", digest=self.task["training"]["digest"])
        return True

    def _on_step(self, step: int, loss: float) -> None:
        """Tells of a training's progress, a few times a second at most."""
        if time.monotonic() - self._told > 0.5 or step == self.options.steps:
            self._told = time.monotonic()
            self.tell("step", what="training", done=step, of=self.options.steps, loss=round(loss, 4))

    def _record(self, seconds: float | None) -> None:
        """Writes what rows say of a finished training. A resumed one took what its steps took."""
        figures = summarise_log(self.folder / LOG)
        steps = read_log(self.folder / LOG)
        spent = sum(step["step_ms"] for step in steps) / 1e3
        write_json(
            self.folder / TRAINED,
            {
                "digest": self.task["training"]["digest"],
                "steps": self.options.steps,
                "tokens": self.options.tokens,
                "parameters": self.checkpoint.model.count_parameters(),
                "seconds": round(max(spent, seconds or 0.0), 3),
                "diverged_at": None,
                "machine": self.host,
                **figures,
            },
        )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The trained model."""
        return load_checkpoint(self.folder, device=self.options.device)

    def documents(self, split: str) -> TokenizedDocuments:
        """The section's tokens of a split."""
        if split not in self._documents:
            path = self.section.tokenizer_path(self.output, self.checkpoint.config.vocabulary_size)
            self._documents[split] = tokenize_split(self.section, split, path, self.task["cache_directory"])
        return self._documents[split]

    def text(self, settings: EvaluationSettings, segment_length: int) -> EvaluationText:
        """The text of an evaluation."""
        key = f"{settings.text_key} {segment_length}"
        if key not in self._texts:
            self._texts[key] = evaluation_text(
                self.documents(settings.split), settings, segment_length, self.section.name
            )
        return self._texts[key]

    def evaluate(self, job: dict[str, Any]) -> dict[str, Any]:
        """The record of one evaluation or probe; the losses of an evaluation are written on the way."""
        from .systems import Request, evaluate_system

        settings = EvaluationSettings(**job["settings"])
        config = ModelConfig.from_dict(job["config"])
        text = self.text(settings, config.segment_length)
        described = {
            "corpus": self.section.name,
            "split": text.split,
            "rows": text.rows,
            "documents": len(text.document_names),
            "tokens": sum(text.document_tokens),
            "fill_tokens": settings.fill_tokens,
            "digest": text_digest(text, settings),
        }
        if job["system"].startswith("probe:"):
            module = importlib.import_module(f"{__package__}.probes_{job['system'][6:].replace('-', '_')}")
            options = {key: value for key, value in job["options"].items() if key not in ("version", "snapshots")}
            start = time.perf_counter()
            found = module.probe(self.snapshots(job["options"]["snapshots"]), text, options)
            seconds = round(time.perf_counter() - start, 3)
            return {
                "probe": job["system"][6:],
                "numbers": found.numbers,
                "rows": found.rows,
                "seconds": seconds,
                "machine": self.host,
            }
        request = Request(
            checkpoint=self.checkpoint,
            config=config,
            text=text,
            settings=settings,
            options=job["options"],
            seed=int(job["seed"]),
            trunks=self.trunks,
            documents=self.documents,
            splits=tuple(self.section.split_digests),
        )
        evaluated, figures = evaluate_system(job["system"], request)
        return self._write(job["digest"], evaluated, figures, described)

    def snapshots(self, steps: Sequence[int]) -> list[Path]:
        """The training's snapshots of these steps, oldest first, and its checkpoint."""
        folder = self.folder / SNAPSHOTS
        return [*(folder / str(step) for step in sorted(steps)), self.folder]

    def _write(
        self, digest: str, evaluated: Evaluated, figures: dict[str, Any], text: dict[str, Any]
    ) -> dict[str, Any]:
        result = evaluated.result
        result.losses.save(self.output / EVALUATIONS / f"{digest}.npz")
        parameters = sum(value.numel() * value.element_size() for value in self.checkpoint.model.state_dict().values())
        return {
            "digest": digest,
            "perplexity": result.perplexity,
            "accuracy": result.accuracy,
            "tokens": result.tokens,
            "seconds": round(evaluated.seconds, 3),
            "machine": self.host,
            "us_per_token": 1e6 * evaluated.seconds / max(1, evaluated.scored_tokens),
            "backend": result.memory.backend,
            "memory_size": result.memory.memory_size,
            "k": result.memory.k if result.memory.memory_size else 0,
            "text": text,
            "system": figures,
            "costs": {
                "memory_bytes": evaluated.memory_bytes,
                "cache_bytes": evaluated.cache_bytes,
                "parameter_bytes": parameters,
            },
        }


def text_digest(text: EvaluationText, settings: EvaluationSettings) -> str:
    """Names the tokens that are scored, however they are cut into segments and rows: equal digests pair up."""
    digest = hashlib.sha256(f"{settings.fill_tokens}:".encode())
    tokens = text.tokens.permute(1, 0, 2)
    for document in range(len(text.document_names)):
        digest.update(f"{text.document_names[document]}:{text.document_tokens[document]}:".encode())
        chosen = tokens[(text.document_index == document).T]
        digest.update(chosen.flatten()[: text.document_tokens[document]].numpy().tobytes())
    return digest.hexdigest()[:16]


def _options(values: dict[str, Any]) -> TrainingOptions:
    """The inverse of `TrainingJob.as_json`."""
    return TrainingOptions(**{**values, "model": ModelConfig.from_dict(values["model"])})


__all__ = ["run", "text_digest"]
