"""CAGRA graphs by cuVS on a GPU, in sealed parts: a graph takes more keys, but cannot forget any."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.cuvs_support import CUVS, answer, card_for, metric_name, settled
from recollect.memory_backends.inner_products import centred
from recollect.memory_backends.segments import PartOptions, SegmentedBackend

SMALLEST_GRAPH = 1024
"""Runs of fewer keys are searched exactly: a card does that faster, and the graph's degree would shrink."""

LARGEST_ITOPK = 512
"""Candidates that one block of threads of a search holds at most."""


@dataclass(frozen=True)
class CuvsCagraOptions(PartOptions):
    """Options of `cuvs-cagra`; the names are cuVS's."""

    graph_degree: int = field(default=32, metadata={"help": "links of a key in the finished graph"})
    intermediate_graph_degree: int = field(default=64, metadata={"help": "links of a key before they are pruned"})
    itopk_size: int = field(default=64, metadata={"help": "candidates kept while searching, at least k"})
    search_width: int = field(default=1, metadata={"help": "keys from whose links each step of a search goes on"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("graph_degree", "search_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if self.intermediate_graph_degree < self.graph_degree:
            raise ValueError(
                f"intermediate_graph_degree={self.intermediate_graph_degree} is below graph_degree={self.graph_degree}"
            )
        if not 1 <= self.itopk_size <= LARGEST_ITOPK:
            raise ValueError(f"itopk_size={self.itopk_size} is not within 1..{LARGEST_ITOPK}")


class CuvsCagra(SegmentedBackend):
    """One graph to a sealed part, over centred keys for the inner product (see `inner_products`)."""

    name = "cuvs-cagra"
    summary = "CAGRA graphs by cuVS on a GPU, over sealed parts (cuvs.neighbors.cagra)"
    Options: ClassVar[type] = CuvsCagraOptions
    # Graphs are built by many threads at once, in no order.
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=("cpu", "cuda"), eviction="rebuilt", deterministic=False
    )
    requires = (CUVS,)
    needs_card = True
    search_options = ("itopk_size", "search_width")
    sweep = ("cuvs-cagra", "cuvs-cagra:itopk_size=256,search_width=4")
    curve: ClassVar = {"itopk_size": (32, 64, 128, 256, 512), "search_width": (1, 4)}
    builds: ClassVar = {"graph_degree": (16, 32, 64)}
    recall_floor = 0.6
    parallel = False

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        self._library = self.import_library("cuvs.neighbors.cagra")
        self._card = card_for(self.device, self.name)

    def _build_part(self, keys: np.ndarray, seed: int) -> tuple[Any, Tensor | None, Tensor]:
        around, mean = (keys, None) if self.metric == "l2" else centred(keys)
        on_card = settled(torch.from_numpy(np.array(around, dtype=np.float32)), self._card)
        parameters = self._library.IndexParams(
            metric=metric_name(self.metric),
            graph_degree=self.options.graph_degree,
            intermediate_graph_degree=self.options.intermediate_graph_degree,
        )
        index = self._library.build(parameters, on_card)
        # The index may read the keys from where they are, so they stay with it.
        return index, None if mean is None else torch.from_numpy(mean).to(self._card), on_card

    def _search_part(
        self, part: tuple[Any, Tensor | None, Tensor], queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        index, mean, _ = part
        asked = settled(torch.from_numpy(queries), self._card)
        parameters = self._library.SearchParams(
            itopk_size=max(self.options.itopk_size, -(-k // 32) * 32), search_width=self.options.search_width
        )
        distances, neighbours = self._library.search(parameters, index, asked, k)
        scores, positions = answer(distances, neighbours, self.metric, self._card)
        if mean is not None:
            scores = scores + (asked @ mean)[:, None]
        return scores.cpu().numpy(), positions.cpu().numpy()

    def _smallest_part(self) -> int:
        return SMALLEST_GRAPH

    @classmethod
    def _planned_index_bytes(cls, options: CuvsCagraOptions, *, capacity: int, dim: int, metric: str) -> int:
        return 0  # Graphs and their keys lie on a card, not in main memory.

    def _part_bytes(self, part: tuple[Any, Tensor | None, Tensor]) -> int:
        keys = part[2]
        return len(keys) * (self.dim * 4 + self.options.graph_degree * 4)
