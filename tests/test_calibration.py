"""Calibration figures: by hand on four prompts, and by simulation where the truth is known."""

import math

import pytest
import torch

from siftrl.calibration import (
    MAX_EQUIVALENT_ROLLOUTS,
    brier,
    defined,
    equivalent_rollouts,
    explained_variance,
    group_statistics,
    rank_correlation,
    reliability,
)

NAN = float("nan")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@DTYPES
def test_group_statistics_leave_missing_rewards_out(dtype):
    rewards = torch.tensor(
        [[1.0, 0.0, 0.0, 1.0], [1.0, NAN, 0.0, NAN], [NAN, 3.0, NAN, NAN], [NAN] * 4, [2.0] * 4], dtype=dtype
    )
    groups = group_statistics(rewards)
    assert groups.count.tolist() == [4, 2, 1, 0, 4]
    assert groups.mean[[0, 1, 2, 4]].tolist() == [0.5, 0.5, 3.0, 2.0] and groups.mean[3].isnan()
    # mean 1/2, four deviations of 1/4 over 3; two deviations of 1/4 over 1
    assert groups.variance[[0, 1, 4]].tolist() == pytest.approx([1 / 3, 1 / 2, 0.0])
    assert groups.variance[[2, 3]].isnan().all()
    assert groups.spread.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert groups.effective().tolist() == [True, True, False, False, False]
    assert groups.metrics() == {"effective_ratio": 0.4, "observed_mean": pytest.approx(6 / 4)}


def test_rounding_is_no_spread():
    groups = group_statistics(torch.tensor([[0.1 + 0.2, 0.3], [0.3, 0.31]], dtype=torch.float64))
    assert groups.spread[0] > 0 and groups.effective().tolist() == [False, True]


@DTYPES
def test_explained_variance_and_brier_by_hand(dtype):
    predicted = torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=dtype)
    observed = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype)
    # errors 0, 1/4, 1/4, 0; deviations from 1/2: four times 1/4
    assert brier(predicted, observed) == pytest.approx(1 / 8)
    assert explained_variance(predicted, observed) == pytest.approx(1 - (1 / 2) / 1)
    # weights 1, 1, 0, 2: mean 1/2, errors 1/4, deviations 1/4 + 1/4 + 2/4 = 1
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0], dtype=dtype)
    assert brier(predicted, observed, weights) == pytest.approx(1 / 16)
    assert explained_variance(predicted, observed, weights) == pytest.approx(3 / 4)


def test_explained_variance_of_a_constant_an_exact_and_a_bad_prediction():
    observed = torch.tensor([0.1, 0.4, 0.7, 0.9])
    assert explained_variance(observed.mean().expand(4), observed) == pytest.approx(0, abs=1e-6)
    assert explained_variance(observed, observed) == 1
    assert explained_variance(1 - observed, observed) < 0
    assert math.isnan(explained_variance(observed, torch.full((4,), 0.1)))


def test_rank_correlation_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    # no ties: 1 - 6 sum d^2 / (n (n^2 - 1)), d = 1, 1, 0, 0
    assert rank_correlation(a, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(1 - 6 * 2 / 60)
    # ties: ranks 1.5 1.5 3.5 3.5 against 1 2 3 4: covariance 4, variances 4 and 5
    assert rank_correlation(torch.tensor([0.0, 0.0, 1.0, 1.0]), a) == pytest.approx(4 / math.sqrt(4 * 5))
    # ranks 2 2 2 4 5 against 1 2 3 4 5: covariance 8, variances 8 and 10
    five = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0]), torch.arange(5)
    assert rank_correlation(*five) == pytest.approx(8 / math.sqrt(8 * 10))
    assert math.isnan(rank_correlation(a, torch.zeros(4)))


def test_whole_weights_are_repeated_rows():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(20, generator=generator).round(decimals=1)
    observed = torch.rand(20, generator=generator).round(decimals=1)
    variance, count = torch.rand(20, generator=generator), torch.randint(2, 9, (20,), generator=generator)
    times = torch.randint(1, 4, (20,), generator=generator)
    p, o, v, n = (column.repeat_interleave(times) for column in (predicted, observed, variance, count))
    for figure in (explained_variance, brier, rank_correlation):
        assert figure(predicted, observed, times) == pytest.approx(figure(p, o))
    weighted = equivalent_rollouts(predicted, observed, variance, count, times)
    assert weighted == pytest.approx(equivalent_rollouts(p, o, v, n))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_mean_of_k_rollouts_is_worth_k_rollouts(k):
    generator = torch.Generator().manual_seed(k)
    rates = torch.rand(20000, 1, generator=generator)
    predicted = torch.bernoulli(rates.expand(-1, k), generator=generator).mean(dim=1)
    groups = group_statistics(torch.bernoulli(rates.expand(-1, 16), generator=generator))
    found = equivalent_rollouts(predicted, groups.mean, groups.variance, groups.count)
    assert found == pytest.approx(k, rel=0.08)


def test_equivalent_rollouts_at_the_edges():
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(1000, 1, generator=generator)
    groups = group_statistics(torch.bernoulli(rates.expand(-1, 8), generator=generator))
    told = equivalent_rollouts(groups.mean, groups.mean, groups.variance, groups.count)
    assert told == MAX_EQUIVALENT_ROLLOUTS  # better than chance allows: the cap
    constant = equivalent_rollouts(torch.full((1000,), 0.5), groups.mean, groups.variance, groups.count)
    assert constant == pytest.approx(2, rel=0.1)  # p uniform: E p(1-p) = 1/6 over Var p = 1/12
    sure = group_statistics(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert math.isnan(equivalent_rollouts(torch.tensor([0.5, 0.5]), sure.mean, sure.variance, sure.count))


def test_equivalent_rollouts_leaves_single_completions_out():
    groups = group_statistics(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, NAN, NAN]]))
    predicted = torch.tensor([0.2, 0.7, 0.9])
    with_single = equivalent_rollouts(predicted, groups.mean, groups.variance, groups.count)
    without = equivalent_rollouts(predicted[:2], groups.mean[:2], groups.variance[:2], groups.count[:2])
    assert with_single == without and without > 0
    single = [column[2:] for column in (predicted, groups.mean, groups.variance, groups.count)]
    assert math.isnan(equivalent_rollouts(*single))


def test_reliability_by_hand():
    predicted, observed = torch.tensor([-0.1, 0.2, 0.6, 1.0]), torch.tensor([0.0, 1.0, 0.5, 1.0])
    found = reliability(predicted, observed, bins=4, weights=torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert found.count.tolist() == [2, 0, 1, 1]
    assert found.predicted[[0, 2, 3]].tolist() == pytest.approx([(-0.1 + 3 * 0.2) / 4, 0.6, 1.0])
    assert found.observed[[0, 2, 3]].tolist() == pytest.approx([3 / 4, 0.5, 1.0])
    assert found.predicted[1].isnan() and found.observed[1].isnan()


def test_figures_without_a_value_are_not_logged():
    assert defined({"a": torch.tensor(2.0), "b": torch.tensor(NAN)}) == {"a": 2.0}
