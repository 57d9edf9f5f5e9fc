"""What stays outside the graphs that `torch.compile` makes of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, or where a graph is being made, one that the graph is broken for.

    A memory waits for numbers, locks and calls libraries. Left to itself the compiler follows it step by step and
    breaks at each of them, into dozens of graphs. (As a decorator, `torch.compiler.disable` would import the compiler,
    which takes seconds, for those too who never compile.)
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function
