"""Only prompts whose pass rate, measured once before training, lies in a range.

The offline filter of most published recipes, such as Kimi k1.5: Scaling Reinforcement Learning with LLMs,
arXiv 2501.12599: sample the starting model a few times on every prompt and use the pass rate as
its difficulty. Kept: low <= pass_rate(x) <= high. It does not follow the policy as it learns, which is what
the other selectors are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from siftrl.calibration import group_statistics
from siftrl.fields import Count
from siftrl.types import Candidates, PromptSelector, Selection


@dataclass
class StaticFilter(PromptSelector):
    """Keeps the first candidates inside the range; where they are too few, those nearest to it (reason "fill").

    column: the data's column with the measured pass rate (or mean reward) of each prompt.
    low, high: the range, both ends included, in the column's units.
    candidates: prompts drawn for each prompt kept.
    """

    reads: ClassVar[tuple[str, ...]] = ("{column}",)

    column: str = "pass_rate"
    low: float = 0.1
    high: float = 0.9
    candidates: Count = 4

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"static_filter: low ({self.low}) must not be above high ({self.high})")
        self._metrics: dict[str, float] = {}

    def num_candidates(self, keep: int) -> int:
        return self.candidates * keep

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        num = len(candidates)
        assert keep <= num, f"{keep} prompts to keep of {num} candidates"
        rates = self._rates(candidates)
        outside = (self.low - rates).clamp(min=0) + (rates - self.high).clamp(min=0)  # distance; 0 inside
        indices = outside.argsort(stable=True)[:keep]  # ties in the candidates' order, which is random already
        num_inside = int((outside == 0).sum())
        probability = torch.zeros(num)
        probability[indices] = 1
        probability[outside == 0] = min(1.0, keep / max(num_inside, 1))
        taken = min(keep, num_inside)
        reasons = ("uniform",) * taken + ("fill",) * (keep - taken)
        return Selection.of(indices, num, scores=outside, probability=probability, reasons=reasons)

    def observe(self, candidates: Candidates, selection: Selection, rewards: Tensor) -> None:
        self._metrics = group_statistics(rewards).metrics() | {
            "inside": float((selection.scores == 0).double().mean()),
            "filled": selection.reasons.count("fill") / len(selection.reasons),
        }

    def metrics(self) -> dict[str, float]:
        """Of the last step: `effective_ratio`, `observed_mean`, `inside` (share of the candidates in the range) and
        `filled` (share of the kept prompts that are not)."""
        return dict(self._metrics)

    def _rates(self, candidates: Candidates) -> Tensor:
        """float64 [C]: the column's values."""
        for i, row in zip(candidates.ids.tolist(), candidates.rows, strict=True):
            if self.column not in row:
                raise ValueError(
                    f"static_filter: the data has no column {self.column!r} (it has {', '.join(sorted(row))}):"
                    " measure it with `siftrl eval MODEL --data ... --reward ... --out pass_rates.jsonl`, which writes"
                    " `mean_reward` for every prompt, then set data.path to that file and prompt_selector.column to"
                    " mean_reward"
                )
            value = row[self.column]
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(
                    f"static_filter: column {self.column!r} of row {i} of the data holds {value!r}: write a number,"
                    " the share of the prompt's completions that were right"
                )
        return torch.tensor([row[self.column] for row in candidates.rows], dtype=torch.float64)
