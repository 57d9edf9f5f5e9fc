"""A plan in words, for `recollect ablate --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .grid import Grid, Variant
from .jobs import Plan, read_record
from .options import AblateOptions
from .plan import chosen_variants
from .progress import minutes
from .runner import plan_ablation


def describe_plan(options: AblateOptions) -> dict[str, Any]:
    """Grids, trainings, evaluations and the time expected; everything is checked, nothing is trained.

    Raises:
        AblateError, CorpusError: something cannot be run as asked.
    """
    grids, sections, plan = plan_ablation(options)
    left = [job for job in plan.trainings.values() if job.state() == "open"]
    evaluations = [
        job
        for job in plan.evaluations.values()
        if read_record(job.path(job_output(options))) is None and plan.trainings[job.training].state() != "diverged"
    ]
    seconds = (sum(job.seconds for job in left) + sum(job.seconds for job in evaluations)) / (options.jobs or 1)
    return {
        "grids": [
            {
                "grid": grid.name,
                "question": grid.question,
                "reference": grid.reference,
                "variants": {
                    variant.name: _line(grid, variant, plan) for variant in chosen_variants(grid, options.variants)
                },
            }
            for grid in grids
        ],
        "plan": {
            "scale": options.scale,
            "corpora": [section.name for section in sections],
            "rows": len(plan.rows),
            "trainings": len(plan.trainings),
            "trainings_shared": len(plan.rows) - len(plan.trainings),
            "trainings_left": len(left),
            "evaluations": len(plan.evaluations),
            "evaluations_left": len(evaluations),
            "tokens_to_train": sum(job.options.tokens for job in left),
            "jobs": options.jobs or 1,
            "expected": minutes(seconds),
            "expected_seconds": round(seconds),
            "output": str(job_output(options)),
        },
    }


def job_output(options: AblateOptions) -> Path:
    """The output folder, absolute."""
    return Path(options.output).resolve()


def _line(grid: Grid, variant: Variant, plan: Plan) -> str:
    rows = [row for row in plan.rows if row.grid == grid.name and row.variant == variant.name]
    job = plan.trainings[rows[0].training]
    users = {(row.grid, row.variant) for row in plan.rows if row.training == job.digest} - {(grid.name, variant.name)}
    parts = [rows[0].kind, f"checkpoint {job.digest[:8]}"]
    if users:
        parts.append(
            "shared with "
            + ", ".join(name if other == grid.name else f"{other}/{name}" for other, name in sorted(users))
        )
    if variant.match_cost is not None:
        parts.append(f"{variant.match_cost.vary} is set by {variant.match_cost.of}, measured when it runs")
    if job.state() != "open":
        parts.append(job.state())
    if rows[0].skip:
        parts.append(f"skipped: {rows[0].skip}")
    changes = ", ".join(f"{key}={value}" for key, value in variant.changes.items())
    return "; ".join([changes or "the reference model", *parts])
