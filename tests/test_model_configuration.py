"""Configurations: presets are pinned, values are checked, JSON goes both ways."""

from __future__ import annotations

import pytest

from recollect.model.configuration import PRESETS, ConfigurationError, ModelConfig
from recollect.model.training_options import TRAINING_PRESETS, TrainingOptions


def test_the_paper_preset_has_the_sizes_of_the_paper() -> None:
    paper = ModelConfig.preset("paper")
    assert (paper.layers, paper.width, paper.heads, paper.head_dim, paper.feed_forward) == (12, 1024, 8, 128, 4096)
    assert (paper.segment_length, paper.xl_cache, paper.memory_layers, paper.k) == (512, 512, (8,), 32)
    assert paper.gate == "head"
    assert paper.normalise_queries_and_keys
    assert paper.qk_convolution_width == 0
    assert not any((paper.token_shift, paper.matched_start, paper.separate_memory_scale))


@pytest.mark.parametrize("name", PRESETS)
def test_json_brings_back_every_preset(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width=0"),
        ({"k": True}, "k=True"),
        ({"memory_layers": (3,)}, "layers 0 to 2"),
        ({"memory_layers": (2, 1)}, "must rise"),
        ({"activation": "swish"}, "relu, gelu"),
        ({"gate_share": 1.0}, "between 0 and 1"),
        ({"qk_convolution_width": 1}, "qk_convolution_width=1"),
        ({"token_shift": True, "qk_convolution_width": 0}, "qk_convolution_width of at least 2"),
        ({"matched_start": True, "token_shift": False}, "needs token_shift"),
        ({"position_buckets": 32, "position_max_distance": 16}, "must exceed half"),
        ({"gate": "tokens"}, "did you mean 'token'"),
        ({"memory_key": "hiden"}, "did you mean 'hidden'"),
        ({"eviction": "lru"}, "fifo, most_used"),
        ({"eviction_kept_share": 0.0}, "eviction='fifo'"),
        ({"k": 4096}, "k=4096 is above memory_size=2048"),
        ({"attention_window": 64}, "xl_cache of at least 63"),
        ({"compressed_memory": 64}, "needs an xl_cache"),
        ({"compression_rate": 0}, "compression_rate=0"),
        ({"compression_function": "max"}, "convolution, mean"),
        ({"compression_loss": -1.0}, "compression_loss=-1.0"),
        ({"wdth": 3}, "unknown configuration values: wdth"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        ModelConfig.preset("laptop", **changes)


@pytest.mark.parametrize("text", ["{", "[]", '{"width": "256"}', '{"width": true}', '{"token_shift": 1}', '{"no": 1}'])
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        ModelConfig.from_json(text)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigurationError, match="paper"):
        ModelConfig.preset("papr")
    with pytest.raises(ConfigurationError, match="reference"):
        TrainingOptions.preset("referense", "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"optimizer": "sgd"},
        {"precision": "float16"},
        {"matrix_learning_rate": 0.0},
        {"gradient_clip": -1.0},
        {"decay_share": 0.0},
        {"threads": 0},
        {"learning_rate": 1.0},
    ],
)
def test_impossible_training_options_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        TrainingOptions.preset("tiny", "out", **changes)


def test_the_twin_differs_from_the_reference_in_its_memory_alone() -> None:
    reference, twin = (TrainingOptions.preset(name, "out") for name in ("reference", "reference-twin"))
    assert twin.model == reference.model.replace(memory_size=0)
    assert {**twin.to_dict(), "model": None} == {**reference.to_dict(), "model": None}
    assert set(TRAINING_PRESETS) >= {"paper", "laptop", "tiny"}
