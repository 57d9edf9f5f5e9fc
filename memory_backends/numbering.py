"""Which of a job's memories a backend holds, for what is drawn at random."""

from __future__ import annotations


class Numbered:
    """Part of `MemoryBackend`: the place of its memories among those of all processes of a job.

    Attributes:
        first_memory: number of the first of its memories; what is random about memory m is drawn by `first_memory` + m.
    """

    first_memory: int = 0

    def number_from(self, first: int) -> None:
        """Says that memory 0 is number `first` of a job whose other processes hold the rest.

        What is drawn at random for a memory then does not depend on how many processes there are. A backend that is
        made of others tells them. To be called before the first key, and again after loading.
        """
        self.first_memory = first
        for inner in vars(self).values():
            if isinstance(inner, Numbered):
                inner.number_from(first)


__all__ = ["Numbered"]
