"""recollect: which kNN index should hold a language model's memory, and what does the choice cost?

Every public name is importable from here; each is loaded when it is first used, so that `import recollect` costs
nothing and no index library is imported before a backend that needs it is made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from recollect._version import __version__

if TYPE_CHECKING:
    from recollect.memory_backends import (
        BackendInfo,
        BackendUnavailable,
        BuildFailed,
        Capabilities,
        ClosedMemory,
        CorruptMemory,
        DiskFull,
        InvalidInput,
        InvalidSpec,
        MemoryBackend,
        MemoryBackendError,
        MemoryStats,
        NotFinite,
        OptionInfo,
        OutOfMemory,
        OverBudget,
        Requirement,
        SearchResult,
        StoreMissing,
        StoreUnreachable,
        UnknownBackend,
        UnsupportedOperation,
        UnusableMemory,
        WriteConflict,
        backend_names,
        canonical_spec,
        describe_backend,
        list_backends,
        load_backend,
        make_backend,
    )
    from recollect.memory_backends.key_log import (
        KeyLog,
    )
    from recollect.memory_backends.snapshots import (
        forget_snapshot,
        list_snapshots,
        restore_memory,
        snapshot_memory,
    )
    from recollect.model.ann_benchmarks import (
        AnnBenchmark,
        load_ann_benchmarks,
    )
    from recollect.model.checkpoints import (
        Checkpoint,
        CheckpointError,
        load_checkpoint,
        reference_checkpoint,
        save_checkpoint,
    )
    from recollect.model.configuration import (
        ConfigurationError,
        ModelConfig,
    )
    from recollect.model.corpus import (
        Corpus,
        load_corpus,
    )
    from recollect.model.documents import (
        CorpusError,
        Document,
    )
    from recollect.model.evaluation import (
        evaluate,
        replay,
    )
    from recollect.model.evaluation_text import (
        EvaluationText,
        choose_text,
        load_documents,
    )
    from recollect.model.evaluation_types import (
        EvaluationOptions,
        EvaluationResult,
        MemorySpecification,
        TokenLosses,
    )
    from recollect.model.generation import (
        Generation,
    )
    from recollect.model.knn_lm import (
        KnnEvaluationResult,
        KnnLanguageModelOptions,
        evaluate_knn_lm,
    )
    from recollect.model.reading import (
        Reader,
    )
    from recollect.model.recording import (
        Recording,
        record,
    )
    from recollect.model.sampling import (
        GenerationError,
        Sampling,
    )
    from recollect.model.spalm import (
        SpalmEvaluationResult,
        SpalmOptions,
        evaluate_spalm,
    )
    from recollect.model.streams import (
        DocumentStreams,
    )
    from recollect.model.token_cache import (
        TokenizedDocuments,
        tokenize,
    )
    from recollect.model.tokenizer import (
        Tokenizer,
        load_tokenizer,
        train_tokenizer,
    )
    from recollect.model.trace import (
        Trace,
    )
    from recollect.model.trace_export import (
        export_ann_benchmarks,
    )
    from recollect.model.trace_file import (
        load_trace,
    )
    from recollect.model.training import (
        train,
    )
    from recollect.model.training_free import (
        with_memory,
    )
    from recollect.model.training_options import (
        TrainingOptions,
        TrainingResult,
    )
    from recollect.model.transformer import (
        MemorizingTransformer,
        ModelOutput,
        ModelState,
    )
    from recollect.model.trunk import (
        TrunkOutput,
        TrunkStore,
        compute_trunk,
    )
    from recollect.pretrained.attach import (
        AttachedMemory,
        attach_memory,
        load_attached,
    )
    from recollect.pretrained.document_segments import (
        DocumentSegments,
    )
    from recollect.pretrained.errors import (
        UnsupportedModel,
    )
    from recollect.pretrained.evaluation import (
        MemoryChoice,
        MemoryComparison,
        evaluate_with_store,
    )
    from recollect.pretrained.fine_tuning import (
        MemoryCallback,
        TrainableParameters,
        choose_trainable,
    )
    from recollect.pretrained.generation import (
        Continuation,
        GenerationOptions,
        continue_text,
    )
    from recollect.pretrained.inspection import (
        InspectionOptions,
        inspect,
    )
    from recollect.pretrained.inspection_data import (
        Inspection,
    )
    from recollect.pretrained.memorizing import (
        Memorized,
        memorize,
    )
    from recollect.pretrained.population import (
        CollectedKeys,
        collect_keys,
        populate,
    )
    from recollect.pretrained.records import (
        MemorySettings,
    )
    from recollect.pretrained.store import (
        MemoryStore,
        StoreError,
    )
    from recollect.reports import (
        AblationReport,
        ReportError,
        ReportFiles,
        load_results,
        write_ablation_report,
        write_report,
    )
    from recollect.reports.inspection import (
        InspectionFiles,
        write_inspection,
    )
    from recollect.suites.ablation.options import (
        AblateError,
        AblateOptions,
        AblateResult,
    )
    from recollect.suites.ablation.runner import (
        ablate,
    )
    from recollect.suites.comparison import (
        compare,
    )
    from recollect.suites.crossover_options import (
        CrossoverError,
        CrossoverOptions,
        CrossoverResult,
    )
    from recollect.suites.crossover_run import (
        crossover,
    )
    from recollect.suites.options import (
        CompareOptions,
        CompareResult,
    )
    from recollect.suites.tuning_options import (
        TuneError,
        TuneOptions,
        TuneResult,
    )
    from recollect.suites.tuning_run import (
        tune,
    )

# Where each public name comes from; a test holds that this and the imports above agree.
_PUBLIC: dict[str, str] = {
    "recollect.memory_backends": (
        "BackendInfo BackendUnavailable BuildFailed Capabilities ClosedMemory CorruptMemory DiskFull InvalidInput "
        "InvalidSpec MemoryBackend MemoryBackendError MemoryStats NotFinite OptionInfo OutOfMemory OverBudget "
        "Requirement SearchResult StoreMissing StoreUnreachable UnknownBackend UnsupportedOperation UnusableMemory "
        "WriteConflict backend_names canonical_spec describe_backend list_backends load_backend make_backend"
    ),
    "recollect.memory_backends.key_log": "KeyLog",
    "recollect.memory_backends.snapshots": "forget_snapshot list_snapshots restore_memory snapshot_memory",
    "recollect.model.ann_benchmarks": "AnnBenchmark load_ann_benchmarks",
    "recollect.model.checkpoints": "Checkpoint CheckpointError load_checkpoint reference_checkpoint save_checkpoint",
    "recollect.model.configuration": "ConfigurationError ModelConfig",
    "recollect.model.corpus": "Corpus load_corpus",
    "recollect.model.documents": "CorpusError Document",
    "recollect.model.evaluation": "evaluate replay",
    "recollect.model.evaluation_text": "EvaluationText choose_text load_documents",
    "recollect.model.evaluation_types": "EvaluationOptions EvaluationResult MemorySpecification TokenLosses",
    "recollect.model.generation": "Generation",
    "recollect.model.knn_lm": "KnnEvaluationResult KnnLanguageModelOptions evaluate_knn_lm",
    "recollect.model.reading": "Reader",
    "recollect.model.recording": "Recording record",
    "recollect.model.sampling": "GenerationError Sampling",
    "recollect.model.spalm": "SpalmEvaluationResult SpalmOptions evaluate_spalm",
    "recollect.model.streams": "DocumentStreams",
    "recollect.model.token_cache": "TokenizedDocuments tokenize",
    "recollect.model.tokenizer": "Tokenizer load_tokenizer train_tokenizer",
    "recollect.model.trace": "Trace",
    "recollect.model.trace_export": "export_ann_benchmarks",
    "recollect.model.trace_file": "load_trace",
    "recollect.model.training": "train",
    "recollect.model.training_free": "with_memory",
    "recollect.model.training_options": "TrainingOptions TrainingResult",
    "recollect.model.transformer": "MemorizingTransformer ModelOutput ModelState",
    "recollect.model.trunk": "TrunkOutput TrunkStore compute_trunk",
    "recollect.pretrained.attach": "AttachedMemory attach_memory load_attached",
    "recollect.pretrained.document_segments": "DocumentSegments",
    "recollect.pretrained.errors": "UnsupportedModel",
    "recollect.pretrained.evaluation": "MemoryChoice MemoryComparison evaluate_with_store",
    "recollect.pretrained.fine_tuning": "MemoryCallback TrainableParameters choose_trainable",
    "recollect.pretrained.generation": "Continuation GenerationOptions continue_text",
    "recollect.pretrained.inspection": "InspectionOptions inspect",
    "recollect.pretrained.inspection_data": "Inspection",
    "recollect.pretrained.memorizing": "Memorized memorize",
    "recollect.pretrained.population": "CollectedKeys collect_keys populate",
    "recollect.pretrained.records": "MemorySettings",
    "recollect.pretrained.store": "MemoryStore StoreError",
    "recollect.reports": "AblationReport ReportError ReportFiles load_results write_ablation_report write_report",
    "recollect.reports.inspection": "InspectionFiles write_inspection",
    "recollect.suites.ablation.options": "AblateError AblateOptions AblateResult",
    "recollect.suites.ablation.runner": "ablate",
    "recollect.suites.comparison": "compare",
    "recollect.suites.crossover_options": "CrossoverError CrossoverOptions CrossoverResult",
    "recollect.suites.crossover_run": "crossover",
    "recollect.suites.options": "CompareOptions CompareResult",
    "recollect.suites.tuning_options": "TuneError TuneOptions TuneResult",
    "recollect.suites.tuning_run": "tune",
}
_ROOM_OF = {name: room for room, names in _PUBLIC.items() for name in names.split()}

__all__ = ["__version__", *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        return getattr(importlib.import_module(_ROOM_OF[name]), name)
    raise AttributeError(f"module 'recollect' has no public name {name!r}")


def __dir__() -> list[str]:
    return __all__
