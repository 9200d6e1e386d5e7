"""Gradients that are kept as factors, spread over ranks, or known along random directions, against plain matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from siftrl import distributed
from siftrl.gradients import Dense, Factored, Perturbed, RowGradient, RowGradients, direction, factored

NAN = math.nan


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def floats(values: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


TWO_TOKENS = (
    (floats([[1, 0], [0, 2]]), floats([[1, 2, 3], [3, 4, 5]])),  # 1 * [1 2 3] above 2 * [3 4 5]
    (floats([[1], [-1]]), floats([[5, 1], [2, 7]])),  # [5 1] - [2 7]
)
MATRICES = [1, 2, 3, 6, 8, 10, 3, -6]


# ---- one row


@pytest.mark.parametrize("gradient", [Factored(TWO_TOKENS), factored(TWO_TOKENS), Dense(torch.tensor(MATRICES) * 1.0)])
def test_matrices_by_hand(gradient: RowGradient) -> None:
    assert gradient.dense().tolist() == MATRICES and gradient.dense().dtype == torch.float32
    coordinates = torch.tensor([7, 0, 5, 5, 6, 2, 3])  # in no order, with one twice, of both matrices
    assert gradient.at(coordinates).tolist() == [-6, 1, 10, 10, 3, 3, 6]
    assert gradient.at(torch.tensor([6])).tolist() == [3] and gradient.at(torch.tensor([2])).tolist() == [3]
    assert gradient.is_finite


def test_factors_are_sums_of_outer_products() -> None:
    pairs = [(normal(7, 4, seed=1), normal(7, 5, seed=2)), (normal(7, 3, seed=3), normal(7, 6, seed=4))]
    matrices = [sum(torch.outer(d, x) for d, x in zip(delta, inputs, strict=True)) for delta, inputs in pairs]
    expected = torch.cat([matrix.flatten() for matrix in matrices])  # type: ignore[union-attr]
    row = Factored(tuple(pairs))
    torch.testing.assert_close(row.dense(), expected)
    torch.testing.assert_close(row.at(torch.arange(38)), expected)


@pytest.mark.parametrize(
    "tokens, shapes, kept",
    [
        (1, [(4, 4)], Factored),  # 8 numbers, not 16
        (2, [(4, 4)], Dense),  # 16, and 16
        (3, [(4, 4)], Dense),
        (5, [(30, 10)], Factored),  # 200, not 300
        (2, [(4, 4), (10, 10)], Factored),  # 56, not 116
        (3, [(2, 40), (40, 2)], Dense),  # 252, not 160
    ],
)
def test_the_smaller_is_kept(tokens: int, shapes: list[tuple[int, int]], kept: type) -> None:
    pairs = [(normal(tokens, a, seed=i), normal(tokens, b, seed=9 + i)) for i, (a, b) in enumerate(shapes)]
    row = factored(pairs)
    assert type(row) is kept
    torch.testing.assert_close(row.dense(), torch.cat([(delta.T @ x).flatten() for delta, x in pairs]))


@pytest.mark.parametrize("tokens", [1, 200])
def test_bfloat16_factors_are_summed_in_float32(tokens: int) -> None:
    delta, x = torch.full((tokens, 4), 1.0).bfloat16(), torch.full((tokens, 4), 1.0078125).bfloat16()
    values = factored([(delta, x)]).dense()
    # bfloat16 holds no number between 200 and 201, nor between 1 and 1.0078125
    assert values.dtype == torch.float32 and values.tolist() == [tokens * 1.0078125] * 16


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_is_not_finite_is_known(bad: float) -> None:
    (delta, x), other = TWO_TOKENS
    for pairs in (((delta * bad, x), other), ((delta, x * bad), other), (other, (delta, x + bad))):
        assert not Factored(pairs).is_finite
    assert not Dense(torch.tensor([1.0, bad])).is_finite
    assert not Perturbed(torch.tensor([1.0, bad]), (1, 2), ((1, 2),)).is_finite
    assert Perturbed(torch.tensor([1.0, 2.0]), (1, 2), ((1, 2),)).is_finite


# ---- random directions


def test_perturbed_is_the_mean_of_slopes_times_directions() -> None:
    shapes = ((2, 3), (1, 2))
    drawn = []
    for seed in (5, 6):
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.cat([torch.randn(shape, generator=generator).flatten() for shape in shapes]))
    row = Perturbed(torch.tensor([2.0, -4.0]), (5, 6), shapes)
    torch.testing.assert_close(row.dense(), drawn[0] - 2 * drawn[1])
    torch.testing.assert_close(row.at(torch.tensor([7, 0])), row.dense()[[7, 0]])


def test_directions_are_standard_normal_and_functions_of_the_seed() -> None:
    before = torch.get_rng_state()
    (z,) = direction(1, ((200, 300),))
    assert float(z.mean()) == pytest.approx(0, abs=0.02) and float(z.std()) == pytest.approx(1, abs=0.02)
    for seed in range(2, 12):  # more than are remembered
        assert abs(float((z * direction(seed, ((200, 300),))[0]).mean())) < 0.02
    assert torch.equal(direction(1, ((200, 300),))[0], z)
    assert torch.equal(torch.get_rng_state(), before)


# ---- many rows


def rows_of(values: Tensor, held: Sequence[int] | None = None) -> RowGradients:
    """values: [B, D]. held: the rows that this rank scored; None: all."""
    held = range(len(values)) if held is None else held
    mine: dict[int, RowGradient] = {row: Dense(values[row]) for row in held}
    return RowGradients(mine, torch.arange(len(values)), values.shape[1], torch.device("cpu"))


VALUES = floats([[1, 2], [3, 4], [5, 6], [7, 8]])


def test_totals_by_hand() -> None:
    weights = floats([[1, 0, 0, 0], [0.5, 0, -1, 2], [0, 0, 0, 0]])
    total = rows_of(VALUES).total(weights)
    assert total.tolist() == [[1, 2], [0.5 - 5 + 14, 1 - 6 + 16], [0, 0]] and total.dtype == torch.float32


def test_totals_of_transformed_gradients() -> None:
    shapes = []

    def squared_and_scaled(gradient: Tensor) -> Tensor:
        shapes.append(tuple(gradient.shape))
        return gradient.square() / torch.tensor([1.0, 2.0])

    weights = floats([[1, 0, 2, 0], [0, 0, 1, 0]])
    assert rows_of(VALUES).total(weights, squared_and_scaled).tolist() == [[1 + 50, 2 + 36], [25, 18]]
    assert shapes == [(2, 2)]  # rows 1 and 3 weigh nothing


def test_rows_without_weight_do_not_count_whatever_they_hold() -> None:
    values = VALUES.clone()
    values[1] = NAN
    assert rows_of(values).total(floats([[1, 0, 1, 0]])).tolist() == [[6, 8]]


def test_totals_do_not_lose_small_numbers() -> None:
    values = floats([[1e8], [1], [-1e8]])
    assert rows_of(values).total(torch.ones(1, 3)).tolist() == [[1]]  # in float32 it is 0


def test_entries_by_hand() -> None:
    gradients = rows_of(VALUES)
    assert gradients.at(torch.tensor([1, 0, 1]), torch.tensor([2, 0])).tolist() == [[6, 5, 6], [2, 1, 2]]
    assert gradients.at(torch.tensor([1]), torch.tensor([3, 0, 3])).tolist() == [[8], [2], [8]]


def test_views() -> None:
    view = rows_of(VALUES)[torch.tensor([3, 1, 0])]
    assert len(view) == 3
    assert view.total(torch.eye(3)).tolist() == [[7, 8], [3, 4], [1, 2]]
    assert view.at(torch.tensor([0]), torch.tensor([2, 0])).tolist() == [[1], [7]]
    again = view[torch.tensor([2, 0])]
    assert len(again) == 2
    assert again.total(floats([[1, 10]])).tolist() == [[1 + 70, 2 + 80]]
    assert again.at(torch.tensor([1]), torch.tensor([1])).tolist() == [[8]]
    twice = again[torch.tensor([1, 1, 0])]
    assert twice.total(torch.eye(3)).tolist() == [[7, 8], [7, 8], [1, 2]]
    assert twice.at(torch.tensor([0]), torch.tensor([0, 1, 2])).tolist() == [[7], [7], [1]]


def test_rows_that_are_not_finite() -> None:
    values = VALUES.clone()
    values[2, 1] = NAN
    gradients = rows_of(values)
    assert gradients.is_finite().tolist() == [True, True, False, True]
    assert gradients[torch.tensor([2, 3])].is_finite().tolist() == [False, True]


def test_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is one sum over ranks, of which each gives its own rows."""
    order, rows = torch.tensor([3, 0, 2, 1]), torch.tensor([0, 2, 3])
    ranks = [rows_of(VALUES, [0, 3])[order], rows_of(VALUES, [1, 2])[order]]
    sent: list[Tensor] = []
    monkeypatch.setattr(distributed, "sum_", lambda tensors: sent.extend(tensor.clone() for tensor in tensors))

    def summed(ask: str, *args: Tensor) -> Tensor:
        sent.clear()
        for rank in ranks:
            getattr(rank, ask)(*args)
        assert len(sent) == 2
        return sent[0] + sent[1]

    weights = floats([[1, 2, 3, 4], [0, 0, 1, 0]])
    assert summed("total", weights).tolist() == (weights @ VALUES[order]).tolist()
    assert sent[0].dtype == torch.float64
    assert summed("at", torch.tensor([1]), rows).tolist() == [[8], [6], [4]]
    assert summed("is_finite").tolist() == [1, 1, 1, 1]
