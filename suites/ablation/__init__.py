"""The ablation study: declared grids of models, trained and evaluated on the same tokens, never the same thing twice.

    ablate(AblateOptions(grids=("gate", "layers"), corpora=("stdlib",)))

`grid` reads a grid's file, `plan` turns grids into the trainings and evaluations that they need together, `runner` runs
them in processes of their own, `worker` is what such a process does, and `results` writes what reports read.
"""

from .options import AblateError, AblateOptions, AblateResult

__all__ = ["AblateError", "AblateOptions", "AblateResult"]
