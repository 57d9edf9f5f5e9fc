"""Which exceptions are a user's to mend, and how they are told on the command line."""

from __future__ import annotations

import errno
import importlib
import sys

# Named by text, so that telling an error never imports a room that was not in use.
_ROOTS = (
    ("recollect.memory_backends.errors", "MemoryBackendError"),
    ("recollect.model.documents", "CorpusError"),
    ("recollect.model.configuration", "ConfigurationError"),
    ("recollect.model.checkpoints", "CheckpointError"),
    ("recollect.model.training", "TrainingDiverged"),
    ("recollect.model.rank_errors", "RankError"),
    ("recollect.model.sampling", "GenerationError"),
    ("recollect.pretrained.store", "StoreError"),
    ("recollect.suites.cells", "CellError"),
    ("recollect.suites.comparison", "CompareError"),
    ("recollect.suites.engines", "EngineError"),
    ("recollect.suites.crossover_options", "CrossoverError"),
    ("recollect.suites.tuning_options", "TuneError"),
    ("recollect.suites.ablation.options", "AblateError"),
    ("recollect.suites.planning.amounts", "PlanError"),
    ("recollect.suites.provenance", "MixedResults"),
    ("recollect.reports.errors", "ReportError"),
)


def explain(error: BaseException) -> str | None:
    """The message to show for an error that a user can mend; None for any other, which is a fault of ours."""
    for module_name, class_name in _ROOTS:
        module = sys.modules.get(module_name)
        root = getattr(module, class_name, None) if module else None
        if root is not None and isinstance(error, root):
            return f"error: {error}"
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        remedy = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again, earlier results are kept",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
            errno.EACCES: "permission denied; choose another --output or mend the permissions",
            errno.EROFS: "the file system is read-only; choose another --output",
        }.get(error.errno or 0, error.strerror or str(error))
        return f"error: {remedy}{place}"
    return None


def check_roots() -> list[str]:
    """Names in the table above that no longer exist; a test holds that there are none."""
    return [f"{module}.{name}" for module, name in _ROOTS if not hasattr(importlib.import_module(module), name)]
