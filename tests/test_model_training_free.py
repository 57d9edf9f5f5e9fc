"""Memory attached to a model that was trained without one."""

from __future__ import annotations

import pytest
import tiny
import torch

from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.evaluation import replay
from recollect.model.training_free import with_memory
from recollect.model.transformer import MemorizingTransformer
from recollect.model.trunk import compute_trunk


def test_a_layer_that_retrieves_everything_equals_a_cache_of_that_length() -> None:
    # Two buckets: distance 0 has its own, all others share the last, which is that of the retrieved keys.
    config = ModelConfig.preset(
        "tiny", layers=1, memory_layers=(), position_buckets=2, position_max_distance=2, qk_convolution_width=3
    )
    plain = MemorizingTransformer(config).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    long = MemorizingTransformer(config.replace(xl_cache=96)).eval()
    long.load_state_dict(plain.state_dict())
    text = tiny.tiny_text(max_tokens=192)
    expected = replay(long, compute_trunk(long, text))
    attached = with_memory(plain, (0,), memory_size=96, k=96)
    found = replay(attached, compute_trunk(attached, text), backend="exact")
    torch.testing.assert_close(
        torch.from_numpy(found.losses.loss), torch.from_numpy(expected.losses.loss), atol=1e-5, rtol=1e-5
    )
    without = replay(plain, compute_trunk(plain, text))
    assert abs(without.perplexity - found.perplexity) > 1e-3


def test_the_parameters_are_the_very_same_and_the_first_model_stays_as_it_is() -> None:
    model = tiny.tiny_model(memory_layers=(), separate_memory_scale=True)
    text = tiny.tiny_text()
    before = replay(model, compute_trunk(model, text)).losses.loss
    state = torch.get_rng_state()
    attached = with_memory(model, (1, 2), gate="fixed", gate_share=0.25, k=4)
    assert torch.equal(torch.get_rng_state(), state)
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in attached.named_parameters())
    assert model.config.memory_layers == ()
    assert attached.config.memory_layers == (1, 2)
    trunk = compute_trunk(attached, text)
    off, on = (replay(attached, trunk, memory_size=size).losses.loss for size in (0, 64))
    assert (replay(model, compute_trunk(model, text)).losses.loss == before).all()
    torch.testing.assert_close(torch.from_numpy(off), torch.from_numpy(before), atol=1e-5, rtol=1e-5)
    assert abs(off - on).max() > 1e-3


def test_a_model_that_has_memory_may_get_it_elsewhere() -> None:
    model = tiny.tiny_model(memory_layers=(1,), gate="head", separate_memory_scale=True)
    attached = with_memory(model, (2,))
    assert "layers.1.attention.gate.bias" not in attached.state_dict()
    assert len(attached.initial_state(2).memories) == 1


@pytest.mark.parametrize(
    ("layers", "gate", "message"),
    [
        ((), "joint", "memory_layers is empty"),
        ((3,), "joint", "this model has layers 0 to 2"),
        ((1,), "head", "gate='head' has weights that nothing trains"),
    ],
)
def test_what_cannot_work_untrained_is_refused(layers: tuple[int, ...], gate: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        with_memory(tiny.tiny_model(memory_layers=()), layers, gate)
