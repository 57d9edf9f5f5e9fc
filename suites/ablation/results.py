"""The files of a grid that reports read: run.json and rows.jsonl, from the records of trainings and evaluations."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recollect._version import __version__
from recollect.memory_backends.atomic import write_json, write_text

from ..environment import commit_of, is_changed, library_versions
from .grid import Grid
from .jobs import DIVERGED, EVALUATIONS, TRAINED, Plan, PlannedRow, read_record
from .options import AblateOptions
from .plan import chosen_variants
from .provenance import mixed_in
from .sections import Section
from .stability import SPIKE_RULE
from .timing import timing_path

SCHEMA = 1
RUN, ROWS, GRID = "run.json", "rows.jsonl", "grid.toml"

_TRAINING = (
    "digest",
    "steps",
    "tokens",
    "parameters",
    "seconds",
    "step_ms",
    "final_loss",
    "spikes",
    "gradient_norm_median",
    "gradient_norm_max",
    "diverged_at",
    "machine",
)
_TIMED = ("step_ms", "reference_step_ms", "step_ratio")
_EVALUATION = (
    "digest",
    "perplexity",
    "accuracy",
    "tokens",
    "seconds",
    "us_per_token",
    "backend",
    "memory_size",
    "k",
    "text",
)


def row_of(planned: PlannedRow, plan: Plan, output: Path, failures: Mapping[str, str]) -> dict[str, Any]:
    """One line of rows.jsonl, with what is there by now."""
    row: dict[str, Any] = {
        "schema": SCHEMA,
        "grid": planned.grid,
        "section": planned.section,
        "variant": planned.variant,
        "seed": planned.seed,
        "status": "missing",
        "reason": "",
        "kind": planned.kind,
        "reference": planned.reference,
        "training": None,
        "evaluation": None,
        "costs": None,
        "probes": {},
        "system": {},
    }
    if planned.skip:
        return {**row, "status": "skipped", "reason": planned.skip}
    job = plan.trainings[planned.training]
    trained = read_record(job.folder / TRAINED)
    diverged = read_record(job.folder / DIVERGED)
    found = trained or diverged
    if found is not None:
        defaults = {"digest": job.digest, "steps": job.options.steps, "tokens": job.options.tokens}
        row["training"] = {name: {**defaults, **found}.get(name) for name in _TRAINING}
    if trained is None and diverged is not None:
        return {**row, "status": "diverged", "reason": diverged["reason"]}
    for name, digest in planned.probes.items():
        record = read_record(plan.evaluations[digest].path(output))
        if record is not None:
            row["probes"][name] = {"numbers": record["numbers"], "rows": record["rows"]}
    record = read_record(plan.evaluations[planned.evaluation].path(output))
    wanted = (planned.training, planned.evaluation, *planned.probes.values())
    reason = next((failures[digest] for digest in wanted if digest in failures), "")
    if record is None:
        return {**row, "status": "failed" if reason else "missing", "reason": reason}
    row["system"] = record["system"]
    timed = read_record(timing_path(output, planned.timing)) or {}
    row["costs"] = {**record["costs"], **{name: timed[name] for name in _TIMED if name in timed}}
    if timed.get("machine"):
        row["costs"]["timed_on"] = timed["machine"]
    names = (
        "digest",
        "perplexity",
        "accuracy",
        "tokens",
        "seconds",
        "us_per_token",
        "backend",
        "memory_size",
        "k",
        "text",
    )
    row["evaluation"] = {name: record[name] for name in names}
    row["evaluation"]["machine"] = record.get("machine")
    row["evaluation"]["losses"] = f"../{EVALUATIONS}/{planned.evaluation}.npz"
    # A probe that failed leaves the row's own figures as they are, and says so.
    return {**row, "status": "ok", "reason": reason}


def machines_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many rows were trained on each machine, by name; rows that do not say are left out."""
    trained = (row["training"] or {} for row in rows)
    return dict(Counter(str(training["machine"]) for training in trained if training.get("machine")))


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], sections: Sequence[Section]) -> None:
    """Writes rows.jsonl, whole or not at all; rows of other sections, from earlier calls, stay."""
    here = {section.name for section in sections}
    rows = [*(row for row in read_rows(folder) if row["section"] not in here), *rows]
    write_text(folder / ROWS, "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows that lie in a grid's folder; empty where there are none that can be read."""
    try:
        lines = (folder / ROWS).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def write_run(
    folder: Path,
    grid: Grid,
    options: AblateOptions,
    sections: Sequence[Section],
    plan: Plan,
    *,
    seeds: int,
    vocabulary_size: int,
    kinds: Mapping[str, str],
    engine: str,
    jobs: int,
    machine: Mapping[str, Any],
    machines: Mapping[str, int],
    finished: bool,
) -> None:
    """Writes run.json and the grid's own text."""
    before = read_record(folder / RUN)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    commit = commit_of()
    here = {section.name for section in sections}
    others = [section for section in (before or {}).get("sections", []) if section["name"] not in here]
    write_json(
        folder / RUN,
        {
            "schema": SCHEMA,
            "recollect_version": __version__,
            "grid": grid.name,
            "question": grid.question,
            "scale": grid.scale,
            "reference": grid.reference,
            "paper": grid.paper,
            "seeds": list(range(seeds)),
            "sections": [
                *others,
                *(
                    {
                        "name": section.name,
                        "corpus": Path(section.source).name,
                        "corpus_digest": section.digest,
                        "tokenizer_digest": section.tokenizer_key(vocabulary_size),
                    }
                    for section in sections
                ),
            ],
            "variants": [
                {
                    "name": variant.name,
                    "summary": variant.summary,
                    "kind": kinds.get(variant.name, "train"),
                    "reference": variant.reference,
                    "changes": variant.changes,
                    "settings": plan.settings.get((grid.name, variant.name)),
                    "system_options": variant.options,
                }
                for variant in chosen_variants(grid, options.variants)
            ],
            "spike_rule": SPIKE_RULE,
            "machine": machine,
            "machines": machines,
            "engine": engine,
            "libraries": library_versions(),
            "threads": options.threads,
            "mixed": mixed_in(folder.parent),
            "jobs": jobs,
            "commit": commit,
            "uncommitted_changes": is_changed() if commit else None,
            "created": (before or {}).get("created", now),
            "updated": now,
            "finished": finished,
        },
    )
    write_text(folder / GRID, grid.text)
