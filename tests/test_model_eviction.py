"""Eviction by use: the keys that survive are those of a plain simulation, with their values, on any backend."""

from __future__ import annotations

import pytest
import torch

from recollect.memory_backends.registry import make_backend
from recollect.model.configuration import ConfigurationError, ModelConfig
from recollect.model.eviction import Usage
from recollect.model.memory_layer import LayerMemory
from recollect.model.streams import Segment
from recollect.model.training import training_loss
from recollect.model.transformer import MemorizingTransformer

B, H, D, K, C = 2, 2, 8, 3, 12
SCALE = torch.full((H,), 4.0)


def make_memory(spec: str = "exact", *, share: float = 0.5, capacity: int = C) -> LayerMemory:
    backend = make_backend(spec, num_memories=B * H, capacity=capacity, dim=D)
    return LayerMemory(backend, heads=H, k=K, eviction="most_used", kept_share=share)


class Simulation:
    """One memory as a plain list of [key, value, count], oldest first."""

    def __init__(self, capacity: int, share: float) -> None:
        self.capacity, self.share = capacity, share
        self.entries: list[list[torch.Tensor | float]] = []

    def attend(self, queries: torch.Tensor, scale: float) -> torch.Tensor:
        """(T, D), counting the weights that the best K keys got."""
        if not self.entries:
            return torch.zeros_like(queries)
        keys, values = (torch.stack([entry[part] for entry in self.entries]) for part in (0, 1))
        logits = queries @ keys.T * scale
        best = logits.topk(min(K, len(keys)), dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, best.indices, torch.softmax(best.values, -1))
        for entry, weight in zip(self.entries, weights.sum(0).tolist(), strict=True):
            entry[2] += weight
        return weights @ values

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        new = [[key, value, 0.0] for key, value in zip(keys, values, strict=True)]
        stay = min(round(self.share * len(new)), self.capacity - len(new))
        if len(self.entries) + len(new) > self.capacity and stay > 0:
            leaving = len(self.entries) + len(new) + stay - self.capacity
            looked_at = list(reversed(self.entries[:leaving]))  # the newer wins where counts are equal
            chosen = sorted(range(leaving), key=lambda place: -looked_at[place][2])[:stay]
            kept = [[*looked_at[place][:2], 0.0] for place in sorted(chosen, reverse=True)]
            self.entries = self.entries[leaving:] + kept
        self.entries = (self.entries + new)[-self.capacity :]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 3.0])
def test_the_survivors_are_those_of_a_plain_simulation(share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    memory = make_memory(share=share)
    plain = [Simulation(C, share) for _ in range(B * H)]
    for step in range(25):
        if step in (9, 16):
            row = step % 2
            memory.reset_rows(torch.arange(B) == row)
            for head in range(H):
                plain[row * H + head] = Simulation(C, share)
        queries = torch.randn(B, H, 5, D, generator=generator)
        remembered = memory.attend(queries, SCALE).remembered.flatten(0, 1)
        expected = torch.stack([plain[m].attend(queries.flatten(0, 1)[m], 4.0) for m in range(B * H)])
        torch.testing.assert_close(remembered, expected, msg=f"step {step}")
        tokens = (4, 3, 1, 15, 2)[step % 5]  # 15 alone exceeds the capacity
        keys, values = (torch.randn(B, H, tokens, D, generator=generator) for _ in range(2))
        memory.append(keys, values)
        for m in range(B * H):
            plain[m].append(keys.flatten(0, 1)[m], values.flatten(0, 1)[m])
        assert memory.backend.lengths.tolist() == [len(one.entries) for one in plain]


def test_a_key_that_is_used_stays_and_leaves_once_it_is_not() -> None:
    memory = make_memory()
    wanted = torch.nn.functional.normalize(torch.randn(B, H, 1, D), dim=-1)
    memory.append(wanted, torch.full((B, H, 1, D), 7.0))
    generator = torch.Generator().manual_seed(0)

    def read(queries: torch.Tensor) -> torch.Tensor:
        remembered = memory.attend(queries, torch.full((H,), 50.0)).remembered
        noise = torch.nn.functional.normalize(torch.randn(B, H, 4, D, generator=generator), dim=-1)
        memory.append(0.5 * noise, torch.zeros(B, H, 4, D))
        return remembered

    for _ in range(20):  # 80 keys went through a memory of 12
        assert bool((read(wanted) > 6.9).all())
    for _ in range(12):
        read(-wanted)
    assert bool((read(wanted).abs() < 0.1).all())


@pytest.mark.parametrize("spec", ["faiss-flat", "faiss-ivf:nlist=4,nprobe=4", "hnswlib", "degraded:drop=0.3"])
def test_any_backend_serves(spec: str) -> None:
    try:
        memory, oracle = make_memory(spec, capacity=64), make_memory(capacity=64)
    except ImportError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        for each in (memory, oracle):
            state = generator.get_state()
            queries, keys, values = (torch.randn(B, H, 10, D, generator=generator) for _ in range(3))
            answer = each.attend(queries, SCALE)
            assert bool(torch.isfinite(answer.remembered).all())
            each.append(keys, values)
            if each is memory:
                generator.set_state(state)
    assert torch.equal(memory.backend.lengths, oracle.backend.lengths)
    # Whatever it finds, key and value still belong together: both lie where the ring says.
    found = memory.attend(queries, SCALE)
    keys = memory.backend.gather_keys(found.slots.flatten(0, 1)).view(B, H, 10, K, D)
    logits = (queries[..., None, :] * keys).sum(-1) * 4.0
    present = found.slots >= 0
    torch.testing.assert_close(found.logits[present], logits[present])


def test_usage_counts_nothing_for_missing_neighbours() -> None:
    usage = Usage(2, 4, kept_share=0.5, device=torch.device("cpu"))
    usage.note(torch.tensor([[1, 1, -1], [3, -1, -1]]), torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, 0.0]]))
    assert usage.totals.tolist() == [[0.0, 0.75, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    usage.begin(torch.tensor([[1]]), torch.tensor([0]))
    assert not bool(usage.totals[0].any())
    assert float(usage.totals[1, 3]) == 1.0


def test_an_unknown_way_is_refused() -> None:
    backend = make_backend("exact", num_memories=B * H, capacity=C, dim=D)
    with pytest.raises(ConfigurationError, match="fifo, most_used"):
        LayerMemory(backend, heads=H, k=K, eviction="lru")


def test_a_model_trains_with_it_and_differs_from_first_in_first_out() -> None:
    config = ModelConfig.preset("tiny", memory_size=24, eviction="most_used")
    losses = []
    for eviction in ("most_used", "fifo"):
        torch.manual_seed(0)
        model = MemorizingTransformer(config.replace(eviction=eviction))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        state = model.initial_state(2)
        phrase = torch.randint(0, 64, (2, 40))
        text = phrase.repeat(1, 20)
        losses.append([])
        for step in range(40):
            begin = step * 16 % (text.shape[1] - 17)
            segment = Segment(
                tokens=text[:, begin : begin + 16],
                targets=text[:, begin + 1 : begin + 17],
                document_starts=torch.full((2,), step == 0),
                document_index=torch.zeros(2, dtype=torch.int64),
                position=torch.full((2,), begin),
                lengths=torch.full((2,), 16),
            )
            loss, state = training_loss(model, state, segment)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
        assert losses[-1][-1] < 0.7 * losses[-1][0]
    assert losses[0][:2] == losses[1][:2], "nothing was evicted yet"
    assert losses[0][5:] != losses[1][5:]
