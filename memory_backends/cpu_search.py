"""Exact search on a CPU in one pass that never writes the scores, where numba and the processor's instructions allow.

Letters as in `base`; n keys alive. `cpu_kernels` says how it works and why it is exact. Here it is decided where it
runs: `why_not` for a machine, `worth` for a size. Queries that the first pass is no help for (more candidates than
their list holds, as where very many keys are equally good; numbers near the end of float32) take the reference path of
`block_topk`, which is also every query's path on other machines.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.memory_backends.block_topk import by_distance, ranked_by_product
from recollect.memory_backends.block_topk import search_by_score as reference
from recollect.memory_backends.threads import library_threads, run_all

FEWEST_QUERIES = 16
FEWEST_KEYS = 2048
FEWEST_PRODUCTS = 1 << 18
"""Below any of these a memory is searched by `block_topk`. Times of that over times of one fused pass, dimension 64 and
k 32 on one thread of an EPYC (Zen 4): 0.9, 1.1, 1.7 and 1.7 for 16 queries of 2048, 4096, 8192 and 16384 keys; 0.9,
1.2, 1.6 and 2.1 for 32 queries of 1024, 2048, 4096 and 8192; 0.8, 1.4 and 2.1 for 128 queries of 1024, 2048 and 4096;
3.3 for 512 queries of 8192. Dimension 128 differs little. The products are more than that asks for, since the first
search of a process loads the compiled code, in 0.7 s."""

KEYS_PER_NEIGHBOUR = 16
MOST_NEIGHBOURS = 512
"""The same as above for k 128: 2.0 for 64 queries of 2048 keys."""

WIDEST = 1024
"""Components of a key up to which float32 holds every sum of products of codes: 127 * 127 * 1024 < 2^24."""

QUERIES_AT_ONCE = 1024
"""Queries that one pass over the keys serves; their lists take some 10 MiB."""

LIST_ENTRIES = 1 << 21
"""The same as entries of their lists, which are longer for a larger k: 16 MiB."""

QUERIES_PER_THREAD = 128
ENCODED_BY_EACH = 1 << 17
"""The threads that search one memory share out its queries, from so many of them and up to so many keys, and its keys
otherwise. By queries each encodes all the keys; by keys each has lists that are as long as one thread's. CPU time of
two threads for 512 queries, dimension 64, by queries and by keys: 6.5 and 7.0 ms for 8192 keys, 24.2 and 26.7 for
65536, 70.7 and 67.2 for 262144."""

TILES_PER_PART = 16
"""Tiles that a thread takes at least: each begins with lists of its own."""

SQUARES = 16
"""Components over which a key's squared length is spread where distances are wanted: one would need more than 8 bits,
and a whole vector of them costs no more than one."""

CENTRE_SAMPLE = 256
"""Keys from whose mean the others are measured. Any point will do; a common mean makes for coarse codes."""

_rooms = threading.local()


@functools.cache
def why_not() -> str | None:
    """Why this machine has no fused search on its CPU, in words; None where it has. Imports numba, compiles nothing."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"it is written for x86-64 processors with AVX-512 VNNI, and this is {platform.machine()}"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'recollect[fast]'"
    import llvmlite.binding
    from numba.core import config as numba_config

    from recollect.memory_backends.cpu_instructions import NEEDED

    config: Any = numba_config
    has = llvmlite.binding.get_host_cpu_features()
    missing = [feature for feature in NEEDED if not has.get(feature)]
    if missing:
        return f"the processor lacks {', '.join(missing)}"
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return "NUMBA_CPU_NAME, NUMBA_CPU_FEATURES or NUMBA_ENABLE_AVX restricts what numba may use"
    return None


def describe() -> str:
    """Which kernel large searches on this machine's CPU take, in words."""
    reason = why_not() or (_failure() if _failure.cache_info().currsize else None)
    if reason is None:
        return "fused int8 first pass (AVX-512 VNNI), rescored in float32"
    return f"block maxima in torch ({reason})"


