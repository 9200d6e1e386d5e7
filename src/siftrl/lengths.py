"""Rollouts that end together: how long a prompt's completions will be, and which rank gets which prompts.

A step of rollouts lasts as long as its slowest rank, and a rank as long as its last completion. So prompts are dealt
such that expected tokens are near equal, and on each rank the longest start first.

Shapes: P prompts of a step. Pure but for what `ExpectedLength` has learned; every rank calls with the same numbers.
"""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor

_FEATURES = 3  # prompt tokens, predicted reward, excess


class ExpectedLength:
    """Predicts the mean completion length of prompts from what is known before the rollout.

    A linear regression on x = (prompt tokens, the value model's predicted mean reward, excess): the excess is by how
    many tokens the prompt's completions were longer, the last time it was seen, than the first two features say
    (0 for a prompt not seen yet). Lengths that grow as the policy learns move the constant, not each prompt's excess.

        w = (C + ridge / n · diag(C))^-1 c,    length(x) = y_bar + w · (x - x_bar)

    with C the covariance of the features, c theirs with the length y, and n the number of prompts, all over discounted
    sums; ridge is thus a number of prompts, and the units of the features do not matter.

    Args:
        discount: what a step's prompts count one step later.
        ridge: how many prompts it takes until a feature is half believed.
    """

    def __init__(self, discount: float = 0.95, ridge: float = 4.0) -> None:
        self.discount, self.ridge = discount, ridge
        # sums of the products of (1, features, length)
        self._sums = torch.zeros(_FEATURES + 2, _FEATURES + 2, dtype=torch.float64)
        self._excess: dict[int, float] = {}  # prompt's id -> excess

    def predict(self, ids: Tensor, prompt_tokens: Tensor, predicted: Tensor | None) -> Tensor:
        """Expected mean completion length of each prompt: float64 [P], at least 1.

        ids: int64 [P], rows of the data set. prompt_tokens: int64 [P]. predicted: float [P], or None without a value
        model. Before anything was observed it is the prompt's tokens: only their order means something.
        """
        if not self._sums[0, 0]:
            return prompt_tokens.double()
        return self._length(self._features(ids, prompt_tokens, predicted)).clamp(min=1)

    def observe(self, ids: Tensor, prompt_tokens: Tensor, predicted: Tensor | None, lengths: Tensor) -> None:
        """See the mean completion length of each prompt: float [P]. The other arguments are those of `predict`."""
        features, lengths = self._features(ids, prompt_tokens, predicted), lengths.double()
        rows = torch.cat([torch.ones(len(ids), 1, dtype=torch.float64), features, lengths[:, None]], dim=1)
        self._sums = self.discount * self._sums + rows.T @ rows
        excess = lengths - self._length(features, without_excess=True)
        self._excess |= dict(zip(ids.tolist(), excess.tolist(), strict=True))

    def _features(self, ids: Tensor, prompt_tokens: Tensor, predicted: Tensor | None) -> Tensor:
        """float64 [P, 3]: prompt tokens, predicted reward, excess."""
        reward = torch.zeros(len(ids)) if predicted is None else predicted
        excess = torch.tensor([self._excess.get(index, 0.0) for index in ids.tolist()], dtype=torch.float64)
        return torch.stack([prompt_tokens.double(), reward.double(), excess], dim=1)

    def _length(self, features: Tensor, without_excess: bool = False) -> Tensor:
        """float64 [P] from float64 [P, 3]."""
        n = self._sums[0, 0]
        mean = self._sums[0, 1:] / n
        covariance = self._sums[1:, 1:] / n - mean.outer(mean)
        x_bar, y_bar = mean[:-1], mean[-1]
        variance = covariance.diagonal()[:-1]
        varies = variance > 1e-12 * x_bar.square()  # a feature that does not is left out
        w = torch.zeros_like(x_bar)
        C = covariance[:-1, :-1][varies][:, varies] + torch.diag(self.ridge / n * variance[varies])
        w[varies] = torch.linalg.solve(C, covariance[:-1, -1][varies])
        if without_excess:
            w[-1] = 0
        return y_bar + (features - x_bar) @ w

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "excess": dict(self._excess)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._excess = state["sums"], dict(state["excess"])


def deal_prompts(expected: Tensor, ranks: int) -> list[list[int]]:
    """Deal whole prompts to ranks: equal counts, near-equal expected tokens, the longest first on each rank.

    expected: float [P], expected mean completion length; P is a multiple of `ranks`. Returns [rank] -> prompts, as
    positions among the P.

    Longest processing time first (Graham, 1969): a prompt goes to the rank with the fewest tokens so far among those
    with room (ties: the first).
    """
    assert len(expected) % ranks == 0, f"{len(expected)} prompts for {ranks} ranks"
    tokens: list[float] = expected.tolist()
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for prompt in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(prompt)
        if len(dealt[rank]) < len(tokens) // ranks:
            heapq.heappush(loads, (load + tokens[prompt], rank))
    return dealt


def makespan(lengths: list[int], slots: int) -> int:
    """Token steps until all of these requests are done: each, in this order, takes the first slot that is free."""
    free_at = [0] * min(slots, len(lengths))
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at, default=0)


def idle_tail(lengths: list[int], slots: int) -> float:
    """Share of the decode slots' token steps that are idle because some requests end before others.

        1 - sum(lengths) / (min(slots, n) · makespan)

    lengths: tokens of n requests, in the order in which they start. slots: how many are decoded side by side.
    """
    return idle_share(sum(lengths), min(slots, len(lengths)), makespan(lengths, slots))


def idle_share(tokens: float, slots: float, steps: float) -> float:
    """Share of `slots` x `steps` decode steps that gave none of `tokens`; over several engines sums, and the most
    steps of any."""
    return 1 - tokens / (slots * steps) if slots * steps else 0.0
