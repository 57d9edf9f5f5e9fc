"""Slots and first-in first-out order, in one place, for M memories at once, and how their keys are stored.

Letters: M memories, C capacity, T new keys a memory, D dimension.

A key is stored as float32, as bfloat16, or as int8: D whole numbers within -127..127 and one scale, the key's largest
component divided by 127. What the ring holds is then the key: `chunk`, `gather` and `in_order` answer with the decoded
one, in float32, so that a search is exact or not among the keys that there are. Only where whole keys are kept beside
int8 codes, in a file, are these the keys, and the codes a means to find them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.memory_backends.errors import UnsupportedOperation
from recollect.memory_backends.options import IN_MEMORY, KeyStorage
from recollect.memory_backends.pages import RESIDENT_BYTES, FileArray, lazy_zeros

CODES = 127
"""Largest code of an int8 key. Not 128: codes are symmetric, so that a key and its negative lose the same."""
SCALE_BYTES = 4
"""Of an int8 key's scale."""
PAGES_OF_A_ROW = 16 * 4096
"""Bytes of a file that reading one row maps into the process at most: Linux maps 16 pages around the one asked for."""
_LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max
_TYPES: dict[KeyStorage, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def bytes_of_key(dim: int, storage: KeyStorage, *, in_file: bool) -> tuple[int, int]:
    """Bytes of main memory and of a file that a key of dimension `dim` takes."""
    size = dim * _TYPES[storage].itemsize
    if storage == "int8":
        return size + SCALE_BYTES, dim * 4 if in_file else 0
    return (0, size) if in_file else (size, 0)


def encode_int8(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., D) int8 and scales (...) float32 of keys (..., D): key = code * scale within half a scale."""
    scales = keys.abs().amax(-1) / CODES
    inverse = torch.where(scales > 0, scales.reciprocal(), 0.0).clamp(max=torch.finfo(torch.float32).max)
    return (keys * inverse[..., None]).round_().clamp_(-CODES, CODES).to(torch.int8), scales


class KeyRing:
    """The raw keys of M memories as rings of C slots each.

    Key number n since the last reset of its memory has slot n mod C, so the newest C keys are the ones alive.
    Memories fill and reset one by one; nothing here depends on another memory's state. Slots that were never written
    take no main memory.

    Args:
        num_memories, capacity, dim: M, C, D.
        device: where the keys lie.
        storage: "float32", "bfloat16" or "int8".
        keys_in: "memory"; "temporary" or a folder, for a memory-mapped file: of the keys as stored, or for int8 of
            whole keys beside the codes, which stay in memory.

    Attributes:
        storage: how keys are stored.
        stored: (M, C, D) in that type; row `stored[m, s]` is meaningful only while slot s of memory m is alive.
        scales: (M, C) float32 for int8, else None.
        whole: (M, C, D) float32 where whole keys are kept beside int8 codes, else None.
        totals: (M,) int64 on the CPU, keys added since the last reset.

    Raises:
        DiskFull, InvalidInput: no file can be made in `keys_in`.
        UnsupportedOperation: a file was asked for keys that lie on another device.
    """

    def __init__(
        self,
        num_memories: int,
        capacity: int,
        dim: int,
        *,
        device: torch.device,
        storage: KeyStorage = "float32",
        keys_in: str = IN_MEMORY,
    ) -> None:
        if keys_in != IN_MEMORY and device.type != "cpu":
            raise UnsupportedOperation(f"keys_in={keys_in!r} is for keys on the CPU; on {str(device)!r} leave it out")
        self.capacity = capacity
        self.storage: KeyStorage = storage
        self._file: FileArray | None = None
        shape = (num_memories, capacity, dim)
        self.scales: Tensor | None = None
        self.whole: Tensor | None = None
        if keys_in != IN_MEMORY:
            self._file = FileArray(shape, torch.float32 if storage == "int8" else _TYPES[storage], keys_in)
        if storage == "int8":
            self.stored = lazy_zeros(*shape, dtype=torch.int8, device=device)
            self.scales = lazy_zeros(num_memories, capacity, device=device)
            self.whole = None if self._file is None else self._file.tensor
        elif self._file is not None:
            self.stored = self._file.tensor
        else:
            self.stored = lazy_zeros(*shape, dtype=_TYPES[storage], device=device)
        self.totals = torch.zeros(num_memories, dtype=torch.int64)

    @property
    def keys(self) -> Tensor:
        """(M, C, D) float32: the keys themselves, where they are stored as such.

        Raises:
            UnsupportedOperation: they are stored in another type; ask for a `chunk` or `gather` then.
        """
        if self.storage != "float32":
            raise UnsupportedOperation(
                f"keys are stored as {self.storage}: read them by ring.chunk() or ring.gather(), which decode them"
            )
        return self.stored

    @property
    def device(self) -> torch.device:
        """Where the keys lie."""
        return self.stored.device

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

    def rounded(self, keys: Tensor) -> Tensor:
        """Keys (..., D) float32 as the ring gives them back; the very tensor where nothing is lost."""
        if self.storage == "float32" or self.whole is not None:
            return keys
        if self.storage == "bfloat16":
            return self._as_bfloat16(keys).float()
        codes, scales = encode_int8(keys)
        return codes.float().mul_(scales[..., None])

    def _as_bfloat16(self, keys: Tensor) -> Tensor:
        # The largest float32 numbers would become infinite.
        return keys.clamp(-_LARGEST_BFLOAT16, _LARGEST_BFLOAT16).to(torch.bfloat16)

    def _write(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        if self.scales is not None:
            codes, scales = encode_int8(keys)
            self._put(self.stored, codes, slots, memories)
            self._put(self.scales, scales, slots, memories)
            if self.whole is not None:
                self._put(self.whole, keys, slots, memories)
        else:
            self._put(self.stored, self._as_bfloat16(keys) if self.storage == "bfloat16" else keys, slots, memories)
        if self._file is not None:
            self._file.touch(keys.numel() * self._file.tensor.element_size())

    def _put(self, into: Tensor, rows: Tensor, slots: Tensor, memories: Tensor) -> None:
        device = into.device
        first = int(slots[0, 0])
        run = slots.shape[1]
        # In a model all memories of a row move together, so the common case is one slice for all of them: a
        # strided copy runs at memory bandwidth, an indexed one does not.
        together = bool((slots[:, 0] == first).all()) and first + run <= self.capacity
        if together and torch.equal(memories, torch.arange(len(into))):
            into[:, first : first + run] = rows
        else:
            into[memories.to(device, non_blocking=True)[:, None], slots.to(device, non_blocking=True)] = rows

    def gather(self, slots: Tensor, memories: Tensor) -> Tensor:
        """Keys (M', Q, K, D) float32 at slots (M', Q, K) of `memories` (M',); zeros where the slot is -1."""
        source = self.stored if self.whole is None else self.whole
        rows = source.flatten(0, 1)
        device = rows.device
        slots = slots.to(device)
        flat = (slots.clamp(min=0) + (memories.to(device) * self.capacity)[:, None, None]).reshape(-1)
        gathered = self.rows_of(rows, flat)
        if self.storage != "float32" and self.whole is None:
            gathered = gathered.float()
            if self.scales is not None:
                gathered *= self.scales.flatten().index_select(0, flat)[:, None]
        gathered = gathered.view(*slots.shape, rows.shape[-1])
        # Asking whether there is any would wait for a device.
        if device.type != "cpu" or bool((slots < 0).any()):
            gathered = gathered.masked_fill((slots < 0)[..., None], 0.0)
        return gathered

    def rows(self, memory: int, places: Tensor) -> Tensor:
        """Keys (n, D) float32 of one memory at places (n,) int64 on the ring's device, all of them written."""
        source = self.stored if self.whole is None else self.whole
        gathered = self.rows_of(source[memory], places)
        if self.storage != "float32" and self.whole is None:
            gathered = gathered.float()
            if self.scales is not None:
                gathered *= self.scales[memory].index_select(0, places)[:, None]
        return gathered

    def rows_of(self, rows: Tensor, places: Tensor) -> Tensor:
        """`rows.index_select(0, places)` of a part (n, D) of what the ring stores, with an eye on its file."""
        if self._file is None or rows.dtype != self._file.tensor.dtype:
            return rows.index_select(0, places)
        gathered = rows.new_empty(len(places), rows.shape[1])
        step = RESIDENT_BYTES // PAGES_OF_A_ROW
        for start in range(0, len(places), step):
            some = places[start : start + step]
            torch.index_select(rows, 0, some, out=gathered[start : start + step])
            self._file.touch(min(len(some) * PAGES_OF_A_ROW, self._file.nbytes))
        return gathered

    def chunk(self, memory: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """The keys (stop - start, D) float32 in slots start to stop - 1.

        A view where they are stored as such; else decoded, into `out` (stop - start, D) if given.
        """
        if self._file is not None:
            self._file.touch((stop - start) * self._file.tensor.shape[2] * self._file.tensor.element_size())
        if self.whole is not None:
            return self.whole[memory, start:stop]
        if self.storage == "float32":
            return self.stored[memory, start:stop]
        return self.decode(memory, start, stop, out)

    def decode(self, memory: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """The same from what is stored, even where whole keys are kept too; into `out` (stop - start, D) if given."""
        rows = self.stored[memory, start:stop]
        decoded = rows.float() if out is None else out.copy_(rows)
        if self.scales is not None:
            decoded *= self.scales[memory, start:stop, None]
        return decoded

    def live_mask(self, memories: Tensor) -> Tensor:
        """(M', C) bool on the ring's device: which slots hold a key."""
        lengths = self.lengths[memories].to(self.device)
        return torch.arange(self.capacity, device=self.device) < lengths[:, None]

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
            return self.chunk(memory, 0, 0)
        begin, end = start % self.capacity, (stop - 1) % self.capacity + 1
        if begin < end:
            return self.chunk(memory, begin, end)
        return torch.cat((self.chunk(memory, begin, self.capacity), self.chunk(memory, 0, end)))

    def reset(self, memories: Tensor) -> None:
        """Empties `memories` (M',)."""
        self.totals[memories] = 0

    def named_arrays(self) -> dict[str, Tensor]:
        """Everything stored by memory and slot, each (M, C, ...), by the name that it is saved under."""
        named = {"keys": self.stored, "scales": self.scales, "whole": self.whole}
        return {name: array for name, array in named.items() if array is not None}

    def arrays(self) -> tuple[Tensor, ...]:
        """The same without names: what an append that fails must bring back."""
        return tuple(self.named_arrays().values())

    def touch(self, size: int) -> None:
        """Notes that `size` bytes of what is stored were read past the ring's own methods, where it lies in a file."""
        if self._file is not None:
            self._file.touch(size)

    def close(self) -> None:
        """Gives the keys' memory and file back, as soon as nobody else holds a view of them."""
        self.stored = self.stored.new_empty(len(self.totals), 0, self.stored.shape[2])
        self.scales = self.whole = self._file = None

    @property
    def key_bytes(self) -> int:
        """Bytes of main memory that a key takes."""
        return bytes_of_key(self.stored.shape[2], self.storage, in_file=self._file is not None)[0]

    @property
    def mapped_key_bytes(self) -> int:
        """Bytes of a file that a key takes, which the system keeps in main memory or not as it sees fit."""
        return bytes_of_key(self.stored.shape[2], self.storage, in_file=self._file is not None)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of main memory that the keys take when every slot is written."""
        return self.key_bytes * len(self.totals) * self.capacity
