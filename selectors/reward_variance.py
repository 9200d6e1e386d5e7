"""The completions of each prompt whose rewards differ most.

PODS, Xu et al., Not All Rollouts are Useful: Down-Sampling Rollouts in LLM Reinforcement Learning, arXiv 2504.13818: of
a prompt's G completions those n are kept whose rewards have the largest variance. They are the i lowest and the n - i
highest for some i from 0 to n, so sorted once, with prefix sums, all are compared in O(G log G). Of rewards with two
values, n/2 of each are kept, as far as there are.

Different here: n need not be the same for all prompts. The k rows of a batch are dealt to the prompts in proportion to
the completions on offer, so that prompts without spread leave their places to the others. Advantages stay those among
all completions; the authors' code computes them anew from the kept ones. Between subsets of equal variance, and
completions of equal reward, a draw decides; there, the first one found, which of an odd n takes more low ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from siftrl.coreset import budgets
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class RewardVariance(BatchSelector):
    """Keeps the lowest and the highest rewards of each prompt, so that their variance is as large as it can be.

    Completions whose reward is missing come last.
    """

    reads_rewards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        assert signals.rewards is not None and signals.groups is not None
        rewards, prompt = signals.rewards, signals.groups.unique(return_inverse=True)[1]
        scored = (~rewards.isnan()).nonzero().flatten()
        quotas = budgets(prompt[scored].bincount(), keep).tolist()
        kept = [scored[:0]]
        for index, quota in enumerate(quotas):
            if quota:
                rows = scored[prompt[scored] == index]
                kept.append(rows[most_spread(rewards[rows], quota, generator)])
        chosen = torch.cat(kept)
        fill = rewards.isnan().nonzero().flatten()[: keep - len(chosen)]
        self._metrics = {
            "kept_variance": _variance(rewards[chosen], prompt[chosen]),
            "mean_variance": _variance(rewards[scored], prompt[scored]),
            "kept_reward": float(rewards[chosen].mean()),
            "mean_reward": float(rewards[scored].mean()),
        }
        return Selection.of(
            torch.cat([chosen, fill]),
            len(signals),
            scores=rewards,
            reasons=("score",) * len(chosen) + ("fill",) * len(fill),
        )

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_variance`, of the kept rewards within their prompts, mean over the rows, and
        `mean_variance`, of all; `kept_reward`, the mean over the rows kept, and `mean_reward`, over all of them."""
        return dict(self._metrics)


def most_spread(rewards: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """int64 [n]: the places of those n (`keep`) of the `rewards` (float [G], at least one) with the largest variance.

    With R_i the sum of the i lowest and the n - i highest, and Q_i that of their squares, n^2 Var_i = n Q_i - R_i^2.
    """
    order = torch.randperm(len(rewards), generator=generator)  # of equal rewards any may come first
    order = order[rewards[order].argsort(stable=True)]
    ranked = rewards[order].double()
    ranked = ranked - ranked[0]  # equal rewards have a variance of exactly 0
    sums = torch.stack([ranked, ranked.square()]).cumsum(1)
    sums = torch.cat([sums.new_zeros(2, 1), sums], dim=1)  # [2, G + 1]: of the i lowest
    low = torch.arange(keep + 1)
    first = len(rewards) - keep + low  # where the highest begin
    total, squares = sums[:, low] + sums[:, -1:] - sums[:, first]
    variance = keep * squares - total.square()
    rounding = 1e-6 * keep * ranked[-1].square()  # rewards are rounded, and equal variances with them
    best = (variance >= variance.max() - rounding).nonzero().flatten()
    split = int(best[torch.randint(len(best), (), generator=generator)])
    return torch.cat([order[:split], order[int(first[split]) :]])


def _variance(rewards: Tensor, prompt: Tensor) -> float:
    """Mean over rows of (r - mean of its prompt's r)^2. rewards: float [n], prompt: int64 [n], numbers from 0."""
    rewards = rewards.double()
    means = prompt.bincount(rewards) / prompt.bincount()
    return float((rewards - means[prompt]).square().mean())
