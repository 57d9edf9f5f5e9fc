"""Results of a crossover, made up from formulas, for tests of what is written about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recollect.memory_backends.atomic import write_json
from recollect.reports.crossing_results import FILE, SCHEMA


def made_row(queries: int, recall: float, ratio: float | None, *, append: float = 0.0) -> dict[str, Any]:
    row: dict[str, Any] = {
        "queries": queries,
        "recall_wanted": recall,
        "exact_ms": 10.0,
        "rounds": 20,
        "reference_ms": 5.0,
        "noisy": False,
        "spec": None,
        "recall": 0.5,
        "append_ms": 10 * append,
        "exact_append_ms": 0.0,
    }
    if ratio is not None:
        low, high = ratio / 1.05, ratio * 1.05
        row |= {"spec": f"one:<b>={recall}", "recall": 0.97, "search_ms": 10 * ratio}
        row |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
        row |= {"step_ratio": ratio + append, "step_ratio_low": low + append, "step_ratio_high": high + append}
    return row


def made_results(
    folder: Path, indexes: dict[str, Any], *, recalls: tuple[float, ...] = (0.95,), append: float = 0.5
) -> Path:
    """Writes crossover.json: `indexes` gives by registry string the ratio as a function of size and recall."""
    points = []
    for index, ratio in indexes.items():
        for size in (512, 1024, 2048, 4096, 8192):
            rows = [made_row(512, recall, ratio(size, recall), append=append) for recall in recalls]
            points.append(
                {"index": index, "backend": index.partition(":")[0], "size": size, "memories": 8, "rows": rows}
            )
    run = {
        "recollect_version": "0",
        "created": "2026-01-01T00:00:00+00:00",
        "machine": {"cpu": "a processor", "cores": 2, "ram_gib": 8, "os": "an OS", "python": "3.12"},
        "libraries": {"torch": "2"},
        "threads": 2,
        "device": "cpu",
        "seed": 0,
        "commit": None,
        "uncommitted_changes": None,
        "memories": 8,
        "queries": [512],
        "recalls": list(recalls),
        "k": 32,
        "dim": 64,
        "keys": "made-up keys",
        "minutes": 1.0,
        "stopped": dict.fromkeys(indexes, "larger memories would not change the answers"),
        "failed": [],
        "not_installed": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"schema": SCHEMA, "run": run, "points": points})
    return folder
