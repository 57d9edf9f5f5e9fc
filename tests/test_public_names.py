"""The public names, pinned: what stands here stays until a release says otherwise."""

from __future__ import annotations

import ast
import inspect

import pytest

import recollect

PUBLIC_NAMES = [
    "AblateError",
    "AblateOptions",
    "AblateResult",
    "AblationReport",
    "AnnBenchmark",
    "AttachedMemory",
    "BackendInfo",
    "BackendUnavailable",
    "BuildFailed",
    "Capabilities",
    "Checkpoint",
    "CheckpointError",
    "ClosedMemory",
    "CollectedKeys",
    "CompareOptions",
    "CompareResult",
    "ConfigurationError",
    "Continuation",
    "Corpus",
    "CorpusError",
    "CorruptMemory",
    "CrossoverError",
    "CrossoverOptions",
    "CrossoverResult",
    "DiskFull",
    "Document",
    "DocumentSegments",
    "DocumentStreams",
    "EvaluationOptions",
    "EvaluationResult",
    "EvaluationText",
    "Generation",
    "GenerationError",
    "GenerationOptions",
    "Inspection",
    "InspectionFiles",
    "InspectionOptions",
    "InvalidInput",
    "InvalidSpec",
    "KeyLog",
    "KnnEvaluationResult",
    "KnnLanguageModelOptions",
    "Memorized",
    "MemorizingTransformer",
    "MemoryBackend",
    "MemoryBackendError",
    "MemoryCallback",
    "MemoryChoice",
    "MemoryComparison",
    "MemorySettings",
    "MemorySpecification",
    "MemoryStats",
    "MemoryStore",
    "ModelConfig",
    "ModelOutput",
    "ModelState",
    "NotFinite",
    "OptionInfo",
    "OutOfMemory",
    "OverBudget",
    "Reader",
    "Recording",
    "ReportError",
    "ReportFiles",
    "Requirement",
    "Sampling",
    "SearchResult",
    "SpalmEvaluationResult",
    "SpalmOptions",
    "StoreError",
    "StoreMissing",
    "StoreUnreachable",
    "TokenLosses",
    "TokenizedDocuments",
    "Tokenizer",
    "Trace",
    "TrainableParameters",
    "TrainingOptions",
    "TrainingResult",
    "TrunkOutput",
    "TrunkStore",
    "TuneError",
    "TuneOptions",
    "TuneResult",
    "UnknownBackend",
    "UnsupportedModel",
    "UnsupportedOperation",
    "UnusableMemory",
    "WriteConflict",
    "__version__",
    "ablate",
    "attach_memory",
    "backend_names",
    "canonical_spec",
    "choose_text",
    "choose_trainable",
    "collect_keys",
    "compare",
    "compute_trunk",
    "continue_text",
    "crossover",
    "describe_backend",
    "evaluate",
    "evaluate_knn_lm",
    "evaluate_spalm",
    "evaluate_with_store",
    "export_ann_benchmarks",
    "forget_snapshot",
    "inspect",
    "list_backends",
    "list_snapshots",
    "load_ann_benchmarks",
    "load_attached",
    "load_backend",
    "load_checkpoint",
    "load_corpus",
    "load_documents",
    "load_results",
    "load_tokenizer",
    "load_trace",
    "make_backend",
    "memorize",
    "populate",
    "record",
    "reference_checkpoint",
    "replay",
    "restore_memory",
    "save_checkpoint",
    "snapshot_memory",
    "tokenize",
    "train",
    "train_tokenizer",
    "tune",
    "with_memory",
    "write_ablation_report",
    "write_inspection",
    "write_report",
]


def test_public_names_are_these() -> None:
    assert sorted(recollect.__all__) == sorted(PUBLIC_NAMES)
    assert set(dir(recollect)) == set(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_names_load_and_are_documented(name: str) -> None:
    value = getattr(recollect, name)
    assert isinstance(value, str) or inspect.getdoc(value)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(recollect))
    seen = {
        alias.name
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen | {"__version__"} == set(recollect.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no public name 'make_backends'"):
        recollect.make_backends  # noqa: B018
