"""`recollect tune`: the cheapest options that reach a recall, softmax mass or perplexity, verified on other text.

    tune(TuneOptions(backends=("hnswlib",), kind="mass", target=0.99))

Options are chosen on tuning documents by the worse end of each figure's interval, and what is reported of the chosen
one is measured anew on documents that had no part in the choice. Every build's points, every perplexity and the
verification are written as soon as they are there; the same command again goes on from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect.memory_backends import canonical_spec
from recollect.memory_backends.atomic import write_json
from recollect.memory_backends.registry import backend_class
from recollect.memory_backends.spec import format_spec, parse_spec
from recollect.model.checkpoints import load_checkpoint, reference_checkpoint
from recollect.model.evaluation import replay
from recollect.model.evaluation_text import EvaluationText, choose_text, load_documents
from recollect.model.evaluation_types import EvaluationResult
from recollect.model.recording import record
from recollect.reports.statistics import make_blocks, mean_interval

from .cells import fingerprint
from .curve_settings import Settings, open_axes, open_builds, settings_of
from .environment import backend_digest, core_digest, usable_cores
from .measure import can_share, measure_group
from .one_writer import writing_alone
from .plan import read_json
from .progress import Reporter
from .provenance import describe
from .sharing import build_key, search_options
from .tuning_choice import Figure, Point, choose, nearest, outcome_of, promising
from .tuning_curve import Replayed, measure_build, scouted
from .tuning_options import KINDS, OUTCOMES, Outcome, TuneError, TuneOptions, TuneResult, checked
from .workload import Workload, WorkloadSettings, begin_workload, complete_workload

SCHEMA = 1
FILE = "tuning.json"
PARTS = "parts"
"""Folder in the output for what was measured so far."""

PERPLEXITIES = 8
"""Points of one build whose perplexity is measured."""

_CODE = ("curve_settings", "curves", "noise", "sharing", "tuning_choice", "tuning_curve")


def tune(options: TuneOptions | None = None, **changes: Any) -> TuneResult:
    """Chooses options and verifies them.

    Args:
        options: what to tune, for what; may be left out where `changes` names `backends` and `target`.
        changes: single options by name.

    Raises:
        TuneError: an option is out of range, the two texts share a document, or another run is writing to the folder.
        CheckpointError, CorpusError, MemoryBackendError: what was asked for cannot be had.
        OSError: the output cannot be written.
    """
    options = checked(TuneOptions(**changes) if options is None else dataclasses.replace(options, **changes))
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise TuneError(f"output {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    with writing_alone(folder, "run", TuneError), Reporter(options.progress) as reporter:
        try:
            torch.set_num_threads(options.threads or usable_cores())
            return _Tuning(options, folder, reporter).run()
        finally:
            torch.set_num_threads(threads)


class _Tuning:
    def __init__(self, options: TuneOptions, folder: Path, reporter: Reporter) -> None:
        self.options, self.folder, self.reporter = options, folder, reporter
        self.started = time.perf_counter()
        self.builds = _builds(options)
        reporter.step("loading the model", 0.0)
        path = reference_checkpoint() if options.checkpoint is None else Path(options.checkpoint)
        self.path = path.expanduser().resolve()
        self.checkpoint = load_checkpoint(self.path, device=options.device)
        config = self.checkpoint.config
        if not config.memory_layers:
            raise TuneError(f"the model in {path} has no memory layer, so there is nothing to tune")
        self.k = config.k if options.k is None else options.k
        self.size = config.memory_size if options.memory_size is None else options.memory_size
        if self.size < self.k:
            raise TuneError(f"k is {self.k}, above memory_size {self.size}: a memory holds at least what is retrieved")
        reporter.step("reading the corpus", 0.0)
        self.texts = {"tuning": self._text(options.split), "verification": self._text(options.verify_split)}
        shared = set(self.texts["tuning"].document_names) & set(self.texts["verification"].document_names)
        if shared:
            raise TuneError(f"tuning and verification would both read {sorted(shared)[0]!r}: give splits that differ")
        self.provenance = describe(device=options.device, seed=options.seed)
        self.settings = {
            "checkpoint": self.checkpoint.digest,
            "k": self.k,
            "memory_size": self.size,
            "seed": options.seed,
            "device": options.device,
            "threads": torch.get_num_threads(),
            "torch": self.provenance["libraries"].get("torch"),
            "cpu": self.provenance["machine"]["cpu"],
            "core": core_digest(),
            "code": _code_digest(),
        }

    def _text(self, split: str) -> EvaluationText:
        options, config = self.options, self.checkpoint.config
        documents = load_documents(options.corpus, split, self.checkpoint.tokenizer, options.cache_directory)
        return choose_text(
            documents, rows=options.rows, segment_length=config.segment_length, max_tokens=options.max_tokens
        )

    # What is searched ------------------------------------------------------------------------------------------------

    def _steps(self, what: str) -> Callable[[int, int], None]:
        return lambda done, of: self.reporter.step(what, done / of)

    def _workload(self, part: str) -> Workload:
        options = self.options
        folder = self.folder / f".{part}"
        split = options.split if part == "tuning" else options.verify_split
        settings = WorkloadSettings(
            checkpoint=str(self.path),
            corpus=str(options.corpus),
            split=split,
            rows=options.rows,
            max_tokens=options.max_tokens,
            memory_sizes=(self.size,),
            k=options.k,
            device=options.device,
            seed=options.seed,
            cache_directory=None if options.cache_directory is None else str(options.cache_directory),
        )
        begin_workload(folder, settings, self.checkpoint, self.texts[part])
        return complete_workload(folder, on_step=lambda what, share: self.reporter.step(f"{part}: {what}", share))

    @cached_property
    def _tuning(self) -> Replayed:
        workload = self._workload("tuning")
        return Replayed(workload, record(workload.model, workload.trunk), self.size)

    @cached_property
    def _verification(self) -> Replayed:
        workload = self._workload("verification")
        return Replayed(workload, record(workload.model, workload.trunk), self.size)

    @cached_property
    def _exact_losses(self) -> dict[str, EvaluationResult]:
        return {}

    def _exact(self, part: str, replayed: Replayed) -> EvaluationResult:
        """Exact search's losses on a text."""
        if part not in self._exact_losses:
            workload = replayed.workload
            what = f"{part}: perplexity of exact search"
            self.reporter.step(what, 0.0)
            self._exact_losses[part] = replay(
                workload.model,
                workload.trunk,
                backend="exact",
                memory_size=self.size,
                k=self.k,
                seed=self.options.seed,
                on_segment=self._steps(what),
            )
        return self._exact_losses[part]

    # Parts that are kept ---------------------------------------------------------------------------------------------

    def _kept(self, what: str, spec: str, **depends: Any) -> Path:
        """The file of a part, named by all that it depends on."""
        name = parse_spec(spec)[0]
        part = "verification" if what == "verification" else "tuning"
        mark = fingerprint(
            {**self.settings, "text": self.texts[part].digest, "backend": backend_digest(name), "spec": spec, **depends}
        )
        return self.folder / PARTS / f"{what}-{name}-{mark}.json"

    # The run ---------------------------------------------------------------------------------------------------------

    def run(self) -> TuneResult:
        options = self.options
        points: list[Point] = []
        for place, build in enumerate(self.builds):
            points += self._build(build, f"[{place + 1}/{len(self.builds)}]")
        if options.kind == "loss":
            points = self._with_losses(points)
        points.sort(key=lambda point: point.cost)
        chosen = choose(points, options.kind, options.target)
        verified = None if chosen is None else self._verify(chosen)
        if chosen is None:
            chosen, outcome = nearest(points, options.kind, options.target), "not reached"
        else:
            figure = verified.figure(options.kind) if verified is not None else None
            assert figure is not None
            outcome = outcome_of(figure, options.kind, options.target)
        result = TuneResult(
            outcome=outcome,  # type: ignore[arg-type]
            spec=chosen.spec,
            tuning=chosen.as_json(),
            verified=None if verified is None else verified.as_json(),
            points=tuple(point.as_json() for point in points),
            message=message_of(options, chosen, verified, outcome),  # type: ignore[arg-type]
            output=self.folder,
            seconds=time.perf_counter() - self.started,
        )
        self._write(result)
        for part in self.texts:
            shutil.rmtree(self.folder / f".{part}", ignore_errors=True)
        return result

    def _build(self, build: str, head: str) -> list[Point]:
        """The curve of one build on the tuning text."""
        options = self.options
        target = ("softmax_mass" if options.kind == "mass" else "recall_at_k", options.target)
        targets = [] if options.kind == "loss" else [target]
        kept = self._kept("curve", build, targets=targets, cost=options.cost)
        known = read_json(kept)
        if known is None:
            replayed = self._tuning
            what = f"{head} {build}"
            self.reporter.step(f"{what}: which options", 0.0)
            settings = scouted(replayed, build, settings_of(open_axes(build)), targets)
            found = measure_build(
                replayed,
                build,
                settings,
                cost=options.cost,
                on_segment=self._steps(f"{what}: {len(settings)} settings"),
            )
            known = {"points": [point.as_json() for point in found], "provenance": self.provenance}
            write_json(kept, known)
            self.reporter.note(_told(what, found, options))
        return [Point.from_json(content) for content in known["points"]]

    def _with_losses(self, points: Sequence[Point]) -> list[Point]:
        """The points, those worth it with their perplexity measured."""
        found = {point.spec: point for point in points}
        groups: dict[str, list[Point]] = {}
        for point in points:
            groups.setdefault(build_key(point.spec), []).append(point)
        for group in groups.values():
            wanted = promising(group, PERPLEXITIES)
            missing = []
            for point in wanted:
                known = read_json(self._kept("perplexity", point.spec))
                if known is None:
                    missing.append(point)
                else:
                    found[point.spec] = _with_loss(point, known)
            for point, known in self._losses("tuning", self._tuning, missing) if missing else ():
                write_json(self._kept("perplexity", point.spec), known)
                found[point.spec] = _with_loss(point, known)
        return list(found.values())

    def _losses(self, part: str, replayed: Replayed, points: Sequence[Point]) -> Iterator[tuple[Point, dict[str, Any]]]:
        """Perplexity of each point, and its relative increase over exact search's with its interval."""
        exact, workload = self._exact(part, replayed), replayed.workload
        specs = [point.spec for point in points]
        together = [specs] if can_share(workload, specs) else [[spec] for spec in specs]
        by_spec = {point.spec: point for point in points}
        for group in together:
            what = f"{part}: perplexity of {len(group)} settings" if len(group) > 1 else f"{part}: {group[0]}"
            measured = measure_group(workload, group, self.size, on_segment=self._steps(what))
            for cell, result in measured:
                if result is None:
                    raise TuneError(f"{cell.spec} could not be evaluated: {cell.reason}")
                loss = relative_loss(result, exact)
                about = {"perplexity": result.perplexity, "loss": dataclasses.asdict(loss)}
                yield by_spec[cell.spec], {**about, "exact_perplexity": exact.perplexity}

    def _verify(self, chosen: Point) -> Point:
        """The chosen options on the other documents: every figure is measured anew."""
        kept = self._kept("verification", chosen.spec, cost=self.options.cost)
        known = read_json(kept)
        if known is None:
            replayed = self._verification
            setting: Settings = search_options(chosen.spec)
            (point,) = measure_build(
                replayed,
                chosen.spec,
                [setting],
                cost=self.options.cost,
                on_segment=self._steps(f"verifying {chosen.spec}"),
            )
            ((_, found),) = self._losses("verification", replayed, [point])
            known = {"point": _with_loss(point, found).as_json(), "provenance": self.provenance}
            write_json(kept, known)
        return Point.from_json(known["point"])

    def _write(self, result: TuneResult) -> None:
        options, texts = self.options, self.texts
        write_json(
            self.folder / FILE,
            {
                "schema": SCHEMA,
                "kind": options.kind,
                "target": options.target,
                "cost": options.cost,
                "outcome": result.outcome,
                "message": result.message,
                "spec": result.spec,
                "tuning": result.tuning,
                "verified": result.verified,
                "points": list(result.points),
                "memory_size": self.size,
                "k": self.k,
                "num_memories": texts["tuning"].rows * self.checkpoint.config.heads,
                "queries": self.checkpoint.config.segment_length,
                "checkpoint": {"name": self.path.name, "digest": self.checkpoint.digest},
                "texts": {
                    part: {
                        "corpus": text.corpus,
                        "split": text.split,
                        "documents": list(text.document_names),
                        "tokens": sum(text.document_tokens),
                        "digest": text.digest,
                    }
                    for part, text in texts.items()
                },
                "provenance": self.provenance,
            },
        )


