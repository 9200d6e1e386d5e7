"""Chains of hand-made selectors, and rows dealt to ranks and micro-batches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from siftrl.batch_selection import Link, choose, deal, links
from siftrl.gradients import Dense, RowGradients
from siftrl.recipe_text import RecipeError
from siftrl.types import BatchSelector, Selection, Signals


def signals_of(values: Sequence[float]) -> Signals:
    gradients = RowGradients(
        {row: Dense(torch.tensor([value])) for row, value in enumerate(values)},
        torch.arange(len(values)),
        1,
        torch.device("cpu"),
    )
    return Signals(
        num_tokens=torch.arange(1, len(values) + 1),
        ids=torch.arange(100, 100 + len(values)),
        source=[f"s{row}" for row in range(len(values))],
        tensors={"value": torch.tensor(values), "gradient": gradients},
    )


@dataclass
class Top(BatchSelector):
    """Keeps the rows of largest value times `sign`; its score is `offset` + that."""

    sign: float = 1.0
    offset: float = 0.0
    seen: list[Signals] = field(default_factory=list)

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        self.seen.append(signals)
        scores = self.offset + self.sign * signals["value"]
        chosen = scores.argsort(descending=True, stable=True)[:keep]
        return Selection.of(chosen, len(signals), scores=scores, probability=scores / 10, reasons=f"top {self.sign}")


@dataclass
class Weighing(Top):
    """Its weights are in proportion to the values."""

    @property
    def weighted(self) -> bool:
        return True

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        chosen = super().select(signals, keep, generator).indices
        return Selection.of(chosen, len(signals), weights=signals["value"][chosen])


@dataclass
class Drawn(BatchSelector):
    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        return Selection.of(torch.randperm(len(signals), generator=generator)[:keep], len(signals))


@dataclass
class Fixed(BatchSelector):
    """Says that it is not weighted, and returns this, whatever it is given."""

    selection: Selection

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        return self.selection


class FixedWeights(Fixed):
    weighted = True  # type: ignore[assignment]


def chosen_by(
    chain: Sequence[tuple[BatchSelector, float | int]], values: Sequence[float], usable: Sequence[bool] | None = None
) -> Selection:
    mask = torch.tensor(usable if usable is not None else [True] * len(values))
    return choose(links(chain, 0.5), signals_of(values), mask, torch.Generator().manual_seed(0))


# ---- choose


def test_links() -> None:
    one, other = Top(), Drawn()
    assert links(one, 0.25) == [Link(one, 0.25)]
    assert links([(one, 3), (other, 0.5)], 0.25) == [Link(one, 3), Link(other, 0.5)]


def test_one_selector() -> None:
    selection = chosen_by([(Top(), 0.5)], [3, 1, 4, 1.5, 5, 9])
    assert selection.indices.tolist() == [5, 4, 2]
    assert selection.scores.tolist() == [3, 1, 4, 1.5, 5, 9]
    assert selection.probability.tolist() == pytest.approx([0.3, 0.1, 0.4, 0.15, 0.5, 0.9])
    assert selection.weights.tolist() == [1, 1, 1] and selection.reasons == ("top 1.0",) * 3


def test_each_selector_chooses_from_what_the_one_before_kept() -> None:
    first, second, third = Top(), Top(sign=-1, offset=100), Top(offset=50)
    selection = chosen_by([(first, 6), (second, 0.5), (third, 2)], [3, 1, 4, 1.5, 5, 9, 2, 6])
    # kept: 7 9 5 4 3 and 2 (in order of value 9 6 5 4 3 2), then 2 3 4, then 4 3
    assert [seen.ids.tolist() for seen in first.seen + second.seen + third.seen if seen.ids is not None] == [
        [100, 101, 102, 103, 104, 105, 106, 107],
        [105, 107, 104, 102, 100, 106],
        [106, 100, 102],
    ]
    assert second.seen[0].num_tokens.tolist() == [6, 8, 5, 3, 1, 7]
    assert second.seen[0].source == ["s5", "s7", "s4", "s2", "s0", "s6"]
    assert second.seen[0]["gradient"].total(torch.eye(6)).flatten().tolist() == [9, 6, 5, 4, 3, 2]
    assert selection.indices.tolist() == [2, 0]
    # a dropped row keeps the score of the selector that dropped it
    assert selection.scores.tolist() == [53, 1, 54, 1.5, 95, 91, 52, 94]
    assert selection.probability.tolist() == pytest.approx([5.3, 0.1, 5.4, 0.15, 9.5, 9.1, 5.2, 9.4])
    assert selection.reasons == ("top 1.0", "top 1.0")


def test_weights_are_multiplied_and_mean_1() -> None:
    single = chosen_by([(Weighing(), 2)], [1, 3, 9])
    assert single.weights.tolist() == pytest.approx([1.5, 0.5])
    chain = chosen_by([(Weighing(), 3), (Top(sign=-1), 2), (Weighing(), 2)], [1, 2, 3, 9, 6])
    # of 9 6 3 the two smallest, 3 and 6, then the larger first, each weighed by its square: 36 and 9
    assert chain.indices.tolist() == [4, 2]
    assert chain.weights.tolist() == pytest.approx([1.6, 0.4])


def test_weights_follow_rows_that_are_put_in_another_order() -> None:
    chain = chosen_by([(Weighing(), 3), (Top(sign=-1), 3)], [1, 2, 3])
    assert chain.indices.tolist() == [0, 1, 2]
    assert chain.weights.tolist() == pytest.approx([0.5, 1.0, 1.5])


def test_unusable_rows_are_never_offered() -> None:
    selector = Top()
    selection = chosen_by([(selector, 2)], [3, 9, 4, 8], [True, False, True, True])
    assert selector.seen[0].ids is not None and selector.seen[0].ids.tolist() == [100, 102, 103]
    assert selection.indices.tolist() == [3, 2]
    assert selection.scores[[0, 2, 3]].tolist() == [3, 4, 8]
    assert math.isnan(selection.scores[1]) and math.isnan(selection.probability[1])


@pytest.mark.parametrize(
    "usable, kept",
    [(8, [4, 2]), (4, [4, 2]), (3, [3, 2]), (2, [2, 2]), (1, [1, 1])],  # keep counts rows read, not usable ones
)
def test_fewer_usable_rows_than_are_kept(usable: int, kept: list[int]) -> None:
    first, second = Top(), Top()
    flags = [False] * (8 - usable) + [True] * usable
    selection = chosen_by([(first, 0.5), (second, 0.5)], [float(value) for value in range(8)], flags)
    assert [len(first.seen[0]), len(second.seen[0]), len(selection.indices)] == [usable, *kept]
    assert selection.indices.tolist() == [7, 6][: kept[1]]


def test_selectors_draw_from_the_generator_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randperm(6, generator=generator)[:4], torch.randperm(4, generator=generator)[:2]
    assert chosen_by([(Drawn(), 4), (Drawn(), 2)], [0.0] * 6).indices.tolist() == first[second].tolist()


def test_more_rows_than_there_are_to_choose_from() -> None:
    with pytest.raises(RecipeError, match="5 rows are more than the 4 to choose from"):
        chosen_by([(Top(), 5)], [1, 2, 3, 4])


def fixed(indices: Sequence[int], **changes: Any) -> Selection:
    """Of 4 rows."""
    selection = Selection.of(torch.tensor(indices), 4)
    return Selection(**{name: changes.get(name, getattr(selection, name)) for name in Selection.__dataclass_fields__})


@pytest.mark.parametrize(
    "indices, said",
    [
        ([0], r"it returned 1 \(1 different"),
        ([0, 1, 2], r"it returned 3 \(3 different"),
        ([1, 1], r"it returned 2 \(1 different"),
        ([0, 1, 1], r"it returned 3 \(2 different"),
        ([3, -1], r"it returned 2 \(1 different"),  # -1 is row 3 again
        ([0, 4], r"it returned 2 \(1 different"),
        ([], r"it returned 0 \(0 different"),
    ],
)
def test_wrong_rows_are_refused(indices: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=f"batch_selector Fixed: select must return 2 different rows of the 4.*{said}"):
        chosen_by([(Fixed(fixed(indices)), 2)], [1, 2, 3, 4])


def test_the_later_selector_is_named() -> None:
    with pytest.raises(ValueError, match="batch_selector Fixed: select must return 1 different rows of the 2"):
        chosen_by([(Top(), 2), (Fixed(fixed([2])), 1)], [1, 2, 3, 4])


@pytest.mark.parametrize(
    "name, values, lengths",
    [
        ("scores", torch.ones(2), "2, 2, 2, 4"),  # of the kept rows, not of all
        ("scores", torch.ones(1), "2, 2, 1, 4"),
        ("probability", torch.ones(2), "2, 2, 4, 2"),
        ("weights", torch.ones(1), "1, 2, 4, 4"),
        ("reasons", ("why",), "2, 1, 4, 4"),
    ],
)
def test_wrong_lengths_are_refused(name: str, values: Any, lengths: str) -> None:
    with pytest.raises(ValueError, match=f"batch_selector Fixed: .*4 scores.* it returned {lengths}; write Selection"):
        chosen_by([(Fixed(fixed([0, 1], **{name: values})), 2)], [1, 2, 3, 4])


def test_undeclared_weights_are_refused() -> None:
    selection = Selection.of(torch.tensor([0, 1]), 4, weights=torch.tensor([1.0, 3.0]))
    with pytest.raises(
        ValueError, match="batch_selector Fixed: it returned weights other than 1; set `weighted = True`"
    ):
        chosen_by([(Fixed(selection), 2)], [1, 2, 3, 4])
    assert chosen_by([(FixedWeights(selection), 2)], [1, 2, 3, 4]).weights.tolist() == [0.5, 1.5]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_not_above_0_are_refused(bad: float) -> None:
    selection = fixed([0, 1], weights=torch.tensor([2 - bad, bad]))
    with pytest.raises(ValueError, match="batch_selector FixedWeights: weights must be finite and above 0"):
        chosen_by([(FixedWeights(selection), 2)], [1, 2, 3, 4])


# ---- deal


def padded(dealt: list[list[list[int]]], lengths: Sequence[int]) -> int:
    """Tokens of padding in all micro-batches."""
    batches = [[lengths[row] for row in batch] for rank in dealt for batch in rank if batch]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


def test_deal_by_hand() -> None:
    # longest first: 9 and 8 to either rank, 7 to the second (8 < 9), 6 to the first: 15 and 15; then 4, 3, 2, 1
    assert deal([9, 1, 8, 2, 7, 3, 6, 4], 2, 2) == [[[0, 6], [7, 1]], [[2, 4], [5, 3]]]


def test_deal_on_one_rank_sorts() -> None:
    assert deal([1, 5, 3, 5, 2, 4], 1, 3) == [[[1, 3], [5, 2], [4, 0]]]
    assert deal([1, 5, 3], 1, 1) == [[[1, 2, 0]]]


def test_too_few_rows_leave_the_last_micro_batches_empty() -> None:
    assert deal([5, 4, 3], 2, 2) == [[[0], [2]], [[1], []]]
    assert deal([7], 2, 2) == [[[0], []], [[], []]]


@pytest.mark.parametrize("seed", range(150))
def test_deals_are_even(seed: int) -> None:
    rng = random.Random(seed)
    num_ranks, num_batches = rng.randint(1, 4), rng.randint(1, 5)
    bins = num_ranks * num_batches
    num_rows = rng.choice([bins * rng.randint(1, 6), rng.randint(1, 6 * bins)])
    draw = rng.choice(
        [lambda: rng.randint(1, 500), lambda: int(rng.expovariate(0.01)) + 1, lambda: rng.choice([1, 99])]
    )
    lengths = [draw() for _ in range(num_rows)]
    dealt = deal(lengths, num_ranks, num_batches)
    assert len(dealt) == num_ranks and all(len(rank) == num_batches for rank in dealt)
    assert sorted(row for rank in dealt for batch in rank for row in batch) == list(range(num_rows))
    sizes = [len(batch) for rank in dealt for batch in rank]
    is_even = num_rows % bins == 0
    assert max(sizes) - min(sizes) == (0 if is_even else 1)
    assert (0 in sizes) == (num_rows < bins)
    rows = [sum(len(batch) for batch in rank) for rank in dealt]
    assert max(rows) - min(rows) <= 1
    # micro-steps take the rows in order of length: none is longer than one of an earlier step
    steps = [[lengths[row] for rank in dealt for row in rank[step]] for step in range(num_batches)]
    assert all(min(a) >= max(b) for a, b in zip(steps, steps[1:], strict=False) if b)
    tokens = [sum(lengths[row] for batch in rank for row in batch) for rank in dealt]
    assert max(tokens) - min(tokens) <= max(lengths) - (min(lengths) if is_even else 0)


def test_little_is_padded() -> None:
    rng = random.Random(0)
    lengths = [int(rng.expovariate(0.01)) + 1 for _ in range(256)]
    shuffled = list(range(256))
    rng.shuffle(shuffled)
    at_random = [[shuffled[start : start + 8] for start in range(rank * 128, rank * 128 + 128, 8)] for rank in (0, 1)]
    assert padded(deal(lengths, 2, 16), lengths) < padded(at_random, lengths) / 6


# ---- what is scored, and when


@dataclass
class Needing(Top):
    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({"value"})


@dataclass
class Leading(BatchSelector):
    """Keeps the first rows, and needs nothing."""

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        return Selection.of(torch.arange(keep), len(signals))


def scored_by(
    chain: Sequence[tuple[BatchSelector, float | int]], values: Sequence[float], **options: Any
) -> tuple[Selection, list[list[int]]]:
    """The selection, and the rows that were scored, call by call."""
    asked: list[list[int]] = []

    def score(rows: torch.Tensor) -> tuple[dict[Any, Any], torch.Tensor]:
        asked.append(rows.tolist())
        found = torch.tensor(values)[rows]
        return {"value": found}, found.isfinite()

    signals = Signals(num_tokens=torch.ones(len(values), dtype=torch.int64))
    mask = torch.ones(len(values), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    return choose(links(chain, 0.5), signals, mask, generator, score, **options), asked


def test_rows_are_scored_once_and_only_those_that_are_left() -> None:
    """6 rows -> the first 4 -> the largest 2 of them -> the smallest 1 of these."""
    selection, asked = scored_by([(Leading(), 4), (Needing(), 2), (Needing(sign=-1.0), 1)], [3, 1, 4, 1.5, 5, 9])
    assert asked == [[0, 1, 2, 3]]
    assert selection.indices.tolist() == [0]
    assert scored_by([(Leading(), 4)], [3, 1, 4, 1.5, 5, 9])[1] == []


def test_rows_that_turn_out_bad_are_not_offered() -> None:
    selection, _ = scored_by([(Needing(), 3)], [3, math.nan, 4, math.inf, 5, 1])
    assert selection.indices.tolist() == [4, 2, 0]
    assert scored_by([(Needing(), 6)], [3, math.nan, 4, math.inf, 5, 1])[0].indices.tolist() == [4, 2, 0, 5]


def test_a_limit_leaves_rows_out_at_random() -> None:
    values = list(range(40))
    chain = [(Needing(), 10)]
    selection, (asked,) = scored_by(chain, values, max_scored=20)
    assert len(asked) == 20 and asked == sorted(asked) and asked != list(range(20))
    assert selection.indices.tolist() == sorted(asked, reverse=True)[:10]
    assert len(scored_by(chain, values, max_scored=4)[1][0]) == 10  # as many as are kept, at least
    assert scored_by(chain, values, max_scored=40)[1] == [values]


def test_a_step_that_may_not_score_takes_what_is_left_to_choose_at_random() -> None:
    chain = [(Leading(), 20), (Needing(), 10), (Needing(), 0.5)]
    selection, asked = scored_by(chain, list(range(40)), max_scored=0)
    assert asked == [] and selection.reasons == ("uniform",) * 5
    assert len(set(selection.indices.tolist())) == 5 and max(selection.indices.tolist()) < 20
    assert selection.indices.tolist() != [0, 1, 2, 3, 4]
