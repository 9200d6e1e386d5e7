"""How good a prediction of the prompts' rewards is: pure functions on tensors.

Shapes: P prompts, G completions a prompt. Every figure takes `weights` (float [P], any scale): with the
inverse of each prompt's chance of having been chosen, a figure measured on chosen prompts estimates the one
over all prompts (Horvitz and Thompson 1952, self-normalised). Sums run in float64; a figure that is not
defined is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD_TOLERANCE = 1e-6
"""Rewards of a group that differ by no more than this are the same: float noise is no learning signal."""
MAX_EQUIVALENT_ROLLOUTS = 1000.0


@dataclass(frozen=True, slots=True)
class Groups:
    """Statistics of P groups of rewards over the completions that were scored.

    count: int64 [P], scored completions. mean: float64 [P], NaN where count is 0. variance: float64 [P],
    unbiased (divided by count - 1), NaN where count is below 2. spread: float64 [P], max - min, 0 where
    count is 0.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor
    spread: Tensor

    def effective(self, tolerance: float = SPREAD_TOLERANCE) -> Tensor:
        """bool [P]: groups whose rewards differ, so that some advantage is not zero."""
        return self.spread > tolerance

    def metrics(self) -> dict[str, float]:
        """`effective_ratio`: share of groups with spread; `observed_mean`: mean of the group means."""
        figures = {
            "effective_ratio": self.effective().double().mean(),
            "observed_mean": self.mean[self.count > 0].mean(),
        }
        return defined(figures)


@dataclass(frozen=True, slots=True)
class Reliability:
    """A reliability diagram: count int64 [bins], predicted and observed float64 [bins], NaN where empty."""

    count: Tensor
    predicted: Tensor
    observed: Tensor


def group_statistics(rewards: Tensor) -> Groups:
    """Statistics of each row of `rewards` (float [P, G]); NaN marks a completion that was not scored."""
    rewards = rewards.double()
    scored = ~rewards.isnan()
    count = scored.sum(dim=1)
    mean = rewards.nansum(dim=1) / count
    squares = (rewards - mean[:, None]).square().nansum(dim=1)
    variance = torch.where(count > 1, squares / (count - 1), torch.nan)
    top = rewards.masked_fill(~scored, -torch.inf).amax(dim=1)
    bottom = rewards.masked_fill(~scored, torch.inf).amin(dim=1)
    return Groups(count, mean, variance, torch.where(count > 0, top - bottom, 0.0))


def explained_variance(predicted: Tensor, observed: Tensor, weights: Tensor | None = None) -> float:
    """Share of the observations' variance that the prediction explains (float [P] each).

        EV = 1 - sum_i w_i (o_i - p_i)^2 / sum_i w_i (o_i - o_bar)^2,  o_bar the weighted mean of o

    1: exact; 0: no better than the best constant; below 0: worse. NaN where the observations do not vary.
    """
    w, observed = _shares(weights, observed), observed.double()
    variance = (w * (observed - (w * observed).sum()).square()).sum()
    if variance <= 1e-15:  # constant, but for rounding
        return float("nan")
    return float(1 - brier(predicted, observed, weights) / variance)


def brier(predicted: Tensor, observed: Tensor, weights: Tensor | None = None) -> float:
    """Mean squared difference (float [P] each); the Brier score where the observation is a success rate."""
    error = (observed.double() - predicted.double()).square()
    return float((_shares(weights, error) * error).sum())


def rank_correlation(predicted: Tensor, observed: Tensor, weights: Tensor | None = None) -> float:
    """Spearman's rho of two float [P]: the correlation of the ranks, ties at their mean rank.

    A rank is the weight below plus half the weight of the ties; with equal weights that is the usual rank,
    shifted and scaled, which a correlation does not see. NaN where one of the two is constant.
    """
    w = _shares(weights, predicted)
    a, b = _midranks(predicted, w), _midranks(observed, w)
    a, b = a - (w * a).sum(), b - (w * b).sum()
    scale = ((w * a * a).sum() * (w * b * b).sum()).sqrt()
    return float((w * a * b).sum() / scale) if scale > 1e-15 else float("nan")


def equivalent_rollouts(
    predicted: Tensor, mean: Tensor, variance: Tensor, count: Tensor, weights: Tensor | None = None
) -> float:
    """How many rollouts a prompt would predict the group means as well as `predicted` does.

    predicted, mean (of the group), variance (within the group, unbiased): float [P]; count (scored
    completions): [P]. Groups with fewer than two scored completions are left out.

    Let mu be a prompt's true mean reward and s2 the variance of one reward around it. A group mean over n
    rollouts is mu plus independent noise of variance s2/n, so

        E (V - mean)^2 = E (V - mu)^2 + E s2/n                 (V was made before those rollouts)

    and the estimator "mean of k other rollouts" has E (estimate - mu)^2 = E s2/k. The two errors against mu,
    and with them the two explained variances, are equal for

        k = E s2 / (MSE(V, mean) - E s2/n)

    with E s2 estimated by the average within-group variance. Where the denominator is so small (or negative,
    by chance) that k would exceed MAX_EQUIVALENT_ROLLOUTS = 1000, the answer is that cap. NaN where no group
    has spread: one rollout then says everything. PCL (arXiv 2510.01135) compares V with rollouts this way.
    """
    judged = count >= 2
    if not judged.any():
        return float("nan")
    predicted, mean, variance, count = predicted[judged], mean[judged], variance[judged], count[judged]
    weights = None if weights is None else weights[judged]
    w, variance = _shares(weights, variance), variance.double()
    noise = float((w * variance).sum())
    if noise <= 0:
        return float("nan")
    error = brier(predicted, mean, weights) - float((w * variance / count).sum())
    return noise / error if error * MAX_EQUIVALENT_ROLLOUTS > noise else MAX_EQUIVALENT_ROLLOUTS


def reliability(
    predicted: Tensor,
    observed: Tensor,
    bins: int = 10,
    weights: Tensor | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Reliability:
    """Mean prediction and mean observation (float [P] each), in `bins` equal bins of prediction over [low, high].

    Predictions outside the range fall into the first or the last bin. The means are weighted, not the counts.
    """
    where = ((predicted.double() - low) / (high - low) * bins).long().clamp(0, bins - 1)
    w = _shares(weights, predicted)
    zero = torch.zeros(bins, dtype=torch.float64)
    mass = zero.index_add(0, where, w)
    return Reliability(
        count=torch.bincount(where, minlength=bins),
        predicted=zero.index_add(0, where, w * predicted.double()) / mass,
        observed=zero.index_add(0, where, w * observed.double()) / mass,
    )


def defined(figures: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The figures that are numbers: one that is not defined yet is left out rather than logged as NaN."""
    numbers = {name: float(figure) for name, figure in figures.items()}
    return {name: number for name, number in numbers.items() if number == number}


def _shares(weights: Tensor | None, like: Tensor) -> Tensor:
    """float64 [P] that sums to 1."""
    weights = torch.ones(len(like)) if weights is None else weights
    return weights.double() / weights.double().sum()


def _midranks(values: Tensor, shares: Tensor) -> Tensor:
    """float64 [P]: the share below each value plus half the share of its ties."""
    unique, inverse = values.double().unique(return_inverse=True)
    mass = torch.zeros(len(unique), dtype=torch.float64).index_add(0, inverse, shares)
    return (mass.cumsum(0) - mass / 2)[inverse]
