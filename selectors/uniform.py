"""Every prompt that is drawn, in the order drawn: plain GRPO, and the control for every other selector.

DeepSeekMath (GRPO), Shao et al., arXiv 2402.03300: x ~ uniform over the data set, epoch by epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from siftrl.calibration import group_statistics
from siftrl.types import Candidates, PromptSelector, Selection


@dataclass
class Uniform(PromptSelector):
    """Keeps the first m candidates; as many as that are drawn, so all of them."""

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        num = len(candidates)
        assert keep <= num, f"{keep} prompts to keep of {num} candidates"
        chance = torch.full((num,), keep / num)
        return Selection.of(torch.arange(keep), num, probability=chance, reasons="uniform")

    def observe(self, candidates: Candidates, selection: Selection, rewards: Tensor) -> None:
        self._metrics = group_statistics(rewards).metrics()

    def metrics(self) -> dict[str, float]:
        """Of the last step: `effective_ratio` and `observed_mean`."""
        return dict(self._metrics)
