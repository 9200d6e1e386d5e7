"""Prompts of intermediate difficulty, found by a value model.

Prompt Curriculum Learning for Efficient LLM Post-Training (PCL), Gao et al., arXiv 2510.01135: of k*m
candidates x drawn uniformly keep the m with the smallest |V(x) - tau|, tau = 0.5, where V(x) predicts the
mean reward of the policy's completions. For a 0/1 reward with success rate p the expected squared advantage
is p(1 - p), largest at 1/2. The paper's exact variant is `explore: 0, fallback: false, rank_by: mean`.

Added here: rewards with more than two values are ranked by the predicted variance of the group (for 0/1
rewards that is p(1 - p)); a share of the prompts is explored, so that V also sees labels of prompts that it
would not choose; V is judged out of sample, with the selection undone by inverse probability weights; and
while V explains no more variance than a constant the choice is uniform.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from siftrl.calibration import (
    brier,
    defined,
    equivalent_rollouts,
    explained_variance,
    group_statistics,
    rank_correlation,
)
from siftrl.fields import Count, Share
from siftrl.types import Candidates, PromptSelector, Selection
from siftrl.value import ValueConfig

MIN_JUDGED = 64
"""Prompts that must have been judged before the value model may choose, and its figures are told (`window`, where that
is smaller)."""


@dataclass
class PromptCurriculum(PromptSelector):
    """Keeps the candidates with predicted reward nearest to a target, or with the largest predicted variance.

    candidates: k, prompts drawn for each prompt kept.
    target: tau, in units of the reward; where the rewards seen so far take exactly two values a < b, the
        success rate between them, so that the prompts sought are those with V near a + tau (b - a).
    rank_by: "mean": score |V - tau|; "spread": score -(predicted variance of the group); the smallest scores
        are kept. "auto": "mean" until a third reward value is seen, then "spread".
    explore: share of the kept prompts that is drawn uniformly from the candidates that the score did not
        take. explore * m is rounded to the nearest whole number, halves up, and is at least 1 for explore >
        0, m > 1.
    fallback: choose uniformly until min(64, window) prompts have been judged, and while the explained
        variance of what is ranked by (mean or spread) is not above 0.
    window: prompts over which the value model is judged: the last steps, whole, that hold at least so many.
    value: the value model's settings.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"value"})

    candidates: Count = 4
    target: float = 0.5
    rank_by: Literal["auto", "mean", "spread"] = "auto"
    explore: Share = 0.125
    fallback: bool = True
    window: Count = 256
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self) -> None:
        self._values: list[float] = []  # distinct rewards seen, ascending; three are enough to tell
        self._steps: list[Tensor] = []  # float64 [judged prompts of the step, 6], the columns of `_Judged`
        self._metrics: dict[str, float] = {}

    def num_candidates(self, keep: int) -> int:
        return self.candidates * keep

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        num = len(candidates)
        assert keep <= num, f"{keep} prompts to keep of {num} candidates"
        scores = self._scores(candidates)
        if self._falls_back():
            uniform = torch.randperm(num, generator=generator)[:keep]
            chance = torch.full_like(scores, keep / num)
            return Selection.of(uniform, num, scores=scores, probability=chance, reasons="uniform")
        num_explored = self._num_explored(keep)
        num_scored = keep - num_explored
        # Stable, so that ties go to the first candidates: their order is random already.
        best, rest = scores.argsort(stable=True).split([num_scored, num - num_scored])
        explored = rest[torch.randperm(len(rest), generator=generator)[:num_explored]]
        probability = torch.ones_like(scores)
        probability[rest] = num_explored / max(len(rest), 1)
        return Selection.of(
            torch.cat([best, explored]),
            num,
            scores=scores,
            probability=probability,
            reasons=("score",) * num_scored + ("explore",) * num_explored,
        )

    def observe(self, candidates: Candidates, selection: Selection, rewards: Tensor) -> None:
        assert candidates.value is not None
        chosen, groups = selection.indices, group_statistics(rewards)
        predicted = candidates.value.mean[chosen].double()
        spread = candidates.value.spread[chosen].double()
        probability = selection.probability[chosen].double()
        columns = [predicted, spread, groups.mean, groups.variance, groups.count.double(), probability]
        step = torch.stack(columns, dim=1)[groups.count > 0]
        if len(step):
            self._steps.append(step)
        # Whole steps: inside one, the score's choices come before the explored, and only together do their
        # weights stand for all candidates.
        while sum(map(len, self._steps[1:])) >= self.window:
            self._steps.pop(0)
        seen = rewards[~rewards.isnan()].double().round(decimals=6).unique().tolist()
        self._values = sorted({*self._values, *seen})[:3]
        explored, uniform = (selection.reasons.count(reason) for reason in ("explore", "uniform"))
        self._metrics = groups.metrics() | self._judgement() | {"predicted_mean": float(predicted.mean())}
        self._metrics |= {"explored": explored / len(chosen), "fallback": float(uniform > 0)}

    def metrics(self) -> dict[str, float]:
        """Over the window, weighted to stand for all candidates, once min(64, window) prompts were judged:
        `explained_variance`, `brier`, `rank_correlation`, `equivalent_rollouts`, and
        `spread_explained_variance` where ranked by spread. Of the last step's kept prompts:
        `effective_ratio`, `predicted_mean`, `observed_mean`, `explored` (share), `fallback` (1 where the
        choice was uniform)."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self._values), "steps": list(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values, self._steps = list(state["values"]), list(state["steps"])

    def _num_explored(self, keep: int) -> int:
        at_least = 1 if self.explore > 0 and keep > 1 else 0
        return max(int(self.explore * keep + 0.5), at_least)

    def _ranks_by_spread(self) -> bool:
        return self.rank_by == "spread" or (self.rank_by == "auto" and len(self._values) > 2)

    def _scores(self, candidates: Candidates) -> Tensor:
        """float [C]; the smallest are the best."""
        value = candidates.value
        assert value is not None, "prompt_curriculum needs Candidates.value"
        for name, prediction in (("mean", value.mean), ("spread", value.spread)):
            bad = (~prediction.isfinite()).nonzero()
            if len(bad):
                i = int(bad[0])
                raise ValueError(
                    f"prompt_curriculum: the value model predicts a {name} of {float(prediction[i])} for row"
                    f" {int(candidates.ids[i])} of the data ({len(bad)} of {len(prediction)} candidates are not"
                    " finite): its training diverged; write a smaller prompt_selector.value.lr"
                )
        if self._ranks_by_spread():
            return -value.spread
        low, high = self._values if len(self._values) == 2 else (0.0, 1.0)
        return (value.mean - (low + self.target * (high - low))).abs()

    def _falls_back(self) -> bool:
        if not self.fallback:
            return False
        if not self._is_judged():
            return True
        judged = _Judged(self._steps)
        explained = judged.spread_ev() if self._ranks_by_spread() else judged.mean_ev()
        return not explained > 0  # NaN, where nothing varied, falls back too

    def _is_judged(self) -> bool:
        """Whether enough prompts came out to say how good the value model is."""
        return sum(map(len, self._steps)) >= min(MIN_JUDGED, self.window)

    def _judgement(self) -> dict[str, float]:
        if not self._is_judged():
            return {}
        judged = _Judged(self._steps)
        predicted, mean, w = judged.predicted, judged.mean, judged.weights
        figures = {
            "explained_variance": judged.mean_ev(),
            "brier": brier(predicted, mean, w),
            "rank_correlation": rank_correlation(predicted, mean, w),
            "equivalent_rollouts": equivalent_rollouts(predicted, mean, judged.variance, judged.count, w),
        }
        if self._ranks_by_spread():
            figures["spread_explained_variance"] = judged.spread_ev()
        return defined(figures)


class _Judged:
    """What the value model said of the window's prompts when they were chosen, and what came out: float64 [n].

    A score-chosen prompt stands for itself (weight 1), the explored ones for all candidates that the score
    did not take, a uniformly drawn one for C/m: the weights of a step add up to its C candidates.
    """

    def __init__(self, steps: list[Tensor]) -> None:
        columns = torch.cat(steps).unbind(1)
        self.predicted, self.spread, self.mean, self.variance, self.count, probability = columns
        self.weights = 1 / probability

    def mean_ev(self) -> float:
        return explained_variance(self.predicted, self.mean, self.weights)

    def spread_ev(self) -> float:
        known = self.count >= 2  # a variance takes two completions
        return explained_variance(self.spread[known], self.variance[known], self.weights[known])
