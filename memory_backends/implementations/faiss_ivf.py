"""faiss inverted lists over whole keys (IndexIVFFlat)."""

from __future__ import annotations

from typing import Any, ClassVar

from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.faiss_ivf_support import FaissIvfBackend, IvfOptions, planned_list_bytes


class FaissIvf(FaissIvfBackend):
    """A k-means cell of keys to a list; a query searches the `nprobe` cells that suit it best."""

    name = "faiss-ivf"
    summary = "faiss inverted lists over whole keys (IndexIVFFlat)"
    Options: ClassVar[type] = IvfOptions
    capabilities: ClassVar[Capabilities] = Capabilities(needs_training=True)
    sweep = ("faiss-ivf:nprobe=4", "faiss-ivf", "faiss-ivf:nprobe=48")
    curve: ClassVar = {"nprobe": (1, 2, 4, 8, 16, 32, 64)}
    builds: ClassVar = {"nlist": (0, 64, 128, 256, 512)}
    recall_floor = 0.25

    @classmethod
    def _planned_index_bytes(cls, options: IvfOptions, *, capacity: int, dim: int, metric: str) -> int:
        return planned_list_bytes(options, capacity, dim, code_size=dim * 4)

    def _empty_index(self, quantizer: Any, nlist: int, seed: int) -> Any:
        return self.faiss.IndexIVFFlat(quantizer, self.dim, nlist, self._metric)
