"""What lies on one rank of a job: an exact backend with a part of the keys of every rank's memories, or of shared ones.

The calls here follow a header on which all ranks agreed (`rank_group`), and each of them is made by all ranks.

Letters as in `base`; W ranks; O owners of memories: each rank has M of its own (O = W), or all share M (O = 1). `told`
are the tables of all ranks' headers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend, SearchResult
from recollect.memory_backends.rank_group import RankGroup
from recollect.memory_backends.rank_shards import Appended
from recollect.memory_backends.sharding import Share


class RankPart:
    """The part of one rank.

    Args:
        backend: an exact backend of O * M empty memories: j * M + m is for memory m of owner j.
        ranks: all of them.
        num_memories, capacity: M, C.
        shared: whether the ranks share M memories.

    Attributes:
        known: (O, M) keys that every memory was given since its last reset, as this part has it.
    """

    def __init__(
        self, backend: MemoryBackend, ranks: RankGroup, *, num_memories: int, capacity: int, shared: bool
    ) -> None:
        self.backend = backend
        self.ranks = ranks
        self.num_memories = num_memories
        self.capacity = capacity
        self.shared = shared
        self.share = Share(capacity, ranks.size, ranks.rank)
        self.known = torch.zeros(1 if shared else ranks.size, num_memories, dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        """Where the keys lie."""
        return self.backend.device

    def follow(self, totals: Tensor) -> None:
        """Forgets what other ranks have reset since the last call, by the counts (O, M) that they tell."""
        was_reset = totals != self.known
        if bool(totals[was_reset].any()):
            raise AssertionError(f"the ranks tell of {totals.tolist()} keys, and this part of {self.known.tolist()}")
        if bool(was_reset.any()):
            self.backend.reset(was_reset.flatten().nonzero().flatten())
        self.known = totals.clone()

    def start_from(self, totals: Tensor) -> None:
        """Empties the part and takes memories to have been given `totals` (O, M) keys before the next ones."""
        self.backend.reset()
        self.backend.ring.totals.copy_(self.share.count(totals).flatten())

    def take_in(self, rows: Tensor, mine: Appended, before: Tensor, after: Tensor) -> None:
        """Sends this rank's new keys where they belong, and appends those that belong here.

        Args:
            rows: (N, D), those of `mine`.
            mine: this rank's keys that stay.
            before, after: (O, M) keys that every memory was given before and after.
        """
        lies_on = mine.ranks_of(self.capacity, self.ranks.size)
        first = torch.maximum(before, after - self.capacity)
        arriving = self.share.count(after) - self.share.count(first)
        if self.shared:  # every rank was given the same keys
            taken = rows[(lies_on == self.ranks.rank).to(self.device)]
        else:
            taken = self.ranks.trade(
                rows[lies_on.argsort(stable=True).to(self.device)],
                torch.bincount(lies_on, minlength=self.ranks.size).tolist(),
                arriving.sum(1).tolist(),
            )
        # Keys that are evicted within this very call never come: the part goes on with the first one that does.
        skipped = (first > before).flatten()
        self.backend.ring.totals[skipped] = self.share.count(first).flatten()[skipped]
        counts = arriving.flatten()
        begins = counts.cumsum(0) - counts
        for count in counts.unique().tolist():
            if count:
                parts = (counts == count).nonzero().flatten()
                places = (begins[parts, None] + torch.arange(count)).flatten().to(self.device)
                self.backend.add(taken[places].view(len(parts), count, -1), memories=parts)
        self.known = after.clone()

    def search(self, queries: Tensor, k: int, told: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours of this rank's queries among all keys of its memories.

        Args:
            queries: (M', Q, D) on the part's device.
            k: neighbours.
            told: (W, 2, M), of each rank's memories (the same for all where they are shared) the keys that each was
                given, and its place in the call from 1 on; 0 where it is not searched.

        Returns:
            Scores (M', Q, k) and slots (M', Q, k), -inf and -1 where there are no more.
        """
        size, shape = self.ranks.size, (*queries.shape[:2], k)
        scores = torch.full(shape, -torch.inf, device=self.device)
        slots = torch.full(shape, -1, dtype=torch.int64, device=self.device)
        lengths = told[:, 0].clamp(max=self.capacity) * (told[:, 1] > 0)
        # No part of a memory is longer than that of the first rank.
        each = min(k, Share(self.capacity, size, 0).count(int(lengths.max())))
        if not each or not queries.numel():
            return scores, slots
        packed = self._answer(self.ranks.gather(queries), each, told)
        even = [queries.shape[0]] * size
        found = self.ranks.trade(packed, even, even).view(size, *queries.shape[:2], each, 2)
        places = found[..., 1].long()
        lies_on = torch.arange(size, device=self.device)[:, None, None, None]
        places = torch.where(places < 0, -1, places * size + lies_on)
        # What was found for a query lies beside each other then: (M', Q, W * each).
        candidates = found[..., 0].contiguous().view(torch.float32).permute(1, 2, 0, 3).flatten(2)
        best, order = candidates.topk(min(k, candidates.shape[2]), dim=2)
        scores[..., : best.shape[2]] = best
        slots[..., : best.shape[2]] = places.permute(1, 2, 0, 3).flatten(2).gather(2, order)
        return scores, slots

    def _answer(self, asked: Tensor, k: int, told: Tensor) -> Tensor:
        """(W * M', Q, k, 2) int32, bits of a score and a slot of this part, of all ranks' queries (W, M', Q, D)."""
        size, memories, queries = asked.shape[:3]
        if self.shared:  # the queries of all ranks of a memory beside each other
            rows = asked.transpose(0, 1).flatten(1, 2)
            found = self.backend.search(rows, k, memories=_parts_of(told[:1]))
            packed = _packed(found).view(memories, size, queries, k, 2).transpose(0, 1).flatten(0, 1)
        else:
            packed = _packed(self.backend.search(asked.flatten(0, 1), k, memories=_parts_of(told)))
        return packed

    def gather(self, wanted: Tensor, counts: Tensor) -> Tensor:
        """Keys (N, D) of this rank's memories.

        Args:
            wanted: (N,) memory * C + slot on the part's device, those of rank 0 first, and so on.
            counts: (W, W), how many keys each rank wants of each.
        """
        sent, asked = counts[self.ranks.rank].tolist(), counts[:, self.ranks.rank].tolist()
        requests = self.ranks.trade(wanted, sent, asked)
        parts = requests // self.capacity
        if not self.shared:
            asking = torch.repeat_interleave(torch.arange(self.ranks.size), torch.tensor(asked))
            parts += asking.to(self.device) * self.num_memories
        places = requests % self.capacity // self.ranks.size
        keys = self.backend.ring.gather(places[:, None, None], parts)[:, 0, 0]
        if self.backend._norms is not None:
            keys = keys * self.backend._norms[parts, places][:, None]
        return self.ranks.trade(keys, asked, sent)


def _packed(found: SearchResult) -> Tensor:
    return torch.stack((found.scores.view(torch.int32), found.slots.to(torch.int32)), -1)


def _parts_of(told: Tensor) -> Tensor:
    """(O * M',) the memories of the part that are searched: owner by owner, in the order of each one's own call."""
    owners, _, memories = told.shape
    taking = int((told[0, 1] > 0).sum())
    order = told[:, 1].argsort(dim=1, stable=True)[:, memories - taking :]
    return (torch.arange(owners)[:, None] * memories + order).flatten()
