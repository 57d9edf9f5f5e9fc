"""The Compressive Transformer (Rae et al. 2019): what the Transformer-XL cache evicts is compressed, not forgotten.

Every `compression_rate` evicted tokens become one slot of a second, compressed first-in first-out memory, which the
layer attends to as it does to its cache. The paper caches a layer's inputs; here the cache holds keys and values, so
those are compressed, each head's by itself. Gradients follow the paper (section 3.2): the main loss never reaches the
compression, and the compression's own loss reaches nothing else.

Letters: B batch rows, H heads, T tokens of the segment, E evicted tokens, c compression rate, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from recollect.model.configuration import ModelConfig


class Compression(nn.Module):
    """Makes c evicted keys and values into one of each, and keeps the loss by which a learned compression is trained.

    `convolution` is a convolution over time of width and stride c, per head, that starts as the mean; `mean` has no
    weights and so no loss. Keys are brought back to length 1 where the model's keys have it.

    Attributes:
        rate: c.
        cache: tokens that the Transformer-XL cache keeps.
        loss: of the last segment that evicted something while training, a mean over rows; `take_compression_loss`
            collects it.
        rows: how many rows it is the mean of.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rate = config.compression_rate
        self.cache = config.xl_cache
        self.heads = config.heads
        self.normalise = config.normalise_queries_and_keys
        self.loss: Tensor | None = None
        self.rows = torch.zeros(())
        self.keys: nn.Parameter | None = None
        self.values: nn.Parameter | None = None
        if config.compression_function == "convolution":
            mean = torch.eye(config.head_dim)[:, :, None].expand(-1, -1, self.rate) / self.rate  # (D out, D in, c)
            self.keys = nn.Parameter(mean.repeat(config.heads, 1, 1))
            self.values = nn.Parameter(mean.repeat(config.heads, 1, 1))

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, E/c, D) float32 made of evicted ones (B, H, E, D); E is a multiple of c."""
        with torch.autocast(keys.device.type, enabled=False):
            keys, values = self._compress(keys.float(), self.keys), self._compress(values.float(), self.values)
        return functional.normalize(keys, dim=-1) if self.normalise else keys, values

    def _compress(self, vectors: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return vectors.unflatten(2, (-1, self.rate)).mean(dim=3)
        channels = vectors.transpose(2, 3).flatten(1, 2)  # (B, H*D, E)
        output = functional.conv1d(channels, weight, stride=self.rate, groups=self.heads)
        return output.unflatten(1, (self.heads, -1)).transpose(2, 3)

    def evict(
        self, keys: Tensor, values: Tensor, real: Tensor, queries: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compresses what the cache let go, and keeps the attention-reconstruction loss while training.

        Args:
            keys, values: (B, H, E, D), oldest first, without gradient.
            real: (B,) int64, how many of the E are tokens of the row's document, counted from the end.
            queries: (B, H, T, D) of the segment.
            scale: (H,) multiplies inner products. Without these two there is no loss.
        Returns:
            Keys and values (B, H, E/c, D) float32 without gradient, and how many of them (B,) hold real tokens alone.
        """
        slots = real // self.rate
        self.loss = None
        if queries is None or scale is None or self.keys is None or not (self.training and torch.is_grad_enabled()):
            with torch.no_grad():
                return *self(keys, values), slots
        new_keys, new_values = self(keys, values)
        with torch.autocast(keys.device.type, enabled=False):
            asked = queries.detach().float() * scale.detach().float()[:, None, None]
            # Only rows whose evicted tokens are real: an empty cache would be taught to the compression otherwise.
            whole = slots * self.rate
            before = _content_attention(asked, keys, values, whole)
            after = _content_attention(asked, new_keys, new_values, slots)
        chosen = (slots > 0).to(before.dtype)
        difference = (before - after).square().mean(dim=(1, 2, 3))
        self.rows = chosen.sum()
        self.loss = (difference * chosen).sum() / self.rows.clamp_min(1.0)
        return new_keys.detach(), new_values.detach(), slots


def _content_attention(queries: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """(B, H, T, D): attention without positions over the last `real` (B,) of the keys; meaningless where that is 0."""
    logits = queries @ keys.transpose(2, 3)
    count = keys.shape[2]
    empty = torch.arange(count, device=keys.device) < count - real[:, None]
    logits = logits.masked_fill(empty[:, None, None, :], torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1) @ values


def make_compression(config: ModelConfig) -> Compression | None:
    """The compression of one layer; None where the model has no compressed memory."""
    return Compression(config) if config.compressed_memory else None


def take_compression_loss(model: nn.Module, weigh: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
    """The attention-reconstruction loss of the last segment, summed over layers; None where nothing was compressed.

    It is taken once: a second call gives None, and no graph outlives its step.

    Args:
        weigh: makes of the rows (layers,) that each layer compressed what its loss is multiplied by; None is 1.
    """
    losses, rows = [], []
    for module in model.modules():
        if isinstance(module, Compression) and module.loss is not None:
            losses.append(module.loss)
            rows.append(module.rows)
            module.loss = None
    if not losses:
        return None
    stacked = torch.stack(losses)
    return (stacked if weigh is None else stacked * weigh(torch.stack(rows))).sum()
