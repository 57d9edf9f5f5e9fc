"""Long texts, caches, padding and generation with memory: one text, read in whatever way, gives the same."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CONTEXT, FAMILIES, tiny_model, tokens

from recollect.pretrained.attach import attach_memory
from recollect.pretrained.records import Retrieved, StoredKeys
from recollect.pretrained.windows import count_windows, cut

TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_windows_hold_every_token_once_and_no_gap(overlap: int) -> None:
    for length in range(1, 40):
        valid = torch.ones(2, length + 2, dtype=torch.bool)
        valid[0, :2] = False
        valid[1, -2:] = False
        windows = cut(valid, 8, overlap)
        assert windows.tokens.shape == (2, count_windows(length, 8, overlap), 8)
        for row, padded in ((0, 2), (1, 0)):
            fresh = windows.tokens[row][windows.fresh[row]]
            assert fresh.tolist() == list(range(length))
            columns = windows.columns[row][windows.fresh[row]]
            assert columns.tolist() == [token + padded for token in range(length)]
            gone: set[int] = set()
            for window, leaving in zip(windows.tokens[row].tolist(), windows.leaving[row].tolist(), strict=True):
                # Remembered and seen tokens are all that came before, none of them twice.
                seen = set(window) - {-1}
                assert gone | seen == set(range(max(seen) + 1))
                assert not gone & seen
                gone |= set(sorted(seen)[:leaving])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overlap", [0, 5])
@torch.no_grad()
def test_one_call_pieces_over_a_cache_and_single_tokens_agree(family: str, overlap: int) -> None:
    model = tiny_model(family)
    text = tokens(2, 43)
    memory = attach_memory(model, layers=[0, 1], k=5, memory_size=24, overlap=overlap)
    whole = model(text, use_cache=False)
    memory.flush()
    held = memory.lengths
    for size in (43, 11, 1):
        memory.reset()
        cache, parts = None, []
        for piece in text.split(size, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert cache.get_seq_length() == 43
        assert cache.layers[0].keys.shape[2] <= CONTEXT
        torch.testing.assert_close(torch.cat(parts, 1), whole.logits, **TOLERANCE)
        memory.flush()
        assert torch.equal(memory.lengths, held)


@torch.no_grad()
def test_segments_of_a_window_are_a_long_call_without_overlap() -> None:
    model = tiny_model("gpt2")
    text = tokens(2, 3 * CONTEXT)
    memory = attach_memory(model, layers=[1], k=5, overlap=0)
    whole = model(text, use_cache=False).logits
    memory.reset()
    parts = [model(part).logits for part in text.split(CONTEXT, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_padded_rows_are_as_if_alone(family: str, side: str, use_cache: bool) -> None:
    model = tiny_model(family)
    lengths = (41, 7, 16, 29)
    texts = [tokens(1, length, seed=length) for length in lengths]
    batch = torch.zeros(4, 41, dtype=torch.int64)
    mask = torch.zeros(4, 41, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(41 - text.shape[1], None) if side == "left" else slice(text.shape[1])
        batch[row, place], mask[row, place] = text, 1
    memory = attach_memory(model, layers=[0, 1], k=5, memory_size=64, overlap=4)
    stored: list[StoredKeys] = []
    with memory.observing_stored(stored.append):
        logits = model(batch, attention_mask=mask, use_cache=use_cache).logits
        second = tokens(4, 9, seed=5)
        after = model(second, use_cache=use_cache).logits
    memory.flush()
    assert memory.lengths.tolist() == [length + 9 for length in lengths]
    for row, length in enumerate(lengths):
        numbers = torch.cat([record.positions[row] for record in stored if record.layer == 1])
        assert numbers[numbers >= 0].tolist() == list(range(length))
    for row, text in enumerate(texts):
        memory.reset()
        alone = model(text, use_cache=use_cache).logits
        torch.testing.assert_close(logits[row][mask[row].bool()], alone[0], **TOLERANCE)
        torch.testing.assert_close(after[row], model(second[row : row + 1], use_cache=use_cache).logits[0], **TOLERANCE)


@torch.no_grad()
def test_a_token_is_remembered_once_when_it_leaves_the_sight_and_never_finds_itself() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, layers=[1], k=16, memory_size=64)
    seen: list[Retrieved] = []
    first, second, third = tokens(1, 30).split(10, dim=1)
    with memory.observing(seen.append):
        model(first)
        assert memory.lengths.tolist() == [0]
        model(second)
        assert memory.lengths.tolist() == [10]
        output = model(third, use_cache=True)
        assert memory.lengths.tolist() == [20]
        model(first[:, :4], past_key_values=output.past_key_values)  # continues the third: all of it is in sight
        assert memory.lengths.tolist() == [20]
    assert [record.query_positions[0].tolist() for record in seen] == [
        list(range(10, 20)),
        list(range(20, 30)),
        list(range(30, 34)),
    ]
    for record, newest in zip(seen, (9, 19, 19), strict=True):
        found = record.positions[record.positions >= 0]
        assert int(found.max()) == newest
        best = record.positions[record.positions >= 0].view(4, -1, min(16, newest + 1))
        assert (best.sort(dim=-1).values.diff(dim=-1) > 0).all(), "a token was found twice"
    memory.flush()
    assert memory.lengths.tolist() == [34]


@torch.no_grad()
def test_reports_of_a_long_call_name_each_query_once() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, layers=[0, 1], k=4, memory_size=64, overlap=6)
    seen: list[Retrieved] = []
    with memory.observing(seen.append):
        model(tokens(2, 50), use_cache=False)
    for layer in (0, 1):
        asked = torch.cat([record.query_positions for record in seen if record.layer == layer], 1)
        assert asked[0][asked[0] >= 0].tolist() == list(range(16, 50))  # nothing is remembered in the first window
        for record in seen:
            if record.layer == layer:
                known = record.query_positions[:, None, :, None].expand_as(record.positions)
                assert (record.positions < known)[known >= 0].all(), "a token found its future"
                weight = record.weights.sum(-1)
                torch.testing.assert_close(weight, torch.ones_like(weight))
                assert ((record.share > 0) & (record.share < 1)).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_generation_past_the_context_is_what_reading_says(family: str) -> None:
    model = tiny_model(family)
    memory = attach_memory(model, layers=[1], k=4, memory_size=64)
    prompts = tokens(2, 21)
    written = model.generate(prompts, max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0)
    memory.reset()
    logits = model(written, use_cache=False).logits
    assert torch.equal(logits[:, 20:-1].argmax(-1), written[:, 21:])


@torch.no_grad()
def test_generation_of_padded_prompts_is_as_if_alone() -> None:
    model = tiny_model("gpt_neox")
    memory = attach_memory(model, layers=[1], k=4, memory_size=64)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [tokens(1, 21, seed=1), tokens(1, 5, seed=2)]
    batch = torch.cat((texts[0], torch.nn.functional.pad(texts[1], (16, 0))))
    mask = (batch > 0).long()
    together = model.generate(batch, attention_mask=mask, **options)
    for row, text in enumerate(texts):
        memory.reset()
        assert torch.equal(model.generate(text, **options)[0, text.shape[1] :], together[row, 21:])


@torch.no_grad()
def test_generation_finds_what_was_read_before() -> None:
    model = tiny_model("qwen2")
    memory = attach_memory(model, layers=[0, 1], k=8)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    chapter, question = tokens(1, 40, seed=1), tokens(1, 5, seed=2)
    model(chapter)
    with_memory = model.generate(question, **options)
    memory.reset()
    assert not torch.equal(model.generate(question, **options), with_memory)
    # Rows that share their prompt's memory: beams and several samples.
    for extra in ({"num_beams": 3}, {"num_beams": 1, "do_sample": True, "num_return_sequences": 3}):
        memory.reset()
        model(chapter)
        torch.manual_seed(0)
        rows = model.generate(question, **{**options, **extra})
        assert memory.lengths.tolist() == [40]
        model(question)
        assert memory.lengths.tolist() == [40], "several continuations of one text were remembered"
        memory.reset()
        model(chapter.expand(3, -1))
        torch.manual_seed(0)
        own = model.generate(question, **{**options, **extra})
        assert torch.equal(rows, own)


@torch.no_grad()
def test_filling_behind_the_end_of_a_generated_text_is_not_remembered() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, layers=[1], k=4)
    prompts = tokens(2, 4)
    free = model.generate(prompts, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    end = int(free[0, 6])
    first = [row.tolist().index(end, 4) if end in row.tolist()[4:] else None for row in free]
    assert first[1] is None or first[1] > 6, "the test needs one row that goes on"
    memory.detach()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, 0
    memory = attach_memory(model, layers=[1], k=4)
    ended = model.generate(prompts, max_new_tokens=9, do_sample=False)
    assert (ended[0, 7:] == 0).all()
    memory.flush()
    assert memory.lengths.tolist() == [7, ended.shape[1] - 1]  # what was generated last is never read


@torch.no_grad()
def test_rows_are_reset_alone() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, layers=[0, 1], k=4)
    texts = tokens(3, 24)
    model(texts)
    memory.reset([1])
    question = tokens(3, 8, seed=3)
    logits = model(question).logits
    assert memory.lengths.tolist() == [24, 0, 24]
    memory.reset()
    assert memory.lengths.tolist() == [0, 0, 0]
    plain = model(question).logits
    torch.testing.assert_close(logits[1], plain[1], **TOLERANCE)
    assert not torch.allclose(logits[0], plain[0], atol=1e-3)
    memory.reset(torch.tensor([False, True, True]))
    model(question)
    assert memory.lengths.tolist() == [8, 0, 0]


@torch.no_grad()
def test_a_frozen_memory_is_searched_and_not_extended() -> None:
    model = tiny_model("llama")
    memory = attach_memory(model, layers=[1], k=4)
    text, question = tokens(1, 14), tokens(1, 40, seed=2)
    model(text)
    memory.flush()
    with memory.frozen():
        first = model(question, use_cache=False).logits
        again = model(question).logits
        generated = model.generate(question[:, :9], max_new_tokens=20, num_beams=2, do_sample=False, pad_token_id=0)
        assert generated.shape[1] > CONTEXT
    torch.testing.assert_close(first, again, **TOLERANCE)
    assert memory.lengths.tolist() == [14]
    memory.reset()
    assert not torch.allclose(model(question).logits[:, :10], first[:, :10], atol=1e-3)


@torch.no_grad()
def test_embeddings_do_for_tokens() -> None:
    model = tiny_model("llama")
    text = tokens(1, 40)
    memory = attach_memory(model, layers=[1], k=4)
    expected = model(text).logits
    memory.reset()
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(text)).logits, expected, **TOLERANCE)
    memory.reset()
    output = model(inputs_embeds=model.get_input_embeddings()(text[:, :15]))
    rest = model(text[:, 15:], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(rest, expected[:, 15:], **TOLERANCE)


@torch.no_grad()
def test_outputs_keep_their_shapes_for_a_long_text() -> None:
    model = tiny_model("gpt2")
    attach_memory(model, layers=[1], k=4)
    text = tokens(2, 40)
    output = model(text, output_hidden_states=True, labels=text, use_cache=False)
    assert [state.shape for state in output.hidden_states] == [(2, 40, 32)] * 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    )
    assert model(text, use_cache=False, return_dict=False)[0].shape == output.logits.shape
    assert model(text, logits_to_keep=3).logits.shape[1] == 3


@torch.no_grad()
def test_torch_compile_agrees() -> None:
    model = tiny_model("llama")
    parts = tokens(2, 24).split(12, dim=1)
    memory = attach_memory(model, layers=[1], k=4)
    expected = [model(part, use_cache=False).logits for part in parts]
    memory.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for part, logits in zip(parts, expected, strict=True):
        torch.testing.assert_close(compiled(part, use_cache=False).logits, logits, **TOLERANCE)
    assert memory.lengths.tolist() == [12, 12]
