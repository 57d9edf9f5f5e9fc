"""How long searching, appending and building take, in the evaluation pass itself."""

from __future__ import annotations

from .common import CellBenchmark


class SearchLatency(CellBenchmark):
    """One segment's queries over all memories, while the memories are full."""

    unit = "ms"
    version = "2"

    def track_search_p50(self, spec: str, memory_size: int) -> float:
        """Median milliseconds."""
        return self.cell.figure("search_ms_p50")

    def track_search_p99(self, spec: str, memory_size: int) -> float:
        """The 99th percentile; with fewer than 100 segments it is close to the slowest search."""
        return self.cell.figure("search_ms_p99")


class AppendLatency(CellBenchmark):
    """One key, over the whole run, so that rebuilds are in it."""

    unit = "us"
    version = "2"

    def track_append(self, spec: str, memory_size: int) -> float:
        """Mean microseconds."""
        return self.cell.figure("append_us_per_key")


class AppendStepLatency(CellBenchmark):
    """One segment's keys to all memories, as a distribution, so that a step that stalls is seen."""

    unit = "ms"
    version = "2"

    def track_append_p50(self, spec: str, memory_size: int) -> float:
        """Median milliseconds."""
        return self.cell.figure("append_ms_p50")

    def track_append_p99(self, spec: str, memory_size: int) -> float:
        """The 99th percentile; with fewer than 100 segments it is close to the slowest append."""
        return self.cell.figure("append_ms_p99")


class ReferenceLatency(CellBenchmark):
    """The fixed reference operation beside the searches: where it moves, the machine did, not the backend."""

    unit = "ms"
    version = "1"

    def track_reference(self, spec: str, memory_size: int) -> float:
        """Median milliseconds."""
        return self.cell.figure("reference_ms")


class BuildLatency(CellBenchmark):
    """Training and building of indexes, over the whole run."""

    unit = "s"
    version = "2"

    def track_build(self, spec: str, memory_size: int) -> float:
        """Seconds in total."""
        return self.cell.figure("build_seconds")
