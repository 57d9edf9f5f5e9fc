"""Approximate top-k by bucket maxima: TPU-KNN (Chern et al. 2022, arXiv 2206.14286).

All scores are computed, but the top-k is taken from one maximum for each of L buckets of keys, which an accelerator
computes at the speed of the matrix product. A true neighbour is missed only if it shares its bucket with a better one,
so the expected recall is a formula of L and k, whatever the data, as long as neighbours fall into buckets at random:
see `expected_recall`.

L comes from the recall that is asked for as in the paper's own code for TPUs (XLA, `ApproxTopKReductionOutputSize`):
from the lower bound (1 - 1/L)^(k-1) on the recall, rounded up to what a reduction by a power of two leaves, in whole
vectors of 128 lanes. Key number s belongs to bucket s mod L: keys of one bucket lie far apart, since the keys of
neighbouring tokens, which are alike, would otherwise hide each other.

On a card with Triton no score is written (`triton_topk`): a bucket is then a block of the fused search, of which there
are at least L, and the best 2 k of the block maxima are scored anew by their whole keys. The first pass may be of 8
bits there; what recall that leaves is measured in benchmarks/gpu_check.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from recollect.memory_backends import cpu_search
from recollect.memory_backends.base import Capabilities
from recollect.memory_backends.block_topk import select_top
from recollect.memory_backends.errors import InvalidInput, InvalidSpec, UnsupportedOperation
from recollect.memory_backends.fused_backend import FusedBackend
from recollect.memory_backends.options import KeyStorageOptions
from recollect.memory_backends.ring_search import search_ring
from recollect.memory_backends.triton_keys import LANES as GPU_LANES
from recollect.memory_backends.triton_keys import FirstPass
from recollect.memory_backends.triton_search import OLDEST_CARD, FusedSearch
from recollect.memory_backends.triton_topk import FEWEST_KEYS, MOST_BLOCKS, MOST_KEYS, OVERSAMPLED, Shape, power_of_two

MOST_FETCHED = 2
"""Times k: neighbours fetched to find k in different buckets. Where it takes more, buckets are few."""

LANES = 128
"""Width of a TPU's vector: L is a multiple of it, and so few keys are searched exactly."""


def expected_recall(buckets: int, k: int, keys: int | None = None) -> float:
    """Expected recall at k of bucket maxima, when the k neighbours fall into buckets at random.

    A bucket that holds any of the k neighbours returns the best of them, and no bucket returns two. So the number
    found is the number of buckets hit, and a bucket is missed by all k with probability (1 - 1/L)^k:

        E[recall] = L / k * (1 - (1 - 1/L)^k)

    That draws with replacement, right for many keys a bucket. For n keys with key s in bucket s mod L, k distinct
    positions drawn at random miss a bucket of b keys with probability C(n - b, k) / C(n, k), which is exact.
    The paper counts only neighbours alone in their bucket, which gives its bound: E[recall] >= (1 - 1/L)^(k-1).

    Args:
        buckets: L, at least 1.
        k: neighbours asked for, at least 1.
        keys: n, at least k; None for many.
    """
    if keys is None:
        return buckets / k * -math.expm1(k * math.log1p(-1 / buckets)) if buckets > 1 else 1 / k
    small, larger = divmod(keys, buckets)
    hit = 0.0
    for size, count in ((small + 1, larger), (small, buckets - larger)):
        missed = math.prod((keys - size - drawn) / (keys - drawn) for drawn in range(k)) if size + k <= keys else 0.0
        hit += count * (1 - missed)
    return hit / k


