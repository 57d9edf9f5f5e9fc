"""What is to be done of a plan, in which order, and the text that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from recollect.model.corpus import Corpus
from recollect.model.token_cache import tokenize
from recollect.model.tokenizer import load_tokenizer

from .jobs import EvaluationJob, Plan, TrainingJob, read_record
from .options import AblateError
from .sections import Section, evaluation_text, make_tokenizer

Task = tuple[TrainingJob, list[EvaluationJob]]
"""A training with those of its evaluations that are not there; a process runs them together."""


def prepare_texts(
    plan: Plan,
    sections: Sequence[Section],
    corpora: Mapping[str, Corpus],
    output: Path,
    cache_directory: str | Path | None,
    note: Callable[[str], None],
) -> None:
    """Makes tokenizers and tokens, so that processes find them, and every text, so that nothing is found out late.

    Raises:
        CorpusError: no document is long enough for an evaluation.
    """
    wanted = {(job.section, job.options.model.vocabulary_size) for job in plan.trainings.values()}
    by_name = {section.name: section for section in sections}
    for name, vocabulary in sorted(wanted):
        note(f"tokens of {name}")
        path = make_tokenizer(by_name[name], corpora[name], output, vocabulary)
        tokenizer = load_tokenizer(path)
        splits = {"train", *(job.settings.split for job in plan.evaluations.values())}
        documents = {split: tokenize(corpora[name], split, tokenizer, cache_directory) for split in sorted(splits)}
        seen: set[tuple[str, int]] = set()
        for job in plan.evaluations.values():
            training = plan.trainings[job.training]
            if (training.section, training.options.model.vocabulary_size) != (name, vocabulary):
                continue
            shape = (job.settings.text_key, job.config.segment_length)
            if shape not in seen:
                seen.add(shape)
                evaluation_text(documents[job.settings.split], job.settings, job.config.segment_length, name)


def check_devices(plan: Plan) -> None:
    """Raises AblateError where a training is to run on a device that this machine lacks."""
    import torch

    for device in sorted({job.options.device for job in plan.trainings.values()}):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise AblateError(
                f"device {device!r} cannot be used here ({reason}); choose another with --device, or another --scale"
            ) from error


def open_tasks(plan: Plan, output: Path) -> list[Task]:
    """A task for each checkpoint that lacks something, in the order to start them.

    Early seeds come first, of a seed the references, without which nothing has a difference, and then what is cheap.
    """
    rows = [row for row in plan.rows if not row.skip]
    evaluations = {digest for row in rows for digest in (row.evaluation, *row.probes.values())}
    wanted = {row.training for row in rows}
    for digest in list(wanted):
        start = plan.trainings[digest].start
        while start is not None:
            wanted.add(start)
            start = plan.trainings[start].start
    tasks = []
    for digest in wanted:
        job = plan.trainings[digest]
        state = job.state()
        if state == "diverged":
            continue
        todo = [
            item
            for item in plan.evaluations_of(digest)
            if item.digest in evaluations and read_record(item.path(output)) is None
        ]
        if state == "open" or todo:
            tasks.append((job, todo))
    references = {row.training for row in rows if row.variant == row.reference}

    def place(task: Task) -> tuple[int, bool, float, str]:
        job = task[0]
        return job.options.seed, job.digest not in references, _cost(plan, task), job.digest

    return sorted(tasks, key=place)


def _cost(plan: Plan, task: Task) -> float:
    """Expected seconds, those of what it starts from included, so that it comes after that."""
    job, evaluations = task
    before = plan.trainings[job.start] if job.start is not None else None
    own = job.seconds if job.state() == "open" else 0.0
    return own + sum(item.seconds for item in evaluations) + (before.seconds if before is not None else 0.0)