@functools.cache
def _failure() -> str | None:
    """What goes wrong where everything needed seems there, found by one small search; None if nothing does."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 7, 20, generator=generator), torch.randn(1, 300, 20, generator=generator)
    try:
        scores, _, left = search(queries, [keys[0]], 4)
        if not left.any() and torch.allclose(scores, reference(queries, keys, [300], 4)[0], rtol=1e-4, atol=1e-4):
            return None
        reason = "its first search answered wrongly"
    except Exception as error:  # whatever a compiler that we do not know may raise
        reason = f"its loops do not compile: {type(error).__name__}: {error}"
    warnings.warn(
        f"the fused search on this CPU is out of use, and the slower one in torch takes its place, since {reason}. "
        "Please report it, with the versions of numba and llvmlite",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason


def worth(queries: int, keys: int, dim: int, k: int) -> bool:
    """Whether Q queries of one memory of n keys are searched faster in one fused pass, on a machine that has it."""
    if queries < FEWEST_QUERIES or keys < FEWEST_KEYS or queries * keys < FEWEST_PRODUCTS:
        return False
    if keys < KEYS_PER_NEIGHBOUR * k or k > MOST_NEIGHBOURS or dim > WIDEST:
        return False
    return why_not() is None and _failure() is None


def search_by_score(
    queries: Tensor,
    keys: Tensor,
    lengths: Sequence[int],
    k: int,
    *,
    memories: Sequence[int],
    metric: str = "inner_product",
    start: int = 0,
) -> tuple[Tensor, Tensor] | None:
    """What `block_topk.search_by_score` answers, in one fused pass where that is faster.

    Args:
        queries: (M', Q, D) float32.
        keys: (M, C, D) float32.
        lengths: M' numbers of keys searched, from slot `start` on.
        k: at least 1.
        memories: M' rows of `keys`.
        metric: "inner_product", or "l2" for minus the squared Euclidean distance.

    Returns:
        Scores (M', Q, k) and slots (M', Q, k), counted from `start`; None where no memory is worth it.
    """
    dim = queries.shape[2] + (SQUARES if metric == "l2" else 0)
    fused = [row for row, length in enumerate(lengths) if worth(queries.shape[1], length, dim, k)]
    if not fused:
        return None
    rest = [row for row in range(len(lengths)) if row not in set(fused)]
    runs = [keys[memories[row], start : start + lengths[row]] for row in fused]
    one = _search_distances if metric == "l2" else search
    found = one(queries if not rest else queries[fused], runs, k)
    for row, left in enumerate(found[2]):
        if bool(left.any()):
            asked = queries[fused[row]][left]
            again = reference(asked[None], runs[row][None], [len(runs[row])], k, metric=metric)
            found[0][row, left], found[1][row, left] = again[0][0], again[1][0]
    if not rest:
        return found[:2]
    scores = queries.new_empty(*queries.shape[:2], k)
    slots = torch.empty(scores.shape, dtype=torch.int64)
    scores[fused], slots[fused] = found[:2]
    others = [lengths[row] for row in rest]
    scores[rest], slots[rest] = reference(
        queries[rest], keys[:, start:], others, k, memories=[memories[row] for row in rest], metric=metric
    )
    return scores, slots


def _search_distances(queries: Tensor, memories: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`search` by minus the squared distance, of one memory at a time, since its keys are copied."""
    found = []
    for asked, keys in zip(queries, memories, strict=True):
        ranked, ranked_keys = ranked_by_product(asked[None], keys[None], SQUARES)
        _, slots, left = search(ranked, [ranked_keys[0]], k)
        found.append((*by_distance(asked[None], keys[None], slots.masked_fill_(left[..., None], 0)), left))
    scores, slots, left = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, slots, left


def search(queries: Tensor, memories: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best keys by inner product for every query, each memory searched by its own queries.

    Args:
        queries: (M', Q, D) float32 on the CPU.
        memories: M' of keys (n, D) float32 on the CPU, rows contiguous, each n >= k.
        k: at least 1.

    Returns:
        Scores (M', Q, k) float32, falling, slots (M', Q, k) int64, and (M', Q) bool: the queries that were left out,
        whose scores and slots mean nothing. Of equally good keys the lowest slots are returned.
    """
    shape = (*queries.shape[:2], k)
    best = np.zeros(shape, np.int64)
    failed = np.ones(shape[:2], bool)
    threads = library_threads()
    together = len(memories) >= 2 * threads or len(memories) % threads == 0
    tasks = []
    at_once = min(QUERIES_AT_ONCE, LIST_ENTRIES // _list_room(k))
    if not together and shape[1] >= threads * QUERIES_PER_THREAD and max(map(len, memories)) <= ENCODED_BY_EACH:
        group = _kernels().GROUP
        at_once, together = min(at_once, -(-shape[1] // (threads * group)) * group), True
    for row, keys in enumerate(memories):
        for start in range(0, shape[1], at_once):
            part = slice(start, start + at_once)
            asked = queries[row, part].detach().contiguous().numpy()
            parts = 1 if together else threads
            tasks.append(functools.partial(_search_one, asked, keys.numpy(), best[row, part], failed[row, part], parts))
    if together:
        run_all(tasks)
    else:
        for task in tasks:
            task()
    best.sort(axis=-1)
    packed = best[..., ::-1]
    bits = (packed >> 32).astype(np.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    slots = 0xFFFFFFFF - (packed & 0xFFFFFFFF)
    return torch.from_numpy(bits.view(np.float32)), torch.from_numpy(slots), torch.from_numpy(failed)


def _search_one(queries: Any, keys: Any, best: Any, failed: Any, parts: int) -> None:
    """Queries (Q, D) against keys (n, D): writes the k best, packed and in no order, and which queries failed."""
    kernels = _kernels()
    k = best.shape[1]
    length, dim = keys.shape
    centre, weights = _centre_and_weights(queries, keys[:: -(-length // CENTRE_SAMPLE)], kernels.WIDEST_WEIGHT)
    if not np.abs(centre).max() < kernels.LARGEST:
        return
    parts = max(1, min(parts, length // (kernels.TILE * TILES_PER_PART)))
    groups = -(-len(queries) // kernels.GROUP)
    width = -(-dim // kernels.LANES) * kernels.LANES
    padded = groups * kernels.GROUP
    encoded = kernels.Queries(
        np.zeros((groups, width // 4, kernels.GROUP), np.int32),
        np.zeros(padded, np.int32),
        np.zeros(padded, np.float32),
        np.zeros(padded, np.float32),
    )
    taus = np.empty(padded, np.float32)
    kernels.encode_queries(queries, weights, encoded, taus)
    tiles = kernels.Tiles(*(np.zeros(-(-length // kernels.TILE), np.float32) for _ in range(2)))
    lists = [kernels.Lists(*_lists(padded, k, part), taus.copy()) for part in range(parts)]
    rooms = [_room(width, padded) for _ in range(parts)]
    padded_centre, inverses = (
        np.concatenate((one, np.zeros(width - dim, np.float32))) for one in (centre, 1 / weights)
    )
    order = np.empty(len(tiles.norms), np.int64)
    kernels.spread_order(order)
    scans = [
        functools.partial(
            kernels.scan, keys, padded_centre, inverses, encoded, k, order, part, parts, tiles, lists[part], rooms[part]
        )
        for part in range(parts)
    ]
    if not all(run_all(scans)):
        return
    step = -(-len(queries) // parts)

    def finish(part: int) -> None:
        start, stop = part * step, min((part + 1) * step, len(queries))
        for other in lists[1:]:
            kernels.merge(lists[0], other, encoded, k, tiles, rooms[part], start, stop)
        kernels.rescore(queries, keys, encoded, k, tiles, lists[0], rooms[part], start, stop, best, failed)

    run_all([functools.partial(finish, part) for part in range(parts)])


def _centre_and_weights(queries: Any, sample: Any, widest: float) -> tuple[Any, Any]:
    """What keys are taken less and divided by, (D,) float32 each, from queries (Q, D) and a sample of the keys.

    Weights that share a component's range evenly between its keys and its queries; powers of two, which cost no digit.
    """
    centre = sample.mean(0, dtype=np.float64)
    keys = np.sqrt(np.square(sample - centre).mean(0))
    asked = np.sqrt(np.square(queries, dtype=np.float64).mean(0))
    ratios = np.sqrt(keys / np.where(asked > 0, asked, 1))
    ratios = np.where((asked > 0) & (ratios > 0), ratios, 1)
    powers = np.exp2(np.rint(np.log2(ratios) - np.log2(ratios).mean()))
    return centre.astype(np.float32), powers.clip(1 / widest, widest).astype(np.float32)


def _list_room(k: int) -> int:
    """Entries of a query's list: what a first sample of keys and a wide margin need, and a tile more."""
    return max(1024, 16 * k) + 128


def _lists(queries: int, k: int, part: int) -> tuple[Any, Any, Any]:
    """Empty counts, and room for lower bounds and slots that the calling thread keeps from one search to the next."""
    room = _list_room(k)
    kept = getattr(_rooms, "lists", None)
    if kept is None:
        kept = _rooms.lists = {}
    if part not in kept or kept[part][0].size < queries * room:
        kept[part] = np.empty(queries * room, np.float32), np.empty(queries * room, np.int32)
    lows, slots = (numbers[: queries * room].reshape(queries, room) for numbers in kept[part])
    return np.zeros(queries, np.int64), lows, slots


def _room(width: int, queries: int) -> Any:
    """What one scan works in; torch's memory, unlike NumPy's, begins at a line of the cache."""
    kernels = _kernels()
    return kernels.Room(
        torch.zeros(kernels.TILE, width).numpy(),
        torch.zeros(kernels.TILE * width, dtype=torch.uint8).numpy(),
        torch.zeros(kernels.TILE, kernels.LANES).numpy(),
        np.zeros(queries, np.int32),
        np.zeros(queries, np.float32),
    )


def _kernels() -> ModuleType:
    """The compiled loops; imported here because a machine without numba must do without."""
    from recollect.memory_backends import cpu_kernels

    return cpu_kernels
