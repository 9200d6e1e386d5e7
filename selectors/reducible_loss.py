"""The rows that are not learnt yet, but can be.

RHO-loss, Mindermann et al., arXiv 2206.07137: of B rows keep the k with the largest reducible holdout loss
L[y_i | x_i; D_t] - L[y_i | x_i; D_ho], the model's loss less that of a model trained on held-out rows. What both find
hard is noise; what the reference finds easy and the model hard is worth learning. L is the mean over the row's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from siftrl.fields import WeightsPath
from siftrl.signals import Loss, ReferenceLoss
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class ReducibleLoss(BatchSelector):
    """Keeps the rows whose loss is furthest above that of a reference model; of equal ones the first.

    reference: folder or hub name of the reference model, trained on rows like these, but not on these.
    """

    reference: WeightsPath

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({Loss(), ReferenceLoss(self.reference)})

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        reference = signals[ReferenceLoss(self.reference)]
        reducible = signals[Loss()] - reference
        chosen = reducible.argsort(descending=True, stable=True)[:keep]
        self._metrics = {
            "kept_reducible_loss": float(reducible[chosen].mean()),
            "mean_reducible_loss": float(reducible.mean()),
            "mean_reference_loss": float(reference.mean()),
        }
        return Selection.of(chosen, len(signals), scores=reducible)

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_reducible_loss`, the mean over the rows kept, and over all of them
        `mean_reducible_loss` and `mean_reference_loss`."""
        return dict(self._metrics)
