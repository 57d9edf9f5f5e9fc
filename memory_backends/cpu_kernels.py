"""Compiled loops of the fused search on a CPU; imported only where numba is installed (see `cpu_search`).

Letters as in `base`; W is D rounded up to whole vectors, S the room of a query's list of candidates.

Keys are read a tile of TILE at a time, less a centre c, since q.(k - c) ranks the keys like q.k, and divided component
by component by weights that the queries are multiplied with, so that no component uses up the codes. A tile is rounded
to whole numbers of a scale of its own, and multiplied by the queries, rounded likewise, in the processor's instruction
for sums of 8-bit products (VNNI: 64 multiply-adds an instruction, four times the rate of float32). Scores stay in
registers: the accumulators start from minus the threshold of each query, so that the sign of a score says whether its
key may be among the k best, and only those go into the query's list.

What makes the answer exact: with q = q^ + (q - q^) for a query and likewise for a key,

    |q.k - q^.k^| <= |q^| |k - k^| + |q - q^| |k| =: eps,

where for a tile the largest |k - k^| and the largest |k| stand (`errors` and `norms` of a tile). Every true score lies
within eps of the one that was computed. Let tau be the k-th highest of (score - eps) seen so far: k keys reach tau, so
a key whose score plus eps lies below tau is not among the k best, now or later. Those that remain are scored once more
in float32, from the keys as they are stored.

Tiles are visited in an order that spreads over the memory (0, 1/2, 1/4, 3/4, 1/8, ... of the way), so that tau rises at
once to where it will stay, also where scores rise or fall along the memory.

The instructions themselves stand in `cpu_instructions`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recollect.memory_backends.cpu_cache import compiled
from recollect.memory_backends.cpu_instructions import (
    GROUP,
    LANES,
    TILE,
    count_reaching,
    extremes,
    keep_reaching,
    ordered,
    pack_block,
    prefetch,
    scan_tile,
    stage_key,
)

LINE = 64
"""Bytes of a line of the cache."""
ROWS_AHEAD = 8
"""Candidates ahead whose keys are asked for while one is scored."""
HALVINGS = 10
"""Steps in which tau is closed in on: to a thousandth of the range of a list, a fraction of its margin."""
CODES = 127
"""Largest code of a query or key."""
SMALLEST_SCALE = np.float32(1e-30)
"""Numbers below this are as good as zero to the first pass, but not to its margin."""
LARGEST = np.float32(1e17)
"""Above it products may overflow; such memories and queries are left to the reference."""
WIDEST_WEIGHT = np.float32(1024)
"""Components are weighted by at most this and at least one by this, so that numbers below LARGEST stay far from the
end of float32."""
ROUNDING = np.float32(8)
"""Units of a tile's scale by which float32 may misplace a sum of products or a threshold."""
WHOLE_MARGIN = np.float32(1 + 1e-4)
"""On top of eps, for the rounding of eps itself and of the float32 scores."""


class Queries(NamedTuple):
    """Encoded queries: codes (groups, W / 4, GROUP) int32 of four int8 each, and (groups * GROUP,) numbers of each.

    In units of a query's own scale: `norms` |q^| and `errors` |q - q^|. `offsets` makes up for the 128 that the codes
    of keys have in excess.
    """

    codes: Any
    offsets: Any
    norms: Any
    errors: Any


class Tiles(NamedTuple):
    """(tiles,) float32: the largest |k - k^| and the largest |k| of each."""

    errors: Any
    norms: Any


class Lists(NamedTuple):
    """The candidates of each query: counts (groups * GROUP,) int64, lower bounds (.., S) float32, slots (.., S) int32,
    and tau (..,) float32, infinite where the list overflowed."""

    counts: Any
    lows: Any
    slots: Any
    taus: Any


class Room(NamedTuple):
    """What a scan works in: keys (TILE, W) float32, their codes (W * TILE,) uint8, squared errors (TILE, LANES)
    float32, thresholds (..,) int32 and what turns accumulators into lower bounds (..,) float32."""

    staged: Any
    panel: Any
    squares: Any
    starts: Any
    shifts: Any


