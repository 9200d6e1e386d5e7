"""The rows that the model predicts worst.

Ordered SGD, Kawaguchi and Lu, arXiv 1907.04371: of B rows keep the k with the largest current losses L_i. Here L_i is
the mean over the row's n_i loss-bearing tokens, L_i = -1/n_i sum_t log p(y_t | x, y_<t), or their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from siftrl.signals import Loss
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class HighLoss(BatchSelector):
    """Keeps the rows of highest loss; of equal ones the first.

    normalise: compare the mean loss of a token; false: the row's sum, which favours long rows.
    """

    normalise: bool = True

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({Loss()})

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        losses = signals[Loss()]
        if not self.normalise:
            losses = losses * signals.num_tokens.to(losses)
        chosen = losses.argsort(descending=True, stable=True)[:keep]
        self._metrics = {"kept_loss": float(losses[chosen].mean()), "mean_loss": float(losses.mean())}
        return Selection.of(chosen, len(signals), scores=losses)

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_loss`, the mean over the rows kept, and `mean_loss`, over all of them."""
        return dict(self._metrics)