def buckets_for(recall: float, k: int, keys: int) -> int:
    """L >= k for a recall asked for, as XLA takes it for TPUs; `keys` itself where a reduction would miss it."""
    if keys <= LANES or recall >= 1:
        return keys
    wanted = LANES if k == 1 else min(max(int((1 - k) / math.log(recall)), LANES, k), keys)
    halvings = (keys // wanted).bit_length() - 1
    if halvings == 0:
        return keys
    return math.ceil(math.ceil(keys / LANES) / 2**halvings) * LANES


def select_by_buckets(scores: Tensor, k: int, *, buckets: int) -> tuple[Tensor, Tensor]:
    """The k highest bucket maxima of scores (..., n), falling, and their positions (..., k); k <= buckets <= n."""
    n = scores.shape[-1]
    rounds = n // buckets
    whole = scores[..., : rounds * buckets].unflatten(-1, (rounds, buckets))
    maxima = whole.amax(-2)
    left_over = n - rounds * buckets
    if left_over:
        maxima[..., :left_over] = torch.maximum(maxima[..., :left_over], scores[..., rounds * buckets :])
    best, bucket = select_top(maxima, k)
    members = bucket[..., None, :] + torch.arange(0, n, buckets, device=scores.device)[:, None]
    member_scores = scores.gather(-1, members.clamp(max=n - 1).flatten(-2)).unflatten(-1, (-1, k))
    member_scores.masked_fill_(members >= n, -torch.inf)
    which = member_scores.argmax(-2, keepdim=True)
    return best, members.gather(-2, which).squeeze(-2)


def neighbours_for(k: int, buckets: int) -> int:
    """How many of the best keys all but surely lie in k buckets of L: k, those expected to share one, and a margin."""
    shared = k * k / buckets
    return math.ceil(k + shared + 4 * math.sqrt(shared) + 4)


def first_of_buckets(scores: Tensor, slots: Tensor, k: int, *, buckets: int) -> tuple[Tensor, Tensor] | None:
    """The k highest bucket maxima, from the best keys (..., n), falling; None where some lie in fewer than k buckets.

    The first of a bucket in a falling order is its maximum, and whatever is not in the list is lower than all of it.
    """
    bucket, order = (slots % buckets).sort(dim=-1, stable=True)
    later = torch.zeros_like(slots, dtype=torch.bool)
    later.scatter_(-1, order[..., 1:], bucket[..., 1:] == bucket[..., :-1])
    if bool(((~later).sum(-1) < k).any()):
        return None
    first = later.to(torch.uint8).argsort(dim=-1, stable=True)[..., :k]
    return scores.gather(-1, first), slots.gather(-1, first)


@dataclass(frozen=True)
class ApproxTopKOptions(KeyStorageOptions):
    """Options of `approx-topk`."""

    recall_target: float = field(
        default=0.95, metadata={"help": "recall to expect at least, above 0 and at most 1; sets the number of buckets"}
    )
    buckets: int | None = field(
        default=None, metadata={"help": "number of buckets, at least k; takes the place of recall_target"}
    )
    first_pass: FirstPass = field(
        default="float16",
        metadata={"help": "on a GPU: type in which queries and keys are compared first; 8 bits cost recall"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.recall_target <= 1:
            raise InvalidSpec(f"'approx-topk': recall_target={self.recall_target!r} is not above 0 and at most 1")
        if self.buckets is not None and self.buckets < 1:
            raise InvalidSpec(f"'approx-topk': buckets={self.buckets!r} is not at least 1")
        if self.buckets is not None and self.recall_target != 0.95:
            raise InvalidSpec(
                f"'approx-topk': buckets={self.buckets} and recall_target={self.recall_target} both set the number of "
                "buckets; give one of them"
            )


class ApproxTopK(FusedBackend):
    """The best keys of L buckets: recall by formula, no index to build, any device."""

    name = "approx-topk"
    summary = "bucket maxima as on TPUs (Chern et al. 2022): recall by formula, nothing to build"
    Options = ApproxTopKOptions
    options: ApproxTopKOptions
    capabilities: ClassVar[Capabilities] = Capabilities(devices=("cpu", "cuda", "mps"))
    search_options = ("recall_target", "buckets")
    sweep = ("approx-topk", "approx-topk:recall_target=0.8")
    curve: ClassVar = {"recall_target": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)}
    recall_floor = 0.75

    def __init__(self, options: Any = None, **arguments: Any) -> None:
        super().__init__(options, **arguments)
        first_pass = self.options.first_pass
        self.fused = FusedSearch.where_usable(self.ring, self.metric, first_pass=first_pass, guard=False)
        if self.fused is None and first_pass != ApproxTopKOptions().first_pass:
            raise UnsupportedOperation(
                f"'approx-topk': first_pass={first_pass} is an option of the search on a card of compute capability "
                f"{'.'.join(map(str, OLDEST_CARD))} or above, with triton installed and room for {FEWEST_KEYS} to "
                f"{MOST_KEYS} keys; this memory is on {str(self.device)!r} with capacity={self.capacity}: leave it out"
            )

    def _search(self, queries: Tensor, k: int, memories: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self.ring.lengths[memories].tolist()
        if self.options.buckets is not None and self.options.buckets < min(k, max(lengths)):
            raise InvalidInput(
                f"k is {k}, but 'approx-topk' has buckets={self.options.buckets} and finds one neighbour in each: "
                "give at least k buckets"
            )
        found = self._from_exact(queries, k, memories, lengths)
        if found is not None:
            return found
        select = partial(_select, options=self.options)

        def plain(asked: Tensor, which: list[int], alive: list[int]) -> tuple[Tensor, Tensor]:
            return search_ring(self.ring, asked, k, which, alive, self.metric, select=select)

        def shape(alive: list[int]) -> Shape | None:
            return _fused_shape(min(alive), max(alive), k, self._buckets(k, min(alive)))

        if self.fused is None:
            return plain(queries, memories.tolist(), lengths)
        return self.fused.search(queries, k, memories.tolist(), lengths, plain, shape=shape, open_blocks=False)

    def _from_exact(
        self, queries: Tensor, k: int, memories: Tensor, lengths: list[int]
    ) -> tuple[Tensor, Tensor] | None:
        """The same answer out of somewhat more than k exact neighbours, where a fused pass finds those sooner than
        the scores of all keys are written; None elsewhere."""
        keys = lengths[0]
        if self.device.type != "cpu" or self.metric == "l2" or self.ring.storage != "float32":
            return None
        if any(length != keys for length in lengths) or k > keys:
            return None
        buckets = self._buckets(k, keys)
        fetch = k if buckets >= keys else neighbours_for(k, buckets)
        if fetch > MOST_FETCHED * k or not cpu_search.worth(queries.shape[1], keys, self.dim, fetch):
            return None
        scores, slots = search_ring(self.ring, queries, fetch, memories, lengths, self.metric)
        return (scores, slots) if buckets >= keys else first_of_buckets(scores, slots, k, buckets=buckets)

    def _buckets(self, k: int, keys: int) -> int:
        return self.options.buckets or buckets_for(self.options.recall_target, k, keys)


def _fused_shape(shortest: int, longest: int, k: int, buckets: int) -> Shape | None:
    """Blocks of the fused search that are at least `buckets` in each memory; None where they would be too many.

    A run of LANES blocks that a memory does not fill has shorter blocks, so only whole runs count.
    """
    wanted = max(buckets, 2 * OVERSAMPLED * k)
    rounds = power_of_two(shortest // wanted + 1) // 2
    while rounds > 1 and shortest // (GPU_LANES * rounds) * GPU_LANES < wanted:
        rounds //= 2
    if rounds < 2 or -(-longest // (GPU_LANES * rounds)) * GPU_LANES > MOST_BLOCKS:
        return None
    return Shape(rounds, power_of_two(OVERSAMPLED * k + 32), 1)


def _select(scores: Tensor, k: int, *, options: ApproxTopKOptions) -> tuple[Tensor, Tensor]:
    keys = scores.shape[-1]
    buckets = options.buckets or buckets_for(options.recall_target, k, keys)
    if buckets >= keys:
        return select_top(scores, k)
    return select_by_buckets(scores, k, buckets=buckets)