@compiled
def encode_queries(queries, weights, encoded, taus):  # type: ignore[no-untyped-def]
    """Rounds queries (Q, D) times weights (D,), float32, into `encoded`.

    Sets taus to infinity where the first pass is no help: for queries of zeros or of numbers too large.
    """
    count, dim = queries.shape
    for q in range(count):
        longest, largest = np.float32(0), np.float32(0)
        for d in range(dim):
            longest = max(longest, abs(queries[q, d]))
            largest = max(largest, abs(queries[q, d] * weights[d]))
        scale = max(largest / np.float32(CODES), SMALLEST_SCALE)
        inverse = np.float32(1) / scale
        group, place = q // GROUP, q % GROUP
        total, norm, error = 0, np.float32(0), np.float32(0)
        for d in range(dim):
            number = queries[q, d] * weights[d] * inverse
            code = np.rint(number)
            word = np.uint32(np.uint8(np.int8(code))) << np.uint32(8 * (d & 3))
            encoded.codes[group, d >> 2, place] |= np.int32(word)
            total += int(code)
            norm += code * code
            error += (number - code) * (number - code)
        encoded.offsets[q] = -128 * total
        encoded.norms[q], encoded.errors[q] = np.sqrt(norm) * WHOLE_MARGIN, np.sqrt(error) * WHOLE_MARGIN
        taus[q] = -np.inf if norm >= CODES * CODES and longest < LARGEST else np.inf
    taus[count:] = np.inf


@compiled
def raise_tau(lists, encoded, tiles, room, q, k):  # type: ignore[no-untyped-def]
    """Raises a query's tau to about the k-th highest of its lower bounds, never above; forgets what cannot reach it."""
    count = lists.counts[q]
    if count < k:
        return
    numbers = lists.lows[q].ctypes.data
    extremes(numbers, count, room.squares[0].ctypes.data, room.squares[1].ctypes.data)
    least, most = room.squares[0, 0], room.squares[1, 0]
    for lane in range(1, LANES):
        least, most = min(least, room.squares[0, lane]), max(most, room.squares[1, lane])
    if lists.taus[q] > least:
        least = lists.taus[q]
        if count_reaching(numbers, count, least) < k:
            return
    for _ in range(HALVINGS):
        middle = least + (most - least) * np.float32(0.5)
        if count_reaching(numbers, count, middle) >= k:
            least = middle
        else:
            most = middle
    lists.taus[q] = least
    lists.counts[q] = keep_reaching(
        numbers,
        lists.slots[q].ctypes.data,
        count,
        least,
        encoded.norms[q],
        encoded.errors[q],
        tiles.errors.ctypes.data,
        tiles.norms.ctypes.data,
    )


@compiled
def set_thresholds(encoded, lists, room, error, norm, scale):  # type: ignore[no-untyped-def]
    """The accumulators that the scores of a tile start from; returns the longest list."""
    widest = np.float32(CODES * CODES * room.staged.shape[1])
    longest = np.int64(0)
    for q in range(len(lists.taus)):
        epsilon = encoded.norms[q] * error + encoded.errors[q] * norm
        threshold = np.floor(min(max((lists.taus[q] - epsilon) / scale, -widest), widest))
        room.starts[q] = encoded.offsets[q] - np.int32(threshold)
        room.shifts[q] = threshold * scale - epsilon
        longest = max(longest, lists.counts[q])
    return longest


