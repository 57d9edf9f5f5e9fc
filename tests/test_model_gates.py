"""Gates: what each kind makes of local and remembered attention, and how a new kind is added."""

from __future__ import annotations

import pytest
import torch

from recollect.model.configuration import GATE_NAMES, ConfigurationError, ModelConfig
from recollect.model.gates import GATES, Gate, Scores, make_gate, register_gate

B, H, T, D = 2, 2, 3, 16  # of the tiny preset
SHAPE = (B, H, T, D)
LEARNED = ("head", "token", "layer", "confidence", "weighted_sum", "concatenation")


def all_found() -> torch.Tensor:
    return torch.ones(SHAPE[:3], dtype=torch.bool)


def joined(kind: str, found: torch.Tensor | None = None, share: float = 0.25) -> tuple[torch.Tensor, ...]:
    config = ModelConfig.preset("tiny", gate=kind, gate_share=share)
    local, remembered, hidden = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(B, T, config.width)
    found = all_found() if found is None else found
    scores = Scores.of(torch.randn(B, H, T, 7), torch.randn(B, H, T, 4), found)
    return make_gate(config)(local, remembered, found, hidden, scores), local, remembered


def test_the_configuration_knows_every_gate_and_no_other() -> None:
    assert set(GATE_NAMES) == set(GATES)


@pytest.mark.parametrize(
    ("kind", "of_local", "of_remembered"),
    [*((kind, 0.75, 0.25) for kind in (*LEARNED, "fixed")), ("sum", 1.0, 1.0), ("mean", 0.5, 0.5)],
)
def test_every_gate_starts_with_its_shares(kind: str, of_local: float, of_remembered: float) -> None:
    output, local, remembered = joined(kind)
    torch.testing.assert_close(output, of_local * local + of_remembered * remembered)


@pytest.mark.parametrize("kind", sorted(GATES))
def test_without_a_neighbour_the_local_attention_stands_alone(kind: str) -> None:
    found = all_found()
    found[0, 1, 2] = False
    output, local, _ = joined(kind, found)
    assert torch.equal(output[0, 1, 2], local[0, 1, 2])
    assert not torch.equal(output[0, 1, 1], local[0, 1, 1])


def test_learned_gates_learn_and_head_gates_differ_by_head() -> None:
    for kind in LEARNED:
        gate = make_gate(ModelConfig.preset("tiny", gate=kind))
        scores = Scores.of(torch.randn(B, H, T, 7), torch.randn(B, H, T, 4), all_found())
        output = gate(torch.randn(SHAPE), torch.randn(SHAPE), all_found(), torch.randn(B, T, 32), scores)
        output.square().sum().backward()
        assert all(bool(parameter.grad.abs().sum() > 0) for parameter in gate.parameters())
    gate = make_gate(ModelConfig.preset("tiny"))
    torch.nn.init.constant_(gate.bias, -100.0)
    with torch.no_grad():
        gate.bias[1] = 100.0
    local, remembered = torch.randn(SHAPE), torch.randn(SHAPE)
    output = gate(local, remembered, all_found(), torch.randn(B, T, 32))
    torch.testing.assert_close(output[:, 0], local[:, 0])
    torch.testing.assert_close(output[:, 1], remembered[:, 1])


def both_attentions(
    logits: torch.Tensor, retrieved: torch.Tensor, values: torch.Tensor, far: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local attention over `values` (B, H, N, D) and attention over retrieved values `far` (B, H, T, K, D)."""
    return torch.softmax(logits, -1) @ values, (torch.softmax(retrieved, -1)[..., None] * far).sum(-2)


@pytest.mark.parametrize("kind", ["joint", "confidence"])
def test_one_softmax_over_all_logits(kind: str) -> None:
    """The joint gate is it; so is the confidence gate with the weights that its docstring names."""
    gate = make_gate(ModelConfig.preset("tiny", gate=kind))
    if kind == "confidence":
        with torch.no_grad():
            gate.weight[0] = 1.0
    logits = (3 * torch.randn(B, H, T, 7)).masked_fill(torch.arange(7) > torch.arange(4, 7)[:, None], -torch.inf)
    retrieved = 3 * torch.randn(B, H, T, 4)
    retrieved[:, :, 1, 2:] = torch.finfo(torch.float32).min  # fewer were found than asked for
    inputs = [logits, retrieved, torch.randn(B, H, 7, D), torch.randn(B, H, T, 4, D)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    output = gate(*both_attentions(*ours), all_found(), torch.randn(B, T, 32), Scores.of(ours[0], ours[1], all_found()))
    weights = torch.softmax(torch.cat(theirs[:2], dim=-1), dim=-1)
    expected = weights[..., :7] @ theirs[2] + (weights[..., 7:, None] * theirs[3]).sum(-2)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, dense in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, dense.grad)


def test_the_scores_of_an_empty_memory_stay_finite_and_pass_no_gradient() -> None:
    """Learned weights above 1 times the least finite number would overflow, and the gradient would be NaN."""
    gate = make_gate(ModelConfig.preset("tiny", gate="confidence"))
    torch.nn.init.constant_(gate.weight, 1.5)
    found = all_found()
    found[0] = False
    retrieved = torch.randn(B, H, T, 4)
    retrieved[0] = torch.finfo(torch.float32).min
    retrieved.requires_grad_()
    output = gate(
        torch.randn(SHAPE),
        torch.randn(SHAPE),
        found,
        torch.randn(B, T, 32),
        Scores.of(torch.randn(B, H, T, 7), retrieved, found),
    )
    output.sum().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in gate.parameters())
    assert not bool(retrieved.grad[0].any())
    assert bool(retrieved.grad[1].any())


def test_a_gate_that_reads_scores_says_so_when_there_are_none() -> None:
    gate = make_gate(ModelConfig.preset("tiny", gate="joint"))
    with pytest.raises(TypeError, match=r"Scores\.of"):
        gate(torch.randn(SHAPE), torch.randn(SHAPE), all_found(), torch.randn(B, T, 32))


def test_an_unknown_gate_offers_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'token'"):
        ModelConfig.preset("tiny", gate="tokens")


def test_a_new_kind_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recollect.model.gates.GATES", dict(GATES))

    @register_gate("larger")
    class LargerGate(Gate):
        def join(
            self, local: torch.Tensor, remembered: torch.Tensor, hidden: torch.Tensor, scores: Scores | None
        ) -> torch.Tensor:
            return torch.maximum(local, remembered)

    try:
        output, local, remembered = joined("larger")
        assert torch.equal(output, torch.maximum(local, remembered))
        with pytest.raises(ConfigurationError, match="exists already"):
            register_gate("larger")(LargerGate)
    finally:
        GATE_NAMES.remove("larger")
