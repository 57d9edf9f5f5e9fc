"""Reading documents into a store: the keys are the model's own, and a store follows its source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_s3 import fake_s3
from tiny import write_tiny_checkpoint, write_tiny_corpus
from tiny_pretrained import WINDOW, write_tiny_llama, write_words

from recollect.model.checkpoints import load_checkpoint
from recollect.model.configuration import ConfigurationError
from recollect.model.documents import CorpusError
from recollect.model.evaluation_text import choose_text, load_documents
from recollect.model.recording import record
from recollect.model.trunk import compute_trunk
from recollect.pretrained.memorizing import CheckpointReader, Memorized, memorize
from recollect.pretrained.store import MemoryStore, StoreError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    return write_tiny_checkpoint(folder / "checkpoint", write_tiny_corpus(folder / "corpus"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def counts(result: Memorized) -> tuple[int, int, int, int]:
    return result.added, result.changed, result.dropped, result.unchanged


def test_keys_are_those_that_the_memory_layer_appends(checkpoint: Path, tmp_path: Path) -> None:
    """Against the recording of the same text, which is made in another way."""
    source = write_words(tmp_path / "src", documents=1, words=90)
    memorize(source, model=checkpoint, output=tmp_path / "store")
    store = MemoryStore.open(tmp_path / "store")
    loaded = load_checkpoint(checkpoint)
    documents = load_documents(source, "all", loaded.tokenizer, tmp_path / "cache")
    text = choose_text(documents, rows=1, segment_length=loaded.config.segment_length, max_tokens=None)
    recorded = record(loaded.model, compute_trunk(loaded.model, text))
    count = len(documents.arrays[0])
    assert store.token_ids.tolist() == documents.arrays[0].tolist()
    (layer,) = loaded.config.memory_layers
    for found, expected in ((store.layer_keys(layer), recorded.keys), (store.layer_values(layer), recorded.values)):
        whole = expected.transpose(0, 1).flatten(1, 2)[:, :count]
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_keys_of_a_pretrained_model_are_those_of_its_projection(llama: Path, tmp_path: Path) -> None:
    """A document within one window: keys before rotary position are the projection of the layer's input."""
    import transformers

    source = write_words(tmp_path / "src", documents=1, words=8)
    memorize(source, model=llama, output=tmp_path / "store", layers=[1, 2])
    store = MemoryStore.open(tmp_path / "store")
    assert store.layers == (1, 2)
    assert 4 < store.tokens <= WINDOW
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        hidden = model(store.token_ids[None], output_hidden_states=True).hidden_states
        for layer in store.layers:
            block = model.model.layers[layer]
            inputs = block.input_layernorm(hidden[layer])
            for name, found in (("k_proj", store.layer_keys(layer)), ("v_proj", store.layer_values(layer))):
                wanted = getattr(block.self_attn, name)(inputs)[0].view(store.tokens, 2, -1).transpose(0, 1)
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_long_document_has_every_token_once(llama: Path, tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", documents=1, words=300)
    memorize(source, model=llama, output=tmp_path / "store")
    store = MemoryStore.open(tmp_path / "store")
    assert store.tokens > 9 * WINDOW
    assert store.position_of.tolist() == list(range(store.tokens))
    assert bool(torch.isfinite(store.layer_keys(store.layers[0])).all())


def test_a_store_follows_its_source(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    reading = CheckpointReader.read
    monkeypatch.setattr(
        CheckpointReader, "read", lambda self, tokens: (read.append(len(tokens)), reading(self, tokens))[1]
    )
    source, output = write_words(tmp_path / "src", documents=4), tmp_path / "store"
    assert counts(memorize(source, model=checkpoint, output=output)) == (4, 0, 0, 0)
    before = {document.name: document.sha256 for document in MemoryStore.open(output).documents}
    assert counts(memorize(source, model=checkpoint, output=output)) == (0, 0, 0, 4)

    assert len(read) == 4
    (source / "text0.txt").write_text("return self value " * 20, encoding="utf-8")
    (source / "text1.txt").unlink()
    (source / "text2.txt").rename(source / "moved.txt")
    (source / "new.txt").write_text("import alpha " * 20, encoding="utf-8")
    with pytest.raises(StoreError, match=r"1 changed, 2 gone.*--update"):
        memorize(source, model=checkpoint, output=output)
    assert counts(memorize(source, model=checkpoint, output=output, update=True)) == (2, 1, 2, 1)

    assert len(read) == 6, "a text that only moved was read again"
    fresh = tmp_path / "fresh"
    memorize(source, model=checkpoint, output=fresh)
    updated, anew = MemoryStore.open(output), MemoryStore.open(fresh)
    found = {document.name: document.sha256 for document in updated.documents}
    assert {name: digest for name, digest in found.items() if name in before and name != "text0.txt"} == {
        "text3.txt": before["text3.txt"]
    }
    assert {d.name: d.text_digest for d in updated.documents} == {d.name: d.text_digest for d in anew.documents}
    assert updated.tokens == anew.tokens
    layer = anew.layers[0]
    for name in anew.names:
        rows, others = (store.document_of == store.names.index(name) for store in (anew, updated))
        torch.testing.assert_close(
            updated.layer_keys(layer)[:, others], anew.layer_keys(layer)[:, rows], rtol=1e-5, atol=1e-5
        )


def test_an_interrupted_run_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    source, output = write_words(tmp_path / "src", documents=4), tmp_path / "store"

    def stop(done: int, total: int) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memorize(source, model=checkpoint, output=output, on_document=stop)
    half = len(MemoryStore.open(output))
    assert 0 < half < 4
    assert counts(memorize(source, model=checkpoint, output=output)) == (4 - half, 0, 0, half)


def test_a_store_at_an_address_serves_as_one_in_a_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials from the environment, one string for memorizing and for attaching."""
    import transformers

    from recollect.pretrained.attach import attach_memory

    source, address = write_words(tmp_path / "src", documents=2, words=40), "s3://bucket/some/store"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    found = []
    with fake_s3() as (objects, options):
        for name, value in options.items():
            monkeypatch.setenv(name.upper(), value)
        for output in (address, str(tmp_path / "store")):
            assert counts(memorize(source, model=llama, output=output, layers=[1])) == (2, 0, 0, 0)
            answer = memorize(source, model=llama, output=output, layers=[1], update=True)
            assert (answer.unchanged, answer.as_json()["store"]) == (2, output)
            handle = attach_memory(model, layers=[1], store=output, memory_size=0, k=4)
            with torch.no_grad():
                found.append(model(torch.arange(4, 12)[None]).logits)
            handle.detach()
        assert objects.content
    assert torch.equal(*found)


def test_another_maker_is_refused(checkpoint: Path, llama: Path, tmp_path: Path) -> None:
    source, output = write_words(tmp_path / "src"), tmp_path / "store"
    memorize(source, model=llama, output=output, layers=[1])
    other = write_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match="another model: LlamaForCausalLM"):
        memorize(source, model=other, output=output)
    with pytest.raises(StoreError, match="another model"):
        memorize(source, model=checkpoint, output=output)
    with pytest.raises(StoreError, match="holds keys of layers 1, and memory is wanted at 2"):
        memorize(source, model=llama, output=output, layers=[2])
    assert counts(memorize(source, model=llama, output=output)) == (0, 0, 0, 3)
    with pytest.raises(ConfigurationError, match="its memory layers already"):
        memorize(source, model=checkpoint, output=tmp_path / "new", layers=[1])
    with pytest.raises(ConfigurationError, match="layer 9 does not exist"):
        memorize(source, model=llama, output=tmp_path / "new", layers=[9])
    assert not (tmp_path / "new").exists()


def test_a_mistaken_path_does_not_empty_a_store(checkpoint: Path, tmp_path: Path) -> None:
    source, output = write_words(tmp_path / "src"), tmp_path / "store"
    memorize(source, model=checkpoint, output=output)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.txt").write_text("alpha beta", encoding="utf-8")
    with pytest.raises(StoreError, match="none of the 3 documents"):
        memorize(elsewhere, model=checkpoint, output=output, update=True)
    with pytest.raises(CorpusError, match="nowhere"):
        memorize(tmp_path / "nowhere", model=checkpoint, output=output, update=True)
    assert len(MemoryStore.open(output)) == 3


def test_damage_is_told_before_a_model_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    source, output = write_words(tmp_path / "src"), tmp_path / "store"
    memorize(source, model=checkpoint, output=output)
    victim = next((output / "data").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(StoreError, match="cut short"):
        memorize(source, model=tmp_path / "no model here", output=output)


def test_attaching_a_memory_does_not_make_another_model(llama: Path) -> None:
    import transformers

    from recollect.pretrained.attach import attach_memory
    from recollect.pretrained.identity import digest_pretrained

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    before = digest_pretrained(model)
    handle = attach_memory(model, layers=[1], gate="head", memory_size=64, k=4)
    assert digest_pretrained(model) == before
    handle.detach()
    assert digest_pretrained(model) == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert digest_pretrained(model) != before
