"""Exact top-k on a GPU that never writes its scores: two small kernels around one matrix product.

Letters as in `base` and `triton_kernels`; G memories searched at once, n keys alive.

1. `scan_blocks` multiplies queries with the images of the keys (float16, say) and keeps of every block of keys only
   the two highest products. At 65536 keys that is 1/16 of what the scores would take, and it is held for a few
   memories at a time.
2. `select_candidates` finds the keys that can be among the k best, given how far images are from the keys.
3. `score_candidates` scores those few by the whole keys, and `keep_best` keeps the k best.

A query that has more candidates than there is room for (all keys equal, say) is searched again by plain torch; so the
answer is exact whatever the data. To know whether there are such queries is the one time a search waits for the
device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.ring_search import search_ring
from recollect.memory_backends.triton_keys import LANES, FirstPass, TritonKeys

FEWEST_KEYS = 4096
"""Below this many keys alive plain torch takes the search: its scores are small, and the launches of the kernels are
not. An estimate; benchmarks/gpu_check.py times both sides."""

MOST_KEYS = 1 << 20
"""Above this many slots as well: blocks would grow too long for their keys to be looked at one by one."""

LARGEST_K = 256
"""Above it plain torch takes the search."""

LARGEST_INDEX = 2**31 - 1
"""Offsets within a memory are 32-bit."""

MAXIMA_BYTES = 128 << 20
"""Block maxima that are held at once. More than the cache of a card holds, since to launch the kernels of many groups
takes the host as long as they take the card."""

SELECT_LAUNCH = {"num_warps": 2, "maxnreg": 128}
"""How a program is launched that selects the candidates of one query among up to 2048 blocks."""

SCORE_WARPS = 4
"""Warps that score the candidates of one query."""

NARROW = 128
"""Candidates that are sorted at once, at least: those of most queries."""

MOST_BLOCKS = 8192
"""Blocks of a memory at most: one program of `select_candidates` holds them."""

LONGEST_BLOCK = 32
"""Keys in a block, while that leaves no more than MOST_BLOCKS blocks."""

MOST_CANDIDATES = 2048
"""Room for candidates of a query where blocks may be opened for every neighbour."""

OVERSAMPLED = 2
"""Candidates for each neighbour where they are taken without a margin."""

SINGLES: dict[FirstPass, float] = {"float16": 1.25, "bfloat16": 1.5, "int8": 6.0, "float8": 14.0}
"""Room for candidates for each neighbour, by what the margin of a type leaves of 65536 unit keys of dimension 128."""


@dataclass(frozen=True)
class Shape:
    """How the keys of a search are cut up, and the room that is left for candidates.

    Attributes:
        rounds: keys in a block, a power of two.
        singles: keys that may count alone, a power of two.
        opened: blocks all of whose keys may count.
    """

    rounds: int
    singles: int
    opened: int

    @property
    def width(self) -> int:
        """Candidates of a query at most."""
        return self.singles + self.opened * self.rounds


def shape_for(
    keys: int, k: int, first_pass: FirstPass = "float16", *, guard: bool = True, fewest: int | None = None
) -> Shape:
    """The shape for at most `keys` keys and k neighbours, with room for what `fewest` keys leave (`keys` when None).

    Enough blocks that the best keys seldom share one: of c keys that fall into N blocks at random, c^2 / 2N pairs do.
    There is room for a pair of each neighbour all the same, up to MOST_CANDIDATES: text that comes again after a
    multiple of LANES tokens makes them.
    """
    wanted = max(1024, 16 * power_of_two(k))
    rounds = min(LONGEST_BLOCK, max(2, power_of_two(keys // wanted + 1) // 2))
    while keys > MOST_BLOCKS * rounds:
        rounds *= 2
    candidates = k * (SINGLES[first_pass] if guard else 1.25 * OVERSAMPLED)
    pairs = candidates**2 / (2 * max(1, (fewest or keys) // rounds))
    singles = power_of_two(int(candidates) + 32)
    opened = power_of_two(int(4 + 2 * min(pairs, 1024 / rounds)))
    room = (MOST_CANDIDATES - singles) // rounds
    while opened < k and 2 * opened <= room:
        opened *= 2
    return Shape(rounds, singles, opened)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def triton_topk(
    keys: TritonKeys,
    ring: KeyRing,
    queries: Tensor,
    k: int,
    memories: list[int],
    lengths: list[int],
    *,
    guard: bool = True,
    shape: Shape | None = None,
    open_blocks: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k best keys for every query, each memory searched by its own queries.

    Args:
        keys: images of the keys of `ring`.
        ring: the keys themselves, stored as float32 or bfloat16.
        queries: (M', Q, D) float32, contiguous.
        k: at least 1.
        memories: M' memories.
        lengths: M' numbers of keys alive, in their first slots.
        guard: with the proven margin, so exactly; without it the best 2 k images, ranked by their whole keys.
        shape: how keys are cut up; by `shape_for` when None.
        open_blocks: without it the best key of each block is all that counts (`approx-topk`).

    Returns:
        Scores (M', Q, k) float32, falling, and slots (M', Q, k) int64; -inf and -1 beyond a memory's length. Among
        equally good keys the lowest slots are returned, unless the query was left to plain torch.
    """
    longest = max(lengths, default=0)
    if not longest or not queries.shape[1]:
        empty = (*queries.shape[:2], k)
        scores = torch.full(empty, -torch.inf, device=queries.device)
        return scores, torch.full(empty, -1, dtype=torch.int64, device=queries.device)
    shape = shape or shape_for(longest, k, keys.first_pass, guard=guard)
    search = _Search(keys, ring.stored, k, shape, guard=guard, open_blocks=open_blocks)
    scores = torch.empty(*queries.shape[:2], k, device=queries.device)
    slots = torch.empty(scores.shape, dtype=torch.int64, device=queries.device)
    counts = torch.zeros(*queries.shape[:2], 3, dtype=torch.int32, device=queries.device)
    encoded = _encode_queries(keys, queries, memories)
    for begin, end in _groups(len(lengths), queries.shape[1], longest, shape):
        group = slice(begin, end)
        some = tuple(None if part is None else part[group] for part in encoded)
        found = scores[group], slots[group], counts[group]
        search.run(queries[group], some, memories[group], lengths[group], *found)
    if search.any_failed.item():
        _search_failed(ring, queries, k, memories, lengths, counts[..., 2], keys.is_distance, scores, slots)
    return scores, slots


