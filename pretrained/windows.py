"""How a text longer than the model's sight is read: window by window, each starting at position zero.

A window holds `window` tokens. The next one begins `window - overlap` tokens later: it reads the last `overlap` tokens
again, so that its first new tokens have something in sight, and everything before it is in memory. Which window a
token belongs to depends on its number in the text alone, so one call, several calls over one cache, and generation
token by token all agree.

Restarting positions are what models with learned positions need (GPT-2 has no position beyond its last), and they keep
rotary models where they were trained: each window looks like the beginning of a text, first token and all. (Sliding a
rotary cache past its first tokens instead makes pretrained models fail: Xiao et al. 2023, arXiv 2309.17453.)

Letters: B batch rows, T columns of a call, N windows, W tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """A batch of texts cut into windows, aligned to the left, a row with fewer windows filled up with empty ones.

    Attributes:
        tokens: (B, N, W) int64: which token of its row stands there, padding not counted; -1 for none.
        columns: (B, N, W) int64: in which column of the call it stood; 0 for none.
        fresh: (B, N, W) bool: the window in which the token counts, not one that reads it again.
        leaving: (B, N) int64: tokens at the window's start that the row's next window no longer sees; 0 in its last.
    """

    tokens: Tensor
    columns: Tensor
    fresh: Tensor
    leaving: Tensor

    def keep(self, wanted: Tensor) -> Windows:
        """The windows up to the last that some row wants, those not marked in `wanted` (B, N) bool empty."""
        count = int(wanted.any(0).sum())
        wanted = wanted[:, :count]
        tokens = self.tokens[:, :count].masked_fill(~wanted[..., None], -1)
        return Windows(
            tokens,
            self.columns[:, :count].masked_fill(tokens < 0, 0),
            self.fresh[:, :count] & (tokens >= 0),
            self.leaving[:, :count] * wanted,
        )


def count_windows(length: int, window: int, overlap: int) -> int:
    """Windows that a text of `length` tokens is read in; at least one."""
    return 1 + max(0, -(-(length - window) // (window - overlap)))


def cut(valid: Tensor, window: int, overlap: int) -> Windows:
    """Cuts rows whose real tokens are marked in `valid` (B, T) bool, wherever the padding stands."""
    lengths = valid.sum(1)
    numbers = [count_windows(length, window, overlap) for length in lengths.tolist()]
    count, stride = max(numbers), window - overlap
    rows = torch.tensor(numbers, device=valid.device)[:, None]
    which = torch.arange(count, device=valid.device)
    within = torch.arange(window, device=valid.device)
    tokens = (which[:, None] * stride + within).expand(len(valid), -1, -1)
    exists = (tokens < lengths[:, None, None]) & (which < rows)[..., None]
    order = torch.argsort(~valid, dim=1, stable=True)  # the columns of the real tokens come first
    columns = order.gather(1, tokens.clamp(max=valid.shape[1] - 1).flatten(1)).view_as(tokens)
    tokens = tokens.masked_fill(~exists, -1)
    fresh = exists & ((which == 0)[:, None] | (within >= overlap))
    leaving = torch.where(which < rows - 1, stride, 0)
    return Windows(tokens, columns.masked_fill(~exists, 0), fresh, leaving)


def aligned_right(windows: Windows, which: Tensor) -> tuple[Tensor, Tensor]:
    """One window of every row, its tokens moved to the right, so that a cache can grow behind them.

    Args:
        windows: of B rows.
        which: (B,) the window of each row.

    Returns:
        Places (B, L) int64 within the window, -1 for padding at the left, L the longest; and lengths (B,).
    """
    rows = torch.arange(len(which), device=which.device)
    lengths = (windows.tokens[rows, which] >= 0).sum(1)
    longest = int(lengths.max())
    places = torch.arange(longest, device=which.device) - (longest - lengths)[:, None]
    return places.clamp(min=-1), lengths