def _builds(options: TuneOptions) -> list[str]:
    """Specs to build, those of the first backend first.

    Raises:
        UnknownBackend, InvalidSpec, BackendUnavailable: one cannot be had.
    """
    found: dict[str, str] = {}
    for spec in options.backends:
        canonical_spec(spec)
        backend_class(parse_spec(spec)[0]).check_available()
        for build in open_builds(spec) if options.builds else [format_spec(*parse_spec(spec))]:
            found.setdefault(canonical_spec(build), build)
    return list(found.values())


def _code_digest() -> str:
    code = hashlib.sha256()
    for name in _CODE:
        code.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return code.hexdigest()


def relative_loss(result: EvaluationResult, exact: EvaluationResult) -> Figure:
    """The relative increase of perplexity over exact search's, paired by token, with its interval."""
    losses = result.losses
    blocks = make_blocks(losses.document.astype(np.int64), losses.position.astype(np.int64))
    difference = losses.loss.astype(np.float64) - exact.losses.loss.astype(np.float64)
    found = mean_interval(difference, np.ones(len(difference), dtype=np.bool_), blocks)
    return Figure(*(float(np.expm1(value)) for value in (found.estimate, found.low, found.high)))


def _with_loss(point: Point, known: dict[str, Any]) -> Point:
    return dataclasses.replace(point, loss=Figure(**known["loss"]), perplexity=float(known["perplexity"]))