def _encode_queries(keys: TritonKeys, queries: Tensor, memories: list[int]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Images (M', Q, P), scales (M', Q) or None, and |q^| and |q - q^| (M', Q, 2) of what is compared with images."""
    from recollect.memory_backends.triton_encoding import encode_queries

    batch, device = queries.shape[:2], queries.device
    kind = keys.images.dtype
    codes = torch.empty(*batch, keys.depth, dtype=kind, device=device)
    scales = None if keys.scales is None else torch.empty(batch, device=device)
    bounds = torch.empty(*batch, 2, device=device)
    rows = _numbers(tuple(memories), device)
    several = max(1, (64 if interpreted() else 4) * 128 // keys.depth)
    encode_queries[(-(-batch.numel() // several),)](
        queries,
        bounds if keys.centres is None else keys.centres,
        rows,
        codes,
        bounds if scales is None else scales,
        bounds,
        batch.numel(),
        batch[1],
        D=queries.shape[2],
        P=keys.depth,
        HAS_CENTRE=keys.centres is not None,
        HAS_SCALES=scales is not None,
        LARGEST=float(torch.iinfo(kind).max if kind == torch.int8 else torch.finfo(kind).max),
        ROUNDED=kind == torch.int8,
        ROWS=several,
        num_warps=4,
    )
    return codes, scales, bounds


def _groups(memories: int, queries: int, longest: int, shape: Shape) -> list[tuple[int, int]]:
    """Runs of memories that are searched at once."""
    one = 2 * 4 * queries * (-(-longest // (LANES * shape.rounds)) * LANES)
    step = max(1, MAXIMA_BYTES // one)
    return [(begin, min(memories, begin + step)) for begin in range(0, memories, step)]


def _search_failed(
    ring: KeyRing,
    queries: Tensor,
    k: int,
    memories: list[int],
    lengths: list[int],
    failed: Tensor,
    is_distance: bool,
    scores: Tensor,
    slots: Tensor,
) -> None:
    """Searches the queries marked in `failed` (M', Q) by plain torch, into `scores` and `slots`."""
    where = failed.nonzero().cpu()
    metric = "l2" if is_distance else "inner_product"
    for row in where[:, 0].unique().tolist():
        asked = where[where[:, 0] == row, 1].to(queries.device)
        best, found = search_ring(ring, queries[row, asked][None], k, [memories[row]], [lengths[row]], metric)
        scores[row, asked], slots[row, asked] = best[0], found[0]


class _Search:
    """One call's kernels and constants."""

    def __init__(self, keys: TritonKeys, raw: Tensor, k: int, shape: Shape, *, guard: bool, open_blocks: bool) -> None:
        from recollect.memory_backends import triton_candidates

        self.kernels = triton_candidates
        self.keys = keys
        self.raw = raw
        self.k = k
        self.shape = shape
        self.guard = guard
        self.open_blocks = open_blocks
        self.bounds = keys.bounds(shape.rounds)
        self.any_failed = torch.zeros(1, dtype=torch.int32, device=raw.device)

    def run(
        self,
        queries: Tensor,
        encoded: tuple[Any, ...],
        memories: list[int],
        lengths: list[int],
        scores: Tensor,
        slots: Tensor,
        counts: Tensor,
    ) -> None:
        """One group: queries (G, Q, D), and `_encode_queries` of them, into scores and slots (G, Q, k) and counts
        (G, Q, 3)."""
        keys, shape, device = self.keys, self.shape, queries.device
        group, count, dim = queries.shape
        blocks = -(-max(max(lengths), 1) // (LANES * shape.rounds)) * LANES
        reach = self.k if self.guard else OVERSAMPLED * self.k
        rows, alive, reached = _on_device(tuple(memories), tuple(lengths), reach, device)
        codes, scales, query_bounds = encoded
        firsts = torch.empty(group, count, blocks, device=device)
        seconds = torch.empty_like(firsts) if self.open_blocks else firsts
        some = firsts  # stands where a kernel is given no such tensor
        scan, tiles = _scan()
        scan[_scan_grid(count, blocks, group)](
            codes,
            keys.images,
            some if scales is None else scales,
            some if keys.scales is None else keys.scales,
            some if keys.bias is None else keys.bias,
            rows,
            alive,
            firsts,
            seconds,
            count,
            blocks,
            keys.capacity,
            HINT=min(256, max(16, power_of_two(count))),
            P=keys.depth,
            BLOCK_D=min(keys.depth, 256),
            ROUNDS=shape.rounds,
            SECOND=self.open_blocks,
            HAS_SCALES=scales is not None,
            QUANTISED=keys.first_pass == "int8",
            HAS_BIAS=keys.bias is not None,
            UPCAST=interpreted(),
            **tiles,
        )
        singles = torch.empty(group * count, shape.singles, dtype=torch.int32, device=device)
        opened = torch.empty(group * count, shape.opened, dtype=torch.int32, device=device)
        common = {"ROUNDS": shape.rounds, "SINGLES": shape.singles, "OPENED": shape.opened}
        most = power_of_two(blocks)
        # The interpreter takes as long for many numbers as for one.
        several = 16 if interpreted() else 1
        self.kernels.select_candidates[(-(-group * count // several),)](
            firsts,
            seconds,
            self.bounds,
            query_bounds,
            rows,
            singles,
            opened,
            counts,
            reached,
            group * count,
            count,
            blocks,
            self.bounds.shape[2],
            float(self.guard),
            SECOND=self.open_blocks,
            HAS_BIAS=keys.bias is not None,
            GROUPS=min(power_of_two(reach), most),
            BLOCKS=most,
            MASKED=blocks != most or several > 1,
            QUERIES=several,
            **(SELECT_LAUNCH if most <= 2048 else {"num_warps": 8}),
            **common,
        )
        candidates = torch.empty(group * count, shape.width, dtype=torch.int64, device=device)
        self.kernels.score_candidates[(group * count,)](
            queries.contiguous(),
            self.raw,
            rows,
            alive,
            singles,
            opened,
            counts,
            self.any_failed,
            candidates,
            count,
            keys.capacity,
            D=dim,
            P=keys.depth,
            BLOCK_C=32,
            MEMBERS=min(32, shape.rounds),
            DISTANCE=keys.is_distance,
            num_warps=SCORE_WARPS,
            **common,
        )
        self.kernels.keep_best[(-(-group * count // several),)](
            candidates,
            counts,
            scores,
            slots,
            group * count,
            K=self.k,
            WIDTH=max(NARROW, power_of_two(2 * self.k)),
            QUERIES=several,
            num_warps=1,
            **common,
        )


@functools.lru_cache(maxsize=64)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers as int32 on the device; the same at each step."""
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _on_device(
    memories: tuple[int, ...], lengths: tuple[int, ...], reach: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Memories, lengths, and neighbours to reach, (G,) int32 each; the same at each step once full."""
    numbers = [memories, lengths, [min(reach, length) for length in lengths]]
    rows, alive, reached = torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)
    return rows, alive, reached


# Tiles of the scan ----------------------------------------------------------------------------------------------------

TUNED = True
"""Whether a card tries the `TILES` at its first search, which takes some 20 seconds; False takes one that fits all."""

UNTUNED_TILES = {"BLOCK_Q": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
INTERPRETED_TILES = {"BLOCK_Q": 64, "BLOCK_N": 128}

TILES = (
    (64, 64, 4, 4),
    (64, 32, 4, 4),
    (128, 64, 8, 4),
    (16, 128, 4, 4),
)
"""Queries and blocks of a tile, warps, stages: what is tried on a card, once for every kind of search."""

SHARED_BYTES = 200 << 10
"""Shared memory that the stages of a tile may take."""


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU: TRITON_INTERPRET=1 when triton was first imported."""
    from recollect.memory_backends import triton_kernels

    return type(triton_kernels.scan_blocks).__name__ == "InterpretedFunction"


@functools.cache
def _tuned_scan() -> Any:
    """The scan with its tiles tuned on the card it runs on. The choice is kept on disk."""
    import triton

    from recollect.memory_backends.triton_kernels import scan_blocks

    configurations = [
        triton.Config({"BLOCK_Q": queries, "BLOCK_N": blocks}, num_warps=warps, num_stages=stages)
        for queries, blocks, warps, stages in TILES
    ]
    tuned_by = ["HINT", "P", "SECOND", "HAS_SCALES", "HAS_BIAS"]
    return triton.autotune(
        configurations, key=tuned_by, prune_configs_by={"early_config_prune": _prune}, cache_results=True
    )(scan_blocks)


def _scan() -> tuple[Any, dict[str, int]]:
    """The scan and the tile sizes that it must be given: none where they are tuned."""
    from recollect.memory_backends.triton_kernels import scan_blocks

    if interpreted():
        return scan_blocks, INTERPRETED_TILES
    return (_tuned_scan(), {}) if TUNED else (scan_blocks, UNTUNED_TILES)


def _prune(configurations: list[Any], named: dict[str, Any], **others: Any) -> list[Any]:
    """Tiles that fit: no more queries than there are (but the smallest tile), and stages that shared memory holds."""
    arguments = {**named, **others}
    depth, hint = arguments["BLOCK_D"], arguments["HINT"]
    size = arguments["keys"].element_size()

    def fits(one: Any) -> bool:
        tile = one.kwargs["BLOCK_Q"] + one.kwargs["BLOCK_N"] * one.num_stages
        return tile * depth * size <= SHARED_BYTES and one.kwargs["BLOCK_Q"] <= max(16, hint)

    wide = [one for one in configurations if fits(one) and 4 * one.kwargs["BLOCK_Q"] >= min(hint, 128)]
    return wide or [one for one in configurations if fits(one)] or configurations[-1:]


def _scan_grid(count: int, blocks: int, group: int) -> Any:
    def grid(tiles: dict[str, Any]) -> tuple[int, int, int]:
        return (-(-count // tiles["BLOCK_Q"]), blocks // tiles["BLOCK_N"], group)

    return grid


__all__ = ["Shape", "interpreted", "shape_for", "triton_topk"]
