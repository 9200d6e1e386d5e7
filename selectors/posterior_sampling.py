"""A belief about each prompt's success rate, from its own past rollouts: no value model, no forward pass.

Can Prompt Difficulty be Online Predicted for Accelerating RL Finetuning of Reasoning Models? (MoPPS), Qu et
al., arXiv 2507.04632. Each prompt's success rate gamma has a posterior Beta(alpha, beta), from a prior
Beta(alpha0, beta0) (here alpha0 = beta0 = `prior`). When s successes and f failures of the prompt are seen,

    alpha <- lambda alpha + (1 - lambda) alpha0 + s
    beta  <- lambda beta  + (1 - lambda) beta0  + f

so that old rollouts, of an older policy, fade with the discount lambda. One draw gamma_hat ~ Beta(alpha,
beta) a candidate (Thompson sampling); the m candidates with the smallest |gamma_hat - target| are kept,
target = 0.5.

A reward between failure and success counts as that share of a success.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siftrl.calibration import brier, defined, group_statistics, rank_correlation
from siftrl.fields import Count, Positive, Share
from siftrl.types import Candidates, PromptSelector, Selection


@dataclass
class PosteriorSampling(PromptSelector):
    """Keeps the candidates whose sampled success rate is nearest to a target.

    candidates: prompts drawn for each prompt kept.
    target: the success rate sought, in [0, 1].
    discount: lambda, what a new look at a prompt leaves of the earlier ones; 1: nothing fades.
    prior: alpha0 = beta0.
    failure, success: the rewards that count as 0 and as 1; those between are placed linearly, those outside
        are clamped, and their share is the metric `clamped`.
    """

    candidates: Count = 4
    target: Share = 0.5
    discount: Share = 0.5
    prior: Positive = 1.0
    failure: float = 0.0
    success: float = 1.0

    def __post_init__(self) -> None:
        if not self.failure < self.success:
            raise ValueError(
                f"posterior_sampling: failure ({self.failure}) must be below success ({self.success}):"
                " write the rewards of a wrong and of a right completion"
            )
        self._posterior: dict[int, tuple[float, float]] = {}  # prompt's id -> (alpha, beta)
        self._metrics: dict[str, float] = {}

    def num_candidates(self, keep: int) -> int:
        return self.candidates * keep

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        num = len(candidates)
        assert keep <= num, f"{keep} prompts to keep of {num} candidates"
        alpha, beta = self._beliefs(candidates.ids)
        # torch's own Beta takes no generator; numpy's is exact, and seeded here it repeats with `generator`.
        seed = int(torch.randint(2**62, (1,), generator=generator))
        draws = torch.from_numpy(np.random.default_rng(seed).beta(alpha.numpy(), beta.numpy()))
        scores = (draws - self.target).abs()
        indices = scores.argsort(stable=True)[:keep]
        probability = torch.zeros(num)
        probability[indices] = 1
        return Selection.of(indices, num, scores=scores, probability=probability)

    def observe(self, candidates: Candidates, selection: Selection, rewards: Tensor) -> None:
        rates = (rewards.double() - self.failure) / (self.success - self.failure)
        groups = group_statistics(rates.clamp(0, 1))
        seen = groups.count > 0
        ids, count, mean = candidates.ids[selection.indices][seen], groups.count[seen], groups.mean[seen]
        alpha, beta = self._beliefs(ids)
        predicted = alpha / (alpha + beta)
        prior = (1 - self.discount) * self.prior
        alpha = self.discount * alpha + prior + count * mean
        beta = self.discount * beta + prior + count * (1 - mean)
        self._posterior |= dict(zip(ids.tolist(), zip(alpha.tolist(), beta.tolist(), strict=True), strict=True))
        scored = rates[~rates.isnan()]
        figures: dict[str, Tensor | float] = {
            "predicted_mean": predicted.mean(),
            "brier": brier(predicted, mean),
            "rank_correlation": rank_correlation(predicted, mean),
            "clamped": ((scored < 0) | (scored > 1)).double().mean(),
            "prompts_known": float(len(self._posterior)),
        }
        self._metrics = group_statistics(rewards).metrics() | defined(figures)

    def metrics(self) -> dict[str, float]:
        """Of the last step's kept prompts: `effective_ratio`, `observed_mean`; `predicted_mean`, `brier` and
        `rank_correlation` of the posterior's mean before they were seen; `clamped`: share of their rewards
        outside [failure, success]. `prompts_known`: prompts seen so far."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"posterior": dict(self._posterior)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._posterior = dict(state["posterior"])

    def _beliefs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and beta of each of `ids` (int64 [n]): float64 [n] each; the prior where a prompt is new."""
        beliefs = [self._posterior.get(i, (self.prior, self.prior)) for i in ids.tolist()]
        alpha, beta = torch.tensor(beliefs, dtype=torch.float64).reshape(-1, 2).unbind(1)
        return alpha, beta
