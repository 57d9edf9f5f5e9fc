"""Which sizes are measured: against indexes whose time is a formula, so that the crossing is known."""

from __future__ import annotations

import pytest

from recollect.reports.crossing import SizedRatio, find_crossing
from recollect.suites.crossover_ladder import Ladder, Question, Rung

QUESTION = Question(512, 0.95, False)


def climbed(
    ratio: object, *, largest: int = 131_072, memories: int = 8, least: int = 2, budget: float = 1e9, **more: object
) -> Ladder:
    """A ladder climbed to its end with an index whose ratio at a size is a function; a key costs a microsecond."""
    ladder = Ladder(512, largest, memories, least, **more)  # type: ignore[arg-type]
    left = budget
    while (wanted := ladder.next(left)) is not None:
        assert len(ladder.rungs) < 40, "it comes to an end"
        assert wanted.size not in [rung.size for rung in ladder.rungs], "nothing is measured twice"
        value = ratio(wanted.size)  # type: ignore[operator]
        found = None if value is None else SizedRatio(wanted.size, value, value / 1.02, value * 1.02)
        seconds = 1e-6 * wanted.size * wanted.memories
        left -= seconds
        ladder.add(Rung(wanted.size, wanted.memories, seconds, {QUESTION: found}))
    return ladder


def sizes(ladder: Ladder) -> list[int]:
    return [rung.size for rung in ladder.rungs]


@pytest.mark.parametrize("where", [900, 5000, 23_000])
def test_a_crossing_is_enclosed_closely(where: int) -> None:
    ladder = climbed(lambda size: (where / size) ** 0.7)
    measured = sizes(ladder)
    below, above = max(s for s in measured if s < where), min(s for s in measured if s > where)
    assert above / below <= 1.3
    assert max(measured) <= 8 * where, "nobody climbs far beyond the crossing"
    crossing = find_crossing([rung.ratios[QUESTION] for rung in ladder.rungs])  # type: ignore[misc]
    assert crossing.size == pytest.approx(where, rel=0.01)


def test_an_index_that_cannot_win_is_left() -> None:
    ladder = climbed(lambda size: 200.0 * (size / 512) ** -0.1)
    assert max(sizes(ladder)) < 131_072
    assert "would not change" in ladder.stopped
    assert max(sizes(climbed(lambda size: 1.5))) == 131_072, "one that may win is followed to the end"


def test_an_index_that_no_longer_reaches_the_recall_is_left_after_a_second_try() -> None:
    ladder = climbed(lambda size: 2.0 if size < 4096 else None)
    assert sizes(ladder) == [512, 1024, 2048, 4096, 8192]


def test_fewer_memories_before_giving_up() -> None:
    ladder = climbed(lambda size: 1.5, budget=0.2)
    used = {rung.size: rung.memories for rung in ladder.rungs}
    assert used[512] == 8
    assert min(used.values()) == 2, "no fewer than there are threads"
    assert "time" in ladder.stopped
    assert sum(rung.seconds for rung in ladder.rungs) <= 0.2


def test_what_does_not_fit_is_not_tried() -> None:
    ladder = climbed(lambda size: 1.5, fits=lambda size, memories: size * memories <= 40_000)
    assert [rung.size * rung.memories <= 40_000 for rung in ladder.rungs] == [True] * len(ladder.rungs)
    assert max(sizes(ladder)) == 16_384
    nothing = Ladder(512, 1024, 8, 2, fits=lambda size, memories: False)
    assert nothing.next(1e9) is None
    assert "fit" in nothing.stopped


def test_known_sizes_cost_nothing() -> None:
    ladder = climbed(lambda size: 1.5, budget=0.0, known=frozenset({512, 1024, 2048}))
    assert sizes(ladder) == [512, 1024, 2048]


def test_a_question_that_was_left_out_at_a_size_is_neither_lost_nor_asked_for_again() -> None:
    other = Question(1, 0.95, False)
    ladder = Ladder(512, 65_536, 8, 2)
    sequence = []
    while (wanted := ladder.next(1e9)) is not None:
        sequence.append(wanted.size)
        assert len(sequence) == len(set(sequence)) < 40
        value = (9000 / wanted.size) ** 0.7
        ratios: dict[Question, SizedRatio | None] = {QUESTION: SizedRatio(wanted.size, value, value, value)}
        if wanted.size in (512, 1024):
            value = 700 / wanted.size
            ratios[other] = SizedRatio(wanted.size, value, value, value)
        ladder.add(Rung(wanted.size, wanted.memories, 1.0, ratios))
    assert 704 in sequence, "the crossing of the other question is enclosed, as far as it can be measured"
    assert any(8000 < size < 10_000 for size in sequence)


def test_fewer_memories_only_where_they_say_enough() -> None:
    ladder = climbed(lambda size: 1.5, budget=0.2, may_reduce=lambda size: False)
    assert {rung.memories for rung in ladder.rungs} == {8}
    assert max(sizes(ladder)) < max(sizes(climbed(lambda size: 1.5, budget=0.2)))