def _told(what: str, points: Sequence[Point], options: TuneOptions) -> str:
    kind = "mass" if options.kind == "loss" else options.kind
    found = [figure.value for point in points if (figure := point.figure(kind)) is not None]
    return f"{what}: {len(points)} settings, {kind} {min(found):.3f} to {max(found):.3f}"


def message_of(options: TuneOptions, chosen: Point, verified: Point | None, outcome: Outcome) -> str:
    """The finding in words; registry strings stand between backticks."""
    kind, target = options.kind, options.target
    aim = f"{kind} of at {'most' if kind == 'loss' else 'least'} {target:g}"
    figure = chosen.figure(kind)
    assert figure is not None
    if outcome == "not reached":
        more = "" if options.builds else " --builds,"
        return (
            f"Nothing reaches a {aim} for certain on the tuning documents ({KINDS[kind]}). Nearest comes "
            f"`{chosen.spec}` with {figure.text()} at {chosen.cost:.2f} times the cost of exact search. Another "
            f"backend,{more} more tokens (narrower intervals) or a lower target may do."
        )
    assert verified is not None
    other = verified.figure(kind)
    assert other is not None
    text = (
        f"`{chosen.spec}` is the cheapest that reaches a {aim} on the tuning documents, with {figure.text()}. On other "
        f"documents it has {other.text()}: {outcome} ({OUTCOMES[outcome]}). A {options.cost} takes "
        f"{verified.cost:.2f} times what it takes with exact search."
    )
    if verified.cost >= 1:
        text += " Exact search is the cheaper one at this memory size."
    if outcome == "missed":
        text += " Tune for a stricter target or on more tokens."
    return text


__all__ = ["TuneError", "TuneOptions", "TuneResult", "tune"]
