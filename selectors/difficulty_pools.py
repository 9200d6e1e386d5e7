"""Quotas of easy, normal and hard prompts, told apart by how the prompt went the last time it was seen.

The difficulty pools of INTELLECT-3: Technical Report, Prime Intellect, arXiv 2512.16144, and of its trainer
prime-rl: a prompt whose last group mean r_bar is at least `easy_above` is easy, at most `hard_below` hard,
else (or not seen yet) normal. Of m prompts, pool p gets floor(share_p m), and what rounding leaves goes to
the largest remainders (Hamilton's method), so that the quotas add up to m.

Easy and hard prompts rarely have spread; a small share of them finds those that stopped being easy or hard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siftrl.calibration import group_statistics
from siftrl.fields import Count, Share
from siftrl.types import Candidates, PromptSelector, Selection

POOLS = ("normal", "easy", "hard")
"""In this order the pools are filled, and ties of remainders are given."""


@dataclass
class DifficultyPools(PromptSelector):
    """Keeps the first candidates of each pool up to its quota; what a pool lacks, the other pools fill.

    candidates: prompts drawn for each prompt kept.
    easy_above, hard_below: group means, in units of the reward, from which on a prompt is easy or hard.
    easy, normal, hard: shares of the kept prompts; they add up to 1.
    """

    candidates: Count = 4
    easy_above: float = 0.75
    hard_below: float = 0.25
    easy: Share = 0.1
    normal: Share = 0.8
    hard: Share = 0.1

    def __post_init__(self) -> None:
        total = self.easy + self.normal + self.hard
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"difficulty_pools: easy + normal + hard must be 1, not {total:g}: write shares that add up,"
                " such as easy: 0.1, normal: 0.8, hard: 0.1"
            )
        if not self.hard_below < self.easy_above:
            raise ValueError(
                f"difficulty_pools: hard_below ({self.hard_below}) must be below easy_above ({self.easy_above})"
            )
        self._last: dict[int, float] = {}  # prompt's id -> its last group mean
        self._metrics: dict[str, float] = {}

    def num_candidates(self, keep: int) -> int:
        return self.candidates * keep

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        num = len(candidates)
        assert keep <= num, f"{keep} prompts to keep of {num} candidates"
        last = torch.tensor([self._last.get(i, torch.nan) for i in candidates.ids.tolist()], dtype=torch.float64)
        pools = self._pools(last)
        quotas = _largest_remainder([self.normal, self.easy, self.hard], keep)
        probability = torch.ones(num)
        chosen, spare, reasons = [], torch.zeros(num, dtype=torch.bool), []
        for pool, name, quota in zip(range(len(POOLS)), POOLS, quotas, strict=True):
            members = (pools == pool).nonzero().flatten()
            chosen.append(members[:quota])  # the candidates' order is random already
            reasons += [name] * len(members[:quota])
            spare[members[quota:]] = True
            probability[members] = min(1.0, quota / max(len(members), 1))
        missing = keep - len(reasons)
        chosen.append(spare.nonzero().flatten()[:missing])
        # Taken for its pool, or else for a place that another pool could not fill.
        filled = missing / max(int(spare.sum()), 1)
        probability = torch.where(probability < 1, probability + (1 - probability) * filled, probability)
        return Selection.of(
            torch.cat(chosen),
            num,
            scores=last,
            probability=probability,
            reasons=(*reasons, *["fill"] * missing),
        )

    def observe(self, candidates: Candidates, selection: Selection, rewards: Tensor) -> None:
        groups = group_statistics(rewards)
        seen = groups.count > 0
        ids = candidates.ids[selection.indices][seen]
        self._last |= dict(zip(ids.tolist(), groups.mean[seen].tolist(), strict=True))
        known = self._pools(torch.tensor(list(self._last.values()), dtype=torch.float64))
        self._metrics = groups.metrics() | {"filled": selection.reasons.count("fill") / len(selection.reasons)}
        self._metrics |= {f"{name}_known": float((known == pool).sum()) for pool, name in enumerate(POOLS)}

    def metrics(self) -> dict[str, float]:
        """Of the last step: `effective_ratio`, `observed_mean`, `filled` (share of prompts that stand in for those
        their quota lacked). Of all prompts seen so far: `easy_known`, `normal_known`, `hard_known`."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = dict(state["last"])

    def _pools(self, means: Tensor) -> Tensor:
        """int64 [n]: the place in POOLS of each group mean (float [n], NaN where not seen)."""
        easy, hard = means >= self.easy_above, means <= self.hard_below
        return torch.where(easy, POOLS.index("easy"), torch.where(hard, POOLS.index("hard"), 0))


def _largest_remainder(shares: list[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to `shares` (which add up to 1)."""
    exact = [share * total for share in shares]
    quotas = [int(number + 1e-9) for number in exact]  # 0.1 * 30 is 2.9999999999999996 in some orders of sums
    by_remainder = sorted(range(len(shares)), key=lambda i: round(quotas[i] - exact[i], 9))
    for i in by_remainder[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas
