"""How a call is carried out: as it is, window by window, or continued over a cache that has no room left.

Letters: B batch rows, T columns of a call, S columns in sight, N windows, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from recollect.pretrained.errors import MemoryStateError
from recollect.pretrained.sight import Sight
from recollect.pretrained.windows import Windows, aligned_right, cut

if TYPE_CHECKING:
    from recollect.pretrained.reading import Reading

Gather = Callable[[list[Tensor]], Tensor]
"""From hidden states (rows, columns, width) of the calls that a call was split into, to the caller's columns."""


@dataclass
class Plan:
    """What the memory layers must know of the call that is running.

    Attributes:
        windows: N; the model's batch has B * N rows, window n of row b in row b * N + n.
        in_turn: the windows are taken one after another, and some of their tokens enter the memory on the way.
        positions: (B, T) or (1, T): what the model turns the queries by; of one window when N > 1.
        numbers: (B, N, T): which token of the row's text each query is; -1 for padding and for what is read again.
        all_numbers: the same, with those read again.
        leaving: N lists of B: how many of a window's first tokens enter the memory after it.
        last: (B,) the window that stays in sight after a call of several; None where none does.
    """

    windows: int
    in_turn: bool
    positions: Tensor
    numbers: Tensor
    all_numbers: Tensor
    leaving: list[list[int]]
    last: Tensor | None = None


def plan_call(
    reading: Reading,
    given: dict[str, Any],
    inputs: Tensor,
    valid: Tensor,
    lengths: list[int],
    cache: Any,
    sight: Sight | None,
    *,
    again: Tensor | None = None,
    enters: Tensor | None = None,
    restarted: bool = False,
    forgotten: int = 0,
) -> None:
    """Plans a call whose tokens all fit into the window together with what is in sight.

    Args:
        reading: the state between calls.
        given: the arguments of the base model, changed in place.
        inputs: (B, T) tokens or (B, T, X) embeddings.
        valid: (B, T) bool, False for padding.
        lengths: real tokens of each row.
        cache: None without one.
        sight: what the call continues; None if it begins a sight.
        again: (B, T) bool, tokens that are only read again.
        enters: (B, T) bool, tokens that will enter the memory; all when None.
        restarted: the sight begins within a text.
        forgotten: columns that the cache has given up.
    """
    batch, tokens = inputs.shape[:2]
    device = inputs.device
    before = torch.tensor([0] * batch if sight is None else sight.counts, device=device)[:, None]
    ranks = before + valid.cumsum(1) - 1
    restarted = restarted or (sight is not None and sight.restarted)
    if restarted:
        visible = valid if sight is None else torch.cat((sight.mask, valid), 1)
        if sight is not None:
            forgotten = cache.layers[0].forgotten
        given["attention_mask"] = None if bool(visible.all()) else functional.pad(visible.long(), (forgotten, 0))
        positions = ranks.clamp(min=0)
        given["position_ids"] = positions
    elif given.get("position_ids") is not None:
        positions = given["position_ids"]
    else:
        start = 0 if sight is None else sight.mask.shape[1]
        positions = torch.arange(start, start + tokens, device=device)[None]
    all_numbers = (reading.first_of(batch, device)[:, None] + ranks).masked_fill(~valid, -1)
    numbers = all_numbers if again is None else all_numbers.masked_fill(again, -1)
    reading.plan = Plan(1, False, positions, numbers[:, None], all_numbers[:, None], [[0] * batch])
    entering = valid if enters is None else enters & valid
    if not reading.stores:
        # What was read before a pause and is only read again still enters.
        entering = torch.zeros_like(valid) if again is None else entering & again
    ended = None if sight is None else _ended(reading, sight, inputs)
    if ended is not None:
        entering = entering & ~ended[:, None]
    news = Sight(valid, entering, positions, [inputs], lengths, restarted=restarted, ended=ended)

    def commit() -> None:
        if sight is not None:
            sight.extend(news)
            return
        if cache is not None:
            news.layers = {layer.shape.layer: cache.layers[layer.shape.layer] for layer in reading.layers}
        else:
            news.layers, reading.caught = reading.caught, {}
        reading.sight = news

    reading.commit = commit


def plan_windows(reading: Reading, given: dict[str, Any], inputs: Tensor, valid: Tensor, cache: Any) -> None:
    """Plans a call that begins a text longer than the window; arguments as in `plan_call`.

    All windows are read at once, as rows of one batch; the memory layers take them in turn. With a cache the last
    window of each row is a call of its own, whose keys the cache keeps.
    """
    settings = reading.settings
    batch, tokens = inputs.shape[:2]
    device = inputs.device
    reading.check_can_store(batch, None)
    if getattr(reading.base, "gradient_checkpointing", False) and reading.base.training:
        raise MemoryStateError(
            f"gradient checkpointing reads a call twice, so it can't be longer than the window of {settings.window} "
            "tokens: train on shorter pieces of the text"
        )
    windows = cut(valid, settings.window, settings.overlap)
    last = (windows.tokens[..., 0] >= 0).sum(1) - 1
    rows = torch.arange(batch, device=device)
    if cache is None:
        _fold(reading, given, inputs, windows)
        reading.plan.last = last
        mask = windows.tokens[rows, last] >= 0
        news = Sight(
            mask,
            mask if reading.stores else torch.zeros_like(mask),
            reading.plan.positions,
            [_pick(inputs, windows.columns[rows, last])],
            mask.sum(1).tolist(),
            restarted=True,
        )

        def commit() -> None:
            news.layers, reading.caught = reading.caught, {}
            reading.sight = news
            reading.advance(windows.leaving.sum(1).tolist())

        reading.commit = commit
        reading.split = ([], _unfold(windows, None, None, batch, tokens))
        return

    which = torch.arange(windows.tokens.shape[1], device=device)
    head = windows.keep(which < last[:, None])
    head_given = {key: value for key, value in given.items() if key != "past_key_values"} | {"use_cache": False}
    _fold(reading, head_given, inputs, head)
    reading.cached = False
    outputs = reading.call(head_given)
    reading.cached = True
    reading.advance(head.leaving.sum(1).tolist())

    places, lengths = aligned_right(windows, last)
    tail_valid = places >= 0
    tail_columns = windows.columns[rows, last].gather(1, places.clamp(min=0))
    fresh = windows.fresh[rows, last].gather(1, places.clamp(min=0)) & tail_valid
    tail = _pick(inputs, tail_columns)
    _replace_inputs(given, tail)
    forgotten = tokens - tail.shape[1]
    for layer in cache.layers:
        layer.forget(forgotten)
    plan_call(
        reading,
        given,
        tail,
        tail_valid,
        lengths.tolist(),
        cache,
        None,
        again=tail_valid & ~fresh if reading.stores else None,
        restarted=True,
        forgotten=forgotten,
    )
    reading.split = ([outputs], _unfold(head, tail_columns, fresh, batch, tokens))


def plan_continued(reading: Reading, given: dict[str, Any], inputs: Tensor, valid: Tensor, cache: Any) -> None:
    """Plans a call over a cache, whose tokens do not all fit into the window any more; arguments as in `plan_call`.

    It is read in pieces, each filling the window; between them a new window begins. The last piece is the call itself.
    """
    tokens = inputs.shape[1]
    seen = cache.get_seq_length()
    outputs: list[Any] = []
    skipped: list[int] = []
    start = 0
    while True:
        sight = reading.sight
        assert sight is not None
        own = dict(given)
        own["attention_mask"] = functional.pad(valid.long(), (seen, 0), value=1)[:, : seen + tokens]
        fits = _fitting(valid[:, start:], sight.counts, reading.settings.window)
        if fits:
            stop = start + fits
            part = valid[:, start:stop]
            own["attention_mask"] = functional.pad(
                torch.cat((sight.mask, part), 1).long(), (cache.layers[0].forgotten, 0)
            )
            if given.get("position_ids") is not None:
                own["position_ids"] = given["position_ids"][:, start:stop]
            _replace_inputs(own, inputs[:, start:stop])
            plan_call(reading, own, inputs[:, start:stop], part, part.sum(1).tolist(), cache, sight)
            skipped.append(0)
        else:
            again, again_valid, enters = _leave_window(reading, sight)
            counts = again_valid.sum(1).tolist()
            stop = start + _fitting(valid[:, start:], counts, reading.settings.window)
            part = valid[:, start:stop]
            both = _joined_inputs(reading, again, inputs[:, start:stop])
            forgotten = cache.get_seq_length() - again.shape[1]
            for layer in cache.layers:
                layer.forget(forgotten)
            _replace_inputs(own, both)
            lengths = [old + new for old, new in zip(counts, part.sum(1).tolist(), strict=True)]
            plan_call(
                reading,
                own,
                both,
                torch.cat((again_valid, part), 1),
                lengths,
                cache,
                None,
                again=torch.cat((again_valid, torch.zeros_like(part)), 1),
                enters=torch.cat((enters, torch.ones_like(part)), 1),
                restarted=True,
                forgotten=forgotten,
            )
            skipped.append(again.shape[1])
        if stop == tokens:
            break
        outputs.append(reading.call(own))
        start = stop
    given.clear()
    given.update(own)

    def gather(parts: list[Tensor]) -> Tensor:
        return torch.cat([part[:, skip:] for part, skip in zip(parts, skipped, strict=True)], 1)

    reading.split = (outputs, gather)


def _ended(reading: Reading, sight: Sight, inputs: Tensor) -> Tensor | None:
    """(B,) bool: rows where `inputs` is only filling behind an end, as generation does until all rows have ended."""
    if inputs.shape[1] != 1 or len(inputs) == 1 or inputs.is_floating_point() or not reading.end_tokens:
        return None
    ends = torch.tensor(reading.end_tokens, device=inputs.device)
    before = sight.pieces[-1]
    after_end = torch.zeros_like(inputs[:, 0], dtype=torch.bool)
    if not before.is_floating_point() and before.shape[1]:
        after_end = torch.isin(before[:, -1], ends)
    if sight.ended is not None:
        after_end = after_end | sight.ended
    fillings = torch.tensor((*reading.end_tokens, *reading.fill_tokens), device=inputs.device)
    return after_end & torch.isin(inputs[:, 0], fillings)


def _fitting(valid: Tensor, counts: list[int], window: int) -> int:
    """How many of the next columns (B, T) fit into the window of every row, with `counts` tokens in sight."""
    room = torch.tensor([window - count for count in counts], device=valid.device)
    return int((valid.cumsum(1) <= room[:, None]).all(0).sum())


def _leave_window(reading: Reading, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
    """Ends the window of every full row: its tokens leave but for the overlap, which is to be read again.

    Returns:
        What is to be read again, (B, L) tokens or (B, L, X) embeddings, at the right; which of it is real, and which
        is to enter the memory later, (B, L) bool.
    """
    settings = reading.settings
    reading.check_can_store(len(sight.mask), sight)
    kept = [settings.overlap if count == settings.window else count for count in sight.counts]
    reading.leave(sight, [count - keep for count, keep in zip(sight.counts, kept, strict=True)])
    device = sight.mask.device
    longest = max(kept)
    counts, keeps = (torch.tensor(numbers, device=device)[:, None] for numbers in (sight.counts, kept))
    places = torch.arange(longest, device=device) - (longest - keeps)
    order = torch.argsort(~sight.mask, dim=1, stable=True)
    columns = order.gather(1, (counts - keeps + places).clamp(min=0))
    real = places >= 0
    pieces = sight.pieces[0]
    for piece in sight.pieces[1:]:
        pieces = _joined_inputs(reading, pieces, piece)
    reading.sight = None
    return _pick(pieces, columns), real, sight.enters.gather(1, columns) & real


def _joined_inputs(reading: Reading, first: Tensor, second: Tensor) -> Tensor:
    """Both, one after the other along the columns; as embeddings if one of them is."""
    if first.is_floating_point() != second.is_floating_point():
        embed = reading.base.get_input_embeddings()
        first, second = (part if part.is_floating_point() else embed(part) for part in (first, second))
    return torch.cat((first, second), 1)


def _pick(inputs: Tensor, columns: Tensor) -> Tensor:
    """Tokens or embeddings of `inputs` (B, T, ...) in `columns` (B, ...) int64."""
    rows = torch.arange(len(inputs), device=inputs.device).view(-1, *([1] * (columns.dim() - 1)))
    return inputs[rows, columns]


def _replace_inputs(given: dict[str, Any], inputs: Tensor) -> None:
    for name in ("inputs_embeds", "input_ids"):
        given.pop(name, None)
    given["inputs_embeds" if inputs.is_floating_point() else "input_ids"] = inputs


def _fold(reading: Reading, given: dict[str, Any], inputs: Tensor, windows: Windows) -> None:
    """Lays the windows out as rows of one call, and plans it."""
    batch, count, width = windows.tokens.shape
    _replace_inputs(given, _pick(inputs, windows.columns).flatten(0, 1))
    for name in ("attention_mask", "position_ids"):
        given.pop(name, None)
    first = reading.first_of(batch, inputs.device)[:, None, None]
    all_numbers = (first + windows.tokens).masked_fill(windows.tokens < 0, -1)
    numbers = all_numbers.masked_fill(~windows.fresh, -1)
    positions = torch.arange(width, device=inputs.device)[None]
    reading.plan = Plan(count, True, positions, numbers, all_numbers, windows.leaving.T.tolist())


def _unfold(head: Windows, tail_columns: Tensor | None, tail_fresh: Tensor | None, batch: int, tokens: int) -> Gather:
    """Puts hidden states of folded windows, and of the call behind them, where the caller's columns are."""
    device = head.tokens.device
    places = torch.full((batch, tokens), -1, dtype=torch.int64, device=device)
    rows = torch.arange(batch, device=device)[:, None, None].expand_as(head.tokens)
    flat = torch.arange(head.tokens.numel(), device=device).view_as(head.tokens)
    places[rows[head.fresh], head.columns[head.fresh]] = flat[head.fresh]
    if tail_columns is not None and tail_fresh is not None:
        behind = head.tokens.numel() + torch.arange(tail_columns.numel(), device=device).view_as(tail_columns)
        tail_rows = torch.arange(batch, device=device)[:, None].expand_as(tail_columns)
        places[tail_rows[tail_fresh], tail_columns[tail_fresh]] = behind[tail_fresh]

    def gather(parts: list[Tensor]) -> Tensor:
        states = torch.cat([part.flatten(0, 1) for part in parts])
        chosen = states.index_select(0, places.clamp(min=0).flatten()).view(batch, tokens, -1)
        return chosen.masked_fill((places < 0)[..., None], 0.0)

    return gather
