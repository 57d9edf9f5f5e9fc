"""Keeping what attention used most: a first-in first-out memory whose most used old keys are appended again.

Every backend evicts the oldest keys, and that contract stays. When T new keys would overflow a memory of C, the oldest
(1 + r) T keys are looked at, the r T of them that got most attention weight are appended once more before the new ones,
and the others go. This is the second chance of the CLOCK algorithm (Corbato 1968) with a count in place of its bit.

A key's count begins at zero when it is appended and again when it gets its second chance. So the keys that are compared
have all been there for one round of the ring, and a key that was popular long ago does not stay for ever.

Letters: M memories, C capacity, T new keys, R keys that stay (r T), N queries times neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Addition:
    """Some memories, and what is appended again to each before its new keys.

    Attributes:
        memories: (M',) int64 on the CPU.
        slots: (M', R) int64 on the CPU, where the keys that stay lie now, oldest first; R may be 0.
    """

    memories: Tensor
    slots: Tensor


class Usage:
    """Attention weight that each slot got since its key was appended.

    Args:
        num_memories: M.
        capacity: C.
        kept_share: r, keys that stay for each new key.
        device: where the counts lie: where attention computes its weights.

    Attributes:
        totals: (M, C) float32.
    """

    def __init__(self, num_memories: int, capacity: int, *, kept_share: float, device: torch.device) -> None:
        self.capacity = capacity
        self.kept_share = kept_share
        self.totals = torch.zeros(num_memories, capacity, device=device)

    @torch.no_grad()
    def note(self, slots: Tensor, weights: Tensor) -> None:
        """Counts the attention `weights` (M, N) that the keys at `slots` (M, N) got; -1 must weigh nothing."""
        self.totals.scatter_add_(1, slots.clamp_min(0), weights.float())

    def begin(self, slots: Tensor, memories: Tensor) -> None:
        """New keys lie at `slots` (M', T) of `memories` (M',): their counts begin at zero."""
        device = self.totals.device
        self.totals[memories.to(device)[:, None], slots.to(device)] = 0.0

    def additions(self, appended: Tensor, new_keys: int) -> list[Addition]:
        """What stays in each memory when `new_keys` keys come.

        Args:
            appended: (M,) int64 on the CPU, keys that each memory was given since its last reset.
            new_keys: T.

        Returns:
            At most two groups that name every memory once: those that have room, and those that overflow.
        """
        stay = min(round(self.kept_share * new_keys), self.capacity - new_keys)
        lengths = appended.clamp(max=self.capacity)
        overflows = (lengths + new_keys > self.capacity) & (stay > 0)
        groups = []
        roomy, full = (~overflows).nonzero().flatten(), overflows.nonzero().flatten()
        if len(roomy):
            groups.append(Addition(roomy, torch.zeros(len(roomy), 0, dtype=torch.int64)))
        if len(full):
            groups.append(Addition(full, self._most_used(full, appended[full], lengths[full], new_keys + stay, stay)))
        return groups

    def _most_used(self, memories: Tensor, appended: Tensor, lengths: Tensor, added: int, stay: int) -> Tensor:
        """(M', R) slots of the most used of the keys that adding `added` keys evicts; the newer where counts are equal.

        A memory that was not quite full evicts fewer keys than `added`, but always more than `stay`.
        """
        evicted = lengths + added - self.capacity
        # From the newest candidate to the oldest, so that the stable sort prefers the newer of two equals.
        numbers = (appended - lengths)[:, None] + evicted[:, None] - 1 - torch.arange(added)
        is_candidate = numbers >= (appended - lengths)[:, None]
        slots = numbers.clamp_min(0) % self.capacity
        counts = self.totals[memories.to(self.totals.device)].cpu().gather(1, slots)
        order = counts.masked_fill(~is_candidate, -1.0).sort(dim=1, descending=True, stable=True).indices[:, :stay]
        return slots.gather(1, order.sort(dim=1, descending=True).values)
