"""Memory for a pretrained causal language model, attached and taken off again.

    model = AutoModelForCausalLM.from_pretrained(...)
    memory = attach_memory(model, layers=[8], backend="exact", memory_size=8192, k=32)
    model(**first_chapter)
    model.generate(**question)      # finds what the first chapter said
    memory.reset()                  # another document
    memory.detach()                 # the model as it was

What the model sees by itself is its *sight*: the tokens of the call and of the cache that it is given, at most `window`
of them. A token enters the memory when it leaves the sight: when a call begins without a cache, when a window is full,
or on `flush`. So nothing is ever counted twice, and no token retrieves itself or what comes after it. Texts longer
than a window may be given in one call or generated to any length; `recollect.pretrained.windows` says how they are
read. A memory belongs to a batch row and stays between calls until `reset`; padding, on either side, is never stored
nor retrieved.

How keys are kept apart from positions is told in `recollect.pretrained.rotary`. GPT-2 adds learned positions to its
input, so its keys carry them and are stored as they are: a token is found best where it stands alike in its window.

Limits. Static caches and the compiled generation that needs them are refused, as are 4-D masks; several documents
packed into one row are not told apart. The memory layers return no attention weights. What beam search writes is not
remembered, since its rows are no texts until it ends; `num_return_sequences` rows share the memory of their prompt.
`torch.compile(model)` works; the memory itself runs outside the compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recollect.memory_backends import canonical_spec
from recollect.model.configuration import ConfigurationError
from recollect.pretrained import families
from recollect.pretrained.handle import SETTINGS, AttachedMemory, attach_settings
from recollect.pretrained.records import KeyStore, MemorySettings
from recollect.pretrained.saving import load_attached
from recollect.pretrained.store import opened_store


def attach_memory(
    model: Any,
    layers: int | str | Sequence[int] | None = None,
    *,
    backend: str = "exact",
    memory_size: int = 8192,
    k: int = 32,
    gate: str = "joint",
    gate_share: float = 0.5,
    window: int | None = None,
    overlap: int | None = None,
    distance: int | None = None,
    store: KeyStore | str | Path | None = None,
    seed: int = 0,
) -> AttachedMemory:
    """Gives a pretrained causal language model a memory; the model itself is changed, and can be changed back.

    Args:
        model: a Hugging Face causal language model: GPT-2, GPT-NeoX (Pythia), Llama, Mistral, Qwen2 or Qwen3.
        layers: which layers get one: numbers, negative ones from the top, or a name as in `families.choose_layers`;
            None is the layer three quarters up, where Wu et al. 2022 have it.
        backend: registry string of the index, such as "exact" or "faiss-ivf:nlist=64,nprobe=8".
        memory_size: tokens kept for each batch row and key head; 0 to search nothing but the store.
        k: pairs retrieved for each query.
        gate: "joint", one softmax over what is seen and what is retrieved, which needs no training; "joint_bias", the
            same with a learned offset per head, starting as "joint"; "head", the paper's learned share per head;
            "fixed", the share `gate_share`.
        gate_share: the share of memory that "head" starts from and "fixed" keeps.
        window: tokens that the model attends to by itself; None is the model's context length, or a memory layer's
            sliding window if that is shorter.
        overlap: tokens of a full window that the next one reads again; None is a quarter of the window.
        distance: rotary models: how many tokens back a remembered key seems to lie; None is half a window, which the
                model has learned to attend over. (Distance 0, where only a token's own key ever stood, makes pretrained
                models worse, and so does a distance that they never saw.) Must be None for other models.
        store: keys of texts read before, which every row searches beside its own: a `MemoryStore`, or the folder or
            address of one.
        seed: decides everything random in the index.

    Returns:
        The handle, also at `model.recollect_memory`. Its parameters are the gates'.

    Raises:
        UnsupportedModel: the family, the attention implementation or the model's form is not supported.
        ConfigurationError: a layer does not exist, or a number does not fit the model or another.
        MemoryBackendError: the backend does not exist, is not installed, or cannot be made so.
    """
    model = families.causal_model(model)
    if hasattr(model, SETTINGS):
        raise ConfigurationError(f"the model has a memory already; call model.{SETTINGS}.detach() first")
    count = len(families.attention_modules(model))
    chosen = families.choose_layers(layers, count)
    window = families.choose_window(model, chosen, window)
    settings = MemorySettings(
        layers=chosen,
        backend=canonical_spec(backend),
        memory_size=_whole("memory_size", memory_size, 0),
        k=_whole("k", k, 1),
        gate=gate,
        gate_share=gate_share,
        window=window,
        overlap=_overlap(overlap, window),
        distance=_distance(distance, window, families.family_of(model)),
        seed=seed,
    )
    return attach_settings(model, settings, opened_store(store))


def _whole(name: str, number: Any, least: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ConfigurationError(f"{name}={number!r} must be a whole number of at least {least}")
    return number


def _overlap(overlap: int | None, window: int) -> int:
    return window // 4 if overlap is None else _whole("overlap", overlap, 0)


def _distance(distance: int | None, window: int, family: families.Family) -> int:
    if distance is None:
        return window // 2 if family.rotary else 0
    if not family.rotary:
        raise ConfigurationError(
            f"distance={distance} can't be had: the positions of {family.name} are learned and stay in its keys; "
            "leave it out"
        )
    return _whole("distance", distance, 0)


__all__ = ["AttachedMemory", "attach_memory", "attach_settings", "load_attached"]
