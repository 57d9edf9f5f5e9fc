"""What `import recollect` costs beside `import torch`, each in fresh processes taken in turn.

`python benchmarks/import_time.py` prints the ratios (target: at most 1.3 for the names most users import) and writes
benchmarks/results/import_time.json.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from recollect.memory_backends.atomic import write_json
from recollect.suites.provenance import describe

RESULTS = Path(__file__).resolve().parent / "results" / "import_time.json"
STATEMENTS = {
    "torch": "import torch",
    "recollect": "import recollect",
    "recollect.make_backend": "from recollect import make_backend, MemoryBackend",
    "recollect.MemorizingTransformer": "from recollect import MemorizingTransformer",
}
ROUNDS = 9


def cpu_seconds(statement: str) -> float:
    """Processor time of a fresh interpreter that runs `statement`; unlike wall time, it holds on a busy machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    taken: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for turn in range(ROUNDS + 1):
        for name, statement in STATEMENTS.items():
            seconds = cpu_seconds(statement)
            if turn:  # the first turn fills the file cache
                taken[name].append(seconds)
    results = {
        name: {
            "seconds": round(statistics.median(values), 4),
            "ratio_to_torch": round(
                statistics.median(value / torch for value, torch in zip(values, taken["torch"], strict=True)), 3
            ),
        }
        for name, values in taken.items()
    }
    print(json.dumps(results, indent=1))
    write_json(RESULTS, {"provenance": describe(threads=1), "rounds": ROUNDS, "results": results})


if __name__ == "__main__":
    main()
