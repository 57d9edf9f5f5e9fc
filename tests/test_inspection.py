"""What an inspection says was retrieved is what exact search finds; its report, its intervals, both kinds of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, write_tiny_checkpoint, write_tiny_corpus
from tiny_pretrained import WINDOW, write_tiny_llama, write_words

from recollect.model.checkpoints import load_checkpoint, save_checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.evaluation import replay
from recollect.model.evaluation_text import choose_text, load_documents
from recollect.model.recording import record
from recollect.model.trunk import compute_trunk
from recollect.pretrained.inspection import InspectionOptions, inspect
from recollect.pretrained.inspection_data import Inspection
from recollect.pretrained.memorizing import memorize
from recollect.reports.errors import ReportError
from recollect.reports.inspection import write_inspection
from recollect.reports.inspection_kinds import kind_table, verdict, verdict_on_repeats
from recollect.reports.inspection_results import load_inspection
from recollect.reports.statistics import make_blocks, mean_interval

SIZE, K = 24, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    return write_tiny_checkpoint(folder / "checkpoint", write_tiny_corpus(folder / "corpus"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text"), documents=3, words=90)


def options_for(checkpoint: Path, text: Path, **changes: Any) -> InspectionOptions:
    given = {"model": checkpoint, "corpus": str(text), "split": "all", "memory_size": SIZE, "k": K, "rows": 2}
    return InspectionOptions(**{**given, **changes})


@pytest.fixture(scope="module")
def found(checkpoint: Path, text: Path) -> Inspection:
    return inspect(options_for(checkpoint, text))


def test_what_was_retrieved_is_what_exact_search_finds(found: Inspection, checkpoint: Path, text: Path) -> None:
    """Every token's neighbours, weights and copies, from the recorded queries and keys alone."""
    loaded = load_checkpoint(checkpoint)
    documents = load_documents(text, "all", loaded.tokenizer)
    chosen = choose_text(documents, rows=2, segment_length=16, max_tokens=50_000)
    recorded = record(loaded.model, compute_trunk(loaded.model, chosen))
    by_name = dict(zip(documents.names, documents.arrays, strict=True))
    tokens, heads = found.tokens, loaded.config.heads
    checked = 0
    for entry in range(0, len(tokens.loss), 7):
        number, predicting = int(tokens.document[entry]), int(tokens.position[entry]) - 1
        segment, row = _where(chosen, number, predicting)
        start = predicting // 16 * 16
        array = by_name[chosen.document_names[number]]
        first = max(0, start - SIZE)
        for head in range(heads):
            got = tokens.retrieved[entry, 0, head]
            if start == 0:
                assert (got == -1).all()
                assert np.isnan(tokens.distance[entry, 0, head])
                continue
            keys = torch.cat([recorded.keys[segment - back, row * heads + head] for back in range(start // 16, 0, -1)])
            query = recorded.queries[segment, row * heads + head, predicting - start]
            logits = keys[first:] @ query * recorded.scale[head]
            best = logits.topk(K)
            weights = torch.softmax(best.values, dim=0).numpy()
            places = best.indices.numpy() + first
            assert got.tolist() == places.tolist()
            np.testing.assert_allclose(tokens.weight[entry, 0, head], weights, atol=2e-3)
            target = array[predicting + 1]
            on_target = weights[array[places] == target].sum()
            before = weights[array[places + 1] == target].sum()
            np.testing.assert_allclose(tokens.on_target[entry, 0, head], on_target, atol=2e-3)
            np.testing.assert_allclose(tokens.before_target[entry, 0, head], before, atol=2e-3)
            distance = (weights * (predicting + 1 - places)).sum()
            np.testing.assert_allclose(tokens.distance[entry, 0, head], distance, rtol=1e-3)
            checked += 1
    assert checked > 50


def _where(chosen: Any, document: int, position: int) -> tuple[int, int]:
    """The segment and row in which a document's token was read."""
    hits = (chosen.document_index == document) & (chosen.position == position // 16 * 16) & (chosen.lengths > 0)
    segment, row = hits.nonzero()[0].tolist()
    return segment, row


def test_losses_are_those_of_an_evaluation(found: Inspection, checkpoint: Path, text: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    chosen = choose_text(load_documents(text, "all", loaded.tokenizer), rows=2, segment_length=16, max_tokens=50_000)
    trunk = compute_trunk(loaded.model, chosen)
    plain = replay(loaded.model, trunk, memory_size=SIZE, k=K)
    np.testing.assert_allclose(found.tokens.loss, plain.losses.loss, rtol=1e-4, atol=1e-5)
    without = replay(loaded.model, trunk, backend="none")
    np.testing.assert_allclose(found.tokens.loss_without, without.losses.loss, rtol=1e-4, atol=1e-5)


def test_texts_and_tokens_belong_together(found: Inspection, checkpoint: Path) -> None:
    tokenizer = load_checkpoint(checkpoint).tokenizer
    for number, document in enumerate(found.documents):
        chosen = found.tokens.document == number
        for position, token in zip(found.tokens.position[chosen][:40], found.tokens.token[chosen][:40], strict=True):
            start, end = document.offsets[position]
            assert document.text[start:end] == tokenizer.decode([int(token)])


@pytest.mark.parametrize(
    ("gate", "known"), [("head", True), ("fixed", True), ("joint", True), ("confidence", True), ("sum", False)]
)
def test_a_gates_share(gate: str, known: bool, text: Path, tmp_path: Path) -> None:
    """Told where a gate mixes the two attentions in shares; the fixed gate's is its constant."""
    tokenizer = load_checkpoint(write_tiny_checkpoint(tmp_path / "other", text)).tokenizer
    model = tiny_model(vocabulary_size=tokenizer.vocabulary_size, gate=gate, gate_share=0.25)
    save_checkpoint(tmp_path / "gated", model, tokenizer)
    tokens = inspect(options_for(tmp_path / "gated", text)).tokens
    something = tokens.retrieved[:, 0, 0, 0] >= 0
    share = tokens.share[something].astype(np.float32)
    assert bool(np.isfinite(share).all()) == known
    if known:
        assert (share >= 0).all()
        assert (share <= 1).all()
        assert share.std() > 0.01 or gate != "joint"
    if gate in ("head", "fixed", "confidence"):  # as they start
        np.testing.assert_allclose(share, 0.25, atol=1e-2)


def test_what_cannot_be_followed_is_told(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no memory to inspect"):
        inspect(options_for(checkpoint, text, memory_size=0))
    loaded = load_checkpoint(checkpoint)
    model = tiny_model(vocabulary_size=loaded.config.vocabulary_size, eviction="most_used")
    save_checkpoint(tmp_path / "used", model, loaded.tokenizer)
    with pytest.raises(ConfigurationError, match="first-in first-out"):
        inspect(options_for(tmp_path / "used", text))


def test_a_store_is_followed_too(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", documents=2, words=40)
    memorize(source, model=checkpoint, output=tmp_path / "store")
    found = inspect(options_for(checkpoint, text, store=tmp_path / "store"))
    origin, retrieved = found.tokens.origin, found.tokens.retrieved
    assert (origin >= 0).any()
    tokenizer = load_checkpoint(checkpoint).tokenizer
    for number, document in enumerate(found.stored):
        assert document.text == (source / document.name).read_text(encoding="utf-8")
        assert len(document.offsets) == len(tokenizer.encode(document.text))
        assert retrieved[origin == number].max() < len(document.offsets)
    found.save(tmp_path / "out")
    assert "from the store" in write_inspection(tmp_path / "out").page.read_text(encoding="utf-8")


def test_a_pretrained_model_is_watched(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    llama = write_tiny_llama(tmp_path / "llama")
    memorize(write_words(tmp_path / "src"), model=llama, output=tmp_path / "store", layers=[1, 2])
    for store in (None, tmp_path / "store"):
        layers = [1, 2] if store is None else None
        found = inspect(options_for(llama, text, memory_size=256, layers=layers, store=store))
        tokens = found.tokens
        assert tokens.retrieved.shape == (len(tokens.loss), 2, 4, 4)
        own = (tokens.origin < 0) & (tokens.retrieved >= 0)
        early = tokens.position < WINDOW
        assert not own[early].any()
        assert own[~early].any()
        # Nothing that lies ahead, and nothing that the window still shows, is ever retrieved.
        assert (tokens.retrieved < tokens.position[:, None, None, None])[own].all()
        weights = tokens.weight.astype(np.float32).sum(-1)
        assert weights.max() <= 1.001
        share = tokens.share.astype(np.float32)
        assert share[~early].max() > 0.0
        assert (share <= 1.0).all()
        if store is not None:
            assert (tokens.origin >= 0)[early].any()
        gain = np.abs(tokens.loss_without - tokens.loss)
        assert gain[~early].max() > 1e-2
        found.save(tmp_path / "out")
        assert write_inspection(tmp_path / "out").page.is_file()


def test_the_report(found: Inspection, tmp_path: Path) -> None:
    import pyarrow.parquet

    found.save(tmp_path)
    files = write_inspection(tmp_path)
    assert files.tokens_parquet is not None
    table = pyarrow.parquet.read_table(files.tokens_parquet)
    assert table.num_rows == len(found.tokens.loss)
    np.testing.assert_allclose(table["gain"].to_numpy(), found.tokens.loss_without - found.tokens.loss, atol=1e-6)
    assert (
        table["text"][0].as_py()
        == found.documents[int(found.tokens.document[0])].text[
            slice(*found.documents[int(found.tokens.document[0])].offsets[int(found.tokens.position[0])].tolist())
        ]
    )
    summary = json.loads(files.summary_json.read_text(encoding="utf-8"))
    assert sum(row["tokens"] for row in summary["kinds"]) == summary["tokens"] == len(found.tokens.loss)
    whole = float((found.tokens.loss_without.astype(np.float64) - found.tokens.loss).mean())
    by_kind = sum(
        float((found.tokens.loss_without - found.tokens.loss)[found.tokens.kind == number].sum())
        for number in range(len(found.run["kinds"]))
    )
    assert by_kind / len(found.tokens.loss) == pytest.approx(whole, abs=1e-5)
    assert np.log(summary["perplexity_without"]) - np.log(summary["perplexity"]) == pytest.approx(whole, abs=1e-5)


def test_markup_in_a_text_stays_text(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "<b>.html").write_text("</script><script>alert(1)</script> alpha " * 30, encoding="utf-8")
    inspect(options_for(checkpoint, tmp_path / "src")).save(tmp_path / "out")
    page = write_inspection(tmp_path / "out").page.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert "<b>.html" not in page


def test_an_inspection_that_is_damaged_is_told(found: Inspection, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"run\.json is missing"):
        load_inspection(tmp_path)
    found.save(tmp_path)
    arrays = tmp_path / "inspection.npz"
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReportError, match="cannot be read"):
        load_inspection(tmp_path)
    arrays.write_bytes(whole)
    (tmp_path / "run.json").write_text('{"schema": 1, "kind": "comparison"}')
    with pytest.raises(ReportError, match="not an inspection"):
        load_inspection(tmp_path)


def test_intervals_of_means_hold_what_they_promise() -> None:
    """Over many samples of dependent values, nine in ten or more intervals hold the true mean and difference."""
    generator = np.random.default_rng(0)
    held = different = 0
    for seed in range(60):
        document = np.repeat(np.arange(40), 50)
        chosen = generator.random(2000) < 0.3
        values = generator.normal(size=40)[document] * 0.5 + generator.normal(size=2000) + np.where(chosen, 0.4, 0.0)
        blocks = make_blocks(document, np.tile(np.arange(50), 40))
        interval = mean_interval(values, chosen, blocks, seed=seed)
        held += interval.low <= 0.4 <= interval.high
        other = mean_interval(values, chosen, blocks, against=~chosen, seed=seed)
        different += other.low <= 0.4 <= other.high
    assert held >= 52
    assert different >= 52
    with pytest.raises(ValueError, match="no token is marked"):
        mean_interval(values, np.zeros(2000, dtype=bool), blocks)


def test_the_verdict_follows_the_gains(found: Inspection, tmp_path: Path) -> None:
    """Names that gain by construction are found to gain, and nothing else is."""
    kinds = list(found.run["kinds"])
    generator = np.random.default_rng(1)
    count = len(found.tokens.loss)
    kind = generator.choice([kinds.index("name"), kinds.index("citation"), kinds.index("common word")], count)
    noise = generator.normal(0, 0.1, count)
    gain = np.where(kind == kinds.index("name"), 1.0, 0.2) + noise
    changed = {
        **{name: getattr(found.tokens, name) for name in found.tokens.__dataclass_fields__},
        "kind": kind.astype(np.int8),
        "loss_without": (found.tokens.loss + gain).astype(np.float32),
    }
    Inspection(type(found.tokens)(**changed), found.documents, found.run).save(tmp_path)
    table = kind_table(load_inspection(tmp_path))
    by_kind = {row.kind: row for row in table.rows}
    assert by_kind["name"].beyond_common is not None
    assert by_kind["name"].beyond_common.low > 0.7
    # What stood before can only be compared where there is enough of it, and then its gain is told.
    sentence = verdict_on_repeats(table)
    assert sentence == "" or "names +1.00" in sentence
    sentence = verdict(table)
    assert sentence.startswith("It holds for names (+0.8")
    assert "no difference to common words was measured for citations" in sentence
