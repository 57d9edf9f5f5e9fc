"""A made-up ablation folder whose true effects are known: for tests, and for looking at the report.

    python -m recollect.reports.ablation_synthetic FOLDER     # three grids, their reports and the page over them

Every figure in it is invented; the page says so in its machine line.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.reports.files import write_bytes, write_text
from recollect.reports.synthetic import autocorrelated

SEEDS = (0, 1, 2)
LEVEL = math.log(40.0)
"""Mean loss of the reference on the first text; that of each further text is 0.1 higher."""


def write_synthetic_grid(
    folder: Path,
    grid: str,
    variants: Sequence[Mapping[str, Any]],
    *,
    reference: str,
    sections: Sequence[str] = ("code",),
    seeds: Sequence[int] = SEEDS,
    documents: int = 8,
    tokens_per_document: int = 1500,
    seed_spread: float = 0.003,
    token_spread: float = 0.15,
    paper: str = "",
    question: str = "",
) -> Path:
    """Fills `folder`/`grid` as `recollect ablate` does, losses in `folder`/evaluations. Returns the grid's folder.

    variants: name, and of these what is wanted: effect (added to the mean loss, nats), or effects by section; status by
        seed ({1: 'diverged'}); settings, kind, reference, summary; evaluation, training, costs and probes of its rows.
    seed_spread: standard deviation over seeds of each variant's own mean loss.
    token_spread: of what a variant and seed has of its own at each token, nothing on average.
    """
    target = folder / grid
    document = np.repeat(np.arange(documents), tokens_per_document)
    position = np.tile(np.arange(1, tokens_per_document + 1), documents)
    planned = [
        {
            "name": v["name"],
            "summary": v.get("summary", f"what {v['name']} is"),
            "kind": v.get("kind", "train"),
            "reference": v.get("reference", reference),
            "changes": {},
            "settings": v.get("settings", {}),
        }
        for v in variants
    ]
    write_text(
        target / "run.json", json.dumps(_run(grid, planned, reference, sections, seeds, paper, question), indent=1)
    )
    lines = []
    for number, section in enumerate(sections):
        # One text: what is hard is hard for every variant and seed.
        hard = LEVEL + 0.1 * number + 0.8 * autocorrelated(np.random.default_rng(number), len(document))
        hard += LEVEL + 0.1 * number - hard.mean()
        for place, variant in enumerate(variants):
            for seed in seeds:
                effect = variant.get("effects", {}).get(section, variant.get("effect", 0.0))
                generator = np.random.default_rng([_number(grid), number, place, seed])
                own = token_spread * autocorrelated(generator, len(document))
                own -= own.mean()
                luck = seed_spread * float(generator.normal())
                status = variant.get("status", {}).get(seed, "ok")
                row = _row(grid, section, variant, seed, status, reference)
                if status == "ok":
                    loss = np.maximum(hard + own + effect + luck, 0.01)
                    correct = loss < np.quantile(hard, 0.35)
                    row |= _figures(folder, grid, section, variant, seed, loss, correct, document, position, generator)
                lines.append(json.dumps(row))
    write_text(target / "rows.jsonl", "\n".join(lines) + "\n")
    return target


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _run(
    grid: str,
    planned: list[dict[str, Any]],
    reference: str,
    sections: Sequence[str],
    seeds: Sequence[int],
    paper: str,
    question: str,
) -> dict[str, Any]:
    return {
        "schema": 1,
        "grid": grid,
        "question": question or f"What does {grid} do?",
        "scale": "small",
        "reference": reference,
        "seeds": list(seeds),
        "sections": [
            {"name": s, "corpus": s, "corpus_digest": hashlib.sha256(s.encode()).hexdigest()} for s in sections
        ],
        "variants": planned,
        "paper": paper,
        "finished": True,
        "created": "2026-01-02T03:04:05+00:00",
        "recollect_version": "0.0.0",
        "commit": "0123456789abcdef",
        "machine": {
            "cpu": "Invented CPU: every figure on this page is made up",
            "cores": 2,
            "ram_gib": 8.0,
            "os": "Linux",
            "python": "3.11.2",
        },
        "libraries": {"torch": "2.13.0"},
        "spike_rule": "a loss far above those before it",
    }


def _row(grid: str, section: str, variant: Mapping[str, Any], seed: int, status: str, reference: str) -> dict[str, Any]:
    diverged = {"diverged_at": 120, "steps": 120} if status == "diverged" else None
    return {
        "schema": 1,
        "grid": grid,
        "section": section,
        "variant": variant["name"],
        "seed": seed,
        "status": status,
        "reason": "" if status == "ok" else f"made up <b>{status}</b>: loss | NaN",
        "kind": variant.get("kind", "train"),
        "reference": variant.get("reference", reference),
        "training": diverged,
        "evaluation": None,
        "costs": None,
        "probes": {},
        "system": {},
    }


def _figures(
    folder: Path,
    grid: str,
    section: str,
    variant: Mapping[str, Any],
    seed: int,
    loss: NDArray[np.float64],
    correct: NDArray[np.bool_],
    document: NDArray[np.int64],
    position: NDArray[np.int64],
    generator: np.random.Generator,
) -> dict[str, Any]:
    digest = hashlib.sha256(f"{grid}:{section}:{variant['name']}:{seed}".encode()).hexdigest()[:16]
    buffer = io.BytesIO()
    names = np.asarray([f"document-{n}" for n in range(int(document.max()) + 1)], dtype=np.str_)
    np.savez(
        buffer,
        loss=loss.astype(np.float32),
        correct=correct,
        document=document.astype(np.int32),
        position=position.astype(np.int32),
        document_names=names,
    )
    write_bytes(folder / "evaluations" / f"{digest}.npz", buffer.getvalue())
    return {
        "training": {
            "digest": digest,
            "steps": 300,
            "tokens": 307_200,
            "parameters": 1_300_000,
            "spikes": int(generator.integers(0, 2)),
            "gradient_norm_median": 1.0 + 0.05 * float(generator.normal()),
            "gradient_norm_max": 5.0 + 0.5 * float(generator.normal()),
            "step_ms": 200.0 + 2.0 * float(generator.normal()),
            **variant.get("training", {}),
        },
        "evaluation": {
            "perplexity": float(np.exp(loss.astype(np.float32).mean(dtype=np.float64))),
            "accuracy": float(correct.mean()),
            "tokens": len(loss),
            "us_per_token": 80.0 + float(generator.normal()),
            "backend": "exact",
            "memory_size": 2048,
            "k": 32,
            "losses": f"../evaluations/{digest}.npz",
            **variant.get("evaluation", {}),
        },
        "costs": {
            "memory_bytes": 2_097_152,
            "cache_bytes": 0,
            "parameter_bytes": 5_200_000,
            **variant.get("costs", {}),
        },
        "probes": variant.get("probes", {}),
    }


def write_synthetic_ablations(folder: Path) -> Path:
    """Three grids: gates with a diverged seed, memory sizes on two texts, search pairs. Returns `folder`."""
    write_synthetic_grid(
        folder,
        "gate",
        [
            {"name": "head"},
            {"name": "token", "effect": -0.03},
            {"name": "layer", "effect": 0.0},
            {"name": "fixed", "effect": 0.05, "training": {"gradient_norm_max": 9.0}},
            {"name": "joint", "effect": 0.02, "status": {1: "diverged"}},
        ],
        reference="head",
        question="Which gate joins memory and local attention best?",
    )
    sizes = (0, 512, 2048, 8192, 65_536)
    write_synthetic_grid(
        folder,
        "memory",
        [
            {
                "name": f"{size}" if size else "none",
                "effects": {"code": -0.04 * i, "books": -0.01 * min(i, 3)},
                "evaluation": {"memory_size": size, "backend": "exact" if size else "none"},
                "costs": {"memory_bytes": 1024 * size},
                "settings": {"model": {"memory_size": size, "k": 32, "layers": 6, "memory_layers": [3]}},
            }
            for i, size in enumerate(sizes)
        ],
        reference="none",
        sections=("code", "books"),
        paper="memory",
        question="How large should the memory be?",
    )
    write_synthetic_grid(
        folder,
        "search-pairs",
        [
            {
                "name": f"{trained}-{evaluated}",
                "effect": effect,
                "settings": {"training": {"backend": trained}},
                "evaluation": {"backend": evaluated},
            }
            for trained, evaluated, effect in (
                ("exact", "exact", 0.0),
                ("exact", "hnswlib", 0.06),
                ("hnswlib", "exact", 0.01),
                ("hnswlib", "hnswlib", 0.03),
            )
        ],
        reference="exact-exact",
        question="Does training with an index teach the model to bear its errors?",
    )
    return folder


if __name__ == "__main__":
    from recollect.reports import write_ablation_report

    if len(sys.argv) != 2:
        sys.exit("usage: python -m recollect.reports.ablation_synthetic FOLDER")
    print(write_ablation_report(write_synthetic_ablations(Path(sys.argv[1]))).page)
