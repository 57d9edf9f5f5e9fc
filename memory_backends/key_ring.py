"""Slots and first-in first-out order, in one place, for M memories at once.

Letters: M memories, C capacity, T new keys a memory, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.memory_backends.out_of_memory import check_fits


class KeyRing:
    """The raw keys of M memories as rings of C slots each.

    Key number n since the last reset of its memory has slot n mod C, so the newest C keys are the ones alive.
    Memories fill and reset one by one; nothing here depends on another memory's state.

    Attributes:
        keys: (M, C, D) float32; row `keys[m, s]` is meaningful only while slot s of memory m is alive.
        totals: (M,) int64 on the CPU, keys added since the last reset.
    """

    def __init__(self, num_memories: int, capacity: int, dim: int, *, device: torch.device) -> None:
        self.capacity = capacity
        if device.type == "cpu":
            check_fits(num_memories * capacity * dim * 4, "to hold the keys")
        self.keys = torch.zeros(num_memories, capacity, dim, device=device)
        self.totals = torch.zeros(num_memories, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """(M,) int64: how many keys each memory holds now."""
        return self.totals.clamp(max=self.capacity)

    def append(self, keys: Tensor, memories: Tensor) -> Tensor:
        """Adds keys (M', T, D) to `memories` (M',) and returns their slots (M', T).

        When T exceeds C only the newest C keys stay: the slots of the others are -1.
        """
        new_keys = keys.shape[1]
        numbers = self.totals[memories, None] + torch.arange(new_keys)
        slots = numbers % self.capacity
        kept = slots[:, max(0, new_keys - self.capacity) :]
        if kept.numel():
            self._write(keys[:, new_keys - kept.shape[1] :], kept, memories)
        self.totals[memories] += new_keys
        if new_keys > self.capacity:
            slots[:, : new_keys - self.capacity] = -1
        return slots

    def _write(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        device = self.keys.device
        first = int(slots[0, 0])
        run = slots.shape[1]
        # In a model all memories of a row move together, so the common case is one slice for all of them: a
        # strided copy runs at memory bandwidth, an indexed one does not.
        together = bool((slots[:, 0] == first).all()) and first + run <= self.capacity
        if together and torch.equal(memories, torch.arange(len(self.keys))):
            self.keys[:, first : first + run] = keys
        else:
            self.keys[memories.to(device)[:, None], slots.to(device)] = keys

    def gather(self, slots: Tensor, memories: Tensor) -> Tensor:
        """Keys (M', Q, K, D) at slots (M', Q, K) of `memories` (M',); zeros where the slot is -1."""
        rows = self.keys.flatten(0, 1)
        device = rows.device
        slots = slots.to(device)
        flat = (slots.clamp(min=0) + (memories.to(device) * self.capacity)[:, None, None]).reshape(-1)
        gathered = rows.index_select(0, flat).view(*slots.shape, rows.shape[-1])
        if bool((slots < 0).any()):
            gathered = gathered.masked_fill((slots < 0)[..., None], 0.0)
        return gathered

    def live_mask(self, memories: Tensor) -> Tensor:
        """(M', C) bool on the ring's device: which slots hold a key."""
        lengths = self.lengths[memories].to(self.keys.device)
        return torch.arange(self.capacity, device=self.keys.device) < lengths[:, None]

    def first_number(self, memory: int) -> int:
        """The number (counted since the reset) of the oldest key alive in this memory."""
        return max(0, int(self.totals[memory]) - self.capacity)

    def slots_of(self, numbers: Tensor, memories: Tensor) -> Tensor:
        """Slots of key numbers (M', ...) of `memories` (M',); -1 where the key is evicted or not yet added."""
        totals = self.totals[memories].to(numbers.device).view(-1, *([1] * (numbers.dim() - 1)))
        alive = (numbers >= (totals - self.capacity).clamp(min=0)) & (numbers < totals)
        return torch.where(alive, numbers % self.capacity, -1)

    def in_order(self, memory: int, start: int | None = None, stop: int | None = None) -> Tensor:
        """Keys numbered start to stop - 1 of one memory, oldest first, (stop - start, D); a view where possible."""
        total = int(self.totals[memory])
        start = self.first_number(memory) if start is None else start
        stop = total if stop is None else stop
        if start >= stop:
            return self.keys[memory, :0]
        begin, end = start % self.capacity, (stop - 1) % self.capacity + 1
        if begin < end:
            return self.keys[memory, begin:end]
        return torch.cat((self.keys[memory, begin:], self.keys[memory, :end]))

    def reset(self, memories: Tensor) -> None:
        """Empties `memories` (M',)."""
        self.totals[memories] = 0

    def arrays(self) -> tuple[Tensor, ...]:
        """Everything stored by memory and slot, each (M, C, ...): what an append that fails must bring back."""
        return (self.keys,)

    @property
    def nbytes(self) -> int:
        """Bytes that the raw keys take."""
        return self.keys.numel() * self.keys.element_size()
