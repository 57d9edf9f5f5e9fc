"""Where and with what a comparison runs: machine, libraries, threads, commit, and the code that decides a figure."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from recollect.memory_backends.base import MemoryBackend
from recollect.memory_backends.registry import classes_of

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder that holds memory_backends/, model/ and suites/: the checkout's root, or the installed package."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)

LIBRARIES = (
    "torch",
    "numpy",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "cuvs-cu12",
    "triton",
    "scann",
    "hnswlib",
    "pynndescent",
    "numba",
    "tokenizers",
    "ray",
    "pylance",
    "pymilvus",
    "milvus-lite",
)
"""Distributions whose versions a result names, where they are installed."""

_MEASURING = (
    "cells",
    "crossover",
    "curve_settings",
    "curves",
    "measure",
    "noise",
    "oracle",
    "sharing",
    "workload",
    "workload_curves",
)
_EVALUATING = (
    "attention",
    "eviction",
    "evaluation",
    "evaluation_text",
    "gates",
    "hidden_keys",
    "local_attention",
    "memory_layer",
    "position_bias",
    "recording",
    "streams",
    "transformer",
    "trunk",
)
_NOT_MEASURED = ("testing", "testing_base", "testing_oracle", "storage", "atomic", "__init__")


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, system and Python, for run.json."""
    import psutil

    return {
        "cpu": _processor(),
        "cores": usable_cores(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


@cache
def _processor() -> str:
    try:
        import cpuinfo

        name = cpuinfo.get_cpu_info().get("brand_raw")
        if name:
            return str(name)
    except Exception:  # the package reads what each system offers, and raises what that raises
        pass
    return platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a figure, where they are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit_of(folder: Path = PACKAGE) -> str | None:
    """The git commit of the checkout that the code runs from; None where it is not a checkout."""
    try:
        # A copy installed into an environment inside some repository is not that repository's commit.
        if Path(_git(folder, "rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return _git(folder, "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def is_changed(folder: Path = PACKAGE) -> bool:
    """Whether tracked files of the checkout differ from its commit."""
    try:
        return bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return False


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


@cache
def core_digest() -> str:
    """Names the code that every figure depends on: the interface of memories, the model, the measurement."""
    files = [path for path in sorted((PACKAGE / "memory_backends").glob("*.py")) if path.stem not in _NOT_MEASURED]
    files += [PACKAGE / "model" / f"{name}.py" for name in _EVALUATING]
    files += [PACKAGE / "suites" / f"{name}.py" for name in _MEASURING]
    return _digest(files)


@cache
def training_digest() -> str:
    """Names the code that trained weights and their evaluation depend on."""
    return hashlib.sha256((core_digest() + _digest(sorted((PACKAGE / "model").glob("*.py")))).encode()).hexdigest()


def backend_digest(spec: str) -> str:
    """Names the code and the library versions of one backend, and of those that it is made of."""
    classes = classes_of(spec)
    built_on = [base for cls in classes for base in cls.__mro__ if issubclass(base, MemoryBackend)]
    sources = [Path(inspect.getfile(cls)) for cls in dict.fromkeys(built_on) if cls is not MemoryBackend]
    # Helpers beside it start with an underscore; which of them it uses is not asked.
    files = [*sources, *sorted(sources[0].parent.glob("_[a-z]*.py"))]
    distributions = _distributions()
    versions = []
    for need in (need for cls in classes for need in cls.requires):
        for distribution in sorted(set(distributions.get(need.module.partition(".")[0], ()))):
            versions.append(f"{distribution}={importlib.metadata.version(distribution)}")
    return hashlib.sha256(f"{_digest(files)}:{versions}".encode()).hexdigest()


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
