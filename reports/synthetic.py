"""A made-up result folder with plausible curves: for tests, and for looking at the report without measuring anything.

    python -m recollect.reports.synthetic FOLDER     # writes the results and the report of them

Every figure in it is invented; the page says so in its machine line.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from recollect.reports.files import write_bytes, write_text

SIZES = (512, 2048, 8192, 32768)
SEGMENT, ROWS, HEADS, K, DIM = 128, 4, 4, 32, 64

# spec: (recall at 8192 keys, recall lost per quadrupling, fixed ms, ms per 1000 keys, growth, append us, extra bytes)
SPECS: dict[str, tuple[float, float, float, float, float, float, float]] = {
    "exact": (1.0, 0.0, 0.4, 0.9, 1.0, 0.2, 0.0),
    "approx-topk:recall=0.95": (0.953, 0.0, 0.4, 0.62, 1.0, 0.2, 0.0),
    "approx-topk:recall=0.99": (0.991, 0.0, 0.45, 0.7, 1.0, 0.2, 0.0),
    "degraded:drop=0.05": (0.95, 0.0, 0.5, 1.0, 1.0, 0.2, 0.0),
    "degraded:drop=0.2": (0.8, 0.0, 0.5, 1.0, 1.0, 0.2, 0.0),
    "degraded:drop=0.5": (0.5, 0.0, 0.5, 1.0, 1.0, 0.2, 0.0),
    "degraded:drop=0.9": (0.1, 0.0, 0.5, 1.0, 1.0, 0.2, 0.0),
    "faiss-flat": (1.0, 0.0, 0.7, 2.6, 1.0, 0.3, 256.0),
    "faiss-hnsw:ef_search=128": (0.97, 0.012, 9.0, 1.2, 0.3, 60.0, 400.0),
    "faiss-hnsw:ef_search=32": (0.89, 0.03, 4.0, 0.6, 0.3, 60.0, 400.0),
    "faiss-ivf:nlist=64,nprobe=16": (0.96, 0.01, 1.2, 0.85, 0.8, 1.4, 264.0),
    "faiss-ivf:nlist=64,nprobe=4": (0.82, 0.02, 0.9, 0.35, 0.8, 1.4, 264.0),
    "faiss-ivfpq:m=16,nlist=64,nprobe=16": (0.71, 0.02, 1.1, 0.4, 0.8, 2.1, 26.0),
    "hnswlib:ef_search=128": (0.975, 0.012, 8.0, 1.0, 0.3, 55.0, 410.0),
    "hnswlib:ef_search=32": (0.9, 0.03, 3.5, 0.5, 0.3, 55.0, 410.0),
    "pynndescent": (0.93, 0.02, 20.0, 2.0, 0.4, 190.0, 700.0),
    "scann:leaves_to_search=16": (0.94, 0.01, 2.0, 0.3, 0.7, 9.0, 90.0),
    "scann:leaves_to_search=4": (0.84, 0.02, 1.6, 0.15, 0.7, 9.0, 90.0),
}


def write_synthetic_results(
    folder: Path,
    *,
    documents: int = 24,
    tokens_per_document: int = 640,
    sizes: tuple[int, ...] = SIZES,
    specs: tuple[str, ...] | None = None,
    seed: int = 0,
    with_losses: bool = True,
    with_crossover: bool = True,
    with_curves: bool = True,
    twin: bool = True,
) -> Path:
    """Fills `folder` with run.json, cells, losses, curves.json and crossover.json, as `recollect compare` does.

    Returns it.
    """
    generator = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents, dtype=np.int32), tokens_per_document)
    position = np.tile(np.arange(tokens_per_document, dtype=np.int32), documents)
    base = autocorrelated(generator, len(document)) * 1.2 + math.log(36.0)
    copying = np.clip(autocorrelated(generator, len(document)) + 0.9, 0, None)
    copying /= copying.mean()
    names = [f"package_{i}" for i in range(documents)]
    run = _run(sizes, documents, len(document), names, seed)
    if twin:
        run["twin"] = {"name": "trained without memory on the same tokens", "perplexity": 34.5}
    write_text(folder / "run.json", json.dumps(run, indent=1))
    _cell(folder, run, "none", "none", 0, base if with_losses else None, float(np.exp(base.mean())), document, position)
    for size in sizes:
        for spec in specs or tuple(SPECS):
            recall, slope, fixed, per_thousand, growth, append, extra = SPECS[spec]
            steps = math.log(size / 8192, 4)
            recall = float(np.clip(recall - slope * steps, 0.02, 1.0))
            if spec == "scann:leaves_to_search=4" and size == 512:
                _cell(folder, run, spec, "scann", size, status="skipped", reason="needs 1024 keys or more to train")
                continue
            mass = 1 - (1 - recall) ** 1.3
            gain = 0.33 * (1 - math.exp(-size / 1500)) * mass**0.8
            noise = 0.0 if spec == "exact" else 0.01 * (1 - recall + 0.02)
            losses = base - copying * gain + noise * autocorrelated(generator, len(base))
            ms = fixed + per_thousand * size / 1000 * (size / 8192) ** (growth - 1)
            figures: dict[str, Any] = {
                "recall_at_k": recall,
                "softmax_mass": mass,
                "accuracy": 0.3 + 0.2 * gain,
                "tokens": len(losses),
                "search_ms": ms,
                "search_ms_low": ms * 0.97,
                "search_ms_high": ms * 1.05,
                "search_ms_p50": ms,
                "search_ms_p95": ms * 1.1,
                "search_ms_p99": ms * 1.3,
                "search_ms_cold": ms * 1.2,
                "search_first_ms": ms * 1.5,
                "searches": 40,
                "append_ms_p50": append * SEGMENT * ROWS * HEADS / 1000,
                "append_ms_p95": append * SEGMENT * ROWS * HEADS / 900,
                "append_ms_p99": append * SEGMENT * ROWS * HEADS / 500,
                "reference_ms": 5.0,
                "noisy": spec.startswith("pynndescent"),
                "append_us_per_key": append * (1 + 0.05 * steps),
                "build_seconds": append * size * ROWS * HEADS / 1e6,
                "key_bytes": 4.0 * DIM * size * ROWS * HEADS,
                "index_bytes": extra * size * ROWS * HEADS,
                "bytes_per_key": 4.0 * DIM + extra,
                "streaming": _streaming(recall, append, ms, generator),
            }
            backend = spec.split(":")[0]
            perplexity = float(np.exp(losses.mean()))
            kept = losses if with_losses else None
            _cell(folder, run, spec, backend, size, kept, perplexity, document, position, **figures)
        reason = (
            "ImportError: no library 'vectorama' here; pip install 'vectorama>=2' <script>alert(\"x\")</script> | & 'q'"
        )
        _cell(folder, run, "vectorama:mode='<b>\"fast\"</b>'", "vectorama", size, status="failed", reason=reason)
    if with_curves:
        content = {"schema": 1, "provenance": _provenance(run), "curves": _curves(specs or tuple(SPECS), sizes)}
        write_text(folder / "curves.json", json.dumps(content))
    if with_crossover:
        write_text(
            folder / "crossover.json",
            json.dumps({"schema": 1, "provenance": _provenance(run), "rows": _crossover(specs or tuple(SPECS))}),
        )
    return folder


def _run(sizes: tuple[int, ...], documents: int, tokens: int, names: list[str], seed: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "recollect_version": "0.0.0",
        "created": "2026-01-02T03:04:05+00:00",
        "machine": {
            "cpu": "Invented CPU: every figure on this page is made up",
            "cores": 2,
            "ram_gib": 8.0,
            "os": "Linux",
            "python": "3.11.2",
        },
        "libraries": {"torch": "2.13.0", "faiss-cpu": "1.15.0", "hnswlib": "0.8.0", "scann": "1.4.0"},
        "threads": 1,
        "seed": seed,
        "corpus": {
            "name": "synthetic",
            "digest": hashlib.sha256(b"synthetic").hexdigest(),
            "split": "test",
            "documents": documents,
            "tokens": tokens,
            "document_names": names,
        },
        "checkpoint": {
            "name": "synthetic",
            "digest": hashlib.sha256(b"checkpoint").hexdigest(),
            "parameters": 2_900_000,
            "config": {"layers": 3, "width": 256, "heads": HEADS, "head_dim": DIM, "memory_layers": [1]},
        },
        "commit": "0123456789abcdef",
        "code": hashlib.sha256(b"code").hexdigest(),
        "device": "cpu",
        "k": K,
        "segment_length": SEGMENT,
        "rows": ROWS,
        "max_tokens": tokens,
        "memory_sizes": [0, *sizes],
        "twin": None,
    }


def _provenance(run: dict[str, Any]) -> dict[str, Any]:
    names = ("machine", "libraries", "threads", "device", "seed", "commit", "code", "k")
    return {name: run[name] for name in names}


def _curves(specs: tuple[str, ...], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """A curve of five points for each spec, its own among them; one point where it is exact."""
    made = []
    for size in sizes:
        for spec in specs:
            recall, slope, fixed, per_thousand, growth, _, _ = SPECS[spec]
            if spec.startswith("degraded"):
                continue
            name, _, options = spec.partition(":")
            own = float(np.clip(recall - slope * math.log(size / 8192, 4), 0.02, 1.0))
            ms = 0.9 * (fixed + per_thousand * size / 1000 * (size / 8192) ** (growth - 1))
            exact_ms = 0.9 * (0.4 + 0.9 * size / 1000)
            points = []
            for effort in (1.0,) if own == 1.0 else (0.3, 0.6, 1.0, 2.0, 4.0):
                found = 1 - (1 - own) ** min(effort, 3.0) if effort != 1.0 else own
                took = ms * (0.3 + 0.7 * effort)
                points.append(
                    {
                        "spec": spec if effort == 1.0 else f"{name}:{options + ',' if options else ''}effort={effort}",
                        "backend": name,
                        "memory_size": size,
                        "k": K,
                        "recall_at_k": found,
                        "softmax_mass": 0.97 * (1 - (1 - found) ** 1.3),
                        "search_ms": took,
                        "search_ms_low": took * 0.97,
                        "search_ms_high": took * 1.04,
                        "search_ms_p95": took * 1.1,
                        "search_ms_p99": took * 1.2,
                        "samples": 12,
                        "exact_ratio": took / exact_ms,
                        "exact_ratio_low": 0.97 * took / exact_ms,
                        "exact_ratio_high": 1.04 * took / exact_ms,
                        "reference_ms": 5.0,
                        "noisy": name == "pynndescent",
                    }
                )
            made.append({"build": spec, "backend": name, "memory_size": size, "points": points, "reason": ""})
    return made


def autocorrelated(generator: np.random.Generator, count: int, correlation: float = 0.8) -> np.ndarray:
    """(count,) first-order autoregressive noise of unit variance."""
    from scipy.signal import lfilter

    noise = generator.normal(size=count) * math.sqrt(1 - correlation**2)
    return np.asarray(lfilter([1.0], [1.0, -correlation], noise))


def _streaming(recall: float, append: float, ms: float, generator: np.random.Generator) -> dict[str, list[float]]:
    turnover = [0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    wobble = 1 + 0.05 * generator.normal(size=len(turnover))
    return {
        "turnover": turnover,
        "recall": [min(1.0, recall + 0.3 * (1 - recall) / (1 + t)) for t in turnover],
        "append_us": [append * float(w) for w in wobble],
        "search_ms": [ms * min(1.0, t) * float(w) for t, w in zip(turnover, wobble, strict=True)],
    }


def _cell(
    folder: Path,
    run: dict[str, Any],
    spec: str,
    backend: str,
    size: int,
    losses: np.ndarray | None = None,
    perplexity: float | None = None,
    document: np.ndarray | None = None,
    position: np.ndarray | None = None,
    *,
    status: str = "ok",
    reason: str | None = None,
    **figures: Any,
) -> None:
    identity = f"{backend}-{size}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"
    name = None
    if losses is not None:
        name = f"losses/{identity}.npz"
        buffer = io.BytesIO()
        assert document is not None
        assert position is not None
        np.savez(buffer, loss=losses.astype(np.float32), document=document, position=position)
        write_bytes(folder / name, buffer.getvalue())
    cell = {"schema": 1, "spec": spec, "backend": backend, "memory_size": size, "k": run["k"], "status": status}
    cell |= {"provenance": _provenance(run)}
    cell |= {"reason": reason, "perplexity": perplexity, "seed": run["seed"], "losses": name, **figures}
    write_text(folder / "cells" / f"{identity}.json", json.dumps(cell))


def _crossover(specs: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for size in (8192, 32768, 131072, 524288):
        for spec in specs:
            recall, slope, fixed, per_thousand, growth, append, _ = SPECS[spec]
            if spec.startswith("degraded"):
                continue
            rows.append(
                {
                    "spec": spec,
                    "backend": spec.split(":")[0],
                    "memory_size": size,
                    "num_memories": 1,
                    "queries": 512,
                    "k": K,
                    "search_ms": 0.3 * (fixed + per_thousand * size / 1000 * (size / 8192) ** (growth - 1)),
                    "recall_at_k": max(0.05, min(1.0, recall - slope * math.log(size / 8192, 4))),
                    "build_seconds": append * size / 1e6,
                }
            )
    return rows


if __name__ == "__main__":
    from recollect.reports import write_report

    if len(sys.argv) != 2:
        sys.exit("usage: python -m recollect.reports.synthetic FOLDER")
    print(write_report(write_synthetic_results(Path(sys.argv[1]))).page)
