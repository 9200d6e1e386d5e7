"""Draw, roll out, and throw away the groups without spread, until m groups are left.

DAPO: An Open-Source LLM Reinforcement Learning System at Scale, Yu et al., arXiv 2503.14476, section 3.2:
train on groups with 0 < |{o_i correct}| < G only, and keep sampling until the batch is full. A group of
equal rewards has advantages of zero. The effective ratio is 1, paid for with the rollouts thrown away.

Here a group counts where max_j r_j - min_j r_j > tolerance, over the completions that were scored: for
rewards that are sums of floats, `!= 0` would take rounding for signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siftrl.calibration import group_statistics
from siftrl.fields import Count, NonNegative
from siftrl.types import Candidates, PromptSelector, Selection


@dataclass
class DynamicSampling(PromptSelector):
    """Uniform proposals, of which the trainer redraws those whose groups `accept` refuses.

    tolerance: the largest max - min of a group's rewards that still counts as no spread.
    max_rounds: rounds of drawing and rolling out a step may take; the first one counts.
    """

    tolerance: NonNegative = 1e-6
    max_rounds: Count = 4

    def __post_init__(self) -> None:
        self._drawn, self._accepted = 0, 0
        self._metrics: dict[str, float] = {}

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        num = len(candidates)
        assert keep <= num, f"{keep} prompts to keep of {num} candidates"
        chance = torch.full((num,), keep / num)
        return Selection.of(torch.arange(keep), num, probability=chance, reasons="uniform")

    def observe(self, candidates: Candidates, selection: Selection, rewards: Tensor) -> None:
        accepted = int(self.accept(rewards).sum())
        self._drawn += len(rewards)
        self._accepted += accepted
        self._metrics = group_statistics(rewards).metrics() | {
            "accepted": accepted / len(rewards),
            "accepted_overall": self._accepted / self._drawn,
        }

    def accept(self, rewards: Tensor) -> Tensor:
        """bool [P]: groups (rows of float [P, G], NaN where missing) whose scored rewards differ."""
        return group_statistics(rewards).effective(self.tolerance)

    def metrics(self) -> dict[str, float]:
        """Of the last round's groups, before any is refused: `accepted` (share), `effective_ratio`,
        `observed_mean`. `accepted_overall`: share of all groups rolled out so far; 1 / it is the price."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "accepted": self._accepted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn, self._accepted = state["drawn"], state["accepted"]
