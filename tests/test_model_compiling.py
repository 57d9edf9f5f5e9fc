"""A model with memory under `torch.compile`: the same numbers, and the memory outside the graphs."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from recollect.model.configuration import ModelConfig
from recollect.model.transformer import MemorizingTransformer

MOST_GRAPHS = 20


def test_a_compiled_model_answers_as_the_model_does_and_makes_few_graphs() -> None:
    config = ModelConfig.preset("tiny")
    torch.manual_seed(0)
    model = MemorizingTransformer(config)
    tokens = torch.randint(config.vocabulary_size, (4, 2, config.segment_length))
    starts = torch.tensor([[True, True], [False, False], [False, True], [False, False]])
    torch._dynamo.reset()
    counters.clear()
    logits, gradients, graphs = [], [], []
    for run in (model, torch.compile(model, backend="aot_eager")):
        state = model.initial_state(2)
        model.zero_grad()
        for segment, start in zip(tokens, starts, strict=True):
            output = run(segment, state, start)
            state = output.state
            output.logits.logsumexp(-1).sum().backward()
            logits.append(output.logits.detach())
            graphs.append(counters["stats"]["unique_graphs"])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for eager, compiled in zip(logits[:4], logits[4:], strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    # Left to itself the compiler follows the search into some fifty graphs.
    assert 0 < graphs[-1] <= MOST_GRAPHS
    assert graphs[-1] == graphs[-3], "no step after the first with a memory to search makes more"
