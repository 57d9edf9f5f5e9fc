"""The report of an inspection: page, tables and per-token data, written into its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recollect.reports.files import write_bytes, write_text
from recollect.reports.inspection_kinds import KindTable, head_rows, kind_table, verdict, verdict_on_repeats
from recollect.reports.inspection_results import InspectionResults, load_inspection
from recollect.reports.statistics import Interval


@dataclass(frozen=True)
class InspectionFiles:
    """What was written. tokens_parquet is None where pyarrow is not installed; verdict and kinds are what they say."""

    page: Path
    summary_json: Path
    tokens_parquet: Path | None
    verdict: str
    kinds: tuple[dict[str, Any], ...]


def write_inspection(folder: Path | str) -> InspectionFiles:
    """Reads what `recollect inspect` found and writes inspection.html, inspection.json and tokens.parquet beside it.

    Raises ReportError when it cannot be read, before anything is written.
    """
    from recollect.reports.inspection_page import render_inspection

    results = load_inspection(folder)
    table = kind_table(results)
    summary = _summary(results, table)
    html = render_inspection(results, table)
    parquet = _write_parquet(results.folder / "tokens.parquet", results)
    summary_path = write_text(results.folder / "inspection.json", _json(summary))
    page = write_text(results.folder / "inspection.html", html)
    return InspectionFiles(page, summary_path, parquet, summary["verdict"], tuple(summary["kinds"]))


def _json(value: Any) -> str:
    import json

    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _summary(results: InspectionResults, table: KindTable) -> dict[str, Any]:
    run = {name: value for name, value in results.run.items() if name not in ("documents", "stored")}
    means = {
        name: float(np.exp(results[name].mean(dtype=np.float64)))
        for name in ("loss", "loss_without", *(("loss_twin",) if results.has_twin else ()))
    }
    return {
        "run": run,
        "tokens": results.tokens,
        "perplexity": means["loss"],
        "perplexity_without": means["loss_without"],
        "perplexity_twin": means.get("loss_twin"),
        "verdict": verdict(table),
        "verdict_on_repeats": verdict_on_repeats(table),
        "intervals": table.blocks.description,
        "kinds": [
            {
                "kind": row.kind,
                "tokens": row.tokens,
                "loss_without": row.loss_without,
                "loss": row.loss,
                "gain": _interval(row.gain),
                "gain_over_twin": _interval(row.gain_over_twin),
                "beyond_common_words": _interval(row.beyond_common),
                "beyond_common_words_far": _interval(row.beyond_common_far),
                "part_of_gain": row.part_of_gain,
                "occurrences": {
                    name: {"tokens": count, "gain": _interval(part)} for name, count, part in row.occurrences
                },
            }
            for row in table.rows
        ],
        "heads": head_rows(results),
    }


def _interval(part: Interval | None) -> dict[str, float] | None:
    return None if part is None else {"estimate": part.estimate, "low": part.low, "high": part.high}


def _write_parquet(path: Path, results: InspectionResults) -> Path | None:
    """A row a token; what belongs to a head is a list, layer by layer and head by head."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    names = [document.name for document in results.documents]
    texts = [
        results.documents[document].piece(position)
        for document, position in zip(results["document"], results["position"], strict=True)
    ]
    columns: dict[str, Any] = {
        "document": pyarrow.DictionaryArray.from_arrays(pyarrow.array(results["document"]), pyarrow.array(names)),
        "position": results["position"],
        "token": results["token"],
        "text": pyarrow.array(texts),
        "kind": _named(pyarrow, results["kind"], results.kinds),
        "occurrence": _named(pyarrow, results["occurrence"], list(results.run["occurrences"])),
        "loss": results["loss"],
        "loss_without": results["loss_without"],
        "loss_twin": results["loss_twin"],
        "gain": results.gain.astype(np.float32),
    }
    for name in ("share", "retrieved", "origin", "weight", "on_target", "before_target", "distance"):
        flat = results[name].reshape(results.tokens, -1)
        values = pyarrow.array(flat.astype(np.float32 if flat.dtype == np.float16 else flat.dtype).ravel())
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(values, flat.shape[1])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression="zstd")
    return write_bytes(path, sink.getvalue().to_pybytes())


def _named(pyarrow: Any, places: Any, names: list[str]) -> Any:
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(places), pyarrow.array(names))
