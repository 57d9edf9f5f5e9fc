"""Running an ablation: what is planned and not there yet, in processes of their own, early seeds and cheap jobs first.

    result = ablate(AblateOptions(grids=("gate",), jobs=2))

Whatever ends a run, the same command goes on where it stopped: a training from its last saved state, an evaluation from
its beginning. What is there is found by the digest of all that decides it, whichever grid made it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from recollect.model.corpus import EMBEDDED

from ..engines import Bench, Losses, make_engine
from ..one_writer import writing_alone
from ..processes import Event
from .grid import Grid, Variant, load_grid
from .jobs import TRAINED, EvaluationJob, Plan, TrainingJob, read_record
from .matching import Costs
from .options import AblateError, AblateOptions, AblateResult
from .plan import Planner, Resolved
from .progress import Reporter, minutes
from .provenance import machine_of, settle
from .results import machines_of, row_of, write_rows, write_run
from .schedule import Task, check_devices, open_tasks, prepare_texts
from .sections import Section, read_sections
from .timing import timing_path


def plan_ablation(options: AblateOptions) -> tuple[list[Grid], list[Section], Plan]:
    """Grids, sections and plan, everything checked, nothing trained; what `match_cost` measures is left at its least.

    Raises:
        AblateError, CorpusError: something cannot be run as asked.
    """
    run = _Ablation(options)
    run.read()
    run.make_plan(measure=False)
    return run.grids, run.sections, run.plan


def ablate(options: AblateOptions) -> AblateResult:
    """Runs what the grids need and is not there yet, then writes rows, tables and pages.

    Raises:
        AblateError, CorpusError: something cannot be run as asked, or another run is writing to the folder.
        OSError: the output cannot be written; what was there before is as it was.
        KeyboardInterrupt: Ctrl-C, after the processes were ended.
    """
    return _Ablation(options).run()


class _Ablation:
    def __init__(self, options: AblateOptions) -> None:
        self.options = options
        self.output = Path(options.output).resolve()
        self.started = time.perf_counter()
        self.failures: dict[str, str] = {}
        self.trained = self.evaluated = 0
        self.notes: list[str] = []
        self.losses = Losses()
        self.learned = (0.0, 0.0)

    # Planning

    def read(self) -> None:
        """Reads grids and corpora."""
        self.grids = [load_grid(name, self.options.scale) for name in dict.fromkeys(self.options.grids)]
        names = [grid.name for grid in self.grids]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise AblateError(f"two grids are named {', '.join(sorted(twice))}: their results would share a folder")
        known = {variant.name for grid in self.grids for variant in grid.variants}
        for name in self.options.variants:
            if name not in known:
                raise AblateError(f"no grid has a variant {name!r}; there are {', '.join(sorted(known))}")
        # Grids are checked before the corpora, which take longer to read.
        Planner(self.options, (), matched=_least).check(self.grids)
        self.sections, self.corpora = read_sections(self.options.corpora)

    def make_plan(self, *, measure: bool) -> None:
        """Plans all grids, seeds outermost."""
        costs = Costs(self.output, self.options, measure=measure)
        planner = Planner(self.options, self.sections, matched=costs.matched, measured=self._seconds)
        for grid in self.grids:
            planner.add(grid)
        self.plan = planner.plan

    def _seconds(self, digest: str) -> float | None:
        record = read_record(self.output / "checkpoints" / digest / TRAINED)
        return None if record is None else float(record["seconds"])

    # Running

    def run(self) -> AblateResult:
        """See `ablate`."""
        self.read()
        if self.output.exists() and not self.output.is_dir():
            raise AblateError(f"output {self.output} is a file: give a folder")
        self.output.mkdir(parents=True, exist_ok=True)
        with writing_alone(self.output, "ablation", AblateError), Reporter(self.options.progress) as self.reporter:
            self.make_plan(measure=False)
            device = str(next(iter(self.plan.trainings.values())).options.device)
            if self.options.engine == "local":
                check_devices(self.plan)
            with make_engine(
                self.options.engine,
                output=self.output,
                threads=self.options.threads,
                note=self.reporter.note,
                address=self.options.address,
                device=device,
            ) as self.engine:
                self.lock = self.engine.turn
                self._choose_machines(device)
                reused = self._do()
            report = self._report() if self.options.report else None
        rows = [(grid, self._rows(grid)) for grid in self.grids]
        told = {
            status: tuple(
                (grid.name, row["section"], row["variant"], row["seed"], row["reason"])
                for grid, lines in rows
                for row in lines
                if row["status"] == status
            )
            for status in ("diverged", "failed")
        }
        return AblateResult(
            output=self.output,
            report=report,
            folders=tuple(self.output / grid.name for grid in self.grids),
            trained=self.trained,
            evaluated=self.evaluated,
            reused=reused,
            diverged=told["diverged"],
            failed=told["failed"],
            notes=tuple(self.notes),
            seconds=time.perf_counter() - self.started,
        )

    def _choose_machines(self, device: str) -> None:
        """Settles where is trained, and whether that may be added to what the folder holds."""
        options = self.options
        self.machine = self.engine.settle(machine_of(self.output), any_machine=options.mix)
        settle(
            self.output,
            threads=options.threads,
            device=device,
            mix=options.mix,
            machine=self.machine,
            unlike=self.engine.unlike,
        )
        self.bench = Bench(self.engine, self.output, options.threads, options.timeout, device)
        self.jobs = options.jobs or self.engine.places(alone=False, threads=options.threads, device=device)

    def _do(self) -> int:
        """Trains, evaluates and times what is not there yet; returns how much was there."""
        self.make_plan(measure=True)
        prepare_texts(
            self.plan, self.sections, self.corpora, self.output, self.options.cache_directory, self.reporter.note
        )
        tasks = open_tasks(self.plan, self.output)
        open_evaluations = sum(len(evaluations) for _, evaluations in tasks)
        self.total = len(self.plan.trainings) + len(self.plan.evaluations)
        self.left = {job.digest for job, _ in tasks if job.state() == "open"}
        self.left |= {job.digest for _, evaluations in tasks for job in evaluations}
        reused = self.total - len(self.left)
        self._write(finished=False)
        self.reporter.note(
            f"{len(self.plan.rows)} rows: {len(self.plan.trainings)} trainings and {len(self.plan.evaluations)} "
            f"evaluations, of which {len(self.left) - open_evaluations} and {open_evaluations} are to be done, in "
            f"about {minutes(self._remaining())}"
        )
        self._run_all(tasks)
        if self.options.timing:
            self._time()
        self._write(finished=True)
        return reused

    def _remaining(self) -> float:
        """Expected seconds until all is done."""
        trainings = [job.seconds for digest, job in self.plan.trainings.items() if digest in self.left]
        evaluations = [job.seconds for digest, job in self.plan.evaluations.items() if digest in self.left]
        expected, taken = self.learned
        ratio = taken / expected if expected else 1.0
        return ratio * (sum(trainings) + sum(evaluations)) / self.jobs

    def _run_all(self, tasks: list[Task]) -> None:
        """Runs the tasks, `jobs` at a time; one that starts from another's checkpoint waits for it."""
        waiting = list(tasks)
        running: dict[concurrent.futures.Future[None], Task] = {}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    open_now = {job.digest for job, _ in waiting} | {job.digest for job, _ in running.values()}
                    for task in list(waiting):
                        if len(running) == self.jobs:
                            break
                        start = task[0].start
                        if start is not None and start in open_now:
                            continue
                        waiting.remove(task)
                        if start is not None and self.plan.trainings[start].state() != "trained":
                            self._give_up(task, f"its start, {self.plan.trainings[start].label}, was not trained")
                            continue
                        running[pool.submit(self._run_task, task)] = task
                    done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        del running[future]
                        future.result()
            except BaseException:
                self.engine.stop()
                raise

    def _give_up(self, task: Task, reason: str) -> None:
        job, evaluations = task
        with self.lock:
            for digest in (job.digest, *(item.digest for item in evaluations)):
                self.failures[digest] = reason
                self.left.discard(digest)
        self._write_rows({job.digest})

    def _run_task(self, task: Task) -> None:
        """One task, from its start to its end: what is lost with a process or a machine is run again."""
        job, evaluations = task
        while True:
            last = self._run_process(job, evaluations)
            if last["event"] == "end":
                return
            if last["event"] != "lost" or not self.losses.again(job.digest):
                self._crashed(job, evaluations, self.losses.told(job.digest, str(last["reason"])))
                return
            with self.lock:
                evaluations = [item for item in evaluations if item.digest in self.left]
                self._note(f"{job.label}, seed {job.options.seed}: {last['reason']}: it was gone on with")

    def _run_process(self, job: TrainingJob, evaluations: Sequence[EvaluationJob]) -> Event:
        """One process, from its start to its end."""
        key = f"{job.label} seed {job.options.seed}"
        section = next(section for section in self.sections if section.name == job.section)
        training, needs = job.as_json(), []
        if self.engine.name != "local" and section.source != EMBEDDED:
            # Elsewhere a path that starts here means nothing.
            source = Path(section.source).expanduser().resolve()
            section = dataclasses.replace(section, source=str(source))
            training["options"]["corpus"] = str(source)
            needs.append(source)
        if job.start is not None:
            needs.append(self.plan.trainings[job.start].folder)
        content = {
            "kind": "ablation",
            "output": str(self.output),
            "section": dataclasses.asdict(section),
            "training": training,
            "evaluations": [item.as_json() for item in evaluations],
            "cache_directory": None if self.options.cache_directory is None else str(self.options.cache_directory),
        }
        try:
            return self.bench.run(
                content,
                lambda event: self._hear(key, job, evaluations, event),
                log=self.output / "logs" / f"{job.digest}.log",
                needs=tuple(needs),
                resumes=(
                    job.folder,
                    section.tokenizer_path(self.output, job.options.model.vocabulary_size).parent,
                ),
                label=key,
            )
        finally:
            self.reporter.ended(key)

    def _crashed(self, job: TrainingJob, evaluations: Sequence[EvaluationJob], reason: str) -> None:
        """Notes what a process that died leaves undone."""
        with self.lock:
            left = [digest for digest in (job.digest, *(item.digest for item in evaluations)) if digest in self.left]
            for digest in left:
                self.failures[digest] = reason
                self.left.discard(digest)
        self.reporter.note(f"{job.label}, seed {job.options.seed}: failed: {reason}")
        self._write_rows({job.digest})

    def _hear(self, key: str, job: TrainingJob, evaluations: Sequence[EvaluationJob], event: Event) -> None:
        kind = event["event"]
        if kind == "step":
            detail = f"loss {event['loss']:.3f}" if "loss" in event else ""
            self.reporter.working(key, f"{key}: {event['what']}", event["done"] / max(1, event["of"]), detail)
            return
        if kind == "start":
            self.reporter.working(key, f"{key}: evaluating {event['index'] + 1} of {len(evaluations)}", 0.0)
            return
        digest = str(event["digest"])
        with self.lock:
            self.left.discard(digest)
            if kind == "trained":
                self.trained += 1
                # What the trainings so far took tells this machine's pace.
                self.learned = (self.learned[0] + job.seconds, self.learned[1] + (self._seconds(digest) or job.seconds))
                text = f"{key} ({job.section}): trained"
            elif kind == "done":
                self.evaluated += 1
                item = evaluations[int(event["index"])]
                record = read_record(item.path(self.output)) or {}
                figure = f"perplexity {record['perplexity']:.3f}" if "perplexity" in record else "probed"
                text = f"{item.label} seed {item.seed} ({job.section}): {figure}"
            else:
                self.failures[digest] = str(event["reason"])
                text = f"{key} ({job.section}): {kind}: {event['reason']}"
                if kind == "diverged":
                    del self.failures[digest]
                    self.left -= {item.digest for item in evaluations}
            done, left = self.total - len(self.left), self._remaining()
        self.reporter.finished(done, self.total, text, left)
        self._write_rows({digest})

    def _time(self) -> None:
        """Times training steps in one process, while nothing else of this run is running."""
        wanted = {row.timing for row in self.plan.rows if not row.skip}
        jobs = [self.plan.timings[digest] for digest in sorted(wanted)]
        jobs = [job for job in jobs if read_record(timing_path(self.output, job["digest"])) is None]
        if not jobs:
            return
        self.reporter.note(f"timing {len(jobs)} training steps beside their references")
        task = {"kind": "ablation", "output": str(self.output), "timings": jobs}

        def hear(event: Event) -> None:
            if event["event"] == "start":
                self.reporter.working("timing", f"timing {event['what']}", event["index"] / len(jobs))
            elif event["event"] == "failed":
                self._note(f"{jobs[int(event['index'])]['label']}: its training step was not timed: {event['reason']}")

        last: Event = {"event": "lost"}
        while last["event"] == "lost" and jobs:
            last = self.bench.run(task, hear, log=self.output / "logs" / "timing.log", alone=True, label="timing")
            if last["event"] == "lost" and not self.losses.again("timing"):
                break
            jobs = [job for job in jobs if read_record(timing_path(self.output, job["digest"])) is None]
            task = {**task, "timings": jobs}
        self.reporter.ended("timing")
        if last["event"] != "end":
            self._note(f"not all training steps were timed: {last['reason']}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.reporter.note(text)

    # Results

    def _rows(self, grid: Grid) -> list[dict[str, Any]]:
        order = {name: place for place, name in enumerate(variant.name for variant in grid.variants)}
        sections = {section.name: place for place, section in enumerate(self.sections)}
        planned = [row for row in self.plan.rows if row.grid == grid.name]
        planned.sort(key=lambda row: (sections[row.section], order[row.variant], row.seed))
        return [row_of(row, self.plan, self.output, self.failures) for row in planned]

    def _write_rows(self, digests: Collection[str]) -> None:
        """Writes the rows of the grids that have a part in something that changed."""
        with self.lock:
            for grid in self.grids:
                rows = (row for row in self.plan.rows if row.grid == grid.name)
                if any(not {row.training, row.evaluation, *row.probes.values()}.isdisjoint(digests) for row in rows):
                    write_rows(self.output / grid.name, self._rows(grid), self.sections)

    def _write(self, *, finished: bool) -> None:
        """Writes everything of all grids."""
        with self.lock:
            for grid in self.grids:
                folder = self.output / grid.name
                rows = self._rows(grid)
                write_rows(folder, rows, self.sections)
                write_run(
                    folder,
                    grid,
                    self.options,
                    self.sections,
                    self.plan,
                    seeds=grid.seeds if self.options.seeds is None else self.options.seeds,
                    vocabulary_size=next(iter(self.plan.trainings.values())).options.model.vocabulary_size,
                    kinds={row["variant"]: row["kind"] for row in rows},
                    engine=self.engine.name,
                    jobs=self.jobs,
                    machine=self.machine,
                    machines=machines_of(rows),
                    finished=finished and all(row["status"] not in ("missing", "failed") for row in rows),
                )

    def _report(self) -> Path:
        """Tables and pages of every grid in the folder, by the room that knows how; gives the page over them."""
        from recollect.reports import write_ablation_report

        self.reporter.note("writing the report")
        return write_ablation_report(self.output).page


def _least(grid: Grid, variant: Variant, resolved: Resolved) -> dict[str, Any]:
    """The least of the values that `match_cost` may set, for checking a grid."""
    assert variant.match_cost is not None
    return {variant.match_cost.vary.partition(".")[2]: variant.match_cost.values[0]}
