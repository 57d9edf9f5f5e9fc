"""Run in a process of its own by test_milvus_faults.py: appends to a memory until it is killed.

    python milvus_appending.py URI COLLECTION [OPTIONS]

Prints the total of keys after every append that has returned. Key number n is what `key_numbers` makes of n.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

CAPACITY, DIM, STEP = 1500, 8, 37


def key_numbers(first: int, last: int) -> Tensor:
    """Keys (1, last - first, DIM): another for every number, and the same in every process."""
    numbers = torch.arange(first, last, dtype=torch.float64)[:, None]
    return torch.sin(numbers * torch.arange(1, DIM + 1) * 0.7311).float()[None]


def main(uri: str, collection: str, *options: str) -> None:
    from recollect.memory_backends import make_backend

    torch.set_num_threads(1)
    spec = ",".join((f"milvus:uri={uri}", f"collection={collection}", *options))
    memory = make_backend(spec, num_memories=1, capacity=CAPACITY, dim=DIM)
    total = int(memory.ring.totals[0])
    while True:
        memory.add(key_numbers(total, total + STEP))
        total += STEP
        print(total, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