@compiled
def encode_tile(keys, first, rows, centre, inverses, room):  # type: ignore[no-untyped-def]
    """Rounds `rows` keys from `first` on into `room.panel`; returns the largest number, |k - k^| and |k|, the scale."""
    dim, width = keys.shape[1], room.staged.shape[1]
    longest, wrong = np.float32(0), np.float32(0)
    for lane in range(LANES):
        room.squares[0, lane] = 0
    for key in range(rows):
        source, target = keys[first + key].ctypes.data, room.staged[key].ctypes.data
        if dim < width:
            for d in range(dim):
                room.staged[key, d] = keys[first + key, d]
            for d in range(dim, width):
                room.staged[key, d] = 0
            source = target
        norm = stage_key(source, width, centre.ctypes.data, inverses.ctypes.data, target, room.squares[0].ctypes.data)
        longest = max(longest, norm)
    largest = np.float32(0)
    for lane in range(LANES):
        largest = max(largest, room.squares[0, lane])
    for key in range(rows, TILE):
        for d in range(width):
            room.staged[key, d] = 0
    scale = max(largest / np.float32(CODES), SMALLEST_SCALE)
    for key in range(TILE):
        for lane in range(LANES):
            room.squares[key, lane] = 0
    for block in range(0, TILE, LANES):
        for d in range(0, width, LANES):
            pack_block(
                room.staged[block].ctypes.data + 4 * d,
                4 * width,
                np.float32(1) / scale,
                room.panel.ctypes.data + TILE * d + 4 * block,
                room.squares[block].ctypes.data,
            )
    for key in range(rows):
        error = np.float32(0)
        for lane in range(LANES):
            error += room.squares[key, lane]
        wrong = max(wrong, error)
    return largest, (np.sqrt(wrong) + ROUNDING / CODES) * scale, np.sqrt(longest), scale


@compiled
def spread_order(order):  # type: ignore[no-untyped-def]
    """Writes 0 to n - 1 in the order of their bits read backwards, which spreads every beginning of it evenly."""
    highest = 1
    while highest < len(order):
        highest *= 2
    found, now = 0, 0
    for _ in range(highest):
        if now < len(order):
            order[found] = now
            found += 1
        bit = highest >> 1
        while now & bit:
            now ^= bit
            bit >>= 1
        now |= bit


