"""A memory of hidden states instead of keys and values (`ModelConfig.memory_key = 'hidden'`).

Unlimiformer (Bertsch et al. 2023, section 2.3) stores what enters the attention once for all heads, not each head's
keys and values. With k = A h, a query's inner product with a key is q.k = q.(A h) = (A^T q).h: the heads search one
memory a row, each with its queries mapped into the space of hidden states. The keys and values of what they found are
computed from the stored states with the present weights. So they are never stale as projections go (the states
themselves are as old as ever), and gradients reach the key and value projections through retrieval.

* Convolved keys (`qk_convolution_width`): a key is a sum over the S newest inputs, k = sum of c_s * (W h_s), which is
  as linear, in the S inputs side by side. These are what is stored: X = S * W numbers a token.
* Normalised keys: k / |k| is not linear in h. The search ranks by q.k, the pairs found are weighed by q.k / |k|. A key
  that is short and points the right way may therefore be missed.

Letters: B batch rows (as many memories), H heads, T tokens, C capacity, K neighbours, D head dimension, W model width,
S taps of the convolution (1 without one), X stored size, U states that a row's queries retrieved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.memory_backends.base import MemoryBackend
from recollect.model.configuration import ModelConfig
from recollect.model.memory_layer import LayerMemory, Memory, Retrieved, RetrievedLogits, WeightedValues
from recollect.model.value_store import FLOAT32, parse_values


@dataclass(frozen=True)
class KeyValueMap:
    """How a layer makes keys and values from stored states.

    Attributes:
        keys: (H * D, X), from the S newest inputs side by side, oldest first.
        values: (H * D, W), from the newest input.
        normalise: whether keys have length 1.
    """

    keys: Tensor
    values: Tensor
    normalise: bool

    @classmethod
    def of(cls, key: Tensor, value: Tensor, taps: Tensor | None, *, normalise: bool) -> KeyValueMap:
        """From projections `key`, `value` (H * D, W) and the keys' convolution `taps` (S, H * D), newest last."""
        if taps is not None:
            key = torch.cat([tap[:, None] * key for tap in taps], dim=1)
        return cls(key.float(), value.float(), normalise)


class HiddenMemory(Memory):
    """The hidden states that entered one layer, one memory a row.

    Args:
        backend: B empty memories of dimension X.
        width: W; X must be a multiple of it.
        k, device, eviction, kept_share: as for `Memory`.

    Attributes:
        past: (B, S - 1, W) the inputs before the next segment's, zero at a document's start.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        *,
        width: int,
        k: int,
        device: torch.device | None = None,
        eviction: str = "fifo",
        kept_share: float = 0.5,
    ) -> None:
        super().__init__(backend, per_row=1, k=k, values=None, device=device, eviction=eviction, kept_share=kept_share)
        if backend.dim % width:
            raise ValueError(f"a backend of dimension {backend.dim} cannot hold inputs of width {width}")
        self.width = width
        self.past = torch.zeros(backend.num_memories, backend.dim // width - 1, width, device=self.device)

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), "past": self.past}

    def reset_rows(self, rows: Tensor) -> None:
        super().reset_rows(rows)
        self.past.masked_fill_(rows.to(self.device)[:, None, None], 0.0)

    def attend(self, queries: Tensor, scale: Tensor, made: KeyValueMap) -> Retrieved:
        """Attention over the K retrieved states of each query and head; slots in the result are the row's.

        Args:
            queries: (B, H, T, D).
            scale: (H,) multiplies the logits.
            made: the layer's present projections.
        """
        batch, heads, tokens, dim = queries.shape
        queries = queries.float()
        with torch.no_grad():
            searched = torch.einsum("bhtd,hdx->bhtx", queries, made.keys.unflatten(0, (heads, dim)))
            found = self.backend.search(searched.flatten(1, 2), self.k).slots.to(self.device)
        stored, places = self._stored(found)
        keys = self._per_head(functional.linear(stored, made.keys), heads)
        if made.normalise:
            keys = functional.normalize(keys, dim=-1)
        values = self._per_head(functional.linear(stored[..., -self.width :], made.values), heads)
        # Rows of `keys` (B*H*U, D) for each query: (B*H*T, K).
        offsets = torch.arange(batch * heads, device=places.device)[:, None] * stored.shape[1]
        rows = (places.view(batch * heads, -1) + offsets).view(batch * heads * tokens, -1)
        slots = found.view(batch, heads, tokens, -1)
        products = RetrievedLogits.apply(queries.reshape(-1, dim), functional.embedding(rows, keys))
        logits, weights = self._weigh(products.view_as(slots), scale, slots)
        remembered = WeightedValues.apply(weights.reshape(rows.shape), functional.embedding(rows, values))
        return Retrieved(remembered.view(batch, heads, tokens, dim), slots[..., 0] >= 0, logits, weights, slots)

    def _stored(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's retrieved states once, (B, U, X), and where among them each of `slots` (B, H*T, K) lies.

        What many queries retrieve is then projected once. A missing neighbour lies at place 0, to be weighed zero.
        """
        batch, present = len(slots), slots.flatten(1).clamp_min(0)
        used = torch.zeros(batch, self.backend.capacity, dtype=torch.bool, device=slots.device)
        used.scatter_(1, present, True)
        # A row that is empty retrieved nothing, yet its missing neighbours stand at slot 0.
        used &= (
            torch.arange(self.backend.capacity, device=slots.device) < self.backend.lengths.to(slots.device)[:, None]
        )
        place = (used.cumsum(1) - 1).clamp_min(0)
        row, slot = used.nonzero(as_tuple=True)
        chosen = slots.new_full((batch, max(1, int(used.sum(1).max()))), -1)
        chosen[row, place[row, slot]] = slot
        stored = self.backend.gather_keys(chosen[:, None])[:, 0].to(slots.device)  # zeros where a row has fewer
        return stored, place.gather(1, present).view_as(slots)

    def _per_head(self, projected: Tensor, heads: int) -> Tensor:
        """(B, U, H * D) as (B * H * U, D)."""
        return projected.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 2)

    def append(self, hidden: Tensor) -> None:
        """Adds the inputs (B, T, W), each beside the S - 1 before it."""
        with torch.no_grad():
            inputs = torch.cat([self.past, hidden.detach().float()], dim=1)
            taps, tokens = self.past.shape[1] + 1, hidden.shape[1]
            self._append(torch.cat([inputs[:, tap : tap + tokens] for tap in range(taps)], dim=-1), None)
            self.past.copy_(inputs[:, tokens:])


AnyMemory = LayerMemory | HiddenMemory


def make_layer_memory(
    config: ModelConfig, backend: MemoryBackend, *, k: int, device: torch.device, values: str = FLOAT32
) -> AnyMemory:
    """The memory that `config.memory_key` and `config.eviction` name, over an empty backend.

    Args:
        backend: of `config.memories_per_row` memories a row, of dimension `config.memory_dim`.
        values: how values are stored (see `recollect.model.value_store`); hidden states have none.
    """
    parse_values(values)
    if backend.dim != config.memory_dim:
        raise ValueError(f"a backend of dimension {backend.dim} cannot hold keys of dimension {config.memory_dim}")
    if config.memory_key == "hidden":
        return HiddenMemory(
            backend,
            width=config.width,
            k=k,
            device=device,
            eviction=config.eviction,
            kept_share=config.eviction_kept_share,
        )
    return LayerMemory(
        backend,
        heads=config.heads,
        values=values,
        k=k,
        device=device,
        eviction=config.eviction,
        kept_share=config.eviction_kept_share,
    )
