"""Keys in the type of the fused search's first pass, kept beside a ring, and how far they are from the keys themselves.

Letters as in `base`; P the dimension padded to a power of two, N blocks as in `triton_kernels`.

The first pass need not be precise, only know how precise it is. For every key x there stands here its image x^ in the
type of the first pass, and with it |x - x^| and the larger of |x| and |x^| as they really are, whatever the type did
to it: rounded it, clamped it, lost it altogether. `triton_candidates.select_candidates` makes of them the margin within
which no key is dismissed. So every type gives the same, exact answer; a coarser one leaves more candidates.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.key_ring import encode_int8

FirstPass = Literal["float16", "bfloat16", "float8", "int8"]
FIRST_PASSES: tuple[FirstPass, ...] = ("float16", "bfloat16", "float8", "int8")

LANES = 128
"""Blocks of a run of keys; the same as `triton_kernels.LANES`, which this module must not import."""

SMALLEST_DEPTH = 32
"""Least P: what a matrix unit takes of 8-bit numbers at once."""

LARGEST_NORM = 3.0e38
"""Norms are bounded by a finite number, since zero times infinity would be no bound."""

NUMBERS_AT_ONCE = 1 << 24
"""Numbers that are brought into the first pass's type at a time; their errors are taken in float64."""

_TYPES: dict[FirstPass, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def margin_coefficient(depth: int, rounds: int, first_pass: FirstPass) -> float:
    """What the arithmetic itself may be off by, over the product of the two norms.

    Sums of `depth` products in float32, in any order and by units that cut off instead of rounding, are within
    depth * 2^-22; the same covers the products of whole keys with which candidates are ranked. Writing the round over
    the last bits moves a score by `rounds` units of 2^-23. Float8 units of current cards add up in about 14 bits.
    """
    coefficient = (depth + 16) * 2.0**-22 + rounds * 2.0**-22
    return coefficient + 2.0**-10 if first_pass == "float8" else coefficient


def padded_depth(dim: int) -> int:
    """P for keys of dimension D."""
    return max(SMALLEST_DEPTH, 1 << (dim - 1).bit_length())


def encode(vectors: Tensor, first_pass: FirstPass) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Vectors (..., D) float32 in the type of the first pass.

    Returns:
        Images (..., P), zero beyond D; scales (...) float32 by which they are multiplied, or None; the larger of the
        norms |x| and |x^| (...), and errors |x - x^| (...), float32, never too small.
    """
    scales: Tensor | None = None
    if first_pass == "int8":
        codes, scales = encode_int8(vectors)
    elif first_pass == "float8":
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = vectors.abs().amax(-1) / largest
        inverse = torch.where(scales > 0, scales.reciprocal(), 0.0).clamp(max=torch.finfo(torch.float32).max)
        codes = (vectors * inverse[..., None]).clamp(-largest, largest).to(torch.float8_e4m3fn)
    else:
        largest = torch.finfo(_TYPES[first_pass]).max
        codes = vectors.clamp(-largest, largest).to(_TYPES[first_pass])
    image = codes.double()
    if scales is not None:
        image = image * scales.double()[..., None]
    exact = vectors.double()
    norms, errors = torch.maximum(_norm(image), _norm(exact)), _norm(exact - image)
    missing = padded_depth(vectors.shape[-1]) - vectors.shape[-1]
    if missing:
        padded = codes.new_zeros(*codes.shape[:-1], codes.shape[-1] + missing)
        padded[..., : codes.shape[-1]] = codes
        codes = padded
    return codes, scales, norms, errors


def _norm(vectors: Tensor) -> Tensor:
    """Norms along the last dimension of float64 vectors, as float32 rounded up."""
    return (vectors.square().sum(-1).sqrt() * (1 + 1e-6)).clamp(max=LARGEST_NORM).float()


class TritonKeys:
    """The images of a ring's keys, changed slot by slot as the ring is.

    For `l2` images are of keys less a centre (the mean of the first keys that a memory got), and a bias of minus the
    square of that difference's length stands beside each: 2 (q - c).(x - c) - |x - c|^2 ranks like minus |q - x|^2,
    and loses nothing where keys lie far from the origin and near each other.

    Args:
        num_memories, capacity, dim: M, C, D.
        metric: "l2", or anything that ranks by the inner product.
        device: where they lie.
        first_pass: their type.

    Attributes:
        images: (M, C, P).
        scales: (M, C) float32 for 8-bit types, else None.
        bias: (M, C) float32 for `l2`, else None.
        centres: (M, D) float32 for `l2`, else None.
    """

    def __init__(
        self,
        num_memories: int,
        capacity: int,
        dim: int,
        *,
        metric: str,
        device: torch.device,
        first_pass: FirstPass = "float16",
    ) -> None:
        self.capacity = capacity
        self.dim = dim
        self.depth = padded_depth(dim)
        self.first_pass: FirstPass = first_pass
        self.is_distance = metric == "l2"
        shape = (num_memories, capacity)
        self.images = torch.zeros(*shape, self.depth, dtype=_TYPES[first_pass], device=device)
        self.scales = torch.zeros(shape, device=device) if first_pass in ("int8", "float8") else None
        self.bias = torch.zeros(shape, device=device) if self.is_distance else None
        self.centres = torch.zeros(num_memories, dim, device=device) if self.is_distance else None
        self._has_centre = [False] * num_memories
        # By key: |x - x^|, the norm and |bias|. A slot that holds no key counts as zero.
        self._errors = torch.zeros(3, *shape, device=device)
        self._bounds: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that all of it takes."""
        tensors = [self.images, self.scales, self.bias, self.centres, self._errors, *self._bounds.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def update(self, keys: Tensor, slots: Tensor, memories: Tensor) -> None:
        """Takes in keys (M', T, D) float32 as the ring answers with them, at slots (M', T) of `memories` (M',).

        Slots and memories lie on the CPU, so that nothing waits for the device.
        """
        if not keys.numel():
            return
        which = memories.tolist()
        self._take_centres(keys, which)
        rows = memories.to(keys.device, non_blocking=True)
        places = slots.to(keys.device, non_blocking=True)
        step = max(1, NUMBERS_AT_ONCE // (keys.shape[0] * keys.shape[2]))
        for start in range(0, keys.shape[1], step):
            part = keys[:, start : start + step]
            if self.centres is not None:
                part = (part - self.centres[rows][:, None]).clamp(-LARGEST_NORM, LARGEST_NORM)
            codes, scales, norms, errors = encode(part, self.first_pass)
            at = (rows[:, None], places[:, start : start + step])
            self.images.view(_writable(self.images.dtype))[at] = codes.view(_writable(codes.dtype))
            if self.scales is not None and scales is not None:
                self.scales[at] = scales
            self._errors[0][at] = errors
            self._errors[1][at] = norms
            if self.bias is not None:
                bias = -part.square().sum(-1).clamp(max=LARGEST_NORM)
                self.bias[at] = bias
                self._errors[2][at] = bias.abs()
        for rounds in self._bounds:
            self._renew(rounds, slots, rows)

    def reset(self, memories: Tensor) -> None:
        """Forgets what `memories` (M',) on the CPU held."""
        for memory in memories.tolist():
            self._has_centre[memory] = False
        rows = memories.to(self.images.device, non_blocking=True)
        self._errors[:, rows] = 0.0
        for bounds in self._bounds.values():
            bounds[rows] = 0.0

    def bounds(self, rounds: int) -> Tensor:
        """(M, 3, N) float32 for blocks of `rounds` keys: the E, N and B of `select_candidates`."""
        if rounds not in self._bounds:
            runs = -(-self.capacity // (LANES * rounds))
            made = self._errors.new_zeros(len(self.images), 3, runs * LANES)
            for run in range(runs):
                made[:, :, run * LANES : (run + 1) * LANES] = self._bounds_of_run(run, rounds, None)
            # Only when whole: searches of several threads may want it at once.
            self._bounds[rounds] = made
        return self._bounds[rounds]

    def _take_centres(self, keys: Tensor, which: list[int]) -> None:
        fresh = [row for row, memory in enumerate(which) if not self._has_centre[memory]]
        if self.centres is None or not fresh:
            return
        for row in fresh:
            self.centres[which[row]] = keys[row].mean(0).clamp(-LARGEST_NORM, LARGEST_NORM)
            self._has_centre[which[row]] = True

    def _renew(self, rounds: int, slots: Tensor, rows: Tensor) -> None:
        """Takes the bounds anew of every run that any of `slots` falls into."""
        # Not torch.unique, which sorts: the card would wait for it.
        for run in np.flatnonzero(np.bincount((slots // (LANES * rounds)).numpy().ravel())).tolist():
            self._bounds[rounds][rows, :, run * LANES : (run + 1) * LANES] = self._bounds_of_run(run, rounds, rows)

    def _bounds_of_run(self, run: int, rounds: int, rows: Tensor | None) -> Tensor:
        """(M', 3, LANES) of one run, of all memories when `rows` is None."""
        begin = run * LANES * rounds
        errors = self._errors[:, :, begin : begin + LANES * rounds]
        errors = errors if rows is None else errors[:, rows]
        missing = -errors.shape[2] % LANES
        if missing:
            errors = torch.nn.functional.pad(errors, (0, missing))
        error, norm, bias = errors.unflatten(2, (-1, LANES)).amax(2)
        coefficient = margin_coefficient(self.depth, rounds, self.first_pass)
        # Products of norms stay finite where the search does not give up anyway.
        return torch.stack(((error + coefficient * norm).clamp(max=LARGEST_NORM), norm, coefficient * bias), 1)


def _writable(kind: torch.dtype) -> torch.dtype:
    """The type as which numbers are copied: not every device indexes float8 tensors."""
    return torch.uint8 if kind == torch.float8_e4m3fn else kind


__all__ = ["FIRST_PASSES", "FirstPass", "TritonKeys", "encode", "margin_coefficient", "padded_depth"]