@compiled
def scan(keys, centre, inverses, encoded, k, order, part, parts, tiles, lists, room):  # type: ignore[no-untyped-def]
    """One pass over keys (n, D), or a part of it: fills `tiles` and `lists`.

    Tiles are visited by `order` (tiles,), of which this takes every `parts`-th from `part` on, and the next is asked
    for while one is multiplied. Keys are taken less `centre` (W,) and times `inverses` (W,).

    Returns whether the lists hold; they do not where a number is too large, or every list overflowed.
    """
    length, count, groups = len(keys), len(lists.taus), len(encoded.codes)
    fits = lists.lows.shape[1] - TILE - LANES
    following = max(4, 8 * k // TILE)
    tile_bytes = 4 * TILE * keys.shape[1]
    lines = -(-tile_bytes // (LINE * groups))
    for seen in range(part, len(order), parts):
        now = order[seen]
        ahead = keys[order[min(seen + parts, len(order) - 1)] * TILE].ctypes.data
        first = now * TILE
        rows = min(TILE, length - first)
        largest, error, norm, scale = encode_tile(keys, first, rows, centre, inverses, room)
        if not largest < LARGEST / WIDEST_WEIGHT:
            return False
        tiles.errors[now], tiles.norms[now] = error, norm
        if set_thresholds(encoded, lists, room, error, norm, scale) > fits:
            helped = 0
            for q in range(count):
                if lists.counts[q] > fits:
                    raise_tau(lists, encoded, tiles, room, q, k)
                    if lists.counts[q] > fits // 2:
                        lists.counts[q], lists.taus[q] = 0, np.inf
                helped += lists.taus[q] < np.inf
            if not helped:
                return False
            set_thresholds(encoded, lists, room, error, norm, scale)
        for group in range(groups):
            q = group * GROUP
            for line in range(group * lines, (group + 1) * lines):
                prefetch(ahead + line * LINE)
            scan_tile(
                room.panel.ctypes.data,
                encoded.codes[group].ctypes.data,
                encoded.codes.shape[1],
                room.starts[q:].ctypes.data,
                scale,
                room.shifts[q:].ctypes.data,
                np.int32(first),
                lists.counts[q:].ctypes.data,
                lists.lows[q].ctypes.data,
                lists.slots[q].ctypes.data,
                4 * lists.lows.shape[1],
            )
        if rows < TILE:
            drop_padding(lists, length)
        if seen // parts + 1 >= following and seen + parts < len(order):
            following *= 2
            for q in range(count):
                raise_tau(lists, encoded, tiles, room, q, k)
    return True


@compiled
def drop_padding(lists, length):  # type: ignore[no-untyped-def]
    """Takes slots from `length` on, which the last tile makes up, off the lists."""
    for q in range(len(lists.taus)):
        kept = 0
        for i in range(lists.counts[q]):
            low, slot = lists.lows[q, i], lists.slots[q, i]
            lists.lows[q, kept], lists.slots[q, kept] = low, slot
            kept += slot < length
        lists.counts[q] = kept


@compiled
def merge(lists, other, encoded, k, tiles, room, start, stop):  # type: ignore[no-untyped-def]
    """Adds another part's lists of queries start to stop - 1; tau is infinite where it was or they do not fit."""
    fits = lists.lows.shape[1] - LANES
    for q in range(start, stop):
        lists.taus[q] = max(lists.taus[q], other.taus[q])
        if lists.taus[q] < np.inf and lists.counts[q] + other.counts[q] > fits:
            raise_tau(lists, encoded, tiles, room, q, k)
        count, more = lists.counts[q], other.counts[q]
        if count + more > fits:
            lists.taus[q] = np.inf
        if lists.taus[q] == np.inf:
            continue
        for i in range(more):
            lists.lows[q, count + i], lists.slots[q, count + i] = other.lows[q, i], other.slots[q, i]
        lists.counts[q] = count + more


@compiled
def rescore(queries, keys, encoded, k, tiles, lists, room, start, stop, best, failed):  # type: ignore[no-untyped-def]
    """The k best of the lists of queries start to stop - 1 by float32 scores from keys (n, D).

    Args:
        best: (Q, k) int64 to write, in no order: the score, as an integer that orders like it, above 2^32 - 1 less the
            slot, so that of equal scores the lowest slots are best.
        failed: (Q,) bool to write: where the list overflowed, and nothing is written to `best`.
    """
    found = np.empty(lists.lows.shape[1], np.int64)
    row_bytes = 4 * keys.shape[1]
    for q in range(start, stop):
        failed[q] = lists.taus[q] == np.inf
        if failed[q]:
            continue
        raise_tau(lists, encoded, tiles, room, q, k)
        count = lists.counts[q]
        for i in range(count):
            ahead = keys[lists.slots[q, min(i + ROWS_AHEAD, count - 1)]].ctypes.data
            for byte in range(0, row_bytes, LINE):
                prefetch(ahead + byte)
            slot = lists.slots[q, i]
            score = np.float32(0)
            for d in range(queries.shape[1]):
                score += queries[q, d] * keys[slot, d]
            found[i] = ordered(score) << 32 | (0xFFFFFFFF - slot)
        select(found, count, k)
        for i in range(k):
            best[q, i] = found[i]


@compiled
def select(numbers, count, k):  # type: ignore[no-untyped-def]
    """Brings the k highest of the first `count` distinct numbers to the front, in no order (Hoare's selection)."""
    low, high = 0, count - 1
    while low < high:
        pivot = numbers[(low + high) >> 1]
        left, right = low, high
        while left <= right:
            while numbers[left] > pivot:
                left += 1
            while numbers[right] < pivot:
                right -= 1
            if left <= right:
                numbers[left], numbers[right] = numbers[right], numbers[left]
                left += 1
                right -= 1
        if k - 1 <= right:
            high = right
        elif k - 1 >= left:
            low = left
        else:
            return
