"""The completions that did much better, or much worse, than their prompt's others.

CPPO, Lin et al., Accelerating the Training of Group Relative Policy Optimization-Based Reasoning Models, arXiv
2503.22342: the completions with the smallest |A_i| are dropped, since a policy gradient is A_i times something. The
paper keeps the k of largest |A_i| of each question; the authors' code those of all completions on a device. Here those
of the whole batch, or (`within: group`) of each prompt, to which the rows are dealt in proportion to its completions on
offer.

Different here: where |A_i| is equal, a draw decides. With right and wrong as the only rewards that is most of the
choice, and taking the first would take the first prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from siftrl.coreset import budgets
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class LargestAdvantage(BatchSelector):
    """Keeps the completions whose advantage is largest, whatever its sign; of equal ones any.

    within: "batch": of all completions. "group": of each prompt's, so that every prompt keeps its share.
    """

    reads_rewards: ClassVar[bool] = True

    within: Literal["batch", "group"] = "batch"

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        assert signals.advantages is not None and signals.groups is not None
        sizes, num = signals.advantages.abs(), len(signals)
        groups = signals.groups if self.within == "group" else torch.zeros_like(signals.groups)
        groups = groups.unique(return_inverse=True)[1]
        order = torch.randperm(num, generator=generator)
        order = order[sizes[order].argsort(descending=True, stable=True)]
        kept, probability = [], torch.zeros(num)
        for group, quota in enumerate(budgets(groups.bincount(), keep).tolist()):
            rows = order[groups[order] == group]
            kept.append(rows[:quota])
            if quota:
                last = sizes[rows[quota - 1]]
                above, tied = rows[sizes[rows] > last], rows[sizes[rows] == last]
                probability[above], probability[tied] = 1.0, (quota - len(above)) / len(tied)
        chosen = torch.cat(kept)
        self._metrics = {
            "kept_advantage": float(sizes[chosen].mean()),
            "mean_advantage": float(sizes.mean()),
            "kept_positive": float((signals.advantages[chosen] > 0).float().mean()),
        }
        return Selection.of(chosen, num, scores=sizes, probability=probability)

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_advantage`, the mean size of the advantage over the rows kept, `mean_advantage`, over
        all of them, and `kept_positive`, the share of kept rows that were better than their prompt's mean."""
        return dict(self._metrics)
